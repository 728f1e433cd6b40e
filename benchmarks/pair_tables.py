"""Pairs of cells held in memory as a pairs folder: what the comparison scripts train and test on."""

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import scipy.sparse

from data_scripts.pairs.gene_selection import standardized_dispersion
from data_scripts.pairs.pair_folder import PairFolder, write_pair_folder
from data_scripts.pairs.pair_options import PerturbationOptions
from data_scripts.pairs.perturbation_sampling import sample_from_changes
from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA
from modeling_gppc.normalization_gppc import normalize_counts

PAIRINGS = ["same_type", "same_dataset"]


@dataclasses.dataclass
class Cells:
    """Cells that all measure the same genes.

    Args:
        values (`np.ndarray`): log1p CP10k, float32 of shape `(n, V)`.
        cell_type, donor (`np.ndarray` of str): Shape `(n,)`.
        perturbed (`np.ndarray` of bool): Shape `(n,)`.
        symbols (`list[str]`): Of the genes.
    """

    values: np.ndarray
    cell_type: np.ndarray
    donor: np.ndarray
    perturbed: np.ndarray
    symbols: list[str]

    def gene_positions(self, symbols: tuple[str, ...]) -> np.ndarray:
        """Columns of some genes.

        Raises:
            ValueError: If one is not measured.
        """
        missing = [symbol for symbol in symbols if symbol not in self.symbols]
        if missing:
            raise ValueError(f"`cells` do not measure {', '.join(missing)}; wanted every revealed gene.")
        return np.array([self.symbols.index(symbol) for symbol in symbols])

    def with_genes(self, columns: np.ndarray) -> "Cells":
        """The same cells with some of their genes."""
        return dataclasses.replace(
            self, values=self.values[:, columns], symbols=[self.symbols[column] for column in columns]
        )


def read_cells(path: str | Path) -> Cells:
    """Cells of an AnnData file of raw counts with `cell_type`, `donor_id`, `n_counts_full` and, if any, `is_control`."""
    adata = anndata.read_h5ad(path)
    counts = adata.X.toarray() if scipy.sparse.issparse(adata.X) else np.asarray(adata.X)
    library = adata.obs["n_counts_full"].to_numpy() if "n_counts_full" in adata.obs else counts.sum(axis=1)
    perturbed = ~adata.obs["is_control"].to_numpy(bool) if "is_control" in adata.obs else np.zeros(len(counts), bool)
    symbols = adata.var.get("symbol", adata.var_names)
    return Cells(
        values=normalize_counts(counts, library.astype(np.float64)[:, None]),
        cell_type=adata.obs["cell_type"].astype(str).to_numpy(),
        donor=adata.obs["donor_id"].astype(str).to_numpy(),
        perturbed=perturbed,
        symbols=[str(symbol) for symbol in symbols],
    )


def variable_genes(values: np.ndarray, n_genes: int, always: np.ndarray) -> np.ndarray:
    """Columns of the genes that vary most between some cells for their mean, ascending, `always` among them."""
    sums = values.sum(axis=0, dtype=np.float64)
    squares = (values.astype(np.float64) ** 2).sum(axis=0)
    order = np.argsort(-standardized_dispersion(len(values), (values != 0).sum(axis=0), sums, squares), kind="stable")
    rest = order[~np.isin(order, always)][: max(n_genes - len(always), 0)]
    return np.sort(np.concatenate([always, rest]))


def partners(group: np.ndarray, cells: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`n` sources of each of some cells, drawn from the others of its group: `(sources, targets)`."""
    sources, targets = [], []
    for name in np.unique(group[cells]):
        members = cells[group[cells] == name]
        if len(members) < 2:
            continue
        place = np.tile(np.arange(len(members)), n)
        other = (place + rng.integers(1, len(members), len(place))) % len(members)
        sources.append(members[other])
        targets.append(members[place])
    return np.concatenate(sources), np.concatenate(targets)


def draw_revealed(
    changes: np.ndarray, rng: np.random.Generator, options: PerturbationOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Revealed genes of pairs, drawn among those that change: ids, changes and which entries are real, `(n, K)`.

    Args:
        changes (`np.ndarray`): Target minus source, zero at genes that may not be revealed, shape `(n, V)`.
        rng (`np.random.Generator`): The only source of randomness.
        options (`PerturbationOptions`): How many and which.
    """
    offsets, flat, values = sample_from_changes(scipy.sparse.csr_matrix(changes), rng, options)
    lengths = np.diff(offsets)
    mask = np.arange(max(int(lengths.max(initial=0)), 1)) < lengths[:, None]
    ids, revealed = np.zeros(mask.shape, dtype=np.int64), np.zeros(mask.shape, dtype=np.float32)
    ids[mask], revealed[mask] = flat, values
    return ids, revealed, mask


def training_pairs(
    cells: Cells, rows: np.ndarray, pairs_per_cell: int, seed: int, reveal: PerturbationOptions, pairings=PAIRINGS
) -> pa.Table:
    """Pairs of some of the cells in each pairing: the same type, or the same donor and any type."""
    rng = np.random.default_rng(seed)
    groups = {"same_type": cells.cell_type, "same_dataset": cells.donor}
    tables = []
    for pairing in pairings:
        sources, targets = partners(groups[pairing], rows, pairs_per_cell, rng)
        ids, _, mask = draw_revealed(cells.values[targets] - cells.values[sources], rng, reveal)
        tables.append(pair_table(cells, sources, targets, ids, mask, pairing))
    return pa.concat_tables(tables)


def pair_table(
    cells: Cells, sources: np.ndarray, targets: np.ndarray, revealed: np.ndarray, mask: np.ndarray, pairing: str
) -> pa.Table:
    """Rows in `PAIR_SCHEMA` for pairs of cells.

    Args:
        cells (`Cells`): The cells.
        sources, targets (`np.ndarray`): Row numbers of cells, shape `(n,)`.
        revealed (`np.ndarray`): Gene columns, shape `(n, K)`.
        mask (`np.ndarray` of bool): Which of them are real, shape `(n, K)`.
        pairing (`str`): Name of the context.
    """
    n = len(sources)
    changes = np.take_along_axis(cells.values[targets] - cells.values[sources], revealed, axis=1)
    lengths = mask.sum(axis=1)
    columns = {
        "perturbation_gene_ids": _lists(lengths, revealed[mask], pa.int32()),
        "perturbation_values": _lists(lengths, changes[mask], pa.float32()),
        "source_panel": np.zeros(n, np.int32),
        "target_panel": np.zeros(n, np.int32),
        "pairing": np.full(n, pairing),
        "cell_type": cells.cell_type[sources],
        "target_cell_type": cells.cell_type[targets],
        "dataset_id": np.full(n, "cells"),
        "donor_id": cells.donor[sources],
        "target_donor_id": cells.donor[targets],
        "source_soma_joinid": sources.astype(np.int64),
        "target_soma_joinid": targets.astype(np.int64),
        "is_control": ~cells.perturbed[sources],
    }
    for side, which in (("source", sources), ("target", targets)):
        rows, genes = np.nonzero(cells.values[which])
        counts = np.bincount(rows, minlength=n)
        columns[f"{side}_gene_ids"] = _lists(counts, genes, pa.int32())
        columns[f"{side}_values"] = _lists(counts, cells.values[which][rows, genes], pa.float32())
    arrays = []
    for field in PAIR_SCHEMA:
        value = columns.get(field.name)
        arrays.append(pa.nulls(n, field.type) if value is None else pa.array(value, type=field.type))
    return pa.table(arrays, schema=PAIR_SCHEMA)


def _lists(lengths: np.ndarray, flat: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


def write_folder(path: str | Path, cells: Cells, splits: dict[str, pa.Table]) -> PairFolder:
    """A pairs folder with one panel of all genes."""
    values = cells.values
    n_genes = values.shape[1]
    columns = {
        "gene_id": cells.symbols,
        "gene_symbol": cells.symbols,
        "feature_length": np.full(n_genes, np.nan),
        "n_cells_measured": np.full(n_genes, len(values)),
        "n_cells_expressed": (values != 0).sum(axis=0),
        "n_datasets_measured": np.ones(n_genes, dtype=np.int64),
        "mean": values.mean(axis=0),
        "variance": values.var(axis=0),
    }
    genes = pa.table([pa.array(columns[field.name], type=field.type) for field in GENE_SCHEMA], schema=GENE_SCHEMA)
    return write_pair_folder(path, splits, genes, np.ones((1, n_genes), dtype=bool), pairings=PAIRINGS)
