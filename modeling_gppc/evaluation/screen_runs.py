"""Predictions of every method on a screen: from controls, fold by fold, or for held-out batches and cell lines."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from tqdm.auto import tqdm

from data_scripts.cells.control_halves import control_halves, with_controls
from data_scripts.cells.screen_cells import controls_digest, keep_genes, perturbed_digest, some_cells
from data_scripts.cells.screen_splits import (
    Fold,
    combination_folds,
    group_folds,
    perturbation_folds,
    stated_fold,
)
from data_scripts.cells.screens import CONTROL, Screen
from data_scripts.pairs.leak_guards import SplitPlan, guard_model, refuse_leaks
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_baselines import ScreenContext, control_features, run_baselines
from modeling_gppc.evaluation.screen_model import ScreenModel, read_run
from modeling_gppc.evaluation.screen_scores import ScreenPrediction
from modeling_gppc.evaluation.screen_truth import ScreenTruth, observe
from modeling_gppc.fitting.fit_controls import fit_controls
from modeling_gppc.fitting.fit_screen import fit_screen
from modeling_gppc.fitting.gene_features import GeneFeatures, read_gene_features
from modeling_gppc.fitting.observed_responses import ObservedResponses

MODEL = "gppc"


@dataclasses.dataclass
class ScreenRun:
    """Predictions of one mode.

    Args:
        screen (`Screen`): Cells that were scored, labels as in `truth`.
        truth (`ScreenTruth`): Observed responses.
        predictions (`dict[str, ScreenPrediction]`): By method.
        reference (`np.ndarray`): Systema's R, mean of the training responses for each row, `(P, V)`.
        folds (`np.ndarray`): In which fold each row was left out, int of shape `(P,)`.
        shuffled (`dict`): Target-shuffled nulls of a method, from [`shuffled_null`].
        notes (`list[str]`): What a reader must know.
        train_shares (`np.ndarray`, *optional*): For [`corrected_pearson`].
    """

    screen: Screen
    truth: ScreenTruth
    predictions: dict[str, ScreenPrediction]
    reference: np.ndarray
    folds: np.ndarray
    shuffled: dict[str, list[tuple[ScreenPrediction, np.ndarray]]]
    notes: list[str]
    train_shares: np.ndarray | None = None


def run_screen(
    screen: Screen, options: EvaluateOptions, progress: bool, differential: bool = True
) -> Iterator[ScreenRun]:
    """Runs the mode that the options ask for: once for every division of the controls, or once where none is shared.
    With `differential` genes are tested for differential expression in the first division, both directions. Raises
    `ValueError` if no perturbation can be scored in this mode, or the division of cells leaks."""
    notes = check_models(screen, options)
    features = None
    if options.gene_features is not None:
        genes = {gene for p in screen.perturbations.values() for gene in p.genes}
        features = read_gene_features(options.gene_features, genes)
        notes.append(f"{len(features.table(genes))} of {len(genes)} perturbed genes have features in the table given.")
    if options.hold_out is not None:
        # A batch or cell line is judged by its own controls.
        run = held_out(screen, group_folds(screen, options.hold_out), options, features, progress)
        yield dataclasses.replace(run, notes=[*notes, *run.notes])
        return
    folds = choose_folds(screen, options) if options.mode == "fine-tuned" else None
    pairs = divisions(screen, options)
    for index, (seen, judged) in enumerate(tqdm(pairs, desc="divisions", total=len(pairs), disable=not progress)):
        guard_controls(seen, judged, options)
        tested = differential and index < 2
        if folds is None:
            run = from_controls(seen, judged, options, tested)
        else:
            run = fine_tuned(seen, judged, folds, options, features, tested)
        run.notes[:0] = notes
        yield run
        del run  # before the next one is made


def run_all_controls(screen: Screen, options: EvaluateOptions) -> ScreenRun:
    """Fine-tuned, with all controls on both sides: what [`corrected_pearson`] is computed from."""
    screen = keep_genes(screen, options.max_genes)
    genes = {gene for p in screen.perturbations.values() for gene in p.genes}
    features = None if options.gene_features is None else read_gene_features(options.gene_features, genes)
    return fine_tuned(screen, screen, choose_folds(screen, options), options, features, False, weigh=True)


def divisions(screen: Screen, options: EvaluateOptions) -> list[tuple[Screen, Screen]]:
    """The screen as it is read and as it is judged, with control cells of their own, for every division; a folder that
    was fitted without some of the controls is judged by those."""
    if options.controls == "shared":
        screen = dataclasses.replace(keep_genes(screen, options.max_genes), matched=False)
        return [(screen, screen)]
    halves = control_halves(screen, options.divisions, options.seed)
    if options.folders and options.mode != "zero-shot":
        # Folders are judged by the controls that they were fitted without.
        stated = {((read_run(folder) or {}).get("screen") or {}).get("controls_digest") for folder in options.folders}
        halves = [pair for pair in halves if stated == {controls_digest(with_controls(screen, pair[0]))}]
        if not halves:
            raise ValueError(
                "`model` was not fitted on one half of the screen's control cells, as `divisions` "
                f"{options.divisions} and `seed` {options.seed} divide them: no control cell is left to measure the "
                "truth with. Fit it with `--screen.half_controls true` (as `--folds all` does) and the same "
                "`divisions` and `seed`, or give `controls` 'shared' for the biased form."
            )
    found = []
    for first, second in halves:
        # The genes are chosen on the controls that are read.
        kept = keep_genes(screen, options.max_genes, like=with_controls(screen, first))
        found.append((with_controls(kept, first), with_controls(kept, second)))
    return found


def check_models(screen: Screen, options: EvaluateOptions) -> list[str]:
    """Refuses model folders that were trained on what they must not, with a `ValueError`; notes where that is not
    stated."""
    notes = []
    for folder in options.folders:
        run = read_run(folder)
        guard_model(run, screen.name, perturbed_digest(screen), options.mode)
        if run is None or "datasets" not in run:
            notes.append("What the model was trained on is not stated: leaks through pre-training were not checked.")
    return notes[:1]


def need(labels: list[str], options: EvaluateOptions) -> list[str]:
    """The labels; `ValueError` where there are fewer than two."""
    if len(labels) < 2:
        raise ValueError(
            f"`screen` has {len(labels)} perturbations that can be scored; mode {options.mode!r} needs at least 2: give "
            "the file with all genes (targets must be measured), or map labels to genes."
        )
    return labels


def from_controls(seen: Screen, judged: Screen, options: EvaluateOptions, differential: bool) -> ScreenRun:
    """Zero-shot and in-context: no perturbed cell is read but for the change at the target."""
    labels = need(sorted(label for label, p in seen.perturbations.items() if p.measured), options)
    context = ScreenContext.build(seen, [], labels)
    predictions = run_baselines(context, mode=options.mode)
    predictors = {"covariance": lambda c: run_baselines(c, ["covariance"], options.mode)["covariance"]}
    if options.folders:
        predictors[MODEL] = ScreenModel.load(options.folders[0], options.change).predict
    elif options.model != ["covariance"]:
        predictors[MODEL] = ScreenModel(*fit_screen(seen, [], options), options.change).predict
    if MODEL in predictors:
        predictions[MODEL] = predictors[MODEL](context)
    shuffled = {name: shuffled_null(predict, context, options) for name, predict in predictors.items()}
    truth = observe(judged, labels, options.seed, controls_of=seen, differential=differential)
    reference = (truth.delta.sum(axis=0) - truth.delta) / (len(labels) - 1)
    return ScreenRun(judged, truth, predictions, reference, np.zeros(len(labels), dtype=int), shuffled, [])


def shuffled_null(
    predict: Callable[[ScreenContext], ScreenPrediction], context: ScreenContext, options: EvaluateOptions
) -> list[tuple[ScreenPrediction, np.ndarray]]:
    """Predictions with random genes, none of them a target of the panel, in the targets' places, each with the genes
    that were imposed, bool `(P, V)`: like the targets in whose place they are, they must not be scored."""
    generator = np.random.default_rng(options.seed)
    spread = context.screen.values[context.screen.cells_of(CONTROL)].std(axis=0)
    pool = np.setdiff1d(np.flatnonzero(spread > 1e-6), context.screen.panel_targets)
    outputs = []
    for _ in range(options.n_shuffles):
        substitutes = {
            label: generator.choice(pool, len(context.screen.target_changes(label)), replace=False)
            for label in context.test
        }
        imposed = np.zeros((len(context.test), context.screen.values.shape[1]), dtype=bool)
        for row, label in enumerate(context.test):
            imposed[row, substitutes[label]] = True
        outputs.append((predict(dataclasses.replace(context, substitutes=substitutes)), imposed))
    return outputs


def choose_folds(screen: Screen, options: EvaluateOptions) -> list[Fold]:
    """Folds of the fine-tuned mode; every scored label is tested in exactly one. Raises `ValueError` if no double
    offers as many members as are to be seen, or two model folders hold out the same perturbation."""
    if options.folders:
        stated = [(read_run(folder) or {}).get("screen") or {} for folder in options.folders]
        folds = [
            stated_fold(screen, f"model {index + 1}", entry["train_perturbations"], entry["held_out_perturbations"])
            for index, entry in enumerate(stated)
        ]
        tested = [label for fold in folds for label in fold.test]
        if len(set(tested)) < len(tested):
            raise ValueError("`model`: two folders hold out the same perturbation; give one folder a fold.")
        return folds
    if options.split == "perturbations":
        return perturbation_folds(screen, options.folds, options.seed)
    folds = combination_folds(screen).get(options.seen)
    if folds is None:
        raise ValueError(f"`seen` is {options.seen}; no double of the screen offers so many members seen alone.")
    return folds


def fine_tuned(
    screen: Screen,
    judged: Screen,
    folds: list[Fold],
    options: EvaluateOptions,
    features: GeneFeatures | None,
    differential: bool,
    weigh: bool = False,
) -> ScreenRun:
    """Every label is predicted by methods that saw none of its cells; `weigh` asks for what [`corrected_pearson`] needs."""
    labels = need(sorted(label for fold in folds for label in fold.test), options)
    row = {label: index for index, label in enumerate(labels)}
    targets = [screen.gene_ids[i] for i in screen.panel_targets]
    scored = sorted(set(screen.gene_ids) - set(targets))
    fits_here = options.model == ["gppc"]
    controls = fit_controls(screen, options.n_factors, options.seed) if fits_here else None
    table = perturbed_features(screen, features)
    shape = (len(labels), screen.values.shape[1])
    predictions: dict[str, ScreenPrediction] = {}
    reference, fold_of = np.zeros(shape, np.float32), np.zeros(len(labels), dtype=int)
    train_shares = np.zeros((len(labels), len(screen.control_levels.names)))
    for index, fold in enumerate(folds):
        refuse_leaks(
            SplitPlan(
                train_cells=fold.train_cells,
                test_cells=fold.test_cells,
                train_perturbations=fold.train,
                test_perturbations=fold.test,
                reference_perturbations=fold.train,
                scored_genes=scored,
                target_genes=targets,
                held_out=options.split,
                seen_members=options.seen if options.split == "combinations" else None,
            )
        )
        context = ScreenContext.build(screen, fold.train, fold.test, table)
        outputs = run_baselines(context, mode="fine-tuned", weigh=weigh)
        if options.folders:
            outputs[MODEL] = ScreenModel.load(options.folders[index], options.change).predict(context)
        elif fits_here:
            if len(fold.train) < 2:
                raise ValueError(f"`folds`: {fold.name} trains on {len(fold.train)} perturbations; use fewer folds.")
            fitted = fit_screen(screen, fold.train, options, features, controls)
            outputs[MODEL] = ScreenModel(*fitted, options.change).predict(context)
            if weigh:  # to first order: the mean of the shrunken training responses, and its size
                share = ObservedResponses.of(screen, fold.train).signal_share.mean()
                weight = float(fitted[0].screen_response.scale) * share
                outputs[MODEL].control_weight = np.full(len(fold.test), weight)
        rows = [row[label] for label in fold.test]
        reference[rows], fold_of[rows] = context.mean_response, index
        if weigh:
            train_shares[rows] = np.mean([screen.control_shares(label) for label in fold.train], axis=0)
        for name, output in outputs.items():
            parts = {"delta": output.delta, "variance": output.variance, "control_weight": output.control_weight}
            given = {part: value for part, value in parts.items() if value is not None}
            if name not in predictions:
                empty = {part: np.zeros((len(labels), *value.shape[1:]), np.float32) for part, value in given.items()}
                predictions[name] = ScreenPrediction(**empty, reads_perturbed_cells=output.reads_perturbed_cells)
            for part, value in given.items():
                getattr(predictions[name], part)[rows] = value
    truth = observe(judged, labels, options.seed, controls_of=screen, differential=differential)
    return ScreenRun(judged, truth, predictions, reference, fold_of, {}, [], train_shares)


def perturbed_features(screen: Screen, features: GeneFeatures | None) -> dict[str, np.ndarray]:
    """Features of the perturbed genes by name, for the baselines; from the controls where no table is given."""
    if features is None:
        return control_features(screen)
    return features.table(gene for p in screen.perturbations.values() for gene in p.genes)


def held_out(screen: Screen, folds: list[Fold], options: EvaluateOptions, features, progress: bool) -> ScreenRun:
    """Responses within a batch or cell line from the perturbed and control cells of the others.

    A row is a perturbation within a group, `STAT1 @ batch 2`; its response is against the controls of that group, which
    nothing was fitted on.
    """
    column = options.hold_out.partition("=")[0]
    kind = {"batch": "batches", "cell_line": "cell_lines"}[column]
    groups, every = getattr(screen, column), screen.cells_of(CONTROL)
    label_of_cells, perturbations = screen.label.astype(object), {}
    parts, references, fold_of, left_out = [], [], [], []
    for fold in tqdm(folds, desc="held out", unit="group", disable=not progress):
        inside = np.sort(np.concatenate([fold.test_cells, every[groups[every] == fold.group]]))
        outside = np.sort(np.concatenate([fold.train_cells, every[groups[every] != fold.group]]))
        refuse_leaks(
            SplitPlan(
                held_out=kind,
                train_cells=screen.barcodes[outside],
                panel_cells=screen.barcodes[outside],
                normalisation_cells=screen.barcodes[outside],
                test_cells=screen.barcodes[inside],
                train_groups=np.unique(groups[outside]),
                test_groups=[fold.group],
            )
        )
        here, there = some_cells(screen, inside), some_cells(screen, outside)
        enough = [
            label
            for label in fold.test
            if here.perturbations[label].n_cells >= MIN_GROUP_CELLS
            and there.perturbations[label].n_cells >= MIN_GROUP_CELLS
        ]
        if not enough or here.is_control.sum() < MIN_GROUP_CELLS or there.is_control.sum() < MIN_GROUP_CELLS:
            left_out.append(fold.group)
            continue
        context = ScreenContext.build(there, enough, enough, perturbed_features(there, features))
        outputs = run_baselines(context, mode="fine-tuned")
        if options.model == ["gppc"]:
            fitted = fit_screen(there, enough, dataclasses.replace(options, replicates=column), features)
            outputs[MODEL] = ScreenModel(*fitted, options.change).predict(context)
        for label in enough:
            name = f"{label} @ {fold.group}"
            label_of_cells[inside[screen.label[inside] == label]] = name
            perturbations[name] = dataclasses.replace(here.perturbations[label], label=name)
        parts.append(outputs)
        references += [context.mean_response] * len(enough)
        fold_of += [len(parts)] * len(enough)
    if not parts:
        raise ValueError(
            f"`hold_out`: no {column} has {MIN_GROUP_CELLS} controls and {MIN_GROUP_CELLS} cells of a perturbation, "
            "inside and outside it."
        )
    names = need(list(perturbations), options)
    scored = dataclasses.replace(
        screen, label=label_of_cells.astype(str), perturbations=screen.perturbations | perturbations
    )
    # Controls are matched by batch and cell line: each row is measured against those of its own group.
    truth = observe(scored, names, options.seed)
    common = [name for name in parts[0] if all(name in part for part in parts)]
    predictions = {
        name: ScreenPrediction(
            np.concatenate([part[name].delta for part in parts]),
            None if parts[0][name].variance is None else np.concatenate([part[name].variance for part in parts]),
            parts[0][name].reads_perturbed_cells,
        )
        for name in common
    }
    notes = [f"{column} {', '.join(left_out)}: too few cells."] if left_out else []
    return ScreenRun(scored, truth, predictions, np.array(references), np.array(fold_of), {}, notes)


# Fewer cells than this have no response worth scoring.
MIN_GROUP_CELLS = 10


def guard_controls(seen: Screen, judged: Screen, options: EvaluateOptions) -> None:
    """Refuses a run in which a cell that the truth is measured from would also have been read."""
    controls = [seen.barcodes[row] for row in seen.cells_of(CONTROL)]
    perturbed = [] if options.mode == "fine-tuned" else judged.barcodes[~judged.is_control].tolist()
    truth = [] if options.controls == "shared" else judged.barcodes[judged.is_control].tolist()
    refuse_leaks(
        SplitPlan(
            train_cells=controls,
            panel_cells=controls if options.controls == "shared" else (),
            normalisation_cells=controls,
            selection_cells=controls,
            test_cells=[*perturbed, *truth],
        )
    )
