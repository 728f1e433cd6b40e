"""Scores of a trained model on its test pairs, beside the floors and, for synthetic cells, the best possible."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.schema import SPLITS
from data_scripts.synthetic.network import GeneNetwork
from modeling_gppc.evaluation.first_prediction import cells_to_show, first_prediction
from modeling_gppc.evaluation.model_predictor import model_predictor
from modeling_gppc.evaluation.pair_arrays import PairArrays, sample_rows, text_column
from modeling_gppc.evaluation.pair_floors import fit_floors
from modeling_gppc.evaluation.pair_scores import (
    MODEL_METHOD,
    OPTIMUM,
    RESULTS_VERSION,
    Predictor,
    score_split,
    write_results,
)
from modeling_gppc.evaluation.plots import plot_scores
from modeling_gppc.evaluation.report import render_results
from modeling_gppc.evaluation.score_options import EvaluationOptions
from modeling_gppc.inference.loading import feature_extractor_of
from modeling_gppc.normalization_gppc import close_matches

MIN_FLOOR_PAIRS = 1_000  # fewer training pairs than this do not make a floor of their own
MIN_TABLE_PAIRS = 50  # fewer test pairs than this do not make a table of their own


def check_scoring(folder: PairFolder, options: EvaluationOptions) -> None:
    """Raises `ValueError`, before training, if a split holds no pairs, `options.splits` names an unknown one,
    or `options.perturbation` cannot be shown."""
    for name in SPLITS:
        if name not in folder.splits:
            raise ValueError(
                f"`pairs` hold no {name} pair; wanted some in each of {', '.join(SPLITS)}: give more cells, or other "
                f"`pairs.splits`. {folder.describe_splits()}"
            )
    parts = parts_of(folder.split("test"))
    for name in options.splits or ():
        if name not in parts:
            raise ValueError(f"`evaluation.splits` names `{name}`{close_matches(name, parts)}")
    cells_to_show(feature_extractor_of(folder), folder, options.perturbation)


def score_model(
    model, folder: PairFolder, options: EvaluationOptions, out: Path, seed: int, network: GeneNetwork | None
) -> str:
    """Scores a model and makes its first prediction: writes `results.json` and `figures` into `out`, its folder, and
    returns both for people. Arguments and errors are those of [`evaluate_run`]."""
    results = evaluate_run(model, folder, options, seed, network)
    write_results(results, out / "results.json")
    plot_scores(results, out / "figures" / "scores.png")
    text = render_results(results)
    prediction = first_prediction(model, feature_extractor_of(folder), folder, options.perturbation)
    prediction.plot(out / "figures" / "first_prediction.png")
    return f"{text}\n\n{prediction.text()}"


def evaluate_run(
    model,
    folder: PairFolder,
    options: EvaluationOptions,
    seed: int = 0,
    network: GeneNetwork | None = None,
    progress: bool = True,
) -> dict:
    """Scores a model on the test pairs of a folder, beside floors fitted on `train` and chosen on `validation`.

    Returns the content of `results.json`. `seed` is that of the bootstrap and of the choice of rows; `network`, the
    one behind linear synthetic cells, adds the method `optimum`. Raises `ValueError` as [`check_scoring`].
    """
    check_scoring(folder, options)
    test = folder.split("test")
    parts = parts_of(test)
    settings = {"seed": seed, "n_resamples": options.n_resamples, "progress": progress}
    results = {}
    for name in tqdm(options.splits or parts, desc="splits", unit="split", disable=not progress):
        rows = parts[name][sample_rows(len(parts[name]), options.max_pairs, seed)]
        pairs = _dense(folder, test, rows)
        fitted_on = [_pairs_like(folder, split, pairs, options.max_floor_pairs, seed) for split in SPLITS[:2]]
        floors = fit_floors(*fitted_on, options.floors, progress)
        methods: dict[str, Predictor] = {MODEL_METHOD: model_predictor(model)}
        if network is not None:
            methods[OPTIMUM] = best_predictor(network, folder.gene_ids)
        results[name] = score_split(pairs, methods, floors=floors, **settings)
    return {"schema_version": RESULTS_VERSION, "seed": int(seed), "splits": results}


def parts_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Rows of each part of a split that is worth a table of its own: one a pairing (`same_type`), and with several
    data sets also one a data set and pairing (`DATASET/same_type`); no small ones unless nothing else is there."""
    pairing, dataset = text_column(table, "pairing"), text_column(table, "dataset_id")
    parts, datasets = {}, np.unique(dataset)
    for name in np.unique(pairing).tolist():
        rows = parts[name] = np.flatnonzero(pairing == name)
        if len(datasets) > 1:
            parts |= {f"{own}/{name}": rows[dataset[rows] == own] for own in datasets}
    large = {name: rows for name, rows in parts.items() if len(rows) >= MIN_TABLE_PAIRS}
    return large or {name: rows for name, rows in parts.items() if len(rows)}


def _dense(folder: PairFolder, table: pa.Table, rows: np.ndarray) -> PairArrays:
    return PairArrays.from_table(table.take(pa.array(rows)), folder.panels)


def _pairs_like(folder: PairFolder, split: str, pairs: PairArrays, at_most: int, seed: int) -> PairArrays:
    """Pairs of another split with the pairing and data sets of `pairs`, as far as there are enough of them."""
    table = folder.split(split)
    keep = np.ones(table.num_rows, dtype=bool)
    for column, values in (("pairing", pairs.pairing), ("dataset_id", pairs.dataset)):
        alike = keep & np.isin(text_column(table, column), np.unique(values))
        if alike.sum() >= (MIN_FLOOR_PAIRS if split == "train" else 1):
            keep = alike
    rows = np.flatnonzero(keep)
    return _dense(folder, table, rows[sample_rows(len(rows), at_most, seed)])


def best_predictor(network: GeneNetwork, gene_ids: list[str]) -> Predictor:
    """The best possible predictor of a linear network's cells."""
    from data_scripts.synthetic.best_predictor import optimum

    def predict(pairs: PairArrays) -> tuple[np.ndarray, np.ndarray]:
        imposed = np.full(pairs.source.shape, np.nan)
        row, column = np.nonzero(pairs.revealed_mask)
        imposed[row, pairs.revealed_ids[row, column]] = pairs.revealed_levels[row, column]
        given = (pairs.source_measured, imposed, list(pairs.pairing))
        mean, variance = optimum(network, pairs.source, *given, gene_ids=gene_ids)
        return mean, np.maximum(variance, 1e-12)

    return predict


def load_network_of(output_dir: str | Path) -> GeneNetwork | None:
    """The network behind the cells that a run made, where its best predictor is known: the linear form."""
    from data_scripts.synthetic.network import load_network
    from data_scripts.synthetic.network_store import network_path

    path = network_path(Path(output_dir) / "cells")
    network = load_network(path) if path.is_file() else None
    return network if network is not None and network.config.form == "linear" else None
