"""Scores of every method on held-out pairs, with paired bootstrap intervals over target cells."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_scripts.files import write_json
from modeling_gppc.evaluation.mean_floors import Floor
from modeling_gppc.evaluation.metrics import (
    cluster_bootstrap,
    gaussian_crps,
    interval_coverage,
    percentile_interval,
    row_pearson,
)
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.evaluation.pair_floors import FLOORS

# A predictor takes a batch of pairs and returns means `(n, V)`, or means and variances.
Predictor = Callable[[PairArrays], np.ndarray | tuple[np.ndarray, np.ndarray | None]]
MODEL_METHOD, OPTIMUM, REFERENCE = "gppc", "optimum", "mean"
RESULTS_VERSION = 1


def score_predictions(predict: Predictor, pairs: PairArrays, batch_size: int = 1_024) -> dict[str, np.ndarray]:
    """Runs a predictor over all pairs and scores it over measured genes that are not imposed; arrays `(n,)` by name.

    `squared_error` is summed over the scored genes, `n_scored` is their number, `pearson_delta` the correlation of
    predicted with true change (NaN where it is not defined); where there are variances `covered`, scored genes inside
    the 90 % interval, and `crps`, summed. Raises `ValueError` for predictions of another shape, or not finite where
    they are scored.
    """
    parts = []
    for batch in pairs.batches(batch_size):
        output = predict(batch)
        mean, variance = output if isinstance(output, tuple) else (output, None)
        if mean.shape != batch.target.shape:
            raise ValueError(f"`predict` returned shape {mean.shape}; wanted {batch.target.shape}, a row a pair.")
        scored = batch.scored
        error = np.where(scored, mean - batch.target, 0.0)
        if not np.isfinite(error).all():
            raise ValueError("`predict` returned NaN or infinite values at scored genes.")
        # A change is only known where both cells measured the gene.
        known = scored & batch.source_measured
        part = {
            "squared_error": np.einsum("nv,nv->n", error, error, dtype=np.float64),
            "n_scored": scored.sum(axis=1),
            "pearson_delta": row_pearson(mean - batch.source, batch.target - batch.source, known),
        }
        if variance is not None:
            part["covered"] = (interval_coverage(mean, variance, batch.target) & scored).sum(axis=1)
            part["crps"] = np.where(scored, gaussian_crps(mean, variance, batch.target), 0.0).sum(axis=1)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def score_split(
    pairs: PairArrays,
    methods: Mapping[str, Predictor],
    *,
    floors: Mapping[str, Floor] | None = None,
    seed: int = 0,
    n_resamples: int = 1_000,
    progress: bool = True,
) -> dict:
    """Scores a model and its floors on the same pairs.

    Intervals are 95 % percentile bootstrap intervals over target cells: pairs that share a target are drawn together,
    and every method with the same draws, so differences are paired.

    Args:
        methods (`Mapping[str, Predictor]`): Predictors by name; `gppc` is the model, `optimum` the best possible.
        floors (`Mapping[str, Floor]`, *optional*): Fitted floors to score as well, from [`fit_floors`].
        seed, n_resamples (`int`, *optional*): Of the bootstrap.

    Returns:
        `dict` with `n_pairs`, `n_targets`, `n_genes`, `best_floor`, `best_label_free_floor`, `floor_settings` and
        `methods`: name -> `mse`, `r2` (against `mean`) and `pearson_delta`, each with `_ci95`, `uses_labels`,
        `difference_from_best_floor` and `difference_from_best_label_free_floor` (`floor`, `mse`, `ci95`: negative is
        better), `gain_from_revealed` (`mse`, `ci95`: how far the error falls when the genes are imposed), and, where
        the method predicts a variance, `coverage90` and `crps` with `_ci95`.
    """
    floors = floors or {}
    predictors = {**methods, **{name: floor.predict_moments for name, floor in floors.items()}}
    scores, blind = {}, {}
    imposes = bool(pairs.revealed_mask.any())
    for name, predict in tqdm(predictors.items(), desc="scoring", unit="method", disable=not progress):
        scores[name] = score_predictions(predict, pairs)
        if imposes and name != OPTIMUM and (name not in floors or floors[name].uses_revealed):
            blind[name] = score_predictions(_without_revealed(predict), pairs)
    summary = _summarise(pairs, scores, blind, seed, n_resamples)
    return {**summary, "floor_settings": {name: floor.settings for name, floor in floors.items()}}


def _without_revealed(predict: Predictor) -> Predictor:
    """The predictor given the same pairs with nothing imposed; the imposed genes stay out of the score."""

    def predict_without(batch: PairArrays) -> np.ndarray:
        output = predict(batch.without_revealed())
        return output[0] if isinstance(output, tuple) else output

    return predict_without


def _summarise(
    pairs: PairArrays, scores: Mapping[str, dict], blind: Mapping[str, dict], seed: int, n_resamples: int
) -> dict:
    """Means over all pairs, their intervals, and how far methods are apart: a bootstrap that all of them share."""
    cells = np.char.add(np.char.add(pairs.dataset, "/"), pairs.target_id.astype(str))
    group = np.unique(cells, return_inverse=True)[1].ravel()

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(group, weights=values, minlength=group.max() + 1)

    counts = sums(next(iter(scores.values()))["n_scored"])
    parts: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}  # numerators and denominators of target cells
    for name, found in scores.items():
        defined = np.isfinite(found["pearson_delta"])
        parts[name, "mse"] = sums(found["squared_error"]), counts
        parts[name, "pearson_delta"] = sums(np.where(defined, found["pearson_delta"], 0.0)), sums(defined)
        if name in blind:
            parts[name, "blind"] = sums(blind[name]["squared_error"]), counts
        if "crps" in found:
            parts[name, "coverage90"] = sums(found["covered"]), counts
            parts[name, "crps"] = sums(found["crps"]), counts
    numerators, denominators = (np.stack(side) for side in zip(*parts.values()))
    with np.errstate(invalid="ignore", divide="ignore"):
        samples = dict(zip(parts, cluster_bootstrap(numerators, denominators, n_resamples, seed).T))
        point = dict(zip(parts, numerators.sum(axis=1) / denominators.sum(axis=1)))

    def difference(first: tuple[str, str], second: tuple[str, str]) -> dict:
        gap = {first[1].replace("blind", "mse"): float(point[first] - point[second])}
        return gap | {"ci95": percentile_interval(samples[first] - samples[second])}

    def best(names: list[str]) -> str | None:
        return min(names, key=lambda name: point[name, "mse"], default=None)

    floors = [name for name in scores if name in FLOORS]
    rivals = {
        "best_floor": best(floors),
        "best_label_free_floor": best([name for name in floors if not FLOORS[name].uses_labels]),
    }
    methods: dict[str, dict] = {}
    for name in scores:
        entry = methods[name] = {"uses_labels": name in FLOORS and FLOORS[name].uses_labels}
        for score in ("mse", "pearson_delta", "coverage90", "crps"):
            if (name, score) in parts:
                entry[score] = _number(point[name, score])
                entry[f"{score}_ci95"] = percentile_interval(samples[name, score])
        if REFERENCE in scores:
            entry["r2"] = 1 - entry["mse"] / float(point[REFERENCE, "mse"])
            entry["r2_ci95"] = percentile_interval(1 - samples[name, "mse"] / samples[REFERENCE, "mse"])
        for key, floor in rivals.items():
            if floor is not None and floor != name:
                entry[f"difference_from_{key}"] = {"floor": floor, **difference((name, "mse"), (floor, "mse"))}
        if name in blind:
            entry["gain_from_revealed"] = difference((name, "blind"), (name, "mse"))
            if REFERENCE in scores:
                entry["r2_without_revealed"] = 1 - float(point[name, "blind"] / point[REFERENCE, "mse"])
    n_genes = int(pairs.scored.any(axis=0).sum())
    return {"n_pairs": len(pairs), "n_targets": len(counts), "n_genes": n_genes, **rivals, "methods": methods}


def _number(value: float) -> float | None:
    """JSON has no NaN: an undefined value is null."""
    return float(value) if np.isfinite(value) else None


def write_results(results: dict, path: str | Path) -> None:
    """Writes `results.json` atomically; NaN becomes null."""
    write_json(_without_nan(results), path)


def _without_nan(value):
    if isinstance(value, Mapping):
        return {str(key): _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return _number(value)
    return value.item() if isinstance(value, np.generic) else value
