"""One run of `gppc evaluate`: every method on a screen in one of three modes, guarded, with null and ceiling."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from data_scripts.screens import CONTROL, Screen
from modeling_gppc.evaluation.leak_guards import SplitPlan, guard_fold, refuse_leaks
from modeling_gppc.evaluation.metrics import interval_coverage, pearson_delta
from modeling_gppc.evaluation.screen_baselines import CONTROL_ONLY, ScreenContext, run_baselines
from modeling_gppc.evaluation.screen_models import FineTunedModel, InContextModel, ResponseSize, ZeroShotModel
from modeling_gppc.evaluation.screen_scores import (
    ScreenPrediction,
    ScreenTruth,
    compare_methods,
    observe,
    resample_responses,
    score_prediction,
    summarise_method,
)
from modeling_gppc.evaluation.screen_splits import Fold, combination_folds, perturbation_folds

MODES = ("zero-shot", "in-context", "fine-tuned")
BUILT_IN_MODELS = ("covariance", "factor", "gppc")
MODEL = "gppc"
SPLITS = ("perturbations", "combinations")


@dataclasses.dataclass
class EvaluateOptions:
    """What to run.

    Args:
        mode (`str`, *optional*, defaults to `"in-context"`): `"zero-shot"` (a model folder as it is), `"in-context"`
            (adapted on the screen's controls) or `"fine-tuned"` (and on the training perturbations of each fold).
        model (`str`, *optional*, defaults to `"gppc"`): `"gppc"` (linear response and trained departure), `"factor"`
            (its linear response alone), `"covariance"` (baselines only), or a model folder for zero-shot.
        folds (`int`, *optional*, defaults to 5): Folds over perturbations, fine-tuned mode only.
        split (`str`, *optional*, defaults to `"perturbations"`): Fine-tuned mode: `"perturbations"`, or
            `"combinations"`: doubles, trained on singles.
        seen (`int`, *optional*, defaults to 2): How many members of a double are seen alone.
        seeds (`int`, *optional*, defaults to 5): Runs of the model; their mean response is scored, their spread shown.
        steps (`int`, *optional*, defaults to 300): Training steps of the departure on controls.
        seed (`int`, *optional*, defaults to 0): First seed.
        n_shuffles (`int`, *optional*, defaults to 20): Random genes in the target's place, a perturbation.
        hold (`float`, *optional*, defaults to 0.1): How firmly the other targets are held; see [`InContextModel`].
        max_genes (`int`, *optional*, defaults to 2,000): Most variable genes *among controls* that are kept, targets
            always among them.
    """

    mode: str = "in-context"
    model: str = "gppc"
    folds: int = 5
    split: str = "perturbations"
    seen: int = 2
    seeds: int = 5
    steps: int = 300
    seed: int = 0
    n_shuffles: int = 20
    hold: float = 0.1
    max_genes: int = 2_000
    size: ResponseSize = dataclasses.field(default_factory=ResponseSize)

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`mode` is {self.mode!r}; wanted one of {', '.join(MODES)}.")
        if self.split not in SPLITS:
            raise ValueError(f"`split` is {self.split!r}; wanted one of {', '.join(SPLITS)}.")
        if self.split != "perturbations" and self.mode != "fine-tuned":
            raise ValueError(f"`split` is {self.split!r} with `mode` {self.mode!r}; only 'fine-tuned' trains on some.")
        if self.seen not in (0, 1, 2):
            raise ValueError(f"`seen` is {self.seen}; wanted 0, 1 or 2 members of a double.")
        folder = Path(self.model).is_dir()
        if self.model not in BUILT_IN_MODELS and not folder:
            raise ValueError(
                f"`model` {self.model!r} is neither a model folder nor one of {', '.join(BUILT_IN_MODELS)}."
            )
        if folder != (self.mode == "zero-shot") and self.model != "covariance":
            wanted = "a model folder" if self.mode == "zero-shot" else f"one of {', '.join(BUILT_IN_MODELS)}"
            raise ValueError(f"`model` is {self.model!r} with `mode` {self.mode!r}; wanted {wanted}.")
        for name, least in (
            ("seeds", 1),
            ("steps", 0),
            ("n_shuffles", 0),
            ("hold", 0),
            ("max_genes", 10),
            ("folds", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted at least {least}.")


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


def keep_genes(screen: Screen, at_most: int) -> Screen:
    """The genes most variable among controls, and every measured target; chosen without any perturbed cell."""
    n_genes = len(screen.gene_ids)
    if n_genes <= at_most:
        return screen
    spread = screen.values[screen.cells_of(CONTROL)].var(axis=0)
    spread[screen.panel_targets] = np.inf
    kept = np.sort(np.argsort(-spread, kind="stable")[:at_most])
    position = np.full(n_genes, -1)
    position[kept] = np.arange(len(kept))
    perturbations = {
        label: dataclasses.replace(p, gene_index=np.where(p.gene_index >= 0, position[p.gene_index], -1))
        for label, p in screen.perturbations.items()
    }
    return dataclasses.replace(
        screen,
        values=screen.values[:, kept],
        gene_ids=[screen.gene_ids[i] for i in kept],
        gene_symbols=[screen.gene_symbols[i] for i in kept],
        perturbations=perturbations,
    )


def evaluate_screen(screen: Screen, options: EvaluateOptions, progress: bool = True) -> ScreenEvaluation:
    """Runs every method of a mode and scores it.

    Raises:
        ValueError: If no perturbation can be scored in this mode, or the division of cells leaks.
    """
    screen = keep_genes(screen, options.max_genes)
    folds = _folds(screen, options) if options.mode == "fine-tuned" else []
    if folds:
        labels = sorted(label for fold in folds for label in fold.test)
    else:
        labels = sorted(label for label, p in screen.perturbations.items() if p.measured)
    if len(labels) < 2:
        raise ValueError(
            f"`screen` has {len(labels)} perturbations whose targets are all measured; mode {options.mode!r} needs at "
            "least 2: give the file with all genes, or map labels to genes."
        )
    truth = observe(screen, labels, options.seed)
    if options.mode == "fine-tuned":
        predictions, reference, seeds, shuffled = _fine_tuned(screen, labels, folds, options, progress)
    else:
        predictions, seeds, shuffled = _from_controls(screen, labels, options, progress)
        others = truth.delta.sum(axis=0) - truth.delta
        reference = others / (len(labels) - 1)
    scores = {
        name: score_prediction(prediction, truth, reference, screen, seed=options.seed)
        for name, prediction in tqdm(predictions.items(), desc="scoring", unit="method", disable=not progress)
    }
    return ScreenEvaluation(
        screen, truth, predictions, scores, _summary(screen, truth, predictions, scores, seeds, shuffled, options)
    )


def _from_controls(screen, labels, options: EvaluateOptions, progress: bool):
    """Zero-shot and in-context: no perturbed cell is read but for the change at the target."""
    guard_controls(screen, labels, options.mode)
    context = ScreenContext.build(screen, [], labels)
    predictions = run_baselines(context, mode=options.mode)
    predictors: dict[str, list[Callable]] = {
        "covariance": [lambda c: run_baselines(c, ["covariance"], options.mode)["covariance"]]
    }
    if options.mode == "zero-shot" and options.model != "covariance":
        predictors[MODEL] = [ZeroShotModel(options.model).predict]
    elif options.model != "covariance":
        factor = InContextModel(screen, seed=options.seed, size=options.size, hold=options.hold)
        predictors["factor"] = [factor.predict]
        if options.model == "gppc":
            seeds = range(options.seed, options.seed + options.seeds)
            bar = tqdm(seeds, desc="adapting to controls", unit="seed", disable=not progress)
            predictors[MODEL] = [
                InContextModel(screen, steps=options.steps, seed=seed, size=options.size, hold=options.hold).predict
                for seed in bar
            ]
    spread = {}
    for name, runs in predictors.items():
        outputs = [run(context) for run in runs]
        spread[name] = outputs
        predictions[name] = dataclasses.replace(outputs[0], delta=np.mean([o.delta for o in outputs], axis=0))
    shuffled = {
        name: _shuffled_null(runs, context, options)
        for name, runs in tqdm(predictors.items(), desc="target-shuffled null", unit="method", disable=not progress)
    }
    return predictions, spread, shuffled


def _shuffled_null(runs: list[Callable], context: ScreenContext, options: EvaluateOptions) -> list[ScreenPrediction]:
    """Predictions with random genes, none of them a target of the panel, in the targets' places."""
    generator = np.random.default_rng(options.seed)
    spread = context.screen.values[context.screen.cells_of(CONTROL)].std(axis=0)
    pool = np.setdiff1d(np.flatnonzero(spread > 1e-6), context.screen.panel_targets)
    # A network costs a pass over cells for every gene put in the target's place.
    times = options.n_shuffles if len(runs) == 1 else max(options.n_shuffles // len(runs), 1)
    outputs = []
    for run in runs:
        for _ in range(times):
            substitutes = {
                label: generator.choice(pool, len(context.screen.target_changes(label)), replace=False)
                for label in context.test
            }
            outputs.append(run(dataclasses.replace(context, substitutes=substitutes)))
    return outputs


def _folds(screen: Screen, options: EvaluateOptions) -> list[Fold]:
    """Folds of the fine-tuned mode; every scored label is tested in exactly one.

    Raises:
        ValueError: If the screen has no double that offers as many members as are to be seen.
    """
    if options.split == "perturbations":
        return perturbation_folds(screen, options.folds, options.seed)
    folds = combination_folds(screen).get(options.seen)
    if folds is None:
        raise ValueError(f"`seen` is {options.seen}; no double of the screen offers so many members seen alone.")
    return folds


def _fine_tuned(screen, labels, folds: list[Fold], options: EvaluateOptions, progress: bool):
    """Every label is predicted by methods that saw none of its cells."""
    row = {label: index for index, label in enumerate(labels)}
    shape = (len(labels), screen.values.shape[1])
    scored = [g for i, g in enumerate(screen.gene_ids) if i not in set(screen.panel_targets.tolist())]
    targets = [screen.gene_ids[i] for i in screen.panel_targets]
    models = []
    if options.model != "covariance":
        n_seeds = options.seeds if options.model == "gppc" else 1
        steps = options.steps if options.model == "gppc" else 0
        seeds = range(options.seed, options.seed + n_seeds)
        bar = tqdm(seeds, desc="adapting to controls", unit="seed", disable=not progress)
        models = [
            FineTunedModel(InContextModel(screen, steps=steps, seed=seed, size=options.size, hold=options.hold))
            for seed in bar
        ]
    predictions: dict[str, ScreenPrediction] = {}
    runs = [ScreenPrediction(np.zeros(shape), np.zeros(shape), True) for _ in models]
    reference = np.zeros(shape)
    for fold in tqdm(folds, desc="folds", unit="fold", disable=not progress):
        guard_fold(
            screen.barcodes,
            fold.train_cells,
            fold.test_cells,
            fold.train,
            fold.test,
            scored,
            targets,
            options.seen if options.split == "combinations" else None,
        )
        context = ScreenContext.build(screen, fold.train, fold.test, fold.train_cells)
        rows = [row[label] for label in fold.test]
        reference[rows] = context.mean_response
        for name, output in run_baselines(context, mode="fine-tuned").items():
            whole = predictions.setdefault(name, ScreenPrediction(np.zeros(shape), None, output.reads_perturbed_cells))
            whole.delta[rows] = output.delta
        for run, model in zip(runs, models):
            output = model.predict(context)
            run.delta[rows], run.variance[rows] = output.delta, output.variance
    spread = {}
    if models:
        name = MODEL if options.model == "gppc" else options.model
        spread[name] = runs
        predictions[name] = ScreenPrediction(
            np.mean([run.delta for run in runs], axis=0), np.mean([run.variance for run in runs], axis=0), True
        )
    return predictions, reference, spread, {}


def guard_controls(screen: Screen, labels: list[str], mode: str) -> None:
    """Refuses a run from controls in which a cell that is scored would also have been read."""
    controls = [screen.barcodes[row] for row in screen.cells_of(CONTROL)]
    refuse_leaks(
        SplitPlan(
            train_cells=controls,
            panel_cells=controls,
            normalisation_cells=controls,
            selection_cells=controls,
            test_cells=[screen.barcodes[row] for row in np.flatnonzero(np.isin(screen.label, labels))],
            test_perturbations=labels,
            mode=mode,
        )
    )


def _summary(screen, truth, predictions, scores, spread, shuffled, options: EvaluateOptions) -> dict:
    methods = {}
    measured = np.array([screen.perturbations[label].measured for label in truth.labels])
    for name, prediction in predictions.items():
        null = None
        if shuffled.get(name):
            outputs = [score_prediction_pearson(output, truth) for output in shuffled[name]]
            null = np.mean(outputs, axis=0)
        entry = summarise_method(prediction, truth, scores[name], null, options.seed)
        if 2 <= measured.sum() < len(measured):
            entry["measured_targets"] = {
                metric: float(scores[name][metric][measured].mean()) for metric in ("pearson_delta", "systema_pearson")
            } | {"n": int(measured.sum())}
        if len(spread.get(name, ())) > 1:
            values = [float(score_prediction_pearson(run, truth).mean()) for run in spread[name]]
            entry["seeds"] = {
                "pearson_delta": values,
                "mean": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)),
            }
        methods[name] = entry
    resampled = resample_responses(screen, truth, seed=options.seed)
    subject = next((name for name in (MODEL, "factor") if name in predictions), None)
    comparisons = {}
    if subject:
        for name in predictions:
            if name not in (subject, "no_change", "target_only"):
                comparisons[name] = compare_methods(
                    predictions[subject], predictions[name], truth, resampled, options.seed
                )
    return {
        "schema_version": 1,
        "screen": screen.name,
        "mode": options.mode,
        "model": options.model if options.model in BUILT_IN_MODELS else "folder",
        "options": {key: value for key, value in dataclasses.asdict(options).items() if key != "model"},
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


def score_prediction_pearson(prediction: ScreenPrediction, truth: ScreenTruth) -> np.ndarray:
    """pearson_delta alone, 0 where there is no direction."""
    return np.nan_to_num(pearson_delta(prediction.delta, truth.delta, truth.mask))


def calibration(prediction: ScreenPrediction, truth: ScreenTruth) -> dict[str, float]:
    """Share of observed deltas inside central intervals of several levels, sampling error included."""
    total = (prediction.variance + truth.sampling_variance)[:, truth.mask]
    levels = {"0.5": 0.6744898, "0.8": 1.2815516, "0.9": 1.6448536, "0.95": 1.959964}
    return {
        level: float(interval_coverage(prediction.delta[:, truth.mask], total, truth.delta[:, truth.mask], z).mean())
        for level, z in levels.items()
    }
