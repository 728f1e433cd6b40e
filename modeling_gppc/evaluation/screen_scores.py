"""Observed responses of a screen, and the scores of predicted ones with their intervals, null and ceiling."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special
import scipy.stats

from data_scripts.cells.control_halves import stratified_halves
from data_scripts.cells.control_levels import ControlLevels
from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.evaluation import metrics
from modeling_gppc.fitting.observed_responses import scored_genes, within_variance

# Order of columns in tables and files.
METRICS = (
    "pearson_delta",
    "systema_pearson",
    "direction_accuracy",
    "normalised_squared_error",
    "mae_delta",
    "mse_delta",
    "r2_delta",
    "weighted_mse",
    "l2_top_expressed",
    "discrimination_l1",
    "discrimination_cosine",
    "centroid_accuracy",
    "perturbench_rank",
    "de_overlap",
    "de_precision_at_50",
    "energy_distance",
    "coverage90",
    "crps",
)


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
        de_scores, de_fdr, de_change (`np.ndarray`): Wilcoxon z, Benjamini-Hochberg FDR and log fold change of each
            gene, shape `(P, V)`.
    """

    labels: list[str]
    delta: np.ndarray
    control: np.ndarray
    sampling_variance: np.ndarray
    mask: np.ndarray
    ceiling: np.ndarray
    n_cells: np.ndarray
    countable: np.ndarray
    de_scores: np.ndarray
    de_fdr: np.ndarray
    de_change: np.ndarray

    def select(self, index: np.ndarray) -> "ScreenTruth":
        """Some of the perturbations."""
        shared = ("control", "mask")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["labels"] = [self.labels[i] for i in index]
        return ScreenTruth(**{k: v if k in shared or k == "labels" else v[index] for k, v in fields.items()})


def join_truths(parts: Sequence[ScreenTruth]) -> ScreenTruth:
    """Rows of several truths under each other; genes and mask are the same, the control level is their mean."""
    joined = {}
    for field in dataclasses.fields(ScreenTruth):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "labels":
            joined[field.name] = [label for labels in values for label in labels]
        elif field.name in ("mask", "control"):
            joined[field.name] = values[0] if field.name == "mask" else np.mean(values, axis=0)
        else:
            joined[field.name] = np.concatenate(values)
    return ScreenTruth(**joined)


@dataclasses.dataclass
class ScreenPrediction:
    """Predicted responses of some perturbations.

    Args:
        delta (`np.ndarray`): Shape `(P, V)`.
        variance (`np.ndarray`, *optional*): Of `delta` as a prediction of the true mean response, shape `(P, V)`.
        reads_perturbed_cells (`bool`, *optional*, defaults to `False`): Whether perturbed cells of the screen, other
            than the change at the target itself, were used.
    """

    delta: np.ndarray
    variance: np.ndarray | None = None
    reads_perturbed_cells: bool = False


def observe(
    screen: Screen,
    labels: Sequence[str],
    seed: int = 0,
    n_splits: int = 10,
    controls_of: Screen | None = None,
) -> ScreenTruth:
    """Observed responses, their sampling error, differential expression and split-half ceiling.

    Args:
        screen (`Screen`): The perturbed cells, and the controls that responses are measured against.
        labels (`Sequence[str]`): Perturbations.
        seed (`int`, *optional*, defaults to 0), n_splits (`int`, *optional*, defaults to 10): Of the ceiling.
        controls_of (`Screen`, *optional*): The screen whose controls a replicate has; those of `screen` in halves when
            absent or the same.
    """
    values, levels = screen.values, screen.control_levels
    within = within_variance(screen, [CONTROL, *screen.perturbations])
    mask = scored_genes(screen)
    generator = np.random.default_rng(seed)
    if controls_of is None or controls_of is screen:
        halves = [stratified_halves(screen.cells_of(CONTROL), screen.group, generator) for _ in range(n_splits)]
        sides = [[ControlLevels(values, screen.group, rows) for rows in pair] for pair in halves]
    else:
        sides = [[levels, controls_of.control_levels]] * n_splits
    cells = [screen.cells_of(label) for label in labels]
    counts = np.array([len(rows) for rows in cells])
    delta = [values[rows].mean(axis=0, dtype=np.float64) - levels.mean_for(screen.group[rows]) for rows in cells]
    error = [1 / len(rows) + 1 / levels.number_for(screen.group[rows]) for rows in cells]
    scores, fdr, change = differential_expression(screen, labels)
    return ScreenTruth(
        labels=list(labels),
        delta=np.array(delta),
        control=values[screen.cells_of(CONTROL)].mean(axis=0, dtype=np.float64),
        sampling_variance=within * np.array(error)[:, None],
        mask=mask,
        ceiling=np.array([split_half(screen, rows, sides, mask, generator) for rows in cells]),
        n_cells=counts,
        countable=counts[:, None] * (values != 0).mean(axis=0) >= 1,
        de_scores=scores,
        de_fdr=fdr,
        de_change=change,
    )


def split_half(
    screen: Screen,
    cells: np.ndarray,
    sides: Sequence[Sequence[ControlLevels]],
    mask: np.ndarray,
    generator: np.random.Generator,
) -> float:
    """Mean correlation of the responses of two halves of the rows `cells`, each against other controls: what a replicate
    scores."""
    found = []
    for controls in sides:
        order = generator.permutation(cells)
        halves = [
            screen.values[rows].mean(axis=0) - level.mean_for(screen.group[rows])
            for rows, level in zip((order[::2], order[1::2]), controls)
        ]
        found.append(metrics.pearson_delta(halves[0][None], halves[1][None], mask)[0])
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.0


def differential_expression(screen: Screen, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wilcoxon rank-sum test of each perturbation against all controls, ties corrected, normal approximation.

    Returns:
        z, Benjamini-Hochberg FDR within the perturbation and log2 fold change of mean expm1, each `(P, V)`; the fold
        change is scanpy's, the p-values are `scipy.stats.mannwhitneyu`'s without continuity correction.
    """
    controls = screen.values[screen.cells_of(CONTROL)]
    output = np.zeros((3, len(labels), screen.values.shape[1]))
    control_level = np.expm1(controls.astype(np.float64)).mean(axis=0)
    for row, label in enumerate(labels):
        cells = screen.values[screen.cells_of(label)]
        z = rank_sum_z(cells, controls)
        p = scipy.special.erfc(np.abs(z) / np.sqrt(2))
        order = np.argsort(p)
        adjusted = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
        output[0, row], output[1, row, order] = z, np.minimum(adjusted, 1.0)
        level = np.expm1(cells.astype(np.float64)).mean(axis=0)
        output[2, row] = np.log2((level + 1e-9) / (control_level + 1e-9))
    return output[0], output[1], output[2]


def rank_sum_z(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """z of the rank sum of `first` against `second`, column by column, variance corrected for ties."""
    n, m = len(first), len(second)
    ranks = scipy.stats.rankdata(np.concatenate([first, second]), axis=0)
    # Var of the rank sum is n m / ((N - 1) N) x (sum of squared ranks - N (N + 1)^2 / 4), whatever the ties.
    total = n + m
    spread = (ranks**2).sum(axis=0) - total * (total + 1) ** 2 / 4
    variance = n * m / (total * (total - 1)) * spread
    difference = ranks[:n].sum(axis=0) - n * (total + 1) / 2
    return np.divide(difference, np.sqrt(variance), out=np.zeros_like(difference), where=variance > 1e-9)


def score_prediction(
    prediction: ScreenPrediction,
    truth: ScreenTruth,
    reference: np.ndarray,
    screen: Screen | None = None,
    max_cells: int = 200,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Every metric of one method, one value a perturbation.

    A prediction without any direction (no change at the scored genes) has no correlation; it scores 0 there.

    Args:
        prediction (`ScreenPrediction`): Of the perturbations of `truth`, in order.
        truth (`ScreenTruth`): What was observed.
        reference (`np.ndarray`): Systema's R as deltas: mean of the training perturbations, shape `(P, V)`.
        screen (`Screen`, *optional*): For the energy distance, which needs cells: controls moved by the predicted
            delta against perturbed cells, at most `max_cells` of each.
        max_cells (`int`, *optional*, defaults to 200): See above.
        seed (`int`, *optional*, defaults to 0): Draws those cells.
    """
    delta_hat, delta, mask = prediction.delta, truth.delta, truth.mask
    kept = delta_hat[:, mask], delta[:, mask]
    scores = {
        "pearson_delta": np.nan_to_num(metrics.pearson_delta(*kept)),
        "systema_pearson": metrics.systema_pearson(*kept, reference[:, mask]),
        "direction_accuracy": metrics.direction_accuracy(*kept),
        "normalised_squared_error": metrics.normalised_squared_error(*kept),
        "mae_delta": metrics.mean_absolute_error(*kept),
        "mse_delta": metrics.mean_squared_error(*kept),
        "r2_delta": metrics.r2_score(*kept),
        "weighted_mse": metrics.weighted_mse(*kept, truth.de_scores[:, mask]),
        "l2_top_expressed": metrics.l2_top_expressed(*kept, truth.control[mask]),
        "discrimination_l1": metrics.discrimination(*kept, "l1"),
        "discrimination_cosine": metrics.discrimination(*kept, "cosine"),
        "centroid_accuracy": metrics.centroid_accuracy(*kept),
        "perturbench_rank": metrics.perturbench_rank(*kept),
    }
    observed_genes = [metrics.significant_genes(c, f) for c, f in zip(truth.de_change[:, mask], truth.de_fdr[:, mask])]
    # Point predictions have no test of their own: genes rank by the size of the predicted change.
    ranked = [np.argsort(-np.abs(row), kind="stable")[: np.count_nonzero(row)] for row in kept[0]]
    scores["de_overlap"] = np.array(
        [
            metrics.de_overlap(genes, rank[: len(genes)]) if len(genes) else np.nan
            for genes, rank in zip(observed_genes, ranked)
        ]
    )
    scores["de_precision_at_50"] = np.array(
        [np.isin(rank[:50], genes).sum() / 50 if len(genes) else np.nan for genes, rank in zip(observed_genes, ranked)]
    )
    if screen is not None:
        generator = np.random.default_rng(seed)
        controls = generator.permutation(screen.cells_of(CONTROL))[:max_cells]
        distances = []
        for row, label in enumerate(truth.labels):
            cells = generator.permutation(screen.cells_of(label))[:max_cells]
            moved = screen.values[controls][:, mask] + kept[0][row]
            distances.append(metrics.energy_distance(moved, screen.values[cells][:, mask]))
        scores["energy_distance"] = np.array(distances)
    if prediction.variance is not None:
        # The observed mean has an error of its own; an interval for it must hold both.
        total = (prediction.variance + truth.sampling_variance)[:, mask]
        inside = metrics.interval_coverage(kept[0], total, kept[1])
        scores["coverage90"] = np.array(
            [hits[told].mean() if told.any() else np.nan for hits, told in zip(inside, truth.countable[:, mask])]
        )
        scores["crps"] = metrics.gaussian_crps(kept[0], total, kept[1]).mean(axis=1)
    return scores


def swapped_pearson(prediction: ScreenPrediction, truth: ScreenTruth) -> np.ndarray:
    """Correlation of each response with the predictions made for the *other* perturbations, averaged; `(P,)`.

    A hard null: it keeps what all perturbations of a screen have in common.
    """
    n = len(truth.labels)
    if n < 2:
        return np.full(n, np.nan)
    centred = []
    for values in (truth.delta[:, truth.mask], prediction.delta[:, truth.mask]):
        values = values - values.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        centred.append(np.divide(values, norms, out=np.zeros_like(values), where=norms > 1e-12))
    table = centred[0] @ centred[1].T
    return (table.sum(axis=1) - np.diag(table)) / (n - 1)


def bootstrap_perturbations(values: np.ndarray, n_resamples: int = 2_000, seed: int = 0) -> list[float]:
    """95 % interval of the mean over perturbations, perturbations drawn with replacement; NaN entries are left out."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return [float("nan"), float("nan")]
    samples = metrics.cluster_bootstrap(values, np.ones(len(values)), n_resamples, seed)
    return metrics.percentile_interval(samples[:, 0])


def resampled_correlations(
    screen: Screen,
    truth: ScreenTruth,
    predictions: Mapping[str, ScreenPrediction],
    n_resamples: int = 200,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """pearson_delta of every method against responses recomputed from cells drawn with replacement, controls too.

    Returns:
        Method -> correlations `(n_resamples + 1, P)`, the first row those with the responses as observed; 0 where there is
        no direction. One perturbation is in memory at a time.
    """

    def means(cells):
        values = screen.values[cells][:, truth.mask]
        # A cell is drawn as often in every division of the controls: what a division shares with others, their error does.
        times = np.stack([_times_drawn(name, n_resamples, seed) for name in screen.barcodes[cells]], axis=1)
        times[times.sum(axis=1) == 0] = 1  # a small group of which no cell is drawn
        return (times.astype(np.float32) @ values) / times.sum(axis=1, keepdims=True)

    controls, levels = screen.cells_of(CONTROL), screen.control_levels
    drawn_levels = np.stack([means(controls[screen.group[controls] == name]) for name in levels.names])
    units = {name: _directions(prediction.delta[:, truth.mask]) for name, prediction in predictions.items()}
    found = {name: np.zeros((n_resamples + 1, len(truth.labels))) for name in predictions}
    for row, label in enumerate(truth.labels):
        cells = screen.cells_of(label)
        drawn = means(cells) - np.tensordot(levels.shares(screen.group[cells]), drawn_levels, axes=1)
        drawn = _directions(np.concatenate([truth.delta[row][None, truth.mask], drawn]))
        for name, rows in units.items():
            found[name][:, row] = drawn @ rows[row]
    return found


def _times_drawn(name: str, n_resamples: int, seed: int) -> np.ndarray:
    """How often a cell is drawn in each resample (Poisson bootstrap), from its name; int of shape `(n_resamples,)`."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).poisson(1.0, n_resamples)


def _directions(rows: np.ndarray) -> np.ndarray:
    """Rows less their mean, of length one; zero where nothing varies."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)


def interval_of_mean(correlations: np.ndarray, rows: np.ndarray | None = None, seed: int = 0) -> list[float]:
    """95 % interval of a mean over perturbations, which are drawn with replacement together with the cells behind them.

    The mean of the control cells errs for all perturbations alike; drawing perturbations alone would not see it. What
    drawing cells adds is taken about its own mean: responses of drawn cells are noisier than those observed.

    Args:
        correlations (`np.ndarray`): From [`resampled_correlations`], or the difference of two, `(n_resamples + 1, P)`.
        rows (`np.ndarray`, *optional*): Some of the perturbations.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """
    rows = np.arange(correlations.shape[1]) if rows is None else rows
    if len(rows) < 2:
        return [float("nan"), float("nan")]
    point, drawn = correlations[0], correlations[1:]
    drawn = drawn - drawn.mean(axis=0) + point
    generator = np.random.default_rng(seed)
    picks = rows[generator.integers(0, len(rows), size=(2_000, len(rows)))]
    samples = drawn[generator.integers(0, len(drawn), size=2_000)[:, None], picks].mean(axis=1)
    return metrics.percentile_interval(samples)


def compare_methods(
    first: np.ndarray, second: np.ndarray, ceiling: np.ndarray, seed: int = 0
) -> dict[str, float | list[float]]:
    """Difference in mean pearson_delta, with a paired interval over perturbations x resampled cells.

    Args:
        first, second (`np.ndarray`): From [`resampled_correlations`], `(n_resamples + 1, P)`.
        ceiling (`np.ndarray`): Of each perturbation, shape `(P,)`.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.

    Returns:
        `dict` with `difference`, `ci95`, and the same for the perturbations whose ceiling exceeds 0.5 under
        `above_ceiling_half` (`n`, `difference`, `ci95`).
    """
    gap = first - second

    def summarise(rows: np.ndarray) -> dict:
        difference = float(gap[0, rows].mean()) if len(rows) else float("nan")
        return {"n": len(rows), "difference": difference, "ci95": interval_of_mean(gap, rows, seed)}

    return summarise(np.arange(len(ceiling))) | {"above_ceiling_half": summarise(np.flatnonzero(ceiling > 0.5))}


def summarise_method(
    scores: Mapping[str, np.ndarray],
    swapped: np.ndarray,
    shuffled: np.ndarray | None = None,
    seed: int = 0,
) -> dict:
    """Means over perturbations with their 95 % intervals.

    Args:
        scores (`Mapping[str, np.ndarray]`): From [`score_prediction`].
        swapped (`np.ndarray`): See [`swapped_pearson`], shape `(P,)`.
        shuffled (`np.ndarray`, *optional*): pearson_delta of the target-shuffled null, shape `(P,)`.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
    """
    entry: dict = {"n_perturbations": len(swapped)}
    for name in METRICS:
        if name in scores:
            values = scores[name]
            entry[name] = float(np.nanmean(values)) if np.isfinite(values).any() else None
            entry[f"{name}_ci95"] = bootstrap_perturbations(values, seed=seed)
    for name, null in (("swapped", swapped), ("shuffled", shuffled)):
        if null is not None and np.isfinite(null).all():
            entry[f"{name}_pearson"] = float(null.mean())
            entry[f"matched_minus_{name}"] = float((scores["pearson_delta"] - null).mean())
            entry[f"matched_minus_{name}_ci95"] = bootstrap_perturbations(scores["pearson_delta"] - null, seed=seed)
    return entry
