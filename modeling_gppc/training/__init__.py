"""Training: arguments, data, collator, Trainer."""
