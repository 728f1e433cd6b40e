"""One run of `gppc evaluate`: every method on a screen in one of three modes, guarded, with null and ceiling."""

import dataclasses
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_scripts.cells.screen_cells import shuffle_labels
from data_scripts.cells.screens import Screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.metrics import interval_coverage, pearson_delta
from modeling_gppc.evaluation.screen_baselines import CONTROL_ONLY
from modeling_gppc.evaluation.screen_runs import MODEL, ScreenRun, run_screen
from modeling_gppc.evaluation.screen_scores import (
    ScreenPrediction,
    ScreenTruth,
    bootstrap_perturbations,
    compare_methods,
    interval_of_mean,
    resampled_correlations,
    score_prediction,
    summarise_method,
    swapped_pearson,
)
from modeling_gppc.evaluation.transfer_scorecard import weights_digest


@dataclasses.dataclass
class ScreenEvaluation:
    """Result of an evaluation.

    Args:
        runs (`list[ScreenRun]`): One a division of the controls.
        scores (`dict[str, dict[str, np.ndarray]]`): Method -> metric -> one value a perturbation, mean over runs.
        ceiling (`np.ndarray`): Of each perturbation, mean over runs, shape `(P,)`.
        summary (`dict`): Content of `evaluation.json`.
    """

    runs: list[ScreenRun]
    scores: dict[str, dict[str, np.ndarray]]
    ceiling: np.ndarray
    summary: dict

    # What figures and files show is the first division.
    screen = property(lambda self: self.runs[0].screen)
    truth = property(lambda self: self.runs[0].truth)
    predictions = property(lambda self: self.runs[0].predictions)


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
    runs = run_screen(shuffle_labels(screen, options.seed) if options.shuffle_labels else screen, options, progress)
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in runs[0].predictions}
    for run in tqdm(runs, desc="scoring", unit="division", disable=not progress):
        for name, prediction in run.predictions.items():
            parts[name].append(score_prediction(prediction, run.truth, run.reference, run.screen, seed=options.seed))
    scores = {
        name: {metric: np.mean([part[metric] for part in found], axis=0) for metric in found[0]}
        for name, found in parts.items()
    }
    ceiling = np.mean([run.truth.ceiling for run in runs], axis=0)
    return ScreenEvaluation(runs, scores, ceiling, summarise(runs, scores, ceiling, options))


def summarise(
    runs: list[ScreenRun], scores: dict[str, dict[str, np.ndarray]], ceiling: np.ndarray, options: EvaluateOptions
) -> dict:
    """Content of `evaluation.json`; docs/evaluation.md says what each entry is."""
    run = runs[0]
    screen, truth, predictions = run.screen, run.truth, run.predictions
    drawn = [resampled_correlations(one.screen, one.truth, one.predictions, seed=options.seed) for one in runs]
    mean = {name: np.mean([part[name] for part in drawn], axis=0) for name in predictions}
    methods = {}
    measured = np.array([screen.perturbations[label].measured for label in truth.labels])
    for name, prediction in predictions.items():
        null = None
        if run.shuffled.get(name):
            null = np.mean(
                [
                    score_prediction_pearson(output, one.truth, imposed)
                    for one in runs
                    for output, imposed in one.shuffled[name]
                ],
                axis=0,
            )
        swapped = np.mean([swapped_pearson(one.predictions[name], one.truth) for one in runs], axis=0)
        entry = summarise_method(scores[name], swapped, null, options.seed)
        entry["pearson_delta_ci95"] = interval_of_mean(mean[name], seed=options.seed)
        entry["reads_perturbed_cells"] = prediction.reads_perturbed_cells
        # Size of all responses together, which a few strong perturbations dominate instead of many weak ones.
        gaps = [((one.predictions[name].delta - one.truth.delta)[:, one.truth.mask] ** 2).sum() for one in runs]
        entry["pooled_normalised_squared_error"] = float(
            np.sum(gaps) / np.sum([(one.truth.delta[:, one.truth.mask] ** 2).sum() for one in runs])
        )
        if 2 <= measured.sum() < len(measured):
            entry["measured_targets"] = {
                metric: float(scores[name][metric][measured].mean()) for metric in ("pearson_delta", "systema_pearson")
            } | {"n": int(measured.sum())}
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
            if key != "model"
        },
        "n_models": len(options.folders),
        "weights": [weights_digest(folder) for folder in options.folders],
        "notes": run.notes,
        "n_cells": len(screen.values),
        "n_controls": int(screen.is_control.sum()),
        "n_divisions": len(runs),
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
            name: calibration([(one.predictions[name], one.truth) for one in runs])
            for name, prediction in predictions.items()
            if prediction.variance is not None
        },
    }


def score_prediction_pearson(
    prediction: ScreenPrediction, truth: ScreenTruth, left_out: np.ndarray | None = None
) -> np.ndarray:
    """pearson_delta alone, 0 where there is no direction; without the genes `left_out`, bool of shape `(P, V)`."""
    mask = truth.mask if left_out is None else truth.mask & ~left_out
    return np.nan_to_num(pearson_delta(prediction.delta, truth.delta, mask))


def calibration(pairs: list[tuple[ScreenPrediction, ScreenTruth]]) -> dict[str, float]:
    """Share of observed deltas inside central intervals of several levels, sampling error included, countable genes."""
    levels = {"0.5": 0.6744898, "0.8": 1.2815516, "0.9": 1.6448536, "0.95": 1.959964}
    inside: dict[str, list[np.ndarray]] = {level: [] for level in levels}
    for prediction, truth in pairs:
        total = (prediction.variance + truth.sampling_variance)[:, truth.mask]
        predicted, observed = prediction.delta[:, truth.mask], truth.delta[:, truth.mask]
        for level, z in levels.items():
            hits = interval_coverage(predicted, total, observed, z)
            inside[level].append(hits[truth.countable[:, truth.mask]])
    return {level: float(np.concatenate(hits).mean()) for level, hits in inside.items()}
