"""Responses that were observed in a screen, and how well they are known."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_scripts.cells.control_levels import ControlLevels
from data_scripts.cells.screens import CONTROL, Screen

# A response too small to be told from noise has a direction all the same: so much of it is always kept.
LEAST_SHARE = 0.1


def scored_genes(screen: Screen) -> np.ndarray:
    """Genes that no perturbation of the screen targets, bool of shape `(V,)`."""
    mask = np.ones(screen.values.shape[1], dtype=bool)
    mask[screen.panel_targets] = False
    return mask


def within_variance(screen: Screen, labels: Sequence[str]) -> np.ndarray:
    """Variance of single cells about the mean of their label, pooled over labels, `(V,)`: the few cells of one label,
    none of which happens to express a rare gene, would give its mean no error at all."""
    squares, freedom = np.zeros(screen.values.shape[1]), 0
    for label in labels:
        cells = screen.values[screen.cells_of(label)]
        if len(cells) > 1:
            squares += cells.var(axis=0, dtype=np.float64) * len(cells)
            freedom += len(cells) - 1
    return squares / max(freedom, 1)


@dataclasses.dataclass
class ObservedResponses:
    """Responses `delta` `(T, V)` to some perturbations: mean of their cells minus mean of control cells with the same
    mix of batches; cells and controls behind each (see [`ControlLevels.number_for`]), [`within_variance`] and
    [`scored_genes`]."""

    labels: list[str]
    delta: np.ndarray
    n_cells: np.ndarray
    n_controls: np.ndarray
    within: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, screen: Screen, labels: Sequence[str], controls: np.ndarray | None = None) -> "ObservedResponses":
        """Reads the cells of `labels` and control cells (rows `controls`, or all), and no others."""
        levels = screen.control_levels if controls is None else ControlLevels(screen.values, screen.group, controls)
        cells = [screen.cells_of(label) for label in labels]
        groups = [screen.group[rows] for rows in cells]
        delta = [
            screen.values[rows].mean(axis=0, dtype=np.float64) - levels.mean_for(group)
            for rows, group in zip(cells, groups)
        ]
        return cls(
            list(labels),
            np.array(delta).reshape(len(cells), screen.values.shape[1]),
            np.array([len(rows) for rows in cells], dtype=int),
            np.array([levels.number_for(group) for group in groups]),
            within_variance(screen, [CONTROL, *labels]),
            scored_genes(screen),
        )

    @property
    def signal_share(self) -> np.ndarray:
        """Share of the squared length of each response that sampling does not explain, `(T,)`, at least a tenth."""
        length = np.maximum((self.delta[:, self.counted] ** 2).sum(axis=1), 1e-12)
        error = self.within[self.counted].sum() * (1 / np.maximum(self.n_cells, 1) + 1 / self.n_controls)
        return np.maximum(1 - error / length, LEAST_SHARE)

    @property
    def spread(self) -> np.ndarray:
        """Variance of true responses about their mean, `(V,)`: what is observed less what sampling explains, at least a
        tenth of it; zero for one response."""
        if len(self.labels) < 2:
            return np.zeros(self.delta.shape[1])
        seen = self.delta.var(axis=0, ddof=1)
        return np.maximum(seen - self.within * np.mean(1 / self.n_cells + 1 / self.n_controls), LEAST_SHARE * seen)

    @property
    def shrunken(self) -> np.ndarray:
        """The responses drawn towards zero by the share of their length that sampling explains, `(T, V)`."""
        return self.signal_share[:, None] * self.delta
