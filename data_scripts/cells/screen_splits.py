"""Which perturbations are trained on and which are scored."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_scripts.cells.screens import Screen
from modeling_gppc.normalization_gppc import close_matches


@dataclasses.dataclass
class Fold:
    """One division of a screen: `train` and `test` perturbations, and the rows of cells that may be read for each;
    `group` is the batch or cell line that is held out, where one is."""

    name: str
    train: list[str]
    test: list[str]
    train_cells: np.ndarray
    test_cells: np.ndarray
    group: str = ""


def _cells(screen: Screen, labels: Sequence[str]) -> np.ndarray:
    return np.flatnonzero(np.isin(screen.label, list(labels)))


def perturbation_folds(screen: Screen, n_folds: int = 5, seed: int = 0) -> list[Fold]:
    """k folds over perturbations: those of a fold, alone or in a combination, are seen nowhere in its training part.
    Combinations that share a gene with a test perturbation are in neither part of that fold; every label is tested in
    exactly one fold. Raises `ValueError` if there are fewer perturbations than folds."""
    labels = sorted(screen.perturbations)
    if not 2 <= n_folds <= len(labels):
        raise ValueError(
            f"`folds` is {n_folds}; wanted 2 to {len(labels)}, the number of perturbations with enough cells."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    folds = []
    for index in range(n_folds):
        test = sorted(labels[position] for position in order[index::n_folds])
        hidden = {gene for label in test for gene in screen.perturbations[label].genes}
        train = [
            label for label in labels if label not in test and not hidden & set(screen.perturbations[label].genes)
        ]
        folds.append(Fold(f"fold {index + 1}", train, test, _cells(screen, train), _cells(screen, test)))
    return folds


def combination_folds(screen: Screen) -> dict[int, list[Fold]]:
    """Doubles by how many of their members were seen alone in training, 0, 1 or 2: one fold a double, trained on
    singles only. To see fewer members than the screen offers, the singles of the others are withheld from that fold;
    doubles that offer fewer members than asked for are not in that entry."""
    singles = {p.genes[0]: label for label, p in sorted(screen.perturbations.items()) if len(p.genes) == 1}
    doubles = {label: p.genes for label, p in sorted(screen.perturbations.items()) if len(p.genes) == 2}
    folds: dict[int, list[Fold]] = {0: [], 1: [], 2: []}
    for label, genes in doubles.items():
        offered = [gene for gene in genes if gene in singles]
        for seen in range(len(offered) + 1):
            hidden = set(offered[seen:])
            train = [single for gene, single in singles.items() if gene not in hidden]
            if len(train) >= 2:
                name = f"{label}, {seen} seen"
                folds[seen].append(Fold(name, train, [label], _cells(screen, train), _cells(screen, [label])))
    return {seen: entries for seen, entries in folds.items() if entries}


def group_folds(screen: Screen, hold_out: str) -> list[Fold]:
    """Folds of `--hold_out`: all perturbations, tested in one batch or cell line and trained on in the others.

    `"batch"` or `"cell_line"` holds out each in turn, `"batch=NAME"` that one. Raises `ValueError` if there is no such
    column or group, or only one group.
    """
    column, equals, value = hold_out.partition("=")
    if column not in ("batch", "cell_line"):
        raise ValueError(f"`column` is {column!r}; wanted 'batch' or 'cell_line'.")
    groups = getattr(screen, column)
    names = np.unique(groups).tolist()
    chosen = [value] if equals else names
    if chosen[0] not in names or len(names) < 2:
        raise ValueError(f"`{column}` {chosen[0]!r} cannot be held out; there are {', '.join(names[:8])}.")
    labels = sorted(screen.perturbations)
    perturbed = np.isin(screen.label, labels)
    return [
        Fold(
            f"{column} {name}",
            labels,
            labels,
            np.flatnonzero(perturbed & (groups != name)),
            np.flatnonzero(perturbed & (groups == name)),
            name,
        )
        for name in chosen
    ]


def stated_fold(screen: Screen, name: str, train: Sequence[str], test: Sequence[str]) -> Fold:
    """The division that a model was trained with, as it says itself; `ValueError` if that names a perturbation that
    the screen does not have, or none that was held out."""
    for label in [*train, *test]:
        if label not in screen.perturbations:
            raise ValueError(
                f"`model` was trained on a screen with `{label}`, which this one lacks"
                f"{close_matches(label, list(screen.perturbations))}; read the file with the same options."
            )
    if not test:
        raise ValueError("`model` was fine-tuned without holding out a perturbation: nothing is left to be scored.")
    return Fold(name, list(train), sorted(test), _cells(screen, train), _cells(screen, test))
