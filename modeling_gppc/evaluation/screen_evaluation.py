"""One run of `gppc evaluate`: every method on a screen in one of three modes, guarded, with null and ceiling."""

import dataclasses
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_scripts.cells.screen_cells import keep_genes
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
    resample_responses,
    score_prediction,
    summarise_method,
)
from modeling_gppc.evaluation.transfer_scorecard import weights_digest


@dataclasses.dataclass
class ScreenEvaluation:
    """Result of a run.

    Args:
        screen (`Screen`): What was scored.
        truth (`ScreenTruth`): Observed responses of the scored perturbations.
        predictions (`dict[str, ScreenPrediction]`): By method.
        scores (`dict[str, dict[str, np.ndarray]]`): Method -> metric -> one value a perturbation.
        summary (`dict`): Content of `evaluation.json`.
    """

    screen: Screen
    truth: ScreenTruth
    predictions: dict[str, ScreenPrediction]
    scores: dict[str, dict[str, np.ndarray]]
    summary: dict


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
    run = run_screen(keep_genes(screen, options.max_genes), options, progress)
    scores = {
        name: score_prediction(prediction, run.truth, run.reference, run.screen, seed=options.seed)
        for name, prediction in tqdm(run.predictions.items(), desc="scoring", unit="method", disable=not progress)
    }
    summary = summarise(run, scores, options)
    return ScreenEvaluation(run.screen, run.truth, run.predictions, scores, summary)


def summarise(run: ScreenRun, scores: dict[str, dict[str, np.ndarray]], options: EvaluateOptions) -> dict:
    """Content of `evaluation.json`; docs/evaluation.md says what each entry is."""
    screen, truth, predictions = run.screen, run.truth, run.predictions
    methods = {}
    measured = np.array([screen.perturbations[label].measured for label in truth.labels])
    for name, prediction in predictions.items():
        null = None
        if run.shuffled.get(name):
            outputs = [score_prediction_pearson(output, truth, imposed) for output, imposed in run.shuffled[name]]
            null = np.mean(outputs, axis=0)
        entry = summarise_method(prediction, truth, scores[name], null, options.seed)
        if 2 <= measured.sum() < len(measured):
            entry["measured_targets"] = {
                metric: float(scores[name][metric][measured].mean()) for metric in ("pearson_delta", "systema_pearson")
            } | {"n": int(measured.sum())}
        methods[name] = entry
    resampled = resample_responses(screen, truth, seed=options.seed)
    subject = MODEL if MODEL in predictions else None
    comparisons = {}
    if subject:
        for name in predictions:
            if name not in (subject, "no_change", "target_only"):
                comparisons[name] = compare_methods(
                    predictions[subject], predictions[name], truth, resampled, options.seed
                )
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
        "n_genes": len(screen.gene_ids),
        "n_scored_genes": int(truth.mask.sum()),
        "n_perturbations": len(truth.labels),
        "exclusions": [
            {"reason": reason, "cells": cells, "examples": examples} for reason, cells, examples in screen.exclusions
        ],
        "ceiling": {
            "split_half_pearson": float(truth.ceiling.mean()),
            "n_above_half": int((truth.ceiling > 0.5).sum()),
        },
        "control_only_methods": list(CONTROL_ONLY),
        "subject": subject,
        "methods": methods,
        "comparisons": comparisons,
        "calibration": {
            name: calibration(prediction, truth)
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


def calibration(prediction: ScreenPrediction, truth: ScreenTruth) -> dict[str, float]:
    """Share of observed deltas inside central intervals of several levels, sampling error included, countable genes."""
    mask = truth.mask
    total, told = (prediction.variance + truth.sampling_variance)[:, mask], truth.countable[:, mask]
    predicted, observed = prediction.delta[:, mask], truth.delta[:, mask]
    levels = {"0.5": 0.6744898, "0.8": 1.2815516, "0.9": 1.6448536, "0.95": 1.959964}
    return {level: float(interval_coverage(predicted, total, observed, z)[told].mean()) for level, z in levels.items()}
