"""One run of `gppc evaluate`: every method on a screen in one of three modes, guarded, with null and ceiling."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_scripts.cells.screen_cells import shuffle_labels
from data_scripts.cells.screens import Screen
from data_scripts.files import write_json
from modeling_gppc.evaluation.control_noise import corrected_pearson
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.metrics import interval_coverage, pearson_delta
from modeling_gppc.evaluation.peer_predictions import read_predictions, screen_folds
from modeling_gppc.evaluation.screen_baselines import CONTROL_ONLY
from modeling_gppc.evaluation.screen_intervals import (
    bootstrap_perturbations,
    compare_methods,
    interval_of_mean,
    resampled_correlations,
)
from modeling_gppc.evaluation.screen_runs import MODEL, ScreenRun, run_all_controls, run_screen
from modeling_gppc.evaluation.screen_scores import (
    METRICS,
    ScreenPrediction,
    energy_distances,
    rivals,
    score_prediction,
    strong_genes,
    swapped_pearson,
)
from modeling_gppc.evaluation.screen_truth import ScreenTruth
from modeling_gppc.evaluation.transfer_scorecard import weights_digest


@dataclasses.dataclass
class DivisionScores:
    """Scores of one division of the controls, by method: every metric `(P,)`; [`resampled_correlations`];
    pearson_delta of the two nulls; squared length of error and of truth, all responses together; [`calibration`]; and
    for each perturbation its ceiling and whether its targets are measured."""

    scores: dict[str, dict[str, np.ndarray]]
    drawn: dict[str, np.ndarray]
    swapped: dict[str, np.ndarray]
    shuffled: dict[str, np.ndarray]
    squares: dict[str, tuple[float, float]]
    inside: dict[str, dict[str, float]]
    ceiling: np.ndarray
    measured: np.ndarray


@dataclasses.dataclass
class ScreenEvaluation:
    """Result of an evaluation: the first division of the controls, which figures and files show; metrics by method and
    ceilings `(P,)`, means over divisions; and the content of `evaluation.json`."""

    run: ScreenRun
    scores: dict[str, dict[str, np.ndarray]]
    ceiling: np.ndarray
    summary: dict

    screen = property(lambda self: self.run.screen)
    truth = property(lambda self: self.run.truth)
    predictions = property(lambda self: self.run.predictions)


def evaluate_screen(screen: Screen, options: EvaluateOptions, progress: bool = True) -> ScreenEvaluation:
    """Runs every method of a mode and scores it.

    Raises:
        ValueError: If no perturbation can be scored in this mode, or the division of cells leaks.
    """
    if options.hold_out is not None and len(screen.gene_ids) > options.max_genes:
        raise ValueError(
            f"`hold_out`: {len(screen.gene_ids)} genes are more than `max_genes` = {options.max_genes}, and choosing "
            "some would read controls of the group that is held out; raise `max_genes`, or give a file with fewer."
        )
    screen = shuffle_labels(screen, options.seed) if options.shuffle_labels else screen
    others: list[dict[str, ScreenPrediction]] = []
    notes: list[str] = []
    if options.write_folds is not None or options.predictions:
        folds = screen_folds(screen, options)
        if options.write_folds is not None:
            write_json(folds, options.write_folds)
        others, notes = read_predictions(options.predictions, folds)
    with_nothing = options.nothing and not options.shuffle_labels and not options.folders
    nothing = scores_of_nothing(screen, options) if with_nothing else {}
    corrected = all_controls(screen, options)
    first, parts = None, []
    for index, run in enumerate(run_screen(screen, options, progress)):
        if others:
            run.predictions.update(others[index])
        first = first or dataclasses.replace(run, notes=[*run.notes, *notes])
        parts.append(score_run(run, options))
        del run  # before the next one is made
    scores = {
        name: {
            metric: np.mean([p.scores[name][metric] for p in parts if metric in p.scores[name]], axis=0)
            for metric in found
        }
        for name, found in parts[0].scores.items()
    }
    ceiling = np.mean([part.ceiling for part in parts], axis=0)
    summary = summarise(first, parts, scores, ceiling, options)
    for name, entry in summary["methods"].items():
        entry |= nothing.get(name, {}) | corrected.get(name, {})
    return ScreenEvaluation(first, scores, ceiling, summary)


def all_controls(screen: Screen, options: EvaluateOptions) -> dict[str, dict]:
    """`all_controls_pearson` of every method, from [`corrected_pearson`], with its interval; for fine-tuned fits that
    divide their controls."""
    if options.mode != "fine-tuned" or options.folders or options.hold_out or options.controls == "shared":
        return {}
    run = run_all_controls(screen, options)
    return {
        name: {
            "all_controls_pearson": float(values.mean()),
            "all_controls_pearson_ci95": bootstrap_perturbations(values, seed=options.seed),
        }
        for name, values in corrected_pearson(run.predictions, run.truth, run.screen, run.train_shares).items()
    }


def scores_of_nothing(screen: Screen, options: EvaluateOptions) -> dict[str, dict]:
    """pearson_delta of every method where labels are shuffled within batches and cell lines: `nothing_pearson` and its
    interval. One division, in both directions."""
    options = dataclasses.replace(options, divisions=1, n_shuffles=0)
    drawn = [
        resampled_correlations(run.screen, run.truth, run.predictions, seed=options.seed)
        for run in run_screen(shuffle_labels(screen, options.seed), options, progress=False, differential=False)
    ]
    mean = {name: np.mean([part[name] for part in drawn], axis=0) for name in drawn[0]}
    return {
        name: {
            "nothing_pearson": float(rows[0].mean()),
            "nothing_pearson_ci95": interval_of_mean(rows, seed=options.seed),
        }
        for name, rows in mean.items()
    }


def score_run(run: ScreenRun, options: EvaluateOptions) -> DivisionScores:
    """Every score of one division."""
    truth, predictions, seed = run.truth, run.predictions, options.seed
    # Intervals are judged on the genes that the model claims most of; for all methods the same.
    strong = strong_genes(predictions[MODEL], truth) if MODEL in predictions else None
    groups = rivals(run.folds, seed)
    scores = {
        name: score_prediction(prediction, truth, run.reference, strong, groups)
        for name, prediction in predictions.items()
    }
    if truth.de_scores is not None:
        for name, distances in energy_distances(run.screen, truth, predictions, seed=seed).items():
            scores[name]["energy_distance"] = distances
    shuffled = {
        name: np.mean([score_prediction_pearson(output, truth, imposed) for output, imposed in outputs], axis=0)
        for name, outputs in run.shuffled.items()
        if outputs
    }
    length = float((truth.delta[:, truth.mask] ** 2).sum())
    return DivisionScores(
        scores=scores,
        drawn=resampled_correlations(run.screen, truth, predictions, seed=seed),
        swapped={name: swapped_pearson(prediction, truth) for name, prediction in predictions.items()},
        shuffled=shuffled,
        squares={
            name: (float(((prediction.delta - truth.delta)[:, truth.mask] ** 2).sum()), length)
            for name, prediction in predictions.items()
        },
        inside={
            name: calibration(prediction, truth)
            for name, prediction in predictions.items()
            if prediction.variance is not None
        },
        ceiling=truth.ceiling,
        measured=np.array([run.screen.perturbations[label].measured for label in truth.labels]),
    )


def summarise(
    run: ScreenRun,
    parts: list[DivisionScores],
    scores: dict[str, dict[str, np.ndarray]],
    ceiling: np.ndarray,
    options: EvaluateOptions,
) -> dict:
    """Content of `evaluation.json`; docs/evaluation.md says what each entry is."""
    screen, truth, predictions = run.screen, run.truth, run.predictions
    mean = {name: np.mean([part.drawn[name] for part in parts], axis=0) for name in predictions}
    measured, methods = parts[0].measured, {}
    for name, prediction in predictions.items():
        swapped = np.mean([part.swapped[name] for part in parts], axis=0)
        null = np.mean([part.shuffled[name] for part in parts], axis=0) if name in parts[0].shuffled else None
        entry = summarise_method(scores[name], swapped, null, options.seed)
        entry["pearson_delta_ci95"] = interval_of_mean(mean[name], seed=options.seed)
        entry["reads_perturbed_cells"] = prediction.reads_perturbed_cells
        # Size of all responses together, which a few strong perturbations dominate instead of many weak ones.
        gaps, lengths = np.sum([part.squares[name] for part in parts], axis=0)
        entry["pooled_normalised_squared_error"] = float(gaps / lengths)
        if 2 <= measured.sum() < len(measured):
            entry["measured_targets"] = {
                metric: float(scores[name][metric][measured].mean()) for metric in ("pearson_delta", "systema_pearson")
            } | {"n": int(measured.sum())}
        if "strong_crps" in scores[name] and (ceiling > 0.5).any():
            entry["strong_responses"] = {
                metric: float(np.nanmean(scores[name][metric][ceiling > 0.5]))
                for metric in ("strong_coverage90", "strong_crps", "strong_width90")
            } | {"n": int((ceiling > 0.5).sum())}
        methods[name] = entry
    subject = MODEL if MODEL in predictions else None
    comparisons = {}
    if subject:
        for name in predictions:
            if name not in (subject, "no_change", "target_only"):
                comparisons[name] = compare_methods(mean[subject], mean[name], ceiling, options.seed)
                gap = scores[subject]["systema_pearson"] - scores[name]["systema_pearson"]
                comparisons[name]["systema_pearson"] = {
                    "difference": float(gap.mean()),
                    "ci95": bootstrap_perturbations(gap, seed=options.seed),
                }
    return {
        "schema_version": 1,
        "screen": screen.name,
        "mode": options.mode,
        "model": "folder" if options.folders else options.model[0],
        # Paths stay at home; what a table of features was is said by its name.
        "options": {
            key: Path(value).name if key == "gene_features" and value else value
            for key, value in dataclasses.asdict(options).items()
            if key not in ("model", "write_folds")
        }
        | {"predictions": {name: Path(file).name for name, file in options.predictions.items()}},
        "n_models": len(options.folders),
        "weights": [weights_digest(folder) for folder in options.folders],
        "notes": run.notes,
        "n_cells": len(screen.values),
        "n_controls": int(screen.is_control.sum()),
        "n_divisions": len(parts),
        "n_genes": len(screen.gene_ids),
        "n_scored_genes": int(truth.mask.sum()),
        "n_perturbations": len(truth.labels),
        "exclusions": [
            {"reason": reason, "cells": cells, "examples": examples} for reason, cells, examples in screen.exclusions
        ],
        "ceiling": {
            "split_half_pearson": float(ceiling.mean()),
            "n_above_half": int((ceiling > 0.5).sum()),
        },
        "control_only_methods": list(CONTROL_ONLY),
        "subject": subject,
        "methods": methods,
        "comparisons": comparisons,
        "calibration": {
            name: {level: float(np.mean([part.inside[name][level] for part in parts])) for level in levels}
            for name, levels in parts[0].inside.items()
        },
    }


def summarise_method(
    scores: Mapping[str, np.ndarray],
    swapped: np.ndarray,
    shuffled: np.ndarray | None = None,
    seed: int = 0,
) -> dict:
    """Means over perturbations with their 95 % intervals, also less the nulls of [`swapped_pearson`] and of shuffled
    targets."""
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


def score_prediction_pearson(
    prediction: ScreenPrediction, truth: ScreenTruth, left_out: np.ndarray | None = None
) -> np.ndarray:
    """pearson_delta alone, 0 where there is no direction; without the genes `left_out`, bool of shape `(P, V)`."""
    mask = truth.mask if left_out is None else truth.mask & ~left_out
    return np.nan_to_num(pearson_delta(prediction.delta, truth.delta, mask))


def calibration(prediction: ScreenPrediction, truth: ScreenTruth) -> dict[str, float]:
    """Share of observed deltas inside central intervals of several levels, sampling error included, countable genes."""
    levels = {"0.5": 0.6744898, "0.8": 1.2815516, "0.9": 1.6448536, "0.95": 1.959964}
    total = (prediction.variance + truth.sampling_variance)[:, truth.mask]
    predicted, observed = prediction.delta[:, truth.mask], truth.delta[:, truth.mask]
    counted = truth.countable[:, truth.mask]
    return {
        level: float(interval_coverage(predicted, total, observed, z)[counted].mean()) for level, z in levels.items()
    }
