"""Closed forms: what is fitted without a gradient."""
