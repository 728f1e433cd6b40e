"""CRISPR screens in AnnData files: labels read, genes found, cells normalised, exclusions counted."""

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse

from data_scripts.cells.screen_labels import CONTROL, Perturbation, read_labels
from data_scripts.cells.screen_options import ScreenOptions, find_column
from modeling_gppc.normalization_gppc import check_raw_counts, close_matches, normalize_counts

# Covariates that are batches: 1 in the cells of one, 0 in all others.
BATCH_PREFIX = "batch "


@dataclasses.dataclass
class Screen:
    """Cells of a screen, normalised.

    Args:
        values (`np.ndarray`): Log values, float32 of shape `(n_obs, n_vars)`.
        gene_ids, gene_symbols (`list[str]`): Of the columns.
        label (`np.ndarray` of str): Perturbation of each cell, `control` for controls.
        batch, cell_line (`np.ndarray` of str): Of each cell; one value throughout where the file names none.
        covariates (`np.ndarray`): Technical covariates *of the whole transcriptome*, shape `(n_obs, C)`: log library
            size, log number of expressed genes, mitochondrial share, batch. Those of a targeted panel are left out:
            they are themselves responses.
        covariate_names (`list[str]`): Of the columns of `covariates`.
        library_size (`np.ndarray`): Counts over all genes that the file knows of, shape `(n_obs,)`.
        perturbations (`dict[str, Perturbation]`): By label.
        barcodes (`np.ndarray` of str): Names of the cells.
        exclusions (`list[tuple[str, int, str]]`): Reason, number of cells, examples: everything that was set aside.
        library_is_complete (`bool`): Whether the library size counts all genes or only those of the file.
        guide_efficiency (`dict[str, float]`): Stated by the user; see [`ScreenOptions`].
        name (`str`): Of the file.
        normalization (`str`), target_sum (`float`): How the values were made, see `normalize_counts`.
    """

    values: np.ndarray
    gene_ids: list[str]
    gene_symbols: list[str]
    label: np.ndarray
    batch: np.ndarray
    cell_line: np.ndarray
    covariates: np.ndarray
    covariate_names: list[str]
    library_size: np.ndarray
    perturbations: dict[str, Perturbation]
    barcodes: np.ndarray
    exclusions: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    library_is_complete: bool = True
    guide_efficiency: dict[str, float] = dataclasses.field(default_factory=dict)
    name: str = "screen"
    normalization: str = "log1p"
    target_sum: float = 10_000.0

    @property
    def is_control(self) -> np.ndarray:
        """Bool of shape `(n_obs,)`."""
        return self.label == CONTROL

    def cells_of(self, label: str) -> np.ndarray:
        """Rows of the cells of one label."""
        return np.flatnonzero(self.label == label)

    @property
    def panel_targets(self) -> np.ndarray:
        """Columns of every measured target of any perturbation: genes that no score may count."""
        index = np.concatenate([p.gene_index for p in self.perturbations.values()] or [np.zeros(0, int)])
        return np.unique(index[index >= 0]).astype(int)

    def target_changes(self, label: str) -> list[tuple[int, float, str]]:
        """Change of log value at each target: `(column, change, "measured" or "stated")`.

        Measured as mean of the perturbed cells minus mean of controls of the same batches; where the gene was not
        measured there is nothing to impose and the target is left out. A knock-out whose transcript goes on being
        counted has a small measured change: a stated efficiency then says what the user knows, and is kept apart.
        """
        perturbation = self.perturbations[label]
        cells, controls = self.cells_of(label), self.matched_control_mean(label)
        changes = []
        for gene, column in zip(perturbation.genes, perturbation.gene_index):
            if column < 0:
                continue
            if gene in self.guide_efficiency:
                kept = np.log1p((1 - self.guide_efficiency[gene]) * np.expm1(controls[column]))
                changes.append((int(column), float(kept - controls[column]), "stated"))
            else:
                changes.append((int(column), float(self.values[cells, column].mean() - controls[column]), "measured"))
        return changes

    def matched_control_mean(self, label: str) -> np.ndarray:
        """Mean of the controls, batches and cell lines weighted as among the cells of `label`; shape `(n_vars,)`."""
        group = np.char.add(np.char.add(self.batch, "\x1f"), self.cell_line)
        cells = self.cells_of(label)
        controls = np.flatnonzero(self.is_control)
        groups, times = np.unique(group[cells], return_counts=True)
        total, weight = np.zeros(self.values.shape[1]), 0
        for name, count in zip(groups, times):
            rows = controls[group[controls] == name]
            if len(rows):
                total += count * self.values[rows].mean(axis=0, dtype=np.float64)
                weight += count
        if weight == 0:
            return self.values[controls].mean(axis=0, dtype=np.float64)
        return total / weight

    def summary(self) -> str:
        """What was read and what was set aside, for people."""
        measured = sum(p.measured for p in self.perturbations.values())
        lines = [
            f"{self.name}: {len(self.values)} cells x {len(self.gene_ids)} genes, {int(self.is_control.sum())} controls, "
            f"{len(self.perturbations)} perturbations ({measured} with every target measured)"
        ]
        lines += [f"  set aside: {count} cells, {reason} ({examples})" for reason, count, examples in self.exclusions]
        return "\n".join(lines)


def read_screen(source: str | Path | anndata.AnnData, options: ScreenOptions | None = None) -> Screen:
    """Reads and checks a screen; see [`ScreenOptions`] for what is found and what must be said.

    Raises:
        ValueError: For no perturbation column, no controls, duplicate barcodes or genes, values that are no counts (or
            a mixture of counts and log values), or no perturbation left.
    """
    options = options or ScreenOptions()
    if isinstance(source, anndata.AnnData):
        adata, name = source, "screen"
    else:
        if not Path(source).is_file():
            raise ValueError(f"`screen` {source} is not a file; wanted an AnnData file (.h5ad).")
        adata, name = anndata.read_h5ad(source), Path(source).stem
    obs = adata.obs
    column = find_column(obs.columns, "perturbation", options.perturbation_column, required=True)
    barcodes = adata.obs_names.to_numpy(dtype=str)
    values, times = np.unique(barcodes, return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"`screen` has {int((times > 1).sum())} duplicate barcodes (e.g. `{values[times > 1][0]}`); the same cell "
            "could be in training and test: make them unique, e.g. with the batch's name."
        )
    symbols, ids = _gene_names(adata, options)
    matrix = adata.layers[options.layer] if options.layer else adata.X
    if options.layer and options.layer not in adata.layers:
        raise ValueError(f"`layer` {options.layer!r} is not there{close_matches(options.layer, list(adata.layers))}.")
    _check_values(matrix, options.value_kind)

    text = obs[column].astype(object).where(obs[column].notna(), "").astype(str).str.strip().to_numpy(dtype=object)
    modality_column = find_column(obs.columns, "modality", None)
    modalities = obs[modality_column].astype(str).to_numpy() if modality_column else np.full(len(obs), "")
    label, perturbations, exclusions = read_labels(text.astype(str), modalities, symbols, ids, options, column)

    keep = np.flatnonzero(label != "")
    if options.max_cells is not None:
        generator = np.random.default_rng(options.seed)
        drawn = []
        for one in np.unique(label[keep]):
            rows = np.flatnonzero(label == one)
            drawn.append(generator.permutation(rows)[: options.max_cells])
        keep = np.sort(np.concatenate(drawn))
    label = label[keep]
    counts = matrix[keep]
    counts = np.asarray(counts.toarray() if scipy.sparse.issparse(counts) else counts)
    library_column = find_column(obs.columns, "library_size", options.library_size_column)
    own_sum = counts.sum(axis=1, dtype=np.float64)
    library = obs[library_column].to_numpy(dtype=np.float64)[keep] if library_column else own_sum
    if options.value_kind == "counts" and library_column and (library < own_sum - 1e-3).any():
        row = int(np.flatnonzero(library < own_sum - 1e-3)[0])
        raise ValueError(
            f"`library_size_column` {library_column!r} is {library[row]:g} for cell `{barcodes[keep][row]}`, less than "
            f"its {own_sum[row]:g} counts; it is the sum of counts over all genes."
        )
    if options.value_kind == "counts":
        normalised = normalize_counts(counts, library[:, None], target_sum=options.target_sum)
    else:
        normalised = counts.astype(np.float32)
    batch_column = find_column(obs.columns, "batch", options.batch_column)
    line_column = find_column(obs.columns, "cell_line", options.cell_line_column)
    batch = obs[batch_column].astype(str).to_numpy(dtype=str)[keep] if batch_column else np.full(len(keep), "batch")
    line = obs[line_column].astype(str).to_numpy(dtype=str)[keep] if line_column else np.full(len(keep), "line")
    covariates, covariate_names = _covariates(obs.iloc[keep], library if library_column else None, batch)
    for one in perturbations.values():
        one.n_cells = int((label == one.label).sum())
    return Screen(
        values=normalised,
        gene_ids=ids,
        gene_symbols=symbols,
        label=label,
        batch=batch,
        cell_line=line,
        covariates=covariates,
        covariate_names=covariate_names,
        library_size=library,
        perturbations=perturbations,
        barcodes=barcodes[keep],
        exclusions=exclusions,
        library_is_complete=library_column is not None,
        guide_efficiency=dict(options.guide_efficiency),
        name=name,
        normalization="log1p" if options.value_kind == "counts" else "none",
        target_sum=options.target_sum,
    )


def _gene_names(adata: anndata.AnnData, options: ScreenOptions) -> tuple[list[str], list[str]]:
    index = adata.var_names.astype(str).tolist()
    column = options.symbol_column
    if column is not None and column not in adata.var:
        raise ValueError(f"`symbol_column` {column!r} is not in var{close_matches(column, list(adata.var.columns))}.")
    for candidate in ("symbol", "gene_symbol", "gene_name", "feature_name", "gene_symbols"):
        if column is None and candidate in adata.var:
            column = candidate
    symbols = adata.var[column].astype(str).tolist() if column else index
    duplicated, times = np.unique(index, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"`screen` has gene `{duplicated[times > 1][0]}` more than once in var; sum or drop one.")
    return symbols, index


def _check_values(matrix, value_kind: str) -> None:
    stored = matrix.data if scipy.sparse.issparse(matrix) else np.asarray(matrix)
    if value_kind == "log":
        if not np.isfinite(stored).all():
            raise ValueError("`screen` holds NaN or infinite values; remove or repair those cells.")
        if stored.size and stored.max() > 50:
            raise ValueError(
                f"`value_kind` is 'log' but the largest value is {stored.max():g}; log values stay below about 20: "
                "these look like counts."
            )
        return
    whole = stored == np.rint(stored)
    if scipy.sparse.issparse(matrix) and stored.size and not whole.all() and np.isfinite(stored).all():
        sparse = matrix.tocsr()
        broken = np.add.reduceat(~whole, np.minimum(sparse.indptr[:-1], max(stored.size - 1, 0))) > 0
        broken &= np.diff(sparse.indptr) > 0
    elif stored.ndim == 2 and not whole.all():
        broken = (~whole).any(axis=1)
    else:
        broken = np.zeros(0, bool)
    if broken.any() and not broken.all() and (~broken).sum() > 0.01 * len(broken):
        raise ValueError(
            f"`screen` mixes raw and log values: {int(broken.sum())} cells hold non-integer values and "
            f"{int((~broken).sum())} hold counts; give one kind, e.g. the layer with the counts."
        )
    check_raw_counts(stored, "screen")


def _covariates(obs, library: np.ndarray | None, batch: np.ndarray) -> tuple[np.ndarray, list[str]]:
    columns: list[tuple[str, np.ndarray]] = []
    if library is not None:
        columns.append(("log library size", np.log(np.maximum(library, 1.0))))
        expressed = find_column(obs.columns, "n_expressed", None)
        if expressed:
            columns.append(("log expressed genes", np.log(np.maximum(obs[expressed].to_numpy(dtype=float), 1.0))))
    mito = find_column(obs.columns, "p_mito", None)
    if mito:
        columns.append(("mitochondrial share", np.nan_to_num(obs[mito].to_numpy(dtype=float))))
    columns += [(f"{BATCH_PREFIX}{name}", (batch == name).astype(float)) for name in np.unique(batch)[1:]]
    if not columns:
        return np.zeros((len(obs), 0)), []
    return np.stack([values for _, values in columns], axis=1), [name for name, _ in columns]
