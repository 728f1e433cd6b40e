"""Level of the control cells that a set of perturbed cells is compared with, batch by batch and line by line."""

import numpy as np

from data_scripts.cells.log_values import LogValues


class ControlLevels:
    """Means of the control cells by group (batch and cell line), and their mix for any set of cells. Against the mean
    of *all* controls each response would hold a part of the difference between batches, over which perturbations are
    spread unevenly; those with the same mix of batches would seem alike."""

    def __init__(self, values: LogValues, group: np.ndarray, controls: np.ndarray):
        self.names, place = np.unique(group[controls], return_inverse=True)
        self.counts = np.bincount(place, minlength=len(self.names))
        self.means = np.stack(
            [values[controls[place == index]].mean(axis=0, dtype=np.float64) for index in range(len(self.names))]
        )

    def shares(self, group: np.ndarray) -> np.ndarray:
        """Share of each group of controls among cells of the groups `group`, `(G,)`. Cells of groups without controls do
        not count; where none is left, the shares are those of the controls."""
        place = np.minimum(np.searchsorted(self.names, group), len(self.names) - 1)
        times = np.bincount(place[self.names[place] == group], minlength=len(self.names))
        times = times if times.any() else self.counts
        return times / times.sum()

    def mean_for(self, group: np.ndarray) -> np.ndarray:
        """Mean of the controls, mixed as cells of the groups `group` are; shape `(V,)`."""
        return self.shares(group) @ self.means

    def number_for(self, group: np.ndarray) -> float:
        """How many controls of a single group would give a mean with the sampling error of `mean_for(group)`."""
        return float(1 / (self.shares(group) ** 2 / self.counts).sum())
