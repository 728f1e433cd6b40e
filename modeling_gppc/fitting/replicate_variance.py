"""How much the response to one perturbation differs between batches or cell lines: a random-effects estimate."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.fitting.observed_responses import scored_genes, within_variance

# Fewer cells than this have no response worth comparing.
MIN_CELLS = 10
# Where only one group is left: variance between groups in units of the variance of single cells, rounded means over
# public screens with replicates (batches: Papalexi, Gasperini; cell types: Kang).
USUAL_RATIO = {"batch": 1e-4, "cell_line": 1e-2}
SCALES = np.geomspace(0.01, 100.0, 161)
Z90 = 1.6448536


@dataclasses.dataclass
class GroupResponses:
    """Response `(G, V)` to one perturbation within each of G groups, against the controls of that group; its variance
    by the number of cells, and the genes expected in at least one cell."""

    groups: list[str]
    delta: np.ndarray
    sampling: np.ndarray
    counted: np.ndarray

    def without(self, group: str) -> "GroupResponses":
        """All groups but one."""
        rest = [row for row, name in enumerate(self.groups) if name != group]
        return GroupResponses(
            [self.groups[row] for row in rest], self.delta[rest], self.sampling[rest], self.counted[rest]
        )


def responses_by_group(screen: Screen, labels: Sequence[str], groups: np.ndarray) -> dict[str, GroupResponses]:
    """Responses to the perturbations `labels`, group by group; `groups` names that of each cell, `(n_obs,)`."""
    found = {}
    within = within_variance(screen, [CONTROL, *labels])
    expressed = screen.values.expressed_share()
    rows_of = {group: np.flatnonzero(groups == group) for group in np.unique(groups)}
    controls = {group: np.intersect1d(rows, screen.cells_of(CONTROL)) for group, rows in rows_of.items()}
    levels = {
        group: screen.values[cells].mean(axis=0, dtype=np.float64)
        for group, cells in controls.items()
        if len(cells) >= MIN_CELLS
    }
    n_genes = screen.values.shape[1]
    for label in labels:
        names, delta, sampling, counted = [], [], [], []
        for group, level in levels.items():
            cells = np.intersect1d(screen.cells_of(label), rows_of[group])
            if len(cells) >= MIN_CELLS:
                names.append(group)
                delta.append(screen.values[cells].mean(axis=0, dtype=np.float64) - level)
                sampling.append(within * (1 / len(cells) + 1 / len(controls[group])))
                counted.append(len(cells) * expressed >= 1)
        found[label] = GroupResponses(
            names, *(np.array(part).reshape(len(names), n_genes) for part in (delta, sampling, counted))
        )
    return found


def random_effects(parts: Mapping[str, GroupResponses], within: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Variance of true responses between groups, `(V,)`: observed spread minus sampling error, pooled over
    perturbations and the genes of `mask`; half the gene's own, half what genes of its variance `within` groups have.
    `None` without replicates."""
    squares, freedom = np.zeros(len(within)), 0
    for part in parts.values():
        if len(part.groups) >= 2:
            times = len(part.groups) - 1
            squares += times * (part.delta.var(axis=0, ddof=1) - part.sampling.mean(axis=0))
            freedom += times
    if not freedom:
        return None
    own = squares / freedom
    ratio = max(float(own[mask].sum()), 0.0) / max(float(within[mask].sum()), 1e-12)
    return 0.5 * np.maximum(own, 0) + 0.5 * ratio * within


def variance_between(screen: Screen, parts: Mapping[str, GroupResponses], kind: str) -> np.ndarray:
    """Variance of a response in a new group about its mean over groups, `(V,)`: the random-effects estimate times a
    factor with which 90 % intervals hold 90 % of each group's responses, given the others: their tails are not
    Gaussian."""
    mask = scored_genes(screen)
    within = within_variance(screen, [CONTROL, *parts])
    everything = random_effects(parts, within, mask)
    if everything is None:
        return USUAL_RATIO[kind] * within
    errors, between, sampling = [], [], []
    for group in sorted({name for part in parts.values() for name in part.groups}):
        others = {label: part.without(group) for label, part in parts.items()}
        variance = random_effects(others, within, mask)
        variance = everything if variance is None else variance
        for label, part in parts.items():
            rest = others[label]
            if group not in part.groups or not rest.groups:
                continue
            row, n_rest = part.groups.index(group), len(rest.groups)
            genes = mask & part.counted[row]
            errors.append((part.delta[row] - rest.delta.mean(axis=0))[genes])
            between.append((variance * (1 + 1 / n_rest))[genes])
            sampling.append((part.sampling[row] + rest.sampling.sum(axis=0) / n_rest**2)[genes])
    error, between, sampling = (np.concatenate(part) for part in (errors, between, sampling))
    inside = [np.mean(np.abs(error) <= Z90 * np.sqrt(scale * between + sampling)) for scale in SCALES]
    return SCALES[min(int(np.searchsorted(inside, 0.9)), len(SCALES) - 1)] * everything
