"""AnnData files -> a local SOMA store in Census layout, read unmodified by the official `cellxgene_census` calls."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse
from tqdm import tqdm

from data_scripts.cells.anndata_file import LibrarySizes
from data_scripts.cells.column_names import numbers, texts
from data_scripts.cells.gene_mapping import (
    FileGenes,
    check_species,
    known_genes,
    map_genes,
    read_gene_table,
)
from data_scripts.files import write_atomically
from data_scripts.store import census_layout
from data_scripts.store.census_obs import census_obs
from data_scripts.store.census_source import CensusSource, sources_from_file
from modeling_gppc.normalization_gppc import close_matches

__all__ = ["CensusReport", "CensusSource", "sources_from_file", "write_census"]

# What a store holds of each kind of values. Layer `raw` is whole numbers for everyone who reads it.
LAYERS = {"counts": ("raw", "normalized"), "estimated_counts": ("normalized",), "log": ("log_values",)}


@dataclass
class CensusReport:
    """What went into a store. `datasets` has one row a data set: cells, genes, how many were mapped, which column fed
    cell type, donor and library size, and `notes`; `genes` one row a gene of a data set: `dataset_id` and the columns
    of [`gene_mapping.map_genes`]."""

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

    def summary(self) -> str:
        """A few lines for people: what was written, and which genes could not be mapped."""
        sets = f"{len(self.datasets)} data set{'' if len(self.datasets) == 1 else 's'}"
        lines = [f"{self.n_obs:,} cells x {self.n_vars:,} genes, {sets} -> {self.store}"]
        for row in self.datasets.itertuples():
            lines.append(
                f"  {row.dataset_id}: {row.n_obs:,} cells, {row.n_vars:,} genes ({row.n_unmapped:,} without Ensembl "
                f"id), cell type from {row.cell_type_from}, donor from {row.donor_from}, library from {row.library_from}"
            )
            lines += [f"    {note}" for note in row.notes]
        missing = self.unmapped
        if len(missing):
            examples = ", ".join(missing["name"].drop_duplicates().head(5))
            dropped = int((missing["feature_id"] == "").sum())
            fate = f"{dropped:,} dropped" if dropped else "kept under their names"
            lines.append(f"  {missing['name'].nunique():,} names without Ensembl id, {fate}, e.g. {examples}")
        return "\n".join(lines)


@dataclass
class _Checked:
    """A source that passed all checks: everything but its counts."""

    source: CensusSource
    obs: pd.DataFrame
    labels: dict[str, str | None]
    genes: FileGenes
    library: LibrarySizes
    notes: list[str]
    mapping: pd.DataFrame | None = None
    joinids: np.ndarray | None = None  # of each gene; -1 where dropped


def write_census(
    store: str | Path,
    sources: Iterable[CensusSource],
    *,
    organism: str = "homo_sapiens",
    gene_table: str | Path | Sequence[str | Path] | None = None,
    unmapped: str = "keep",
    keep_obs: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> CensusReport:
    """Writes cells into a local store in Census layout.

    Counts become `X["raw"]` and, over the library size, `X["normalized"]`; estimated counts only the latter; log
    values `X["log_values"]`, float32 bit for bit. The sources' `value_kind` says what they are.

    Everything is checked before the store is begun; it grows under a temporary name beside `store` and gets its name
    at the end. Cells keep the order given (`soma_joinid` counts through the data sets), genes are the union over data
    sets in order of first appearance, and the presence matrix tells which data set measured which gene.

    Args:
        sources (`Iterable[CensusSource]`): The data sets; at most one lazy source is in memory at a time.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Species, as Census names it.
        gene_table (`str`, `Path` or a list of them, *optional*): Symbols and Ensembl ids; see [`read_gene_table`].
        unmapped (`str`, *optional*, defaults to `"keep"`): `keep`, `drop` or `error`; see [`map_genes`].
        keep_obs (`Sequence[str]`, *optional*): Columns of obs to carry along besides those of Census.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a store of that name.

    Raises:
        ValueError: Before anything is written: unknown species, cells that cannot be read (see [`open_cells`]),
            sources of several kinds of values, an existing store.
    """
    store = Path(store)
    place = store.absolute()  # whatever the working directory becomes meanwhile
    check_species(organism)
    if store.exists() and not overwrite:
        raise ValueError(f"`store` {store} exists already; choose another name or ask to overwrite it.")
    if store.exists() and not (store / "census_info").is_dir():
        raise ValueError(
            f"`store` {store} exists and is not a Census-like store; it is not overwritten, choose another."
        )
    paths = [gene_table] if isinstance(gene_table, (str, Path)) else gene_table or []
    tables = [read_gene_table(path) for path in paths]
    checked = [
        _check_source(source, organism, keep_obs)
        for source in tqdm(sources, desc="checking cells", unit="file", disable=not progress)
    ]
    if not checked:
        raise ValueError("`sources` is empty; give at least one data set.")
    kinds = sorted({part.source.options.value_kind for part in checked})
    if len(kinds) > 1:
        raise ValueError(f"`value_kind` of the sources is {' and '.join(kinds)}; a store holds one kind of values.")
    var = _join_genes(checked, tables, unmapped)
    partial, old = (place.with_name(f".{store.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        report = _write_store(partial, checked, var, organism, keep_obs, progress)
        if place.exists():
            os.replace(place, old)
        os.replace(partial, place)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:  # also an interruption must not leave half a store behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report.store = store
    return report


def _check_source(source: CensusSource, organism: str, keep_obs: Sequence[str]) -> _Checked:
    where = source.where
    with source.open() as cells:
        check_species(organism, cells.genes, where)
        obs, labels = census_obs(cells.obs, source.options, source.dataset_id, where)
        for name in keep_obs:
            if name in census_layout.OBS_TYPES:
                raise ValueError(f"`keep_obs` names {name!r}, which is a column of every store already; leave it out.")
            if name not in cells.obs:
                raise ValueError(
                    f"`keep_obs` names {name!r}, which is not a column of obs of {where}{close_matches(name, cells.obs)}"
                )
        library = cells.check()
        obs = pd.concat([obs, cells.obs[list(keep_obs)].reset_index(drop=True)], axis=1).assign(raw_sum=library.sizes)
        return _Checked(source, obs, labels, cells.genes, library, cells.notes)


def _join_genes(checked: Sequence[_Checked], tables: Sequence[pd.DataFrame], unmapped: str) -> pd.DataFrame:
    """Maps the genes of all sources, gives them joint ids, and returns var."""
    known = known_genes(tables, [part.genes for part in checked])
    for part in checked:
        part.mapping = map_genes(part.genes, known, unmapped=unmapped, where=part.source.where)
    genes = pd.concat([part.mapping for part in checked])
    genes = genes[genes["feature_id"] != ""].drop_duplicates("feature_id", ignore_index=True)
    index, previous = pd.Index(genes["feature_id"]), {}
    for place, part in enumerate(checked):
        part.joinids = index.get_indexer(part.mapping["feature_id"])
        last, joinids = previous.get(part.source.dataset_id, (place - 1, part.joinids))
        if last != place - 1 or set(joinids) != set(part.joinids):
            raise ValueError(
                f"`dataset_id` {part.source.dataset_id!r} stands for several sources; parts of one data set follow each "
                "other and measure the same genes: give the data sets different names."
            )
        previous[part.source.dataset_id] = place, part.joinids
    var = genes[["feature_id", "feature_name", "feature_type", "feature_length"]]
    return var.assign(feature_type=var["feature_type"].replace("", "unknown"), soma_joinid=np.arange(len(var)))


def _write_store(
    path: Path, checked: Sequence[_Checked], var: pd.DataFrame, organism: str, keep_obs: Sequence[str], progress: bool
) -> CensusReport:
    obs, extra_types = _plain(pd.concat([part.obs for part in checked], ignore_index=True), keep_obs)
    layers = LAYERS[checked[0].source.options.value_kind]
    census_layout.create_store(path, organism)
    census_layout.create_x_layers(path, organism, layers, (len(obs), len(var)))
    statistics, gene_nnz, first = [], np.zeros(len(var), dtype=np.int64), 0
    with tqdm(total=len(obs), desc="writing cells", unit="cell", disable=not progress) as bar:
        for part in checked:
            with part.source.open() as cells:
                if len(cells.obs) != len(part.obs):
                    raise ValueError(
                        f"{part.source.where} gave {len(part.obs)} cells when checked and {len(cells.obs)} when written; "
                        "a function must return the same cells at every call."
                    )
                for start, block in cells.blocks():
                    block = _stored(block, part.joinids)
                    gene_nnz += np.bincount(block.indices, minlength=len(var))
                    statistics.append(_row_statistics(block))
                    sizes = np.repeat(part.library.sizes[start : start + block.shape[0]], np.diff(block.indptr))
                    fractions = (block.data.astype(np.float64) / sizes).astype(np.float32)
                    values = {name: fractions if name == "normalized" else block.data for name in layers}
                    if block.nnz:
                        census_layout.write_x(path, organism, values, block, first + start)
                    bar.update(block.shape[0])
            first += len(part.obs)
    obs = pd.concat([obs, pd.concat(statistics, ignore_index=True)], axis=1)
    measured = {part.source.dataset_id: np.sort(part.joinids[part.joinids >= 0]) for part in checked}
    datasets = _dataset_table(checked, measured)
    n_measured = np.zeros(len(var), dtype=np.int64)
    for row in datasets.itertuples():
        n_measured[measured[row.dataset_id]] += row.n_obs
    sizes = datasets.set_index("dataset_id")["n_vars"]
    obs["n_measured_vars"] = obs["dataset_id"].map(sizes).astype(np.int64)
    obs["soma_joinid"] = np.arange(len(obs))
    census_layout.write_obs(path, organism, obs, extra_types)
    census_layout.write_var(path, organism, var.assign(nnz=gene_nnz, n_measured_obs=n_measured))
    census_layout.write_presence(path, organism, list(measured.values()), len(var))
    census_layout.write_info(path, organism, obs, datasets)
    genes = [part.mapping.assign(dataset_id=part.source.dataset_id) for part in checked]
    genes = pd.concat(genes).drop_duplicates(ignore_index=True)
    return CensusReport(path, len(obs), len(var), datasets, genes[["dataset_id", *part.mapping.columns]])


def _stored(block: sparse.csr_matrix, joinids: np.ndarray) -> sparse.csr_matrix:
    """The block in columns of the store: dropped genes and explicit zeros left out."""
    kept = np.flatnonzero(joinids >= 0)
    block = block.astype(np.float32)[:, kept]
    block.eliminate_zeros()
    indices = joinids[kept][block.indices]
    return sparse.csr_matrix((block.data, indices, block.indptr), shape=(block.shape[0], int(joinids.max()) + 1))


def _row_statistics(block: sparse.csr_matrix) -> pd.DataFrame:
    """Number, mean and sample variance of the stored values of each row, as Census defines them."""
    nnz, values = np.diff(block.indptr), block.data.astype(np.float64)
    rows = np.repeat(np.arange(len(nnz)), nnz)
    mean = np.bincount(rows, weights=values, minlength=len(nnz)) / np.maximum(nnz, 1)
    squares = np.bincount(rows, weights=(values - mean[rows]) ** 2, minlength=len(nnz))
    variance = squares / np.maximum(nnz - 1, 1)
    return pd.DataFrame({"nnz": nnz.astype(np.int64), "raw_mean_nnz": mean, "raw_variance_nnz": variance})


def _plain(obs: pd.DataFrame, names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, pa.DataType]]:
    """Some columns as truth values, whole numbers, numbers or else text, and their types in the store."""
    types = dict.fromkeys(names, pa.large_string())
    for name in names:
        column, kinds = obs[name], pd.api.types
        whole = not column.isna().any()
        if kinds.is_bool_dtype(column) and whole:
            types[name], obs[name] = pa.bool_(), column.to_numpy(dtype=bool)
        elif kinds.is_integer_dtype(column) and whole:
            types[name], obs[name] = pa.int64(), column.to_numpy(dtype=np.int64)
        elif kinds.is_numeric_dtype(column) and not kinds.is_bool_dtype(column):
            types[name], obs[name] = pa.float64(), numbers(column)
        else:
            obs[name] = [text or "unknown" for text in texts(column)]
    return obs, types


def _dataset_table(checked: Sequence[_Checked], measured: dict[str, np.ndarray]) -> pd.DataFrame:
    rows: dict[str, dict] = {}
    for part in checked:
        source, mapped = part.source, part.mapping["mapped_by"] != "unmapped"
        row = rows.setdefault(
            source.dataset_id,
            {
                "dataset_id": source.dataset_id,
                "dataset_title": source.dataset_id,
                "dataset_h5ad_path": Path(source.cells).name if source.is_file else "",
                "n_obs": 0,
                "n_vars": len(measured[source.dataset_id]),
                "n_mapped": int(mapped.sum()),
                "n_unmapped": int((~mapped).sum()),
                "cell_type_from": part.labels["cell_type"] or "nothing",
                "donor_from": part.labels["donor_id"] or "nothing",
                "library_from": part.library.source,
                "notes": [],
            },
        )
        row["n_obs"] += len(part.obs)
        row["notes"] += [note for note in part.notes if note not in row["notes"]]
    frame = pd.DataFrame(list(rows.values()))
    return frame.assign(dataset_total_cell_count=frame["n_obs"].astype(np.int64))
