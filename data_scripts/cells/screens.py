"""CRISPR screens in AnnData files: labels read, genes found, cells normalised, exclusions counted."""

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from data_scripts.cells.anndata_file import open_cells
from data_scripts.cells.column_names import find_column, texts
from data_scripts.cells.screen_labels import CONTROL, Perturbation, read_labels
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.technical_covariates import technical_covariates

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
        notes (`list[str]`): What was read otherwise than it stands in the file, a line each.
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
    notes: list[str] = dataclasses.field(default_factory=list)
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
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def read_screen(source: str | Path | anndata.AnnData, options: ScreenOptions | None = None) -> Screen:
    """Reads and checks a screen; see [`ScreenOptions`] for what is found and what must be said.

    Raises:
        ValueError: For cells that cannot be read (see [`open_cells`]), no perturbation column, no controls, or no
            perturbation left.
    """
    options = options or ScreenOptions()
    with open_cells(source, options, "`screen`") as cells:
        obs, genes = cells.obs, cells.genes
        column = find_column(obs, "perturbation", options.perturbation_column, required=True)
        library = cells.check()
        label, perturbations, exclusions = read_labels(
            np.array([text.strip() for text in texts(obs[column])]),
            _texts_of(obs, "modality", None, ""),
            genes.labels,
            genes.keys,
            options,
            column,
        )
        keep = np.flatnonzero(label != "")
        if options.max_cells is not None:
            generator = np.random.default_rng(options.seed)
            drawn = [
                generator.permutation(np.flatnonzero(label == one))[: options.max_cells]
                for one in np.unique(label[keep])
            ]
            keep = np.sort(np.concatenate(drawn))
        label, obs, sizes = label[keep], obs.iloc[keep], library.sizes[keep]
        values = cells.subset(keep).log_values(sizes, options.target_sum)
    batch = _texts_of(obs, "batch", options.batch_column, "batch")
    covariates, covariate_names = _covariates(obs, sizes if library.is_complete else None, batch)
    for one in perturbations.values():
        one.n_cells = int((label == one.label).sum())
    return Screen(
        values=values,
        gene_ids=genes.keys,
        gene_symbols=genes.labels,
        label=label,
        batch=batch,
        cell_line=_texts_of(obs, "cell_line", options.cell_line_column, "line"),
        covariates=covariates,
        covariate_names=covariate_names,
        library_size=sizes,
        perturbations=perturbations,
        barcodes=obs.index.to_numpy(dtype=str),
        exclusions=exclusions,
        library_is_complete=library.is_complete,
        guide_efficiency=dict(options.guide_efficiency),
        name="screen" if isinstance(source, anndata.AnnData) else Path(source).stem,
        notes=cells.notes,
        normalization="none" if options.value_kind == "log" else "log1p",
        target_sum=options.target_sum,
    )


def _texts_of(obs: pd.DataFrame, kind: str, named: str | None, otherwise: str) -> np.ndarray:
    column = find_column(obs, kind, named)
    return np.full(len(obs), otherwise) if column is None else obs[column].astype(str).to_numpy(dtype=str)


def _covariates(obs: pd.DataFrame, library: np.ndarray | None, batch: np.ndarray) -> tuple[np.ndarray, list[str]]:
    columns = technical_covariates(obs, library, "`screen`")
    columns |= {f"{BATCH_PREFIX}{name}": (batch == name).astype(float) for name in np.unique(batch)[1:]}
    if not columns:
        return np.zeros((len(obs), 0)), []
    return np.stack(list(columns.values()), axis=1), list(columns)
