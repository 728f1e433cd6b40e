"""From pair rows to batches of tensors."""
