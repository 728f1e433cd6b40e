"""AnnData files -> a local SOMA store in Census layout, read unmodified by the official `cellxgene_census` calls."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse
from tqdm import tqdm

from data_scripts.cells.gene_mapping import (
    UNMAPPED,
    FileGenes,
    GeneTable,
    check_organism,
    map_genes,
    read_file_genes,
    read_gene_table,
    shared_symbols,
)
from data_scripts.files import write_atomically
from data_scripts.store import census_layout
from data_scripts.store.census_source import CensusSource, row_blocks, sources_from_file
from data_scripts.store.obs_columns import census_obs, find_obs_columns, library_sizes
from modeling_gppc.normalization_gppc import check_raw_counts, close_matches

__all__ = ["CensusReport", "CensusSource", "sources_from_file", "write_census"]

LAYERS = {"raw": ("raw", "normalized"), "log_values": ("log_values",)}


@dataclass
class CensusReport:
    """
    What went into a store.

    Args:
        store (`Path`): The store.
        n_obs (`int`): Cells.
        n_vars (`int`): Genes, the union over data sets.
        datasets (`pd.DataFrame`): One row a data set: cells, genes, how many were mapped or not, and which column fed
            cell type, donor and library size.
        genes (`pd.DataFrame`): One row a gene of a data set: `dataset_id` and the columns of
            [`gene_mapping.map_genes`].
    """

    store: Path
    n_obs: int
    n_vars: int
    datasets: pd.DataFrame = field(repr=False)
    genes: pd.DataFrame = field(repr=False)

    @property
    def unmapped(self) -> pd.DataFrame:
        """Rows of `genes` without an Ensembl id."""
        return self.genes[self.genes["mapped_by"] == "unmapped"]

    def write_genes(self, path: str | Path) -> Path:
        """Writes `genes` as CSV and returns the path."""
        with write_atomically(path) as temporary:
            self.genes.to_csv(temporary, index=False)
        return Path(path)

    def summary(self, n_examples: int = 5) -> str:
        """A few lines for people: what was written, and which genes could not be mapped."""
        sets = f"{len(self.datasets)} data set{'' if len(self.datasets) == 1 else 's'}"
        lines = [f"{self.n_obs:,} cells x {self.n_vars:,} genes, {sets} -> {self.store}"]
        for row in self.datasets.itertuples():
            lines.append(
                f"  {row.dataset_id}: {row.n_obs:,} cells, {row.n_vars:,} genes ({row.n_unmapped:,} without Ensembl "
                f"id), cell type from {row.cell_type_from}, donor from {row.donor_from}, library from {row.library_from}"
            )
        missing = self.unmapped
        if len(missing):
            examples = ", ".join(missing["name"].drop_duplicates().head(n_examples))
            dropped = int((missing["feature_id"] == "").sum())
            fate = f"{dropped:,} dropped" if dropped else "kept under their names"
            lines.append(f"  {missing['name'].nunique():,} names without Ensembl id, {fate}, e.g. {examples}")
        return "\n".join(lines)


@dataclass
class _Checked:
    """A source that passed all checks: everything but its counts."""

    source: CensusSource
    obs: pd.DataFrame
    columns: dict[str, str]
    genes: FileGenes
    library: np.ndarray
    library_from: str
    extra: pd.DataFrame
    mapping: pd.DataFrame | None = None
    joinids: np.ndarray | None = None  # of each column; -1 where dropped


def write_census(
    store: str | Path,
    sources: Iterable[CensusSource],
    *,
    organism: str = "homo_sapiens",
    layer: str = "raw",
    gene_table: str | Path | Sequence[str | Path] | GeneTable | None = None,
    unmapped: str = "keep",
    keep_obs: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> CensusReport:
    """Writes cells into a local store in Census layout.

    Everything is checked before the store is begun; it grows under a temporary name beside `store` and gets its name
    at the end. Cells keep the order given (`soma_joinid` counts through the data sets), genes are the union over data
    sets in order of first appearance, and the presence matrix tells which data set measured which gene.

    Args:
        store (`str` or `Path`): Folder of the store.
        sources (`Iterable[CensusSource]`): The data sets; at most one lazy source is in memory at a time.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Species, as Census names it.
        layer (`str`, *optional*, defaults to `"raw"`): `raw` writes counts to `X["raw"]` and counts / library size to
            `X["normalized"]`. `log_values` writes float32 values bit for bit to `X["log_values"]`, unchecked but for
            being finite, for synthetic cells whose values are logarithms already; their `raw_sum` is 1.
        gene_table (`str`, `Path`, a list of them, or `GeneTable`, *optional*): Symbols and Ensembl ids; see
            [`read_gene_table`].
        unmapped (`str`, *optional*, defaults to `"keep"`): `keep`, `drop` or `error`; see [`map_genes`].
        keep_obs (`Sequence[str]`, *optional*): Columns of obs to carry along besides those of Census.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a store of that name.
        progress (`bool`, *optional*, defaults to `False`): Show progress bars.

    Returns:
        [`CensusReport`].

    Raises:
        ValueError: Before anything is written: unknown species, values that are not raw counts, duplicated genes, no
            cells, missing columns, an existing store.
    """
    store = Path(store)
    check_organism(organism)
    if layer not in LAYERS:
        raise ValueError(f"`layer` is {layer!r}; wanted one of {', '.join(LAYERS)}.")
    if unmapped not in UNMAPPED:
        raise ValueError(f"`unmapped` is {unmapped!r}; wanted one of {', '.join(UNMAPPED)}.")
    _check_target(store, overwrite)
    table = gene_table if isinstance(gene_table, GeneTable) else _read_tables(gene_table)
    checked = [
        _check_source(source, organism, layer, keep_obs)
        for source in tqdm(sources, desc="checking cells", unit="file", disable=not progress)
    ]
    if not checked:
        raise ValueError("`sources` is empty; give at least one data set.")
    var, measured = _join_genes(checked, table, unmapped)
    partial = store.with_name(f".{store.name}.partial-{os.getpid()}")
    store.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        report = _write_store(partial, checked, var, measured, organism, layer, progress)
        _move_into_place(partial, store)
    except BaseException:  # also an interruption must not leave half a store behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report.store = store
    return report


def _read_tables(paths: str | Path | Sequence[str | Path] | None) -> GeneTable:
    table = GeneTable()
    for path in [paths] if isinstance(paths, (str, Path)) else paths or []:
        table.add(read_gene_table(path))
    return table


def _check_target(store: Path, overwrite: bool) -> None:
    if not store.exists():
        return
    if not overwrite:
        raise ValueError(f"`store` {store} exists already; choose another name or ask to overwrite it.")
    if not (store / "census_info").is_dir():
        raise ValueError(
            f"`store` {store} exists and is not a Census-like store; it is not overwritten, choose another."
        )


def _move_into_place(partial: Path, store: Path) -> None:
    if store.exists():
        old = store.with_name(f".{store.name}.old-{os.getpid()}")
        os.replace(store, old)
        os.replace(partial, store)
        shutil.rmtree(old)
    else:
        os.replace(partial, store)


def _check_source(source: CensusSource, organism: str, layer: str, keep_obs: Sequence[str]) -> _Checked:
    with source.cells() as adata:
        return _check_cells(source, adata, organism, layer, keep_obs)


def _check_cells(
    source: CensusSource, adata: anndata.AnnData, organism: str, layer: str, keep_obs: Sequence[str]
) -> _Checked:
    where = source.where
    if adata.n_obs == 0:
        raise ValueError(f"{where} has no cells; wanted at least one.")
    matrix = source.matrix(adata)
    genes = read_file_genes(
        source.var(adata),
        organism=organism,
        symbol_key=source.symbol_key,
        ensembl_key=source.ensembl_key,
        where=where,
    )
    obs = adata.obs
    columns = find_obs_columns(obs, source.obs_keys(), where)
    for name in keep_obs:
        if name in census_layout.OBS_TYPES:
            raise ValueError(f"`keep_obs` names {name!r}, which is a column of every store already; leave it out.")
        if name not in obs:
            raise ValueError(
                f"`keep_obs` names {name!r}, which is not a column of obs of {where}{close_matches(name, obs)}"
            )
    sums = np.zeros(adata.n_obs, dtype=np.float64)
    for start, block in row_blocks(matrix):
        if layer == "raw":
            check_raw_counts(block.data, f"counts of {where}")
        elif not np.isfinite(block.data).all():
            raise ValueError(f"values of {where} hold NaN or infinite entries; finite log values are wanted.")
        sums[start : start + block.shape[0]] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
    if layer == "raw":
        library, library_from = library_sizes(obs, sums, source.library_size_key, where)
    else:
        library, library_from = np.ones(adata.n_obs), "none (log values)"
    return _Checked(
        source=source,
        obs=census_obs(obs, columns, source.dataset_id),
        columns=columns,
        genes=genes,
        library=library,
        library_from=library_from,
        extra=obs[list(keep_obs)].reset_index(drop=True),
    )


def _join_genes(
    checked: Sequence[_Checked], table: GeneTable | None, unmapped: str
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Maps the genes of all sources, gives them joint ids, and returns var and the genes each data set measured."""
    shared = shared_symbols(part.genes for part in checked)
    joinids: dict[str, int] = {}
    rows: list[tuple] = []
    measured: dict[str, np.ndarray] = {}
    previous = None
    for part in checked:
        dataset_id = part.source.dataset_id
        part.mapping = map_genes(part.genes, table, shared, unmapped=unmapped, where=part.source.where)
        part.joinids = np.full(len(part.mapping), -1, dtype=np.int64)
        for column, gene in enumerate(part.mapping.itertuples(index=False)):
            if not gene.feature_id:
                continue
            joinid = joinids.setdefault(gene.feature_id, len(joinids))
            if joinid == len(rows):
                rows.append((gene.feature_id, gene.feature_name, gene.feature_type, gene.feature_length))
            part.joinids[column] = joinid
        present = np.sort(part.joinids[part.joinids >= 0])
        seen = dataset_id in measured
        if seen and (previous != dataset_id or not np.array_equal(measured[dataset_id], present)):
            raise ValueError(
                f"`dataset_id` {dataset_id!r} stands for several sources; parts of one data set follow each other "
                "and measure the same genes: give the data sets different names."
            )
        measured[dataset_id] = present
        previous = dataset_id
    var = pd.DataFrame(rows, columns=["feature_id", "feature_name", "feature_type", "feature_length"])
    var["feature_type"] = var["feature_type"].replace("", "unknown")
    return var, measured


def _write_store(
    path: Path,
    checked: Sequence[_Checked],
    var: pd.DataFrame,
    measured: dict[str, np.ndarray],
    organism: str,
    layer: str,
    progress: bool,
) -> CensusReport:
    n_obs = sum(len(part.obs) for part in checked)
    n_vars = len(var)
    census_layout.create_store(path, organism)
    census_layout.create_x_layers(path, organism, LAYERS[layer], (n_obs, n_vars))
    statistics = {name: np.zeros(n_obs) for name in ("nnz", "raw_mean_nnz", "raw_variance_nnz")}
    gene_nnz = np.zeros(n_vars, dtype=np.int64)
    first = 0
    with tqdm(total=n_obs, desc="writing cells", unit="cell", disable=not progress) as bar:
        for part in checked:
            with part.source.cells() as adata:
                if adata.n_obs != len(part.obs):
                    raise ValueError(
                        f"{part.source.where} gave {len(part.obs)} cells when checked and {adata.n_obs} when written; "
                        "`load` must return the same cells at every call."
                    )
                for start, block in row_blocks(part.source.matrix(adata)):
                    block = _stored(block, part.joinids)
                    rows = slice(first + start, first + start + block.shape[0])
                    gene_nnz += np.bincount(block.indices, minlength=n_vars)
                    for name, values in _row_statistics(block).items():
                        statistics[name][rows] = values
                    _write_block(path, organism, layer, block, part, start, rows.start)
                    bar.update(block.shape[0])
            first += len(part.obs)
    obs = pd.concat([part.obs.astype({"dataset_id": str}) for part in checked], ignore_index=True)
    extra, extra_types = _plain(pd.concat([part.extra for part in checked], ignore_index=True))
    obs = pd.concat([obs, extra], axis=1)
    obs["soma_joinid"] = np.arange(n_obs)
    obs["raw_sum"] = np.concatenate([part.library for part in checked])
    for name, values in statistics.items():
        obs[name] = values.astype(np.int64) if name == "nnz" else values
    datasets = _dataset_table(checked, measured)
    obs["n_measured_vars"] = obs["dataset_id"].map(datasets.set_index("dataset_id")["n_vars"]).astype(np.int64)
    var["soma_joinid"] = np.arange(n_vars)
    var["nnz"] = gene_nnz
    var["n_measured_obs"] = np.int64(0)
    for row in datasets.itertuples():
        var.loc[measured[row.dataset_id], "n_measured_obs"] += row.n_obs
    census_layout.write_obs(path, organism, obs, extra_types)
    census_layout.write_var(path, organism, var)
    census_layout.write_presence(path, organism, list(measured.values()), n_vars)
    census_layout.write_info(path, organism, obs, datasets)
    genes = pd.concat(
        [part.mapping.assign(dataset_id=part.source.dataset_id) for part in checked], ignore_index=True
    ).drop_duplicates(ignore_index=True)
    genes = genes[["dataset_id", *(name for name in genes.columns if name != "dataset_id")]]
    return CensusReport(store=path, n_obs=n_obs, n_vars=n_vars, datasets=datasets, genes=genes)


def _stored(block: sparse.csr_matrix, joinids: np.ndarray) -> sparse.csr_matrix:
    """The block in columns of the store: dropped genes and explicit zeros left out."""
    block = block.astype(np.float32)
    block.sum_duplicates()
    kept = joinids >= 0
    if not kept.all():
        block = block[:, kept]
        joinids = joinids[kept]
    block.eliminate_zeros()
    width = int(joinids.max(initial=-1)) + 1
    indices = joinids[block.indices]
    return sparse.csr_matrix((block.data, indices, block.indptr), shape=(block.shape[0], width))


def _write_block(
    path: Path, organism: str, layer: str, block: sparse.csr_matrix, part: _Checked, start: int, first: int
) -> None:
    if not block.nnz:
        return
    order = census_layout.write_x(path, organism, LAYERS[layer][0], block, first)
    if layer == "raw":
        library = np.repeat(part.library[start : start + block.shape[0]], np.diff(block.indptr))
        block.data = (block.data.astype(np.float64) / library).astype(np.float32)
        census_layout.write_x(path, organism, "normalized", block, first, order)


def _row_statistics(block: sparse.csr_matrix) -> dict[str, np.ndarray]:
    """Number, mean and sample variance of the stored values of each row, as Census defines them."""
    nnz = np.diff(block.indptr)
    rows = np.repeat(np.arange(block.shape[0]), nnz)
    values = block.data.astype(np.float64)
    total = np.bincount(rows, weights=values, minlength=block.shape[0])
    mean = np.divide(total, nnz, out=np.zeros_like(total), where=nnz > 0)
    squares = np.bincount(rows, weights=(values - mean[rows]) ** 2, minlength=block.shape[0])
    variance = np.divide(squares, nnz - 1, out=np.zeros_like(total), where=nnz > 1)
    return {"nnz": nnz, "raw_mean_nnz": mean, "raw_variance_nnz": variance}


def _plain(extra: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, pa.DataType]]:
    """Columns as truth values, whole numbers, numbers or else text, and their types in the store."""
    columns, types = {}, {}
    for name, column in extra.items():
        if pd.api.types.is_bool_dtype(column) and not column.isna().any():
            columns[name], types[name] = column.to_numpy(dtype=bool), pa.bool_()
        elif pd.api.types.is_integer_dtype(column) and not column.isna().any():
            columns[name], types[name] = column.to_numpy(dtype=np.int64), pa.int64()
        elif pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            columns[name], types[name] = column.to_numpy(dtype=np.float64, na_value=np.nan), pa.float64()
        else:
            texts = column.astype(object).where(column.notna(), "unknown").astype(str)
            columns[name], types[name] = texts.to_numpy(), pa.large_string()
    return pd.DataFrame(columns, index=extra.index), types


def _dataset_table(checked: Sequence[_Checked], measured: dict[str, np.ndarray]) -> pd.DataFrame:
    rows: dict[str, dict] = {}
    for part in checked:
        source, mapping = part.source, part.mapping
        row = rows.setdefault(
            source.dataset_id,
            {
                "dataset_id": source.dataset_id,
                "dataset_title": source.title or source.dataset_id,
                "dataset_h5ad_path": Path(source.path).name if source.path is not None else "",
                "n_obs": 0,
                "n_vars": len(measured[source.dataset_id]),
                "n_mapped": int((mapping["mapped_by"] != "unmapped").sum()),
                "n_unmapped": int((mapping["mapped_by"] == "unmapped").sum()),
                "cell_type_from": part.columns.get("cell_type", "nothing"),
                "donor_from": part.columns.get("donor_id", "nothing"),
                "library_from": part.library_from,
            },
        )
        row["n_obs"] += len(part.obs)
    frame = pd.DataFrame(list(rows.values()))
    frame["dataset_total_cell_count"] = frame["n_obs"].astype(np.int64)
    return frame
