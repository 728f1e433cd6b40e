"""Scores of predicted responses of a screen, one formula a metric, one value a perturbation."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.evaluation import metrics
from modeling_gppc.evaluation.screen_truth import ScreenTruth

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
    "strong_coverage90",
    "strong_crps",
    "strong_width90",
)
Z90 = 1.6448536


@dataclasses.dataclass
class ScreenPrediction:
    """Predicted responses of some perturbations.

    Args:
        delta (`np.ndarray`): Shape `(P, V)`.
        variance (`np.ndarray`, *optional*): Of `delta` as a prediction of the true mean response, shape `(P, V)`.
        reads_perturbed_cells (`bool`, *optional*, defaults to `False`): Whether perturbed cells of the screen, other
            than the change at the target itself, were used.
        control_weight (`np.ndarray`, *optional*): How much of the error of the training responses' mean of controls is in
            each prediction, shape `(P,)`; see [`corrected_pearson`].
    """

    delta: np.ndarray
    variance: np.ndarray | None = None
    reads_perturbed_cells: bool = False
    control_weight: np.ndarray | None = None


# Perturbations are told apart among at most so many: the work grows with their number, not with its square.
MAX_RIVALS = 256
# Genes of a perturbation whose predicted change is largest: those that a user reads.
N_STRONG = 50


def score_prediction(
    prediction: ScreenPrediction,
    truth: ScreenTruth,
    reference: np.ndarray,
    strong: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Every metric of one method that needs no cells, `(P,)` each; 0 is the correlation of a prediction without any
    direction.

    `reference` `(P, V)` is Systema's R as deltas: the mean of the training perturbations. The intervals of the genes
    `strong` (see [`strong_genes`]; by default those of this prediction) are judged apart. Perturbations are told apart
    from those of their group in `groups` `(P,)`.
    """
    mask = truth.mask
    kept = prediction.delta[:, mask], truth.delta[:, mask]
    scores = {
        "pearson_delta": np.nan_to_num(metrics.pearson_delta(*kept)),
        "systema_pearson": metrics.systema_pearson(*kept, reference[:, mask]),
        "direction_accuracy": metrics.direction_accuracy(*kept),
        "normalised_squared_error": metrics.normalised_squared_error(*kept),
        "mae_delta": metrics.mean_absolute_error(*kept),
        "mse_delta": metrics.mean_squared_error(*kept),
        "r2_delta": metrics.r2_score(*kept),
        "l2_top_expressed": metrics.l2_top_expressed(*kept, truth.control[mask]),
    } | discriminations(*kept, groups)
    if truth.de_scores is not None:
        scores |= differential_scores(kept[0], kept[1], truth)
    if prediction.variance is not None:
        # The observed mean has an error of its own; an interval for it must hold both.
        total = (prediction.variance + truth.sampling_variance)[:, mask]
        inside = np.where(truth.countable[:, mask], metrics.interval_coverage(kept[0], total, kept[1]), np.nan)
        crps = metrics.gaussian_crps(kept[0], total, kept[1])
        scores |= {"coverage90": _mean_of_rows(inside), "crps": crps.mean(axis=1)}
        strong = strong_genes(prediction, truth) if strong is None else strong
        width = 2 * Z90 * np.sqrt(prediction.variance[:, mask])
        for name, table in (("coverage90", inside), ("crps", crps), ("width90", width)):
            scores[f"strong_{name}"] = _mean_of_rows(np.take_along_axis(table, strong, axis=1))
    return scores


def strong_genes(prediction: ScreenPrediction, truth: ScreenTruth) -> np.ndarray:
    """The 50 scored genes whose predicted change is largest, as positions among the scored genes, `(P, 50)`."""
    predicted = np.abs(prediction.delta[:, truth.mask])
    return np.argsort(-predicted, axis=1, kind="stable")[:, :N_STRONG]


def _mean_of_rows(table: np.ndarray) -> np.ndarray:
    """Mean of each row without NaN; NaN where nothing is left."""
    known = np.isfinite(table)
    count = known.sum(axis=1)
    total = np.where(known, table, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(table), np.nan), where=count > 0)


def rivals(folds: np.ndarray, seed: int = 0) -> np.ndarray:
    """Groups `(P,)` in which perturbations are told apart: those that were left out together (equal in `folds`), at
    most 256.

    A method that learns from training responses misses each perturbation that it leaves out: even their mean is
    farther from that one than from the others. Among perturbations left out together that cancels.
    """
    groups, generator = np.zeros(len(folds), dtype=int), np.random.default_rng(seed)
    for fold in np.unique(folds):
        rows = generator.permutation(np.flatnonzero(folds == fold))
        for part in np.array_split(rows, -(-len(rows) // MAX_RIVALS)):
            groups[part] = groups.max() + 1
    return groups


def discriminations(
    predicted: np.ndarray, observed: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Metrics that tell perturbations apart within their groups, see [`rivals`]; NaN where one is alone. Ranks are
    among the *others*, so that chance is 0.5 however small a group is: cell-eval's 1 - rank / N has N - 1."""
    groups = rivals(np.zeros(len(predicted), dtype=int)) if groups is None else groups
    found: dict[str, np.ndarray] = {}
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        pair = predicted[rows], observed[rows]
        among = len(rows) / max(len(rows) - 1, 1)
        for name, values in (
            ("discrimination_l1", 1 - among * (1 - metrics.discrimination(*pair, "l1"))),
            ("discrimination_cosine", 1 - among * (1 - metrics.discrimination(*pair, "cosine"))),
            ("centroid_accuracy", metrics.centroid_accuracy(*pair)),
            ("perturbench_rank", metrics.perturbench_rank(*pair)),
        ):
            found.setdefault(name, np.full(len(predicted), np.nan))[rows] = values if len(rows) > 1 else np.nan
    return found


def differential_scores(predicted: np.ndarray, observed: np.ndarray, truth: ScreenTruth) -> dict[str, np.ndarray]:
    """Metrics of differentially expressed genes, from responses at the scored genes, `(P, n_scored)`; predictions have
    no test of their own: genes rank by the size of the predicted change."""
    mask = truth.mask
    genes = [metrics.significant_genes(c, f) for c, f in zip(truth.de_change[:, mask], truth.de_fdr[:, mask])]
    ranked = [np.argsort(-np.abs(row), kind="stable")[: np.count_nonzero(row)] for row in predicted]
    overlap = [metrics.de_overlap(g, r[: len(g)]) if len(g) else np.nan for g, r in zip(genes, ranked)]
    precision = [np.isin(r[:50], g).sum() / 50 if len(g) else np.nan for g, r in zip(genes, ranked)]
    return {
        "weighted_mse": metrics.weighted_mse(predicted, observed, truth.de_scores[:, mask]),
        "de_overlap": np.array(overlap),
        "de_precision_at_50": np.array(precision),
    }


def energy_distances(
    screen: Screen,
    truth: ScreenTruth,
    predictions: Mapping[str, ScreenPrediction],
    max_cells: int = 200,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Energy distance of perturbed cells from control cells moved by the predicted response, for every method, `(P,)`;
    of at most `max_cells` of either.

    2 E|C + d - X| - E|C - C'| - E|X - X'| with |c + d - x|^2 = |c - x|^2 + 2 d (c - x) + |d|^2, so that a method costs
    only products with its prediction d.
    """
    generator = np.random.default_rng(seed)

    def draw(label: str) -> np.ndarray:
        cells = generator.permutation(screen.cells_of(label))[:max_cells]
        return screen.values[cells][:, truth.mask].astype(np.float64)

    def squares(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T

    controls = draw(CONTROL)
    among_controls = np.sqrt(np.maximum(squares(controls, controls), 0)).mean()
    found = {name: np.zeros(len(truth.labels)) for name in predictions}
    for row, label in enumerate(truth.labels):
        cells = draw(label)
        between, within = squares(controls, cells), np.sqrt(np.maximum(squares(cells, cells), 0)).mean()
        for name, prediction in predictions.items():
            moved = prediction.delta[row, truth.mask]
            gaps = between + 2 * ((controls @ moved)[:, None] - cells @ moved) + moved @ moved
            found[name][row] = 2 * np.sqrt(np.maximum(gaps, 0)).mean() - among_controls - within
    return found


def swapped_pearson(prediction: ScreenPrediction, truth: ScreenTruth) -> np.ndarray:
    """Correlation of each response with the predictions made for the *other* perturbations, averaged; `(P,)`.

    A hard null: it keeps what all perturbations of a screen have in common.
    """
    n = len(truth.labels)
    if n < 2:
        return np.full(n, np.nan)
    table = directions(truth.delta[:, truth.mask]) @ directions(prediction.delta[:, truth.mask]).T
    return (table.sum(axis=1) - np.diag(table)) / (n - 1)


def directions(rows: np.ndarray) -> np.ndarray:
    """Rows `(n, V)` less their mean, of length one, so that products are correlations; zero where nothing varies."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)
