"""CRISPR screens in AnnData files: labels read, genes found, cells normalised, exclusions counted."""

import dataclasses
import functools
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.special

from data_scripts.cells.anndata_file import open_cells
from data_scripts.cells.column_names import find_column, texts
from data_scripts.cells.control_levels import ControlLevels
from data_scripts.cells.log_values import LogValues
from data_scripts.cells.screen_labels import CONTROL, Perturbation, TargetNames, read_labels
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.technical_covariates import technical_covariates

# In which direction a modality moves its target.
DIRECTIONS = {"knock-out": -1, "CRISPRi": -1, "CRISPRa": 1, "overexpression": 1}
# Covariates that are batches: 1 in the cells of one, 0 in all others.
BATCH_PREFIX = "batch "
# Where fewer genes than this share are no targets, nothing worth scoring is left.
LEAST_SCORED_SHARE = 0.1


@dataclasses.dataclass
class Screen:
    """Cells of a screen, normalised.

    Args:
        values ([`LogValues`]): Log values, shape `(n_obs, n_vars)`.
        gene_ids, gene_symbols (`list[str]`): Of the columns.
        label (`np.ndarray` of str): Perturbation of each cell, `control` for controls.
        batch, cell_line (`np.ndarray` of str): Of each cell; one value throughout where the file names none.
        covariates (`np.ndarray`): Technical covariates *of the whole transcriptome*, shape `(n_obs, C)`: log library
            size, log number of expressed genes, mitochondrial share, batch. Those of a targeted panel are left out:
            they are themselves responses.
        covariate_names (`list[str]`): Of the columns of `covariates`.
        library_size (`np.ndarray`): Counts over all genes, as far as the file has them, shape `(n_obs,)`.
        perturbations (`dict[str, Perturbation]`): By label.
        barcodes (`np.ndarray` of str): Names of the cells.
        exclusions (`list[tuple[str, int, str]]`): Reason, number of cells, examples: everything that was set aside.
        library_is_complete (`bool`): Whether the library size counts all genes or only those of the file.
        guide_efficiency (`dict[str, float]`): Stated by the user; see [`ScreenOptions`].
        name (`str`): Of the file.
        notes (`list[str]`): What was read otherwise than it stands in the file, a line each.
        normalization (`str`), target_sum (`float`): How the values were made, see `normalize_counts`.
        matched (`bool`): Whether a response is against controls with the same mix of batches and cell lines, or against
            all (the biased form of the literature).
    """

    values: LogValues
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
    matched: bool = True

    @property
    def is_control(self) -> np.ndarray:
        """Bool of shape `(n_obs,)`."""
        return self.label == CONTROL

    @functools.cached_property
    def group(self) -> np.ndarray:
        """Batch and cell line of each cell as one text, within which perturbed cells are compared with control cells;
        str of shape `(n_obs,)`."""
        group = np.char.add(np.char.add(self.batch, "\x1f"), self.cell_line)
        return group if self.matched else np.zeros_like(group)

    @functools.cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        order = np.argsort(self.label, kind="stable")
        names, start = np.unique(self.label[order], return_index=True)
        return dict(zip(names.tolist(), np.split(order, start[1:])))

    def cells_of(self, label: str) -> np.ndarray:
        """Rows of the cells of one label."""
        return self._rows.get(label, np.zeros(0, dtype=np.intp))

    @functools.cached_property
    def control_levels(self) -> ControlLevels:
        """Levels of all control cells."""
        return ControlLevels(self.values, self.group, self.cells_of(CONTROL))

    def control_shares(self, label: str) -> np.ndarray:
        """Weights of the groups of controls that the cells of a perturbation are compared with, `(G,)`."""
        return self.control_levels.shares(self.group[self.cells_of(label)])

    @functools.cached_property
    def control_covariance(self) -> np.ndarray:
        """Covariance of the genes among control cells, `(n_vars, n_vars)`."""
        return np.cov(self.values[self.cells_of(CONTROL)].T.astype(np.float64))

    @property
    def panel_targets(self) -> np.ndarray:
        """Columns of every measured target of any perturbation: genes that no score may count."""
        columns = [p.columns for p in self.perturbations.values()]
        return np.unique(np.concatenate([*columns, np.zeros(0, int)])).astype(int)

    def target_changes(self, label: str) -> list[tuple[int, float, str]]:
        """Change of log value at each target: `(column, change, "measured" or "stated")`.

        Measured as mean of the perturbed cells minus mean of controls of the same batches, see [`one_sided_mean`];
        targets that were not measured are left out. A knock-out whose transcript goes on being counted has a small
        measured change: an efficiency that the user states replaces it.
        """
        perturbation = self.perturbations[label]
        cells = self.cells_of(label)
        controls = self.control_levels.mean_for(self.group[cells])
        values, sign = self.values[cells], DIRECTIONS.get(perturbation.modality, 0) if self.matched else 0
        levels, changes = values.mean(axis=0, dtype=np.float64), []
        share = 1 / len(cells) + 1 / self.control_levels.number_for(self.group[cells])
        for gene, column in zip(perturbation.genes, perturbation.gene_index):
            if column < 0:
                continue
            if gene in self.guide_efficiency:
                kept = np.log1p((1 - self.guide_efficiency[gene]) * np.expm1(controls[column]))
                changes.append((int(column), float(kept - controls[column]), "stated"))
            else:
                spread = max(values[:, column].std(), self._control_deviation[column])
                change = one_sided_mean(levels[column] - controls[column], spread * np.sqrt(share), sign)
                changes.append((int(column), float(change), "measured"))
        return changes

    @functools.cached_property
    def _control_deviation(self) -> np.ndarray:
        return self.values[self.cells_of(CONTROL)].std(axis=0)

    def summary(self) -> str:
        """What was read and what was set aside, for people."""
        measured = sum(p.measured for p in self.perturbations.values())
        lines = [
            f"{self.name}: {len(self.values)} cells x {len(self.gene_ids)} genes, {int(self.is_control.sum())} controls, "
            f"{len(self.perturbations)} perturbations ({measured} with every target measured)"
        ]
        lines += [f"  set aside: {count} cells, {reason} ({examples})" for reason, count, examples in self.exclusions]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def one_sided_mean(change: float, error: float, sign: int) -> float:
    """Mean of a change given its estimate, the estimate's standard error, and that it has the sign `sign` (0: either).

    Of a normal distribution cut off at zero: a measured change of +0.006 +- 0.03 after a knock-down is one of -0.02.
    """
    if sign == 0 or error <= 0:
        return change
    z = sign * change / error
    # phi(z) / Phi(z), stable where z is far below zero.
    hazard = np.sqrt(2 / np.pi) / scipy.special.erfcx(-z / np.sqrt(2))
    return change + sign * error * hazard


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
        labels = read_labels(
            np.array([text.strip() for text in texts(obs[column])]),
            _texts_of(obs, "modality", None, ""),
            TargetNames(genes.labels, genes.keys),
            options,
            column,
        )
        labels.drop_unmatched(
            _texts_of(obs, "batch", options.batch_column, "batch"),
            _texts_of(obs, "cell_line", options.cell_line_column, "line"),
        )
        labels.drop_rare(options.min_cells)
        label = labels.label
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
    for one in labels.perturbations.values():
        one.n_cells = int((label == one.label).sum())
    screen = Screen(
        values=values,
        gene_ids=genes.keys,
        gene_symbols=genes.labels,
        label=label,
        batch=batch,
        cell_line=_texts_of(obs, "cell_line", options.cell_line_column, "line"),
        covariates=covariates,
        covariate_names=covariate_names,
        library_size=sizes,
        perturbations=labels.perturbations,
        barcodes=obs.index.to_numpy(dtype=str),
        exclusions=labels.exclusions,
        library_is_complete=library.is_complete,
        guide_efficiency=dict(options.guide_efficiency),
        name="screen" if isinstance(source, anndata.AnnData) else Path(source).stem,
        notes=[*cells.notes, *labels.notes],
        normalization="none" if options.value_kind == "log" else "log1p",
        target_sum=options.target_sum,
    )
    left = len(genes.keys) - len(screen.panel_targets)
    if left < LEAST_SCORED_SHARE * len(genes.keys):
        raise ValueError(
            f"`screen`: {len(screen.panel_targets)} of its {len(genes.keys)} genes are targets of some perturbation, and "
            f"no score counts a target: {left} genes would be left. Give a file with more genes or fewer perturbations."
        )
    return screen


def _texts_of(obs: pd.DataFrame, kind: str, named: str | None, otherwise: str) -> np.ndarray:
    column = find_column(obs, kind, named)
    return np.full(len(obs), otherwise) if column is None else obs[column].astype(str).to_numpy(dtype=str)


def _covariates(obs: pd.DataFrame, library: np.ndarray | None, batch: np.ndarray) -> tuple[np.ndarray, list[str]]:
    columns = technical_covariates(obs, library, "`screen`")
    columns |= {f"{BATCH_PREFIX}{name}": (batch == name).astype(float) for name in np.unique(batch)[1:]}
    if not columns:
        return np.zeros((len(obs), 0)), []
    return np.stack(list(columns.values()), axis=1), list(columns)
