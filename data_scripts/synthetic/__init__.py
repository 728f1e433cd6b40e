"""Cells from a known gene network, and their best possible predictor."""
