"""A handful of pair rows written out."""

import numpy as np
import pyarrow as pa

from data_scripts.pairs.schema import PAIR_SCHEMA

N_GENES = 5
PANELS = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=bool)
PAIRINGS = ["same_type", "same_dataset"]
# source ids -> values, target ids -> values, panels, perturbations, pairing
ROWS = [
    ({0: 1.0, 3: 2.0}, {0: 0.5, 1: 1.5}, (0, 0), {3: -2.0}, "same_type"),
    ({}, {4: 2.5}, (0, 0), {4: 2.5}, "same_dataset"),
    ({1: 0.25, 2: 3.0, 4: 1.0}, {3: 0.75}, (0, 1), {1: -0.25, 3: 0.75}, "same_dataset"),
    ({3: 4.0}, {0: 1.0, 3: 4.0}, (1, 1), {}, "same_type"),
    ({0: 2.0}, {0: 3.0, 2: 1.0, 4: 0.5}, (1, 0), {0: 1.0}, "same_type"),
    ({0: 0.5, 1: 0.5, 3: 0.5}, {}, (1, 1), {0: -0.5}, "same_dataset"),
]


def pair_table(rows=ROWS, chunks=(2, 3, 1)):
    """Rows in `PAIR_SCHEMA`, cut into chunks of these lengths, the way shards are."""
    columns = {name: [None] * len(rows) for name in PAIR_SCHEMA.names}
    for row, (source, target, panels, perturbation, pairing) in enumerate(rows):
        for name, genes in (("source", source), ("target", target), ("perturbation", perturbation)):
            columns[f"{name}_gene_ids"][row] = list(genes)
            columns[f"{name}_values"][row] = list(genes.values())
        columns["source_panel"][row], columns["target_panel"][row] = panels
        columns["pairing"][row] = pairing
    table = pa.table(columns, schema=PAIR_SCHEMA)
    starts = np.concatenate([[0], np.cumsum(chunks)])
    return pa.concat_tables([table.slice(start, length) for start, length in zip(starts, chunks)])
