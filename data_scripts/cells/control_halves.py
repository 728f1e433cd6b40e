"""Control cells in two halves: one for all that is fitted or chosen, the other for the truth.

A response is the mean of perturbed cells minus the mean of control cells. Where the training responses and the truth
subtract the *same* mean of controls, the sampling error of that mean is in both, and whatever repeats training responses
predicts it.
"""

import numpy as np

from data_scripts.cells.screen_cells import some_cells
from data_scripts.cells.screens import Screen

# Fewer controls than this on a side make a mean that says nothing.
MIN_HALF = 10


def control_halves(screen: Screen, divisions: int = 3, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """`2 x divisions` pairs of rows of control cells, which share none: random halves, batches and cell lines alike on
    both sides, each in both directions. Raises `ValueError` if a half would hold fewer than 10 cells."""
    controls = np.flatnonzero(screen.is_control)
    if len(controls) < 2 * MIN_HALF:
        raise ValueError(
            f"`screen` has {len(controls)} control cells; wanted at least {2 * MIN_HALF}, so that the truth and what is "
            "fitted have controls of their own: give `controls` 'shared' for the biased form."
        )
    generator, found = np.random.default_rng(seed), []
    for _ in range(divisions):
        first, second = stratified_halves(controls, screen.group, generator)
        found += [(first, second), (second, first)]
    return found


def stratified_halves(
    rows: np.ndarray, group: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of `rows`, each with half of every group; groups of odd size take turns."""
    order = generator.permutation(rows)
    order = order[np.argsort(group[order], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def with_controls(screen: Screen, controls: np.ndarray) -> Screen:
    """The screen with all its perturbed cells and only the control cells `controls` (rows)."""
    return some_cells(screen, np.sort(np.concatenate([np.flatnonzero(~screen.is_control), controls])))
