"""Cells and genes of a screen that a run reads: a gene panel chosen on controls, covariates taken out, some cells."""

import dataclasses
import hashlib

import numpy as np

from data_scripts.cells.screens import CONTROL, Screen


def keep_genes(screen: Screen, at_most: int, like: Screen | None = None) -> Screen:
    """Every measured target and the genes most variable among controls (those of `like`, where given); no perturbed
    cell is read. Of more than `at_most` genes so many are kept; where half of them or more would be targets, which no
    score counts, half as many others besides."""
    n_genes = len(screen.gene_ids)
    if n_genes <= at_most:
        return screen
    chooses = like or screen
    spread = chooses.values[chooses.cells_of(CONTROL)].var(axis=0)
    targets = screen.panel_targets
    spread[targets] = np.inf
    kept = np.sort(np.argsort(-spread, kind="stable")[: max(at_most, len(targets) + at_most // 2)])
    position = np.full(n_genes, -1)
    position[kept] = np.arange(len(kept))
    perturbations = {
        label: dataclasses.replace(
            p, gene_index=np.where(p.gene_index >= 0, position[p.gene_index], -1), columns=position[p.columns]
        )
        for label, p in screen.perturbations.items()
    }
    return dataclasses.replace(
        screen,
        values=screen.values.of_genes(kept),
        gene_ids=[screen.gene_ids[i] for i in kept],
        gene_symbols=[screen.gene_symbols[i] for i in kept],
        perturbations=perturbations,
    )


@dataclasses.dataclass
class TechnicalCovariates:
    """What the C covariates `names` of the whole transcriptome (none: nothing is taken out) explain of the log values,
    linearly: their means, and changes a unit of each, `(C, V)`. Library size, detected genes, mitochondrial share and
    batch move many genes at once; left in, they pass for regulation."""

    names: list[str]
    center: np.ndarray
    slopes: np.ndarray

    @classmethod
    def fit(cls, screen: Screen, cells: np.ndarray) -> "TechnicalCovariates":
        """Least squares on the rows `cells`. On a targeted panel, whose depth is itself a response, nothing is taken
        out."""
        covariates = screen.covariates[cells]
        center, scale = covariates.mean(axis=0), covariates.std(axis=0)
        varied = np.flatnonzero(scale > 1e-9) if screen.library_is_complete else np.zeros(0, dtype=int)
        if not len(varied):
            return cls([], np.zeros(0), np.zeros((0, screen.values.shape[1])))
        values = screen.values[cells].astype(np.float64)
        design = (covariates - center)[:, varied] / scale[varied]
        slopes = np.linalg.lstsq(design, values - values.mean(axis=0), rcond=None)[0] / scale[varied, None]
        full = np.zeros((len(center), values.shape[1]))
        full[varied] = slopes
        return cls(list(screen.covariate_names), center, full)

    def residuals(self, values: np.ndarray, covariates: np.ndarray) -> np.ndarray:
        """Values `(n, V)` without what their covariates `(n, C)` explain, in float64; means are kept."""
        values = values.astype(np.float64)
        return values - (covariates - self.center) @ self.slopes if self.names else values


def some_cells(screen: Screen, cells: np.ndarray) -> Screen:
    """The screen with only the rows `cells`. Every perturbation stays, with as many cells as are left of it: its target
    is a gene of the panel whether or not it has cells here."""
    present, times = np.unique(screen.label[cells], return_counts=True)
    counts = dict(zip(present.tolist(), times.tolist()))
    perturbations = {
        name: dataclasses.replace(p, n_cells=counts.get(name, 0)) for name, p in screen.perturbations.items()
    }
    rows = ("label", "batch", "cell_line", "covariates", "library_size", "barcodes")
    chosen = {name: getattr(screen, name)[cells] for name in rows}
    return dataclasses.replace(screen, values=screen.values.of_cells(cells), perturbations=perturbations, **chosen)


def shuffle_labels(screen: Screen, seed: int = 0) -> Screen:
    """The same cells with their labels permuted within batches and cell lines: a screen without any effect."""
    generator, label = np.random.default_rng(seed), screen.label.copy()
    for name in np.unique(screen.group):
        rows = np.flatnonzero(screen.group == name)
        label[rows] = label[generator.permutation(rows)]
    return dataclasses.replace(screen, label=label)


def perturbed_digest(screen: Screen) -> str:
    """Digest of the names of the perturbed cells: tells whether two runs read the same screen."""
    return _digest(screen.barcodes[~screen.is_control])


def controls_digest(screen: Screen) -> str:
    """Digest of the names of the control cells: tells which of them a model was fitted on."""
    return _digest(screen.barcodes[screen.is_control])


def _digest(names: np.ndarray) -> str:
    return hashlib.blake2b("\n".join(sorted(names.tolist())).encode(), digest_size=16).hexdigest()
