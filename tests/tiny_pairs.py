"""A tiny pairs folder of every column, with random rows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pair_writer import write_pair_folder

from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA


def tiny_rows(n_rows: int, n_genes: int = 12, seed: int = 0) -> pa.Table:
    """Random rows in `PAIR_SCHEMA`."""
    generator = np.random.default_rng(seed)
    columns = {}
    for field in PAIR_SCHEMA:
        if pa.types.is_list(field.type):
            continue
        if field.type == pa.string():
            columns[field.name] = [f"{field.name}-{value}" for value in generator.integers(0, 3, n_rows)]
        elif field.type == pa.bool_():
            columns[field.name] = (generator.random(n_rows) < 0.5).tolist()
        else:
            columns[field.name] = generator.integers(0, 2, n_rows).tolist()
    columns["pairing"] = ["same_type"] * n_rows
    for side in ("source_gene", "target_gene", "perturbation_gene"):
        prefix = side.removesuffix("_gene")
        sizes = generator.integers(0, n_genes, n_rows)
        ids = [np.sort(generator.choice(n_genes, size, replace=False)) for size in sizes]
        columns[f"{prefix}_gene_ids"] = [row.tolist() for row in ids]
        columns[f"{prefix}_values"] = [generator.normal(size=len(row)).astype(np.float32).tolist() for row in ids]
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in PAIR_SCHEMA})


def tiny_genes(n_genes: int = 12) -> pa.Table:
    """A gene table in `GENE_SCHEMA`."""
    names = [f"ENSG{index:011d}" for index in range(n_genes)]
    columns = {"gene_id": names, "gene_symbol": [f"GENE{index}" for index in range(n_genes)]}
    for field in GENE_SCHEMA:
        columns.setdefault(field.name, list(range(1, n_genes + 1)))
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in GENE_SCHEMA})


def write_pairs_folder(folder: Path, file_format: str = "arrow", seed: int = 0) -> Path:
    """A pairs folder with 7 training and 3 test pairs and 2 panels."""
    panels = np.ones((2, 12), dtype=bool)
    panels[1, ::2] = False
    write_pair_folder(
        folder,
        {"train": tiny_rows(7, seed=seed), "test": tiny_rows(3, seed=seed + 1)},
        tiny_genes(),
        panels,
        pairings=["same_type"],
        file_format=file_format,
        options={"query": {"uri": "/somewhere/on/a/machine/cells.soma", "obs_filter": "tissue == 'blood'"}},
        report={"cells": 20, "without_partner": {"no_context": 3}},
    )
    return folder
