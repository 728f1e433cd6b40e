"""Prediction on AnnData."""
