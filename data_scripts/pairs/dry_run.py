"""`gppc build-pairs --dry_run`: what a build would give and take, from the labels and a few blocks of cells."""

import time

import numpy as np
import pyarrow as pa

from data_scripts.pairs.gene_selection import choose_genes, count_genes, gene_lengths_of
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_plan import cell_table, file_format, panels_of, query_for, shard_bounds, vocabulary_of
from data_scripts.pairs.pair_shard import CellTable, ShardRows
from data_scripts.pairs.schema import PAIR_SCHEMA, SPLITS
from data_scripts.pairs.shard_files import shard_writer
from data_scripts.store.cell_stream import CellStream, read_values
from data_scripts.store.census_query import CellQuery

SAMPLE_BLOCKS = 4
SAMPLE_CELLS = 512


def estimate(options: PairOptions, num_proc: int = 1) -> dict:
    """Numbers of a build that is not run: exact cells, data sets, contexts and largest number of pairs; genes, bytes
    and time from a few blocks of training cells, spread over the store. Raises `ValueError` as the build before long
    work."""
    query = query_for(options)
    cells = cell_table(query, options)
    n_cells = cells.num_rows
    split = cells.column("split").to_numpy()
    if not (split == 0).any():
        raise ValueError("`splits` leave no cell for training, so no gene panel can be chosen; change the rules.")
    bounds = shard_bounds(query.obs["soma_joinid"].to_numpy(), options.shard_cells)
    shard = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    contexts, has_partner = {}, np.zeros(n_cells, dtype=bool)
    for index, name in enumerate(options.matching.pairings):
        group = cells.column(f"group_{index}").to_numpy()
        contexts[name] = len(np.unique(group[group >= 0]))
        # Partners share the waiting room, the split and the context.
        keys = (group * len(SPLITS) + split) * len(bounds) + shard
        _, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        has_partner |= (sizes[inverse] >= 2) & (group >= 0)
    n_pairs = int(has_partner.sum()) * options.matching.pairs_per_cell // options.matching.pseudobulk
    sample = _sample(query, options, cells)
    panel_pass = sample["read_seconds_per_cell"] * (split == 0).sum()
    pair_pass = sample["read_seconds_per_cell"] * n_cells + sample["pair_seconds"] * n_pairs
    needs_panel = options.panel.rule in ("common", "variable")
    return {
        "source": query.source,
        "cells": {SPLITS[index]: int((split == index).sum()) for index in range(len(SPLITS))},
        "datasets": int(query.obs["dataset_id"].nunique()),
        "contexts": contexts,
        "cells_with_a_possible_partner": int(has_partner.sum()),
        "genes": sample["genes"],
        "shards": len(bounds) - 1,
        "pairs_at_most": n_pairs,
        "file_format": sample["file_format"],
        "gigabytes": sample["bytes_per_pair"] * n_pairs / 1e9,
        "minutes": (pair_pass + panel_pass * needs_panel) / 60 / max(1, min(num_proc, len(bounds) - 1)),
    }


def _sample(query: CellQuery, options: PairOptions, cells: pa.Table) -> dict:
    """Reads a few blocks: genes, seconds a cell and a pair, bytes a pair."""
    training = np.flatnonzero(cells.column("split").to_numpy() == 0)
    size = min(SAMPLE_CELLS, len(training))
    starts = np.unique(np.linspace(0, len(training) - size, SAMPLE_BLOCKS).astype(np.int64))
    chosen = np.unique(np.concatenate([training[start : start + size] for start in starts]))
    labels = CellTable(cells.take(pa.array(chosen)), len(options.matching.pairings))
    dataset_ids = list(dict.fromkeys(query.obs["dataset_id"].astype(str)))
    measured = query.presence(dataset_ids)
    lengths = gene_lengths_of(query.var) if options.query.normalization == "log_tpm" else None
    n_vars = len(query.var)
    began = time.perf_counter()
    stream = CellStream(query.matrix, options.query, labels.joinids, block_cells=SAMPLE_CELLS)
    part = count_genes(stream, labels.dataset, labels.library, lengths, n_vars, moments=True)
    seconds = time.perf_counter() - began
    counts = np.bincount(labels.dataset, minlength=len(dataset_ids))
    genes, _ = choose_genes([part], counts, measured, query.var_selected, options.panel, query.var)
    panels, panel_of_dataset = panels_of(measured[:, genes])
    values = read_values(stream, labels.library, lengths, vocabulary_of(genes, n_vars))
    began = time.perf_counter()
    labels = CellTable(labels.table, len(options.matching.pairings), panel_of_dataset)
    format_of_files = file_format(options, len(genes))
    sink, n_rows = pa.BufferOutputStream(), 0
    with shard_writer(sink, PAIR_SCHEMA, f".{format_of_files}") as writer:
        for batch in ShardRows(labels, values, panels, options, 0).batches(0):
            writer.write_batch(batch)
            n_rows += batch.num_rows
    return {
        "file_format": format_of_files,
        "genes": len(genes),
        "read_seconds_per_cell": seconds / len(chosen),
        "pair_seconds": (time.perf_counter() - began) / max(n_rows, 1),
        "bytes_per_pair": sink.tell() / max(n_rows, 1),
    }


def describe_estimate(numbers: dict) -> str:
    """The estimate as lines for a person."""
    source = numbers["source"].get("uri") or f"Census {numbers['source'].get('census_version')}"
    cells = numbers["cells"]
    return "\n".join(
        [
            f"source            {source}",
            f"cells             {sum(cells.values()):,} ({', '.join(f'{name} {n:,}' for name, n in cells.items())})",
            f"data sets         {numbers['datasets']:,}",
            f"contexts          {', '.join(f'{name} {n:,}' for name, n in numbers['contexts'].items())}",
            f"with a partner    {numbers['cells_with_a_possible_partner']:,} cells",
            f"genes             {numbers['genes']:,} (from a sample)",
            f"pairs             at most {numbers['pairs_at_most']:,} in {numbers['shards']:,} shards",
            f"on disk           about {numbers['gigabytes']:.2f} GB as {numbers['file_format']}",
            f"time              about {numbers['minutes']:.1f} minutes",
        ]
    )
