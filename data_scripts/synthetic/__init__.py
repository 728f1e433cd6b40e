"""Cells from a known gene network, its interventions and its best possible predictors."""
