"""Scores of every method on held-out pairs, with paired bootstrap intervals over target cells."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_scripts.files import write_json
from modeling_gppc.evaluation.metrics import (
    cluster_bootstrap,
    gaussian_crps,
    interval_coverage,
    percentile_interval,
    row_pearson,
)
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.evaluation.pair_floors import FLOORS, FittedFloors

# A predictor takes a batch of pairs and returns means `(n, V)`, or means and variances.
Predictor = Callable[[PairArrays], np.ndarray | tuple[np.ndarray, np.ndarray | None]]
MODEL_METHOD, OPTIMUM, REFERENCE, GAUSSIAN = "gppc", "optimum", "mean", "conditional_gaussian"
RESULTS_VERSION = 1


@dataclasses.dataclass
class PairScores:
    """What one method got right, a pair an entry; all that is kept of its predictions.

    Args:
        squared_error (`np.ndarray`): Summed over the scored genes, shape `(n,)`.
        n_scored (`np.ndarray`): Number of scored genes, shape `(n,)`.
        pearson_delta (`np.ndarray`): Correlation of predicted with true change, NaN where it is not defined.
        covered, crps (`np.ndarray`, *optional*): Scored genes inside the 90 % interval, and summed CRPS.
    """

    squared_error: np.ndarray
    n_scored: np.ndarray
    pearson_delta: np.ndarray
    covered: np.ndarray | None = None
    crps: np.ndarray | None = None


def score_predictions(predict: Predictor, pairs: PairArrays, batch_size: int = 1_024) -> PairScores:
    """Runs a predictor over all pairs, batch by batch, and scores it over measured, unrevealed genes.

    Raises:
        ValueError: If predictions have another shape than `(n, V)` or are not finite where they are scored.
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
        part = PairScores(
            squared_error=np.einsum("nv,nv->n", error, error, dtype=np.float64),
            n_scored=scored.sum(axis=1),
            pearson_delta=row_pearson(mean - batch.source, batch.target - batch.source, known),
        )
        if variance is not None:
            part.covered = (interval_coverage(mean, variance, batch.target) & scored).sum(axis=1)
            part.crps = np.where(scored, gaussian_crps(mean, variance, batch.target), 0.0).sum(axis=1)
        parts.append(part)
    columns = {}
    for field in dataclasses.fields(PairScores):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = None if any(value is None for value in values) else np.concatenate(values)
    return PairScores(**columns)


def score_split(
    pairs: PairArrays,
    methods: Mapping[str, Predictor],
    *,
    floors: FittedFloors | None = None,
    seed: int = 0,
    n_resamples: int = 1_000,
    batch_size: int = 1_024,
    with_gain: bool = True,
    progress: bool = True,
) -> dict:
    """Scores a model and its floors on the same pairs.

    Intervals are 95 % percentile bootstrap intervals over target cells: pairs that share a target are drawn together,
    and every method with the same draws, so differences are paired.

    Args:
        pairs (`PairArrays`): The pairs of one split.
        methods (`Mapping[str, Predictor]`): Predictors by name; `gppc` is the model, `optimum` the analytic or
            estimated best predictor. Names of floors are those of `baselines.FLOORS`.
        floors (`FittedFloors`, *optional*): Floors to score as well.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap.
        n_resamples (`int`, *optional*, defaults to 1,000): Bootstrap resamples.
        batch_size (`int`, *optional*, defaults to 1,024): Pairs predicted at once.
        with_gain (`bool`, *optional*, defaults to `True`): Whether to also predict with nothing revealed, which says
            what the revealed genes are worth to each method.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a bar.

    Returns:
        `dict` with `n_pairs`, `n_targets`, `n_genes`, `best_floor`, `best_label_free_floor`, `fitted_on` and
        `methods`: name -> `mse`, `mse_ci95`, `r2` and `r2_ci95` (against `mean`), `pearson_delta`,
        `pearson_delta_ci95`, `uses_labels`, `difference_from_best_floor` and `difference_from_best_label_free_floor`
        (`floor`, `mse`, `ci95`: negative is better), `gain_from_revealed` (`mse`, `ci95`: how far the error falls
        when the genes are revealed), and, where the method predicts a variance, `coverage90`, `coverage90_ci95`,
        `crps`, `crps_ci95` and `crps_difference` from the conditional Gaussian (`crps`, `ci95`: negative is better).

    Raises:
        ValueError: If there are no pairs.
    """
    if not len(pairs):
        raise ValueError("`pairs` is empty; a split needs at least one pair to be scored.")
    predictors: dict[str, Predictor] = dict(methods)
    revealing = dict.fromkeys(methods, True)
    for name, floor in (floors.floors if floors else {}).items():
        predictors[name], revealing[name] = floor.predict_moments, floor.uses_revealed
    scores, blind = {}, {}
    with_gain = with_gain and bool(pairs.revealed_mask.any())
    for name, predict in tqdm(predictors.items(), desc="scoring", unit="method", disable=not progress):
        scores[name] = score_predictions(predict, pairs, batch_size)
        if with_gain and revealing[name] and name != OPTIMUM:
            blind[name] = score_predictions(_hide_revealed(predict), pairs, batch_size)
    return _summarise(pairs, scores, blind, floors, seed, n_resamples)


def _hide_revealed(predict: Predictor) -> Predictor:
    """The predictor shown the same pairs with nothing revealed; what was revealed stays out of the score."""

    def predict_blind(batch: PairArrays) -> np.ndarray:
        output = predict(batch.without_revealed())
        return output[0] if isinstance(output, tuple) else output

    return predict_blind


def _summarise(pairs, scores, blind, floors, seed, n_resamples) -> dict:
    names = list(scores)
    _, group = np.unique(
        np.char.add(np.char.add(pairs.dataset, "/"), pairs.target_id.astype(str)), return_inverse=True
    )
    group = group.ravel()

    def sums(values):
        return np.bincount(group, weights=values, minlength=group.max() + 1)

    keys = [(name, "full") for name in names] + [(name, "blind") for name in blind]
    errors = [sums((scores if kind == "full" else blind)[name].squared_error) for name, kind in keys]
    counts = sums(scores[names[0]].n_scored)
    defined = [np.isfinite(scores[name].pearson_delta) for name in names]
    pearson = [sums(np.where(ok, scores[name].pearson_delta, 0.0)) for name, ok in zip(names, defined)]
    n_defined = [sums(ok.astype(float)) for ok in defined]
    empty = np.zeros((0, len(counts)))
    numerators = np.concatenate([np.stack(errors), np.stack(pearson) if pearson else empty])
    denominators = np.concatenate([np.tile(counts, (len(errors), 1)), np.stack(n_defined) if pearson else empty])
    with np.errstate(invalid="ignore", divide="ignore"):
        samples = cluster_bootstrap(numerators, denominators, n_resamples, seed)
        point = numerators.sum(axis=1) / denominators.sum(axis=1)
    column = {key: index for index, key in enumerate(keys)}
    mse = {key: float(point[index]) for key, index in column.items()}
    floor_names = [name for name in names if name in FLOORS]
    label_free = [name for name in floor_names if not FLOORS[name].uses_labels]
    best = min(floor_names, key=lambda name: mse[name, "full"], default=None)
    best_label_free = min(label_free, key=lambda name: mse[name, "full"], default=None)
    summary: dict = {
        "n_pairs": len(pairs),
        "n_targets": len(counts),
        "n_genes": int(pairs.scored.any(axis=0).sum()),
        "best_floor": best,
        "best_label_free_floor": best_label_free,
        "fitted_on": floors.fitted_on if floors else None,
        "methods": {},
    }
    for position, name in enumerate(names):
        here = samples[:, column[name, "full"]]
        entry = {
            "mse": mse[name, "full"],
            "mse_ci95": percentile_interval(here),
            "pearson_delta": _number(point[len(keys) + position]),
            "pearson_delta_ci95": percentile_interval(samples[:, len(keys) + position]),
            "uses_labels": name in FLOORS and FLOORS[name].uses_labels,
        }
        if REFERENCE in names:
            entry["r2"] = 1 - mse[name, "full"] / mse[REFERENCE, "full"]
            entry["r2_ci95"] = percentile_interval(1 - here / samples[:, column[REFERENCE, "full"]])
        for key, floor in (("best_floor", best), ("best_label_free_floor", best_label_free)):
            if floor is not None and floor != name:
                entry[f"difference_from_{key}"] = {
                    "floor": floor,
                    "mse": mse[name, "full"] - mse[floor, "full"],
                    "ci95": percentile_interval(here - samples[:, column[floor, "full"]]),
                }
        if name in blind:
            entry["gain_from_revealed"] = {
                "mse": mse[name, "blind"] - mse[name, "full"],
                "ci95": percentile_interval(samples[:, column[name, "blind"]] - here),
            }
            if REFERENCE in names:
                entry["r2_without_revealed"] = 1 - mse[name, "blind"] / mse[REFERENCE, "full"]
        summary["methods"][name] = entry
    _add_spread(summary["methods"], scores, sums, counts, seed, n_resamples)
    return summary


def _add_spread(methods: dict, scores: Mapping[str, PairScores], sums, counts, seed: int, n_resamples: int) -> None:
    """Coverage and CRPS of the methods that predict a variance, with intervals, into their entries."""
    names = [name for name in scores if scores[name].covered is not None]
    if not names:
        return
    parts = [sums(getattr(scores[name], part)) for part in ("covered", "crps") for name in names]
    samples = cluster_bootstrap(np.stack(parts), counts, n_resamples, seed)
    point = np.stack(parts).sum(axis=1) / counts.sum()
    n = len(names)
    for position, name in enumerate(names):
        entry = methods[name]
        for key, column in (("coverage90", position), ("crps", n + position)):
            entry[key] = float(point[column])
            entry[f"{key}_ci95"] = percentile_interval(samples[:, column])
        if GAUSSIAN in names and name != GAUSSIAN:
            other = n + names.index(GAUSSIAN)
            entry["crps_difference"] = {
                "crps": float(point[n + position] - point[other]),
                "ci95": percentile_interval(samples[:, n + position] - samples[:, other]),
            }


def _number(value: float) -> float | None:
    """JSON has no NaN: an undefined value is null."""
    return float(value) if np.isfinite(value) else None


def assemble_results(splits: Mapping[str, dict], seed: int, **facts) -> dict:
    """The content of `results.json`: `schema_version`, `seed`, `splits` by name and any further facts."""
    return {"schema_version": RESULTS_VERSION, "seed": int(seed), **facts, "splits": dict(splits)}


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


def named_splits(pairs: PairArrays, minimum: int = 50) -> dict[str, np.ndarray]:
    """Rows of each part of a split that is worth a table of its own.

    One part a pairing (`same_type`), and with several data sets also one a data set and pairing
    (`DATASET/same_type`); parts with fewer than `minimum` pairs are left out unless nothing else is there.
    """
    parts = {}
    datasets = np.unique(pairs.dataset)
    for pairing in np.unique(pairs.pairing):
        rows = np.flatnonzero(pairs.pairing == pairing)
        parts[str(pairing)] = rows
        if len(datasets) > 1:
            for dataset in datasets:
                parts[f"{dataset}/{pairing}"] = rows[pairs.dataset[rows] == dataset]
    large = {name: rows for name, rows in parts.items() if len(rows) >= minimum}
    return large or {name: rows for name, rows in parts.items() if len(rows)}
