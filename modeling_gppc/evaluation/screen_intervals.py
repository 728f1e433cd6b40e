"""Intervals of scores of a screen: perturbations are drawn, and the cells behind their responses."""

import zlib
from collections.abc import Mapping

import numpy as np

from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.evaluation import metrics
from modeling_gppc.evaluation.screen_scores import ScreenPrediction, directions
from modeling_gppc.evaluation.screen_truth import ScreenTruth


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
    """pearson_delta of every method `(n_resamples + 1, P)` against responses recomputed from cells drawn with
    replacement, controls too; the first row is that of the responses as observed, 0 stands where there is no
    direction."""

    def means(cells):
        values = screen.values[cells][:, truth.mask]
        # A cell is drawn as often in every division of the controls: what a division shares with others, their error does.
        times = np.stack([_times_drawn(name, n_resamples, seed) for name in screen.barcodes[cells]], axis=1)
        times[times.sum(axis=1) == 0] = 1  # a small group of which no cell is drawn
        return (times.astype(np.float32) @ values) / times.sum(axis=1, keepdims=True)

    controls, levels = screen.cells_of(CONTROL), screen.control_levels
    drawn_levels = np.stack([means(controls[screen.group[controls] == name]) for name in levels.names])
    units = {name: directions(prediction.delta[:, truth.mask]) for name, prediction in predictions.items()}
    found = {name: np.zeros((n_resamples + 1, len(truth.labels))) for name in predictions}
    for row, label in enumerate(truth.labels):
        cells = screen.cells_of(label)
        drawn = means(cells) - np.tensordot(levels.shares(screen.group[cells]), drawn_levels, axes=1)
        drawn = directions(np.concatenate([truth.delta[row][None, truth.mask], drawn]))
        for name, rows in units.items():
            found[name][:, row] = drawn @ rows[row]
    return found


def _times_drawn(name: str, n_resamples: int, seed: int) -> np.ndarray:
    """How often a cell is drawn in each resample (Poisson bootstrap), from its name; int of shape `(n_resamples,)`."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).poisson(1.0, n_resamples)


def interval_of_mean(correlations: np.ndarray, rows: np.ndarray | None = None, seed: int = 0) -> list[float]:
    """95 % interval of a mean over perturbations (`rows` of them), drawn with replacement together with the cells
    behind them: `correlations` `(n_resamples + 1, P)` are those of [`resampled_correlations`] or the difference of
    two.

    The mean of the control cells errs for all perturbations alike, which drawing perturbations alone would not see.
    What drawing cells adds is taken about its own mean: responses of drawn cells are noisier than those observed.
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
    """Difference in mean pearson_delta of two methods with a paired interval (`difference`, `ci95`), and the same for
    the perturbations whose ceiling exceeds 0.5, with their number, under `above_ceiling_half`."""
    gap = first - second

    def summarise(rows: np.ndarray) -> dict:
        difference = float(gap[0, rows].mean()) if len(rows) else float("nan")
        return {"n": len(rows), "difference": difference, "ci95": interval_of_mean(gap, rows, seed)}

    return summarise(np.arange(len(ceiling))) | {"above_ceiling_half": summarise(np.flatnonzero(ceiling > 0.5))}
