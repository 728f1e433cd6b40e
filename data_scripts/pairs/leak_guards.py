"""Leak guards: a division of data that lets test information into training is refused, with the reason."""

import dataclasses
from collections.abc import Iterable, Mapping


@dataclasses.dataclass
class SplitPlan:
    """All that can leak, in one place; every field holds names, an empty one is not checked.

    Args:
        train_cells, test_cells (`Iterable[str]`): Barcodes.
        train_perturbations, test_perturbations (`Iterable[str]`): Labels, `A+B` for combinations.
        held_out (`str`): What the split claims to hold out: `"perturbations"`, `"combinations"`, `"batches"` or
            `"cell_lines"`.
        seen_members (`int`, *optional*): For combinations: how many members were seen alone, as stated.
        train_groups, test_groups (`Iterable[str]`): Batches or cell lines, whichever is held out.
        selection_cells (`Iterable[str]`): Cells that chose hyper-parameters, checkpoints or thresholds.
        panel_cells (`Iterable[str]`): Cells that chose the genes.
        normalisation_cells (`Iterable[str]`): Cells that fixed means, scales or residuals.
        reference_perturbations (`Iterable[str]`): Perturbations averaged into a reference or a mean baseline.
        scored_genes, target_genes (`Iterable[str]`): Genes that count, and targets of the whole panel.
    """

    train_cells: Iterable[str] = ()
    test_cells: Iterable[str] = ()
    train_perturbations: Iterable[str] = ()
    test_perturbations: Iterable[str] = ()
    held_out: str = "perturbations"
    seen_members: int | None = None
    train_groups: Iterable[str] = ()
    test_groups: Iterable[str] = ()
    selection_cells: Iterable[str] = ()
    panel_cells: Iterable[str] = ()
    normalisation_cells: Iterable[str] = ()
    reference_perturbations: Iterable[str] = ()
    scored_genes: Iterable[str] = ()
    target_genes: Iterable[str] = ()


def _parts(label: str) -> set[str]:
    return set(str(label).casefold().split("+"))


def _members(labels: Iterable[str]) -> set[str]:
    return set().union(*map(_parts, labels))


def _canonical(labels: Iterable[str]) -> set[str]:
    return {"+".join(sorted(str(label).casefold().split("+"))) for label in labels}


def find_leaks(plan: SplitPlan) -> list[str]:
    """Reasons why a plan leaks, each one sentence; an empty list is a clean plan."""
    leaks = []

    def overlap(first: Iterable, second: Iterable, reason: str) -> None:
        shared = sorted(set(map(str, first)) & set(map(str, second)))
        if shared:
            shown = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
            leaks.append(f"{reason}: {len(shared)} shared ({shown})")

    overlap(plan.train_cells, plan.test_cells, "a cell is in training and in test")
    overlap(plan.selection_cells, plan.test_cells, "cells of the test set, controls included, were used for selection")
    overlap(plan.panel_cells, plan.test_cells, "the gene panel was chosen with test cells")
    overlap(plan.normalisation_cells, plan.test_cells, "normalisation was fitted on test cells")
    overlap(plan.scored_genes, plan.target_genes, "a target gene of the panel is scored")
    if plan.held_out in ("perturbations", "combinations"):
        test = _canonical(plan.test_perturbations)
        overlap(_canonical(plan.train_perturbations), test, "a perturbation is in training and in test")
        overlap(_canonical(plan.reference_perturbations), test, "a test perturbation is part of the reference mean")
    singles = {str(label).casefold() for label in plan.train_perturbations if "+" not in str(label)}
    if plan.held_out == "perturbations":
        test_genes = _members(plan.test_perturbations)
        combined = [label for label in plan.train_perturbations if "+" in str(label)]
        overlap(_members(combined), test_genes, "a test gene is perturbed in a training combination")
        tested = _members(label for label in plan.test_perturbations if "+" in str(label))
        overlap(singles, tested, "a member of a test combination was seen alone but the split calls it unseen")
    if plan.held_out == "combinations":
        stated = plan.seen_members
        more = [label for label in plan.test_perturbations if len(_parts(label) & singles) > (stated or 0)]
        if stated is None:
            leaks.append("combinations are scored without saying how many of their members were seen (`seen_members`)")
        elif more:
            leaks.append(f"{len(more)} combinations had more members seen alone than the stated {stated} ({more[0]})")
    if plan.held_out in ("batches", "cell_lines"):
        overlap(plan.train_groups, plan.test_groups, f"one of the {plan.held_out} is in training and in test")
    return leaks


def refuse_leaks(plan: SplitPlan) -> None:
    """Raises `ValueError` naming every leak of the plan, in one line."""
    leaks = find_leaks(plan)
    if leaks:
        raise ValueError(f"`split` leaks: {'; '.join(leaks)}. Remove what is shared from training, or score less.")


def model_leak(run: Mapping | None, screen: str, cells_digest: str, mode: str) -> str | None:
    """Why a model folder may not be scored on a screen in a mode; `None` where it may.

    `run` is the content of the folder's `run.json`; where it does not state what the model has seen, no leak can be
    shown.
    """
    run = run or {}
    read = run.get("screen") or {}
    same_cells = read.get("cells_digest") == cells_digest
    if mode == "zero-shot":
        if same_cells or screen in (run.get("datasets") or ()):
            return f"the screen {screen!r} was among what the model was trained on"
        return None
    wanted = "controls" if mode == "in-context" else "perturbations"
    if not read:
        return f"mode {mode!r} wants a model of this screen (train.py --config screen), not one of others"
    if not same_cells:
        return f"the model was trained on other cells ({read.get('name')}) than those that are scored"
    if read.get("train_on") != wanted:
        return (
            f"mode {mode!r} wants a model trained on {wanted} (train.py --config screen --screen.train_on {wanted}); "
            f"this one was trained on {read.get('train_on')}"
        )
    return None


def guard_model(run: Mapping | None, screen: str, cells_digest: str, mode: str) -> None:
    """Raises `ValueError` naming the leak that [`model_leak`] finds."""
    if leak := model_leak(run, screen, cells_digest, mode):
        raise ValueError(f"`model` leaks: {leak}.")
