"""Observed responses of a screen: their sampling error, what a replicate scores, and differential expression."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.special

from data_scripts.cells.control_halves import stratified_halves
from data_scripts.cells.control_levels import ControlLevels
from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.evaluation import metrics
from modeling_gppc.fitting.observed_responses import scored_genes, within_variance


@dataclasses.dataclass
class ScreenTruth:
    """Observed responses of some perturbations.

    Args:
        labels (`list[str]`): The P perturbations.
        delta (`np.ndarray`): Pseudobulk minus that of controls with the same mix of batches, shape `(P, V)`.
        control (`np.ndarray`): Pseudobulk of the controls, shape `(V,)`.
        sampling_variance (`np.ndarray`): Of `delta`, from the variance of cells within labels, shape `(P, V)`.
        mask (`np.ndarray` of bool): Genes that are scored: no target of any perturbation of the screen, shape `(V,)`.
        ceiling (`np.ndarray`): Split-half correlation of the response, shape `(P,)`.
        n_cells (`np.ndarray`): Shape `(P,)`.
        countable (`np.ndarray` of bool): Genes expected, from their share of all cells, in at least one cell of the
            perturbation; the observed delta of the others says only that nothing was counted. Shape `(P, V)`.
        de_scores, de_fdr, de_change (`np.ndarray`, *optional*): Wilcoxon z, Benjamini-Hochberg FDR and log fold change
            of each gene, shape `(P, V)`.
    """

    labels: list[str]
    delta: np.ndarray
    control: np.ndarray
    sampling_variance: np.ndarray
    mask: np.ndarray
    ceiling: np.ndarray
    n_cells: np.ndarray
    countable: np.ndarray
    de_scores: np.ndarray | None = None
    de_fdr: np.ndarray | None = None
    de_change: np.ndarray | None = None

    @property
    def unlike_others(self) -> np.ndarray:
        """1 - correlation of each response with the mean of the others over the scored genes, `(P,)`."""
        others = (self.delta.sum(axis=0) - self.delta) / max(len(self.delta) - 1, 1)
        return 1 - np.nan_to_num(metrics.pearson_delta(self.delta, others, self.mask))


def observe(
    screen: Screen,
    labels: Sequence[str],
    seed: int = 0,
    n_splits: int = 10,
    controls_of: Screen | None = None,
    differential: bool = True,
) -> ScreenTruth:
    """Observed responses, their sampling error, split-half ceiling over `n_splits` and, if asked for, differential
    expression. A replicate has the controls of `controls_of`; those of `screen` in halves where that is absent or the
    same."""
    levels, generator = screen.control_levels, np.random.default_rng(seed)
    within = within_variance(screen, [CONTROL, *screen.perturbations])
    mask = scored_genes(screen)
    if controls_of is None or controls_of is screen:
        halves = [stratified_halves(screen.cells_of(CONTROL), screen.group, generator) for _ in range(n_splits)]
        sides = [[ControlLevels(screen.values, screen.group, rows) for rows in pair] for pair in halves]
    else:
        sides = [[levels, controls_of.control_levels]] * n_splits
    n_cells, n_genes = np.array([len(screen.cells_of(label)) for label in labels]), len(mask)
    delta, error, ceiling = np.zeros((len(labels), n_genes)), np.zeros(len(labels)), np.zeros(len(labels))
    for row, label in enumerate(labels):
        cells = screen.cells_of(label)
        values, group = screen.values[cells], screen.group[cells]
        delta[row] = values.mean(axis=0, dtype=np.float64) - levels.mean_for(group)
        error[row] = 1 / len(cells) + 1 / levels.number_for(group)
        ceiling[row] = split_half(values, group, sides, mask, generator)
    tested = differential_expression(screen, labels) if differential else (None, None, None)
    return ScreenTruth(
        labels=list(labels),
        delta=delta,
        control=screen.values[screen.cells_of(CONTROL)].mean(axis=0, dtype=np.float64),
        sampling_variance=(within * error[:, None]).astype(np.float32),
        mask=mask,
        ceiling=ceiling,
        n_cells=n_cells,
        countable=n_cells[:, None] * screen.values.expressed_share() >= 1,
        de_scores=tested[0],
        de_fdr=tested[1],
        de_change=tested[2],
    )


def split_half(
    values: np.ndarray,
    group: np.ndarray,
    sides: Sequence[Sequence[ControlLevels]],
    mask: np.ndarray,
    generator: np.random.Generator,
) -> float:
    """Mean correlation over the genes of `mask` of the responses of two halves of a perturbation's cells, each against
    other controls (the two of every entry of `sides`): what a replicate scores."""
    first = np.stack([generator.permutation(len(values)) % 2 == 0 for _ in sides]).astype(np.float32)
    responses = []
    for side, chosen in enumerate((first, 1 - first)):
        means = chosen @ values / chosen.sum(axis=1, keepdims=True)
        responses.append(means - np.stack([controls[side].mean_for(group) for controls in sides]))
    found = metrics.pearson_delta(*responses, mask)
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def differential_expression(screen: Screen, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wilcoxon rank-sum test of each perturbation against all controls, ties corrected, normal approximation.

    Returns:
        z, Benjamini-Hochberg FDR within the perturbation and log2 fold change of mean expm1, each `(P, V)`; the fold
        change is scanpy's, the p-values are `scipy.stats.mannwhitneyu`'s without continuity correction.
    """
    group = np.full(len(screen.values), -1)
    for row, label in enumerate([*labels, CONTROL]):
        group[screen.cells_of(label)] = row
    blocks = [rank_sum_z(block, group, len(labels)) for block in screen.values.gene_blocks()]
    z = np.concatenate(blocks, axis=1).astype(np.float32)
    control_level = np.expm1(screen.values[screen.cells_of(CONTROL)].astype(np.float64)).mean(axis=0)
    fdr, change = np.zeros_like(z), np.zeros_like(z)
    for row, label in enumerate(labels):
        p = scipy.special.erfc(np.abs(z[row]) / np.sqrt(2))
        order = np.argsort(p)
        adjusted = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
        fdr[row, order] = np.minimum(adjusted, 1.0)
        level = np.expm1(screen.values[screen.cells_of(label)].astype(np.float64)).mean(axis=0)
        change[row] = np.log2((level + 1e-9) / (control_level + 1e-9))
    return z, fdr, change


def rank_sum_z(values: scipy.sparse.csc_matrix, group: np.ndarray, n_groups: int) -> np.ndarray:
    """z of the rank sums of P groups of cells against one group of controls, variance corrected for ties, `(P, V)`; 0
    where all values are equal. `group` is 0 to P - 1, P for controls, -1 for neither. All groups at once, zeros
    counted instead of sorted."""
    sizes = np.bincount(group[group >= 0], minlength=n_groups + 1)
    n, m = sizes[:n_groups], sizes[n_groups]
    total, sums, ties = n + m, np.empty((values.shape[1], n_groups)), np.empty((values.shape[1], n_groups))
    for gene in range(values.shape[1]):
        entries = slice(values.indptr[gene], values.indptr[gene + 1])
        of, value = group[values.indices[entries]], values.data[entries]
        controls = np.sort(value[(of == n_groups) & (value != 0)])
        kept = (of >= 0) & (of < n_groups) & (value != 0)
        of, value = of[kept], value[kept]
        zeros = n - np.bincount(of, minlength=n_groups)
        # One entry a cell that expresses the gene, and one for all those of a group that do not.
        of, value = np.append(of, np.arange(n_groups)), np.append(value, np.zeros(n_groups, value.dtype))
        cells = np.append(np.ones(len(of) - n_groups, dtype=np.int64), zeros)
        order = np.lexsort((value, of))
        of, value, cells = of[order], value[order], cells[order]
        # Cells of one group and value share their rank: behind all smaller ones, in the middle of their equals.
        starts = np.flatnonzero(np.append(True, (of[1:] != of[:-1]) | (value[1:] != value[:-1])))
        of, value, cells = of[starts], value[starts], np.add.reduceat(cells, starts)
        before = np.cumsum(cells) - cells - (np.cumsum(n) - n)[of]
        control_zeros = m - len(controls)
        below = np.searchsorted(controls, value, "left")
        equal = np.searchsorted(controls, value, "right") - below + control_zeros * (value == 0)
        below += control_zeros * (value > 0)
        sums[gene] = np.bincount(of, cells * (below + before + (equal + cells + 1) / 2), n_groups)
        runs = np.append(np.unique(controls, return_counts=True)[1], control_zeros)
        ties[gene] = np.bincount(of, _ties(equal + cells) - _ties(equal), n_groups) + _ties(runs).sum()
    # Lehmann 1975: n m / 12 x (N + 1 - sum(t^3 - t) / (N (N - 1))).
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    difference = sums - n * (total + 1) / 2
    z = np.divide(difference, np.sqrt(np.maximum(variance, 0)), out=np.zeros_like(sums), where=variance > 1e-9)
    return z.T


def _ties(times: np.ndarray) -> np.ndarray:
    times = times.astype(np.float64)
    return times**3 - times
