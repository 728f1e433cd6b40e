"""Cells as they come: AnnData files, gene names, CRISPR screens."""
