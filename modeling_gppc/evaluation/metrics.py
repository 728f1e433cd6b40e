"""Metrics, one formula each, in plain numpy."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])


def row_pearson(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row over the entries where `mask` is true.

    Args:
        first, second (`np.ndarray`): Shape `(n, V)`.
        mask (`np.ndarray` of bool): Shape `(n, V)`.

    Returns:
        `np.ndarray` of shape `(n,)`; NaN where fewer than two entries count or either side does not vary.
    """
    count = mask.sum(axis=1)
    safe = np.maximum(count, 1)
    # Sums in double precision: a constant row must come out as exactly without variance.
    centred = []
    for values in (first, second):
        kept = np.where(mask, values, 0.0).astype(np.float64, copy=False)
        centred.append(np.where(mask, kept - (kept.sum(axis=1) / safe)[:, None], 0.0))
    product = np.einsum("nv,nv->n", *centred)
    squares = [np.einsum("nv,nv->n", values, values) for values in centred]
    scales = [np.einsum("nv,nv->n", *(2 * [np.where(mask, values, 0.0)])) for values in (first, second)]
    varied = (count >= 2) & (squares[0] > 1e-12 * scales[0]) & (squares[1] > 1e-12 * scales[1])
    return np.where(varied, product / np.sqrt(np.where(varied, squares[0] * squares[1], 1.0)), np.nan)


def gaussian_crps(mean: np.ndarray, variance: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of Gaussian predictions (Gneiting and Raftery 2007, eq. 21).

    sd (w (2 Phi(w) - 1) + 2 phi(w) - 1 / sqrt(pi)), w = (observed - mean) / sd; any shape, lower is better.
    """
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    w = (observed - mean) / deviation
    cumulative = _normal_cumulative(w)
    density = np.exp(-0.5 * w**2) / math.sqrt(2 * math.pi)
    return deviation * (w * (2 * cumulative - 1) + 2 * density - 1 / math.sqrt(math.pi))


def _normal_cumulative(w: np.ndarray) -> np.ndarray:
    """Phi(w) by interpolation in a table of erf; error below 1e-8, and no library beyond numpy."""
    grid = np.linspace(-6.0, 6.0, 24_001)
    return np.interp(w, grid, 0.5 * (1 + _erf(grid / math.sqrt(2))), left=0.0, right=1.0)


def interval_coverage(
    mean: np.ndarray, variance: np.ndarray, observed: np.ndarray, z: float = 1.6448536
) -> np.ndarray:
    """Whether each observed value lies within `mean` +- `z` standard deviations (90 % by default); bool, any shape."""
    return np.abs(observed - mean) <= z * np.sqrt(np.maximum(variance, 0.0))


def cluster_bootstrap(
    numerators: np.ndarray, denominators: np.ndarray, n_resamples: int = 1_000, seed: int = 0
) -> np.ndarray:
    """Resampled ratios of sums: whole groups are drawn with replacement, the same draws for every method.

    Args:
        numerators (`np.ndarray`): Sum over each group, shape `(methods, groups)`.
        denominators (`np.ndarray`): Shape `(methods, groups)` or `(groups,)`.
        n_resamples (`int`, *optional*, defaults to 1,000): Number of resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `np.ndarray` of shape `(n_resamples, methods)`.
    """
    numerators = np.atleast_2d(np.asarray(numerators, dtype=np.float64))
    denominators = np.broadcast_to(np.asarray(denominators, dtype=np.float64), numerators.shape)
    n_methods, n_groups = numerators.shape
    generator = np.random.default_rng(seed)
    stacked = np.concatenate([numerators, denominators]).T
    output = np.empty((n_resamples, n_methods))
    step = max(1, int(2e7 // max(n_groups, 1)))
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        draws = generator.integers(0, n_groups, size=(size, n_groups))
        flat = draws + np.arange(size)[:, None] * n_groups
        times = np.bincount(flat.ravel(), minlength=size * n_groups).reshape(size, n_groups)
        sums = times @ stacked
        output[start : start + size] = sums[:, :n_methods] / sums[:, n_methods:]
    return output


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> list[float]:
    """Percentile interval of resampled values, `[low, high]`; NaN samples are left out."""
    samples = samples[np.isfinite(samples)]
    if len(samples) == 0:
        return [float("nan"), float("nan")]
    tail = 50 * (1 - level)
    return [float(bound) for bound in np.percentile(samples, [tail, 100 - tail])]
