"""Metrics, one formula each, in numpy."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])


def row_pearson(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row of `(n, V)` over the entries where `mask` is true, shape `(n,)`; NaN where fewer
    than two entries count or either side does not vary."""
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
    # Phi(w) by interpolation in a table of erf; error below 1e-8.
    grid = np.linspace(-6.0, 6.0, 24_001)
    cumulative = np.interp(w, grid, 0.5 * (1 + _erf(grid / math.sqrt(2))), left=0.0, right=1.0)
    density = np.exp(-0.5 * w**2) / math.sqrt(2 * math.pi)
    return deviation * (w * (2 * cumulative - 1) + 2 * density - 1 / math.sqrt(math.pi))


def interval_coverage(
    mean: np.ndarray, variance: np.ndarray, observed: np.ndarray, z: float = 1.6448536
) -> np.ndarray:
    """Whether each observed value lies within `mean` +- `z` standard deviations (90 % by default); bool, any shape."""
    return np.abs(observed - mean) <= z * np.sqrt(np.maximum(variance, 0.0))


def cluster_bootstrap(
    numerators: np.ndarray, denominators: np.ndarray, n_resamples: int = 1_000, seed: int = 0
) -> np.ndarray:
    """Resampled ratios of sums, `(n_resamples, methods)`: whole groups are drawn with replacement, the same draws for
    every method. `numerators` hold the sum over each group, `(methods, groups)`, `denominators` too or `(groups,)`."""
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


# --- Perturbation responses: one row a perturbation, delta = pseudobulk minus control pseudobulk, over scored genes --


def pearson_delta(predicted: np.ndarray, observed: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """r(delta_hat, delta) over genes, `(P,)`, NaN where a side does not vary (`pearson_delta` of cell-eval, there over
    all genes). `mask` `(V,)` or `(P, V)` are the genes that count."""
    return row_pearson(predicted, observed, _mask(predicted, mask))


def direction_accuracy(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Share of genes whose predicted sign is the observed one, among genes whose observed delta is not zero."""
    counted = observed != 0
    hits = (np.sign(predicted) == np.sign(observed)) & counted
    return _ratio(hits.sum(axis=1), counted.sum(axis=1))


def normalised_squared_error(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """||delta_hat - delta||^2 / ||delta||^2: 1 is what predicting no response scores."""
    return _ratio(((predicted - observed) ** 2).sum(axis=1), (observed**2).sum(axis=1))


def mean_absolute_error(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean over genes of |predicted - observed| (`mae`, on deltas `mae_delta`, of cell-eval)."""
    return np.abs(predicted - observed).mean(axis=1)


def mean_squared_error(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean over genes of the squared difference (`mse`, on deltas `mse_delta`, of cell-eval)."""
    return ((predicted - observed) ** 2).mean(axis=1)


def r2_score(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """1 - SSE / SST over genes, SST about the mean over genes."""
    about_mean = observed - observed.mean(axis=1, keepdims=True)
    return 1 - _ratio(((predicted - observed) ** 2).sum(axis=1), (about_mean**2).sum(axis=1))


def weighted_mse(predicted: np.ndarray, observed: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mean squared error with weights from differential expression (Mejia et al. 2025, arXiv 2506.22641): |score|
    (such as Wilcoxon z, `(P, V)`) scaled to 0..1 within the perturbation, squared, summing to 1."""
    size = np.abs(scores)
    low, high = size.min(axis=1, keepdims=True), size.max(axis=1, keepdims=True)
    weights = np.where(high > low, (size - low) / np.where(high > low, high - low, 1.0), 1.0) ** 2
    return (weights * (predicted - observed) ** 2).sum(axis=1) / weights.sum(axis=1)


def l2_top_expressed(predicted: np.ndarray, observed: np.ndarray, control: np.ndarray, n: int = 1_000) -> np.ndarray:
    """Euclidean distance of pseudobulks on the `n` genes most expressed in controls (Ahlmann-Eltze et al. 2025)."""
    top = np.argsort(-control, kind="stable")[:n]
    return np.linalg.norm((predicted - observed)[:, top], axis=1)


def systema_pearson(predicted: np.ndarray, observed: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """r(mu_p - R, mu_hat_p - R), R the mean of the training perturbations' centroids (Systema, Vinas Torne et al.
    2025), `(V,)` or `(P, V)`; all pseudobulks or all deltas. What all perturbations have in common cannot score here:
    predicting R itself counts as 0."""
    return np.nan_to_num(pearson_delta(predicted - reference, observed - reference))


def discrimination(
    predicted: np.ndarray,
    observed: np.ndarray,
    distance: str = "l1",
    mask: np.ndarray | None = None,
    ties: str = "midrank",
) -> np.ndarray:
    """Perturbation discrimination score, 1 - rank / N: how many observed responses lie closer to the prediction.

    `ties="position"` and a mask that drops each row's own target give cell-eval's score; `ties="midrank"` and a mask
    that drops every target of the panel give cell-eval2's, in which a constant prediction scores near 0.5.

    Args:
        predicted, observed (`np.ndarray`): Deltas, shape `(P, V)`.
        distance (`str`, *optional*, defaults to `"l1"`): `"l1"`, `"l2"` or `"cosine"`.
        mask (`np.ndarray` of bool, *optional*): Genes that count, shape `(V,)`, or `(P, V)` for each row's own.
        ties (`str`, *optional*, defaults to `"midrank"`): `"midrank"` or `"position"`.

    Returns:
        `np.ndarray` of shape `(P,)`; 1 is best.
    """
    return 1 - _match_ranks(predicted, observed, distance, mask, ties) / len(predicted)


def centroid_accuracy(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Share of the other perturbations' centroids that are farther (Euclid) than the right one (Systema)."""
    return 1 - _match_ranks(predicted, observed, "l2", None, "midrank") / max(len(predicted) - 1, 1)


def perturbench_rank(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Share of other *predictions* at least as close to the observed response by cosine (PerturBench, Wu et al. 2024);
    0 is best."""
    between = _pairwise_distance(observed, predicted, "cosine", None)
    own = np.diag(between)[:, None]
    return ((between <= own).sum(axis=1) - 1) / max(len(predicted) - 1, 1)


def _match_ranks(predicted, observed, distance, mask, ties) -> np.ndarray:
    between = _pairwise_distance(predicted, observed, distance, mask)
    if ties == "position":
        order = np.argsort(between, axis=1)
        return np.argmax(order == np.arange(len(predicted))[:, None], axis=1).astype(float)
    own = np.diag(between)[:, None]
    return (between < own).sum(axis=1) + ((between == own).sum(axis=1) - 1) / 2


def _pairwise_distance(rows: np.ndarray, columns: np.ndarray, distance: str, mask: np.ndarray | None) -> np.ndarray:
    """Distance of every row of `rows` to every row of `columns`; a `(P, V)` mask belongs to `rows`."""
    if mask is not None and np.ndim(mask) == 2:
        each = [_pairwise_distance(row[None, m], columns[:, m], distance, None) for row, m in zip(rows, mask)]
        return np.concatenate(each)
    if mask is not None:
        rows, columns = rows[:, mask], columns[:, mask]
    if distance == "cosine":
        norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(columns, axis=1)
        return 1 - np.divide(rows @ columns.T, norms, out=np.zeros(norms.shape), where=norms > 0)
    output = np.empty((len(rows), len(columns)))
    for index, row in enumerate(rows):
        gaps = columns - row
        output[index] = np.abs(gaps).sum(axis=1) if distance == "l1" else np.sqrt(np.einsum("nv,nv->n", gaps, gaps))
    return output


def significant_genes(log_fold_change: np.ndarray, fdr: np.ndarray, threshold: float = 0.05) -> np.ndarray:
    """Genes with FDR below the threshold, largest absolute log fold change first."""
    genes = np.flatnonzero(fdr < threshold)
    return genes[np.argsort(-np.abs(log_fold_change[genes]), kind="stable")]


def de_overlap(observed: np.ndarray, predicted: np.ndarray, k: int | None = None, precision: bool = False) -> float:
    """Share of the top-k differentially expressed genes found (`overlap_at_k` / `precision_at_k` of cell-eval).

    Args:
        observed, predicted (`np.ndarray`): Ranked genes, from [`significant_genes`].
        k (`int`, *optional*): How many of each; all observed (for precision: predicted) ones by default.
        precision (`bool`, *optional*, defaults to `False`): Whether `k` is limited by the predicted list instead.
    """
    limit = len(predicted) if precision else len(observed)
    k = limit if k is None else min(k, limit)
    return len(np.intersect1d(observed[:k], predicted[:k])) / k if k else 0.0


def _mask(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return np.broadcast_to(True if mask is None else np.asarray(mask, dtype=bool), values.shape)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
