"""Whole tables as a pairs folder of one shard a split; `gppc build-pairs` writes larger ones shard by shard."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_scripts.pairs.pair_folder import PairFolder, finish_pair_folder
from data_scripts.pairs.schema import PAIR_SCHEMA
from data_scripts.pairs.shard_files import write_table_atomically


def write_pair_folder(
    path: Path,
    splits: Mapping[str, pa.Table],
    genes: pa.Table,
    panels: np.ndarray,
    *,
    pairings: Iterable[str],
    file_format: str = "arrow",
    **manifest,
) -> PairFolder:
    """Split name -> rows in `PAIR_SCHEMA`, genes in `GENE_SCHEMA`, panels bool of shape `(n_panels, n_genes)`."""
    entries = {}
    for name, table in splits.items():
        file = f"{name}/shard-00000.{file_format}"
        batches = table.cast(PAIR_SCHEMA).to_batches(max_chunksize=4096)
        summary = write_table_atomically(batches, PAIR_SCHEMA, path / file)
        entries[name] = {"n_pairs": table.num_rows, "shards": [{"file": file, **summary}]}
    recipe = {"organism": "homo_sapiens", "normalization": "log1p", "target_sum": 10_000.0, "pairings": list(pairings)}
    finish_pair_folder(path, genes, panels, {**recipe, "splits": entries, **manifest})
    return PairFolder(path)
