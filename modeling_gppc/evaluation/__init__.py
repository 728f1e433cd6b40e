"""Metrics, baselines, splits, leak guards and reports."""
