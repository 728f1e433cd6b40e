"""Moments of pairs with unmeasured genes, and the conditional means they imply: the linear floors."""

import numpy as np

from modeling_gppc.evaluation.pair_arrays import PairArrays

# More panels than this and a missing source gene counts as average instead of being marginalised exactly.
MAX_EXACT_PANELS = 6


def masked_mean(values: np.ndarray, panel_index: np.ndarray, panels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each gene over the cells that measure it, and their number; values are zero where not measured."""
    counts = np.bincount(panel_index, minlength=len(panels)) @ panels.astype(np.int64)
    return values.sum(axis=0, dtype=np.float64) / np.maximum(counts, 1), counts


def masked_covariance(first, first_panel, second, second_panel, panels: np.ndarray) -> np.ndarray:
    """Cov(first_j, second_i) over the rows that measure both; inputs centred and zero where not measured."""
    pairs_of_panels, times = np.unique(np.stack([first_panel, second_panel]), axis=1, return_counts=True)
    if panels[np.unique(pairs_of_panels)].all():
        return (first.T @ second).astype(np.float64) / len(first)
    used = panels.astype(np.float64)
    counts = (used[pairs_of_panels[0]].T * times) @ used[pairs_of_panels[1]]
    return (first.T @ second).astype(np.float64) / np.maximum(counts, 1)


class PairMoments:
    """First and second moments of training pairs.

    Args:
        pairs (`PairArrays`): Training pairs.

    Attributes:
        source_mean, target_mean (`np.ndarray`): Shape `(V,)`; a gene that no target measures takes the source's mean.
        covariance (`np.ndarray`): Of one cell, sources and targets pooled, shape `(V, V)`.
        cross (`np.ndarray`): Cov(target_j, source_i), shape `(V, V)`.
    """

    def __init__(self, pairs: PairArrays):
        panels = pairs.panels
        self.source_mean, source_counts = masked_mean(pairs.source, pairs.source_panel, panels)
        self.target_mean, target_counts = masked_mean(pairs.target, pairs.target_panel, panels)
        self.source_mean = np.where(source_counts > 0, self.source_mean, self.target_mean)
        self.target_mean = np.where(target_counts > 0, self.target_mean, self.source_mean)
        source = centre(pairs.source, pairs.source_panel, panels, self.source_mean)
        target = centre(pairs.target, pairs.target_panel, panels, self.target_mean)
        self.cross = masked_covariance(target, pairs.target_panel, source, pairs.source_panel, panels)
        # A cell that is in many pairs says no more about the spread of cells than one that is in a single pair.
        _, first_source = np.unique(pairs.source_id, return_index=True)
        _, first_target = np.unique(pairs.target_id, return_index=True)
        cells = np.concatenate([source[first_source], target[first_target]])
        panel = np.concatenate([pairs.source_panel[first_source], pairs.target_panel[first_target]])
        self.covariance = masked_covariance(cells, panel, cells, panel, panels)
        diagonal = np.arange(len(panels[0]))
        self.covariance[diagonal, diagonal] = np.maximum(np.diag(self.covariance), 1e-4)


def centre(values: np.ndarray, panel_index: np.ndarray, panels: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Values minus the gene's mean, zero where not measured."""
    return (values - mean.astype(values.dtype)) * panels[panel_index]


def shrink(covariance: np.ndarray, share: float) -> np.ndarray:
    """Off-diagonal entries scaled by 1 - `share`."""
    return (1 - share) * covariance + np.diag(share * np.diag(covariance))


class StateRegression:
    """E[B | A] = mu_B + W (A - mu_A), W = T (Sigma + ridge D)^-1 over the genes that the source's panel measures.

    Args:
        moments (`PairMoments`): Of the training pairs.
        panels (`np.ndarray` of bool): Shape `(P, V)`.
        ridge (`float`): How much of the variances D is added to Sigma's diagonal.
    """

    def __init__(self, moments: PairMoments, panels: np.ndarray, ridge: float):
        self.moments, self.panels, self.ridge = moments, panels, ridge
        self.penalised = moments.covariance + ridge * np.diag(np.diag(moments.covariance))
        self._weights: dict[int, np.ndarray] = {}

    def weights(self, panel: int) -> np.ndarray:
        """W of one panel, shape `(V, V)`, zero columns at its unmeasured genes; `-1` is the panel of all genes."""
        if panel not in self._weights:
            measured = np.ones(len(self.penalised), dtype=bool) if panel < 0 else self.panels[panel]
            weights = np.zeros_like(self.penalised)
            solved = np.linalg.solve(self.penalised[np.ix_(measured, measured)], self.moments.cross[:, measured].T)
            weights[:, measured] = solved.T
            self._weights[panel] = weights
        return self._weights[panel]

    def panel_keys(self, pairs: PairArrays) -> np.ndarray:
        """Which weights serve each pair: its panel, or -1 when exact treatment of every panel would cost too much."""
        if len(self.panels) > MAX_EXACT_PANELS or self.panels[np.unique(pairs.source_panel)].all():
            return np.full(len(pairs), -1)
        return pairs.source_panel

    def predict(self, pairs: PairArrays) -> np.ndarray:
        """E[B | A] of every gene, `(n, V)`."""
        centred = centre(pairs.source, pairs.source_panel, pairs.panels, self.moments.source_mean)
        output = np.empty_like(centred)
        keys = self.panel_keys(pairs)
        for key in np.unique(keys):
            rows = np.flatnonzero(keys == key)
            output[rows] = centred[rows] @ self.weights(int(key)).T.astype(centred.dtype)
        return output + self.moments.target_mean.astype(output.dtype)

    def residual_covariance(self, panel: int) -> np.ndarray:
        """Cov(B - E[B | A]) under the moments, Sigma - W T' - T W' + W Sigma W'; positive for any weights."""
        weights, moments = self.weights(panel), self.moments
        explained = weights @ moments.cross.T
        return moments.covariance - explained - explained.T + weights @ moments.covariance @ weights.T


def condition_on_revealed(mean: np.ndarray, covariance: np.ndarray, pairs: PairArrays, block: int = 512) -> np.ndarray:
    """mean_j + C_jS C_SS^-1 (b_S - mean_S) for each pair.

    Args:
        mean (`np.ndarray`): Expectation before anything is revealed, shape `(n, V)`.
        covariance (`np.ndarray`): C, shape `(V, V)`.
        pairs (`PairArrays`): With the revealed genes; any number, padded.

    Returns:
        `np.ndarray` of shape `(n, V)`.
    """
    if pairs.revealed_ids.shape[1] == 0:
        return mean
    ids, mask, levels = pairs.revealed_ids, pairs.revealed_mask, pairs.revealed_levels
    columns = covariance.astype(mean.dtype)
    output = mean.copy()
    diagonal = np.arange(ids.shape[1])
    for start in range(0, len(mean), block):
        rows = slice(start, start + block)
        at, real = ids[rows], mask[rows]
        both = real[:, :, None] & real[:, None, :]
        within = np.where(both, covariance[at[:, :, None], at[:, None, :]], 0.0)
        within[:, diagonal, diagonal] += np.where(real, 1e-6, 1.0)
        surprise = np.where(real, levels[rows] - np.take_along_axis(mean[rows], at, axis=1), 0.0)
        coefficients = np.linalg.solve(within, surprise[..., None])[..., 0].astype(mean.dtype)
        output[rows] += np.matmul(coefficients[:, None, :], columns[at])[:, 0]
    return output
