"""Folds of an evaluation as a file, and predictions that other tools made for them."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_baselines import BASELINES
from modeling_gppc.evaluation.screen_runs import MODEL, choose_folds, divisions
from modeling_gppc.evaluation.screen_scores import ScreenPrediction
from modeling_gppc.normalization_gppc import close_matches


def screen_folds(screen: Screen, options: EvaluateOptions) -> dict:
    """What another tool needs to predict exactly what is scored in the fine-tuned mode; docs/evaluation.md says what
    each entry is."""
    names = screen.barcodes.tolist()
    if len(set(names)) < len(names):
        raise ValueError("`screen`: several cells have one name; make obs_names unique, so that folds can name cells.")
    folds = choose_folds(screen, options)
    labels = sorted({label for fold in folds for label in [*fold.train, *fold.test]})
    content = {
        "schema_version": 1,
        "screen": screen.name,
        "normalization": screen.normalization,
        "target_sum": screen.target_sum,
        "library_sizes": dict(zip(names, screen.library_size.tolist())),
        "groups": dict.fromkeys(names, "")
        if options.controls == "shared"
        else dict(zip(names, screen.group.tolist())),
        "shuffled_labels": options.shuffle_labels,
        "cells": {label: screen.barcodes[screen.cells_of(label)].tolist() for label in labels},
        "folds": [{"name": fold.name, "train": fold.train, "test": fold.test} for fold in folds],
        "divisions": [],
    }
    for index, (seen, _) in enumerate(divisions(screen, options)):
        targets = set(seen.panel_targets.tolist())
        content["divisions"].append(
            {
                "division": index,
                "controls": seen.barcodes[seen.cells_of(CONTROL)].tolist(),
                "genes": seen.gene_ids,
                "symbols": seen.gene_symbols,
                "scored_genes": [gene for column, gene in enumerate(seen.gene_ids) if column not in targets],
            }
        )
    content["digest"] = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    return content


def read_predictions(
    files: Mapping[str, str | Path], folds: dict
) -> tuple[list[dict[str, ScreenPrediction]], list[str]]:
    """
    Predictions of other tools, checked against the folds.

    Args:
        files (`Mapping`): Name of a method -> AnnData file: a row a perturbation and division (`obs["target"]` and
            `obs["division"]`), a column a gene (id or symbol), `X` the predicted change of the log value against
            controls; `layers["variance"]`, where it is given, that of the prediction.
        folds (`dict`): From [`screen_folds`].

    Returns:
        For every division, method -> predictions of all tested perturbations in the order of their names; and what a
        reader must know, a sentence each.

    Raises:
        ValueError: For a name that is taken or cannot stand in a table, and for a file that is no such AnnData, lacks
            or repeats rows, has rows of no fold, lacks scored genes, or holds values that are not finite.
    """
    found: list[dict[str, ScreenPrediction]] = [{} for _ in folds["divisions"]]
    notes = []
    for name, path in files.items():
        if name in (*BASELINES, MODEL) or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(
                f"`predictions` {name!r} is the name of a built-in method, or holds other characters than letters, "
                "digits and _ . + -; wanted another NAME=FILE."
            )
        where = f"`predictions` {name}={Path(path).name}"
        try:
            table = anndata.read_h5ad(path)
        except Exception as error:  # h5py and anndata raise many kinds
            raise ValueError(f"{where} cannot be read as AnnData: {error}") from error
        stated = table.uns.get("folds")
        if stated is None:
            notes.append(
                f"{name} does not say which folds it was made for (`uns['folds']`, the digest in their file)."
            )
        elif stated != folds["digest"]:
            raise ValueError(
                f"{where} was made for other folds (digest {stated}, not {folds['digest']}): write them again with "
                "the options of this run, `seed`, `divisions` and `shuffle_labels` among them."
            )
        if table.X is None:
            raise ValueError(f"{where} has no X; wanted the predicted change of the log value.")
        rows, read = sorted(_rows(table, folds, where).items()), set()
        for division, predictions in zip(folds["divisions"], found):
            columns, places = _columns(table, division, where)
            read |= set(columns.tolist())
            own = table[[row for (index, _), row in rows if index == division["division"]], columns]
            matrices = {"X": own.X} | ({"variance": own.layers["variance"]} if "variance" in own.layers else {})
            values = [_values(kind, matrix, places, division, where) for kind, matrix in matrices.items()]
            predictions[name] = ScreenPrediction(*values, reads_perturbed_cells=True)
        if len(read) < table.n_vars:
            notes.append(f"{name}: {table.n_vars - len(read)} of {table.n_vars} genes are unknown or not read.")
    if files:
        shuffled = "Labels are shuffled: {} must be fitted on the cells that the folds file names."
        unshuffled = "{}: what shuffled labels score is not known; predict folds written with `shuffle_labels`."
        notes.append((shuffled if folds["shuffled_labels"] else unshuffled).format(", ".join(files)))
    return found, notes


def _rows(table: anndata.AnnData, folds: dict, where: str) -> dict[tuple[int, str], int]:
    """Division and tested perturbation -> row of the file."""
    for column in ("target", "division"):
        if column not in table.obs:
            raise ValueError(f"{where} has no column obs[{column!r}]{close_matches(column, list(table.obs.columns))}.")
    tested = sorted({label for fold in folds["folds"] for label in fold["test"]})
    wanted = dict.fromkeys((division["division"], label) for division in folds["divisions"] for label in tested)
    numbers = pd.to_numeric(table.obs["division"].astype(str), errors="coerce")
    rows: dict[tuple[int, str], int] = {}
    for row, pair in enumerate(zip(numbers, table.obs["target"].astype(str))):
        if pair in rows or pair not in wanted:
            what = "is there twice" if pair in rows else f"is not in the folds{close_matches(pair[1], tested)}"
            raise ValueError(f"{where}, row {row}: target {pair[1]!r} of division {pair[0]:g} {what}.")
        rows[pair] = row
    missing = [pair for pair in wanted if pair not in rows]
    if missing:
        whole = sorted({division for division, _ in missing} - {division for division, _ in rows})
        raise ValueError(
            f"{where} lacks {len(missing)} of {len(wanted)} rows, e.g. target {missing[0][1]!r} of division "
            f"{missing[0][0]}{f'; of divisions {whole} all' if whole else ''}. Predict all that the folds file tests."
        )
    return rows


def _columns(table: anndata.AnnData, division: dict, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the file that hold genes of the division, and the place of each among those genes."""
    if not table.var_names.is_unique:
        raise ValueError(f"{where}: var_names hold {table.var_names[table.var_names.duplicated()][0]!r} twice.")
    names = {str(name): column for column, name in enumerate(table.var_names)}
    columns = np.array([names.get(g, names.get(s, -1)) for g, s in zip(division["genes"], division["symbols"])])
    scored = set(division["scored_genes"])
    missing = [gene for gene, column in zip(division["genes"], columns) if column < 0 and gene in scored]
    if missing:
        raise ValueError(
            f"{where} lacks {len(missing)} of {len(scored)} scored genes of division {division['division']}, e.g. "
            f"{', '.join(missing[:3])}; var_names are gene ids or symbols."
        )
    places = np.flatnonzero(columns >= 0)
    return columns[places], places


def _values(kind: str, matrix, places: np.ndarray, division: dict, where: str) -> np.ndarray:
    """Predictions of a division at all its genes, 0 where the file has none, `(P, V)`."""
    values = np.asarray(matrix.toarray() if scipy.sparse.issparse(matrix) else matrix, dtype=np.float64)
    wrong = ~np.isfinite(values) | ((values < 0) if kind == "variance" else False)
    scored = np.isin(division["genes"], division["scored_genes"])[places]
    if wrong[:, scored].any():
        raise ValueError(
            f"{where}: {int(wrong[:, scored].sum())} values of {kind} at scored genes of division "
            f"{division['division']} are not finite{' or negative' if kind == 'variance' else ''}."
        )
    found = np.zeros((len(values), len(division["genes"])))
    found[:, places] = np.where(wrong, 0.0, values)
    return found
