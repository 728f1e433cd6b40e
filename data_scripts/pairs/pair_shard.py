"""One shard: consecutive cells in, matched pair rows out, the same bytes wherever it runs."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.partner_matching import match_partners
from data_scripts.pairs.perturbation_sampling import candidate_changes, draw_imposed
from data_scripts.pairs.schema import CONTEXT_COLUMNS, PAIR_SCHEMA, SPLITS, TARGET_COLUMNS
from data_scripts.store.cell_stream import CellStream, read_values

ROWS_PER_BATCH = 1_024
MOMENT_CELLS = 128  # summed at once: few enough to stay in the processor's cache
# Why a cell is in no pair, besides the reasons of partner matching.
NO_CHANGE = "no_differing_gene"
LEFT_OVER = "too_few_for_a_state"


class CellTable:
    """
    Labels of the cells of a shard, rows of the plan's cell table, as numpy and Arrow columns.
    """

    def __init__(self, table: pa.Table, n_pairings: int, panel_of_dataset: np.ndarray | None = None):
        self.table = table.combine_chunks()
        self.joinids, self.split, self.dataset, self.library, self.n_expressed = (
            self.table.column(name).to_numpy() for name in ("soma_joinid", "split", "dataset", "library", "nnz")
        )
        self.panel_of_dataset = panel_of_dataset
        self.panel = None if panel_of_dataset is None else panel_of_dataset[self.dataset]
        self.groups = [self.table.column(f"group_{index}").to_numpy() for index in range(n_pairings)]
        self.different = [
            self.table.column(f"different_{index}").to_numpy() if f"different_{index}" in table.column_names else None
            for index in range(n_pairings)
        ]

    def __len__(self) -> int:
        return len(self.joinids)

    def strings(self, name: str, positions: np.ndarray) -> pa.Array:
        """Values of a label column at some cells, as strings."""
        column = self.table.column(name)
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        return column.take(pa.array(positions)).cast(pa.string())


def average_states(
    cells: CellTable, values: sp.csr_matrix, n: int, log_values: bool, rng: np.random.Generator
) -> tuple[CellTable, sp.csr_matrix]:
    """Averages random groups of `n` cells that agree in split, panel and every context; the rest is left out. Labels
    are those of the group's first cell, with mean library size and number of expressed genes. `log_values` are
    averaged before the logarithm."""
    keys = [cells.split, cells.panel, *cells.groups, *(code for code in cells.different if code is not None)]
    known = np.flatnonzero(np.all([group >= 0 for group in cells.groups], axis=0))
    _, context = np.unique(np.stack(keys)[:, known], axis=1, return_inverse=True)
    context = context.reshape(-1)
    order = np.lexsort((rng.random(len(known)), context))
    sizes = np.bincount(context)
    place = np.arange(len(known)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    full = place < np.repeat(sizes - sizes % n, sizes)
    members = np.sort(known[order[full]].reshape(-1, n), axis=1)
    members = members[np.argsort(members[:, 0])]
    scaled = values.astype(np.float64)
    if log_values:
        scaled.data = np.expm1(scaled.data)
    rows = np.repeat(np.arange(len(members)), n)
    weights = np.full(members.size, 1.0 / n)
    averaged = (sp.csr_matrix((weights, (rows, members.ravel())), shape=(len(members), len(cells))) @ scaled).tocsr()
    averaged.data = (np.log1p(averaged.data) if log_values else averaged.data).astype(np.float32)
    averaged.eliminate_zeros()
    averaged.sort_indices()
    table = cells.table.take(pa.array(members[:, 0]))
    for name, column in (("library", cells.library), ("nnz", cells.n_expressed)):
        means = pa.array(column[members].mean(1)).cast(table.schema.field(name).type, safe=False)
        table = table.set_column(table.column_names.index(name), name, means)
    return CellTable(table, len(cells.groups), cells.panel_of_dataset), averaged.astype(np.float32)


class ShardRows:
    """Pair rows of one shard by split, from the labels of its cells and their values at the vocabulary; its number is
    part of every seed."""

    def __init__(
        self,
        cells: CellTable,
        values: sp.csr_matrix,
        panels: np.ndarray,
        options: PairOptions,
        shard: int,
    ):
        self.cells, self.values, self.panels, self.options = cells, values, panels, options
        self.shard = shard
        self.n_cells = np.bincount(cells.split, minlength=len(SPLITS))
        if options.matching.pseudobulk > 1:
            rng = np.random.default_rng([options.seed, shard, len(SPLITS)])
            log_values = options.query.normalization != "none"
            self.cells, self.values = average_states(cells, values, options.matching.pseudobulk, log_values, rng)
        # A shard holds few of a large store's panels: compare those only.
        present, self.panel = np.unique(self.cells.panel, return_inverse=True)
        own = panels[present].astype(np.float32)  # counts up to 2**24 are exact
        self.shared_genes = np.rint(own @ own.T).astype(np.int64)
        self.pairings = list(options.matching.pairings)
        self.report: dict[str, dict] = {}

    def batches(self, split: int) -> Iterator[pa.RecordBatch]:
        """Pair rows of a split in random order; fills `report[SPLITS[split]]` when exhausted."""
        rng = np.random.default_rng([self.options.seed, self.shard, split])
        inside = np.flatnonzero(self.cells.split == split)
        matching = self.options.matching
        pairs = match_partners(
            [group[inside] for group in self.cells.groups],
            [None if code is None else code[inside] for code in self.cells.different],
            self.panel[inside],
            self.shared_genes,
            matching,
            rng,
            self.values[inside] if matching.policy != "random" else None,
        )
        source, target, pairing = inside[pairs.source], inside[pairs.target], pairs.pairing
        order = rng.permutation(len(source))
        source, target, pairing = source[order], target[order], pairing[order]
        # Differing genes are counted on the first pairs of a shard only: listing them is most of a pair's work.
        sums = {"shared_genes": 0, "differing_genes": 0, "revealed_genes": 0, "compared_pairs": 0}
        paired = np.zeros(len(self.cells), dtype=bool)
        per_pairing = np.zeros(len(self.pairings), dtype=np.int64)
        n_dropped = 0
        for first in range(0, len(source), ROWS_PER_BATCH):
            part = slice(first, first + ROWS_PER_BATCH)
            batch, kept = self._rows(source[part], target[part], pairing[part], rng, sums)
            paired[source[part][kept]] = True
            per_pairing += np.bincount(pairing[part][kept], minlength=len(self.pairings))
            n_dropped += int((~kept).sum())
            if batch.num_rows:
                yield batch
        n = self.options.matching.pseudobulk
        unpaired = {reason: count * n for reason, count in pairs.unpaired.items()}
        lost = (len(inside) - int(paired[inside].sum())) * n - sum(unpaired.values())
        if lost:
            unpaired[NO_CHANGE] = lost
        if len(inside) * n < self.n_cells[split]:
            unpaired[LEFT_OVER] = int(self.n_cells[split]) - len(inside) * n
        self.report[SPLITS[split]] = {
            "cells": int(self.n_cells[split]),
            "cells_paired": int(paired.sum()) * n,
            "cells_unpaired": unpaired,
            "pairs": int(per_pairing.sum()),
            "pairs_dropped": {NO_CHANGE: n_dropped} if n_dropped else {},
            "pairs_per_pairing": dict(zip(self.pairings, per_pairing.tolist())),
            "sums": sums,
        }

    def _rows(self, source, target, pairing, rng, sums) -> tuple[pa.RecordBatch, np.ndarray]:
        before, after = self.values[source], self.values[target]
        own, other = self.cells.panel[source], self.cells.panel[target]
        options = self.options.perturbation
        if not sums["compared_pairs"]:
            changes = candidate_changes(before, after, self.panels, own, other)
            sums["compared_pairs"] = int(np.count_nonzero(np.diff(changes.indptr) >= min(1, options.min_genes)))
            sums["differing_genes"] = int(changes.nnz)
        attempts = 2 * options.max_genes
        rows, genes, deltas, kept = draw_imposed(before, after, self.panels, own, other, options, rng, attempts)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(source))[kept])])
        if not kept.all():
            source, target, pairing = source[kept], target[kept], pairing[kept]
            before, after = before[kept], after[kept]
        cells = self.cells
        sums["shared_genes"] += int(self.shared_genes[self.panel[source], self.panel[target]].sum())
        sums["revealed_genes"] += len(genes)
        columns = {
            "source_gene_ids": _lists(before.indptr, before.indices, pa.int32()),
            "source_values": _lists(before.indptr, before.data, pa.float32()),
            "target_gene_ids": _lists(after.indptr, after.indices, pa.int32()),
            "target_values": _lists(after.indptr, after.data, pa.float32()),
            "source_panel": cells.panel[source],
            "target_panel": cells.panel[target],
            "perturbation_gene_ids": _lists(offsets, genes, pa.int32()),
            "perturbation_values": _lists(offsets, deltas, pa.float32()),
            "pairing": pa.array(self.pairings, pa.string()).take(pa.array(pairing)),
            "source_library_size": cells.library[source],
            "target_library_size": cells.library[target],
            "source_n_expressed": cells.n_expressed[source],
            "target_n_expressed": cells.n_expressed[target],
            "source_soma_joinid": cells.joinids[source],
            "target_soma_joinid": cells.joinids[target],
            "is_control": np.zeros(len(source), dtype=bool),
        }
        columns |= {name: cells.strings(name, source) for name in CONTEXT_COLUMNS}
        columns |= {name: cells.strings(name.removeprefix("target_"), target) for name in TARGET_COLUMNS}
        arrays = [_array(columns[field.name], field.type) for field in PAIR_SCHEMA]
        return pa.RecordBatch.from_arrays(arrays, schema=PAIR_SCHEMA), kept


def _lists(offsets: np.ndarray, values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind))


def _array(values, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values).cast(kind, safe=False)


def gene_moments(values: sp.csr_matrix, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Number of cells that express each gene, sum and sum of squares of its values over the chosen cells."""
    totals = {name: np.zeros(values.shape[1]) for name in ("n_expressed", "sums", "squares")}
    for first in range(0, values.shape[0], MOMENT_CELLS):
        part = values[first : first + MOMENT_CELLS].astype(np.float64)
        weights = chosen[first : first + MOMENT_CELLS].astype(np.float64)
        totals["sums"] += weights @ part
        part.data **= 2
        totals["squares"] += weights @ part
        part.data[:] = 1
        totals["n_expressed"] += weights @ part
    return totals


def read_shard_values(
    matrix, cells: CellTable, options: PairOptions, vocabulary: np.ndarray, gene_lengths: np.ndarray | None
) -> sp.csr_matrix:
    """Normalised values of a shard's cells, `(n_cells, n_genes)`."""
    # Only counts are known to agree with obs.nnz; other layers may hold other zeros.
    expected = cells.n_expressed if options.query.layer == "raw" and (cells.n_expressed >= 0).all() else None
    stream = CellStream(matrix, options.query, cells.joinids, expected)
    return read_values(stream, cells.library, gene_lengths, vocabulary)
