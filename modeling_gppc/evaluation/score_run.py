"""Scores of a trained model on its test pairs, beside the floors and, for synthetic cells, the best possible."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.schema import SPLITS
from data_scripts.synthetic.network import GeneNetwork
from modeling_gppc.evaluation.first_prediction import first_prediction, perturbed_rows
from modeling_gppc.evaluation.model_predictor import ModelPredictor
from modeling_gppc.evaluation.pair_arrays import PairArrays, sample_rows
from modeling_gppc.evaluation.pair_floors import fit_floors
from modeling_gppc.evaluation.pair_scores import (
    MODEL_METHOD,
    OPTIMUM,
    RESULTS_VERSION,
    named_splits,
    score_split,
    write_results,
)
from modeling_gppc.evaluation.plots import plot_scores
from modeling_gppc.evaluation.report import render_results
from modeling_gppc.evaluation.score_options import EvaluationOptions
from modeling_gppc.inference.loading import feature_extractor_of
from modeling_gppc.normalization_gppc import close_matches

# Fewer training pairs than this do not make a floor of their own.
MIN_FLOOR_PAIRS = 1_000


def check_scoring(folder: PairFolder, options: EvaluationOptions) -> None:
    """Finds out whether a model of these pairs can be trained and scored as asked, before it is trained.

    Raises:
        ValueError: If a split holds no pairs, `options.splits` names an unknown one, or `options.perturbation` cannot
            be shown.
    """
    for name in SPLITS:
        if name not in folder.splits:
            raise ValueError(
                f"`pairs` hold no {name} pair; wanted some in each of {', '.join(SPLITS)}: give more cells, or other "
                f"`pairs.splits`. {folder.describe_splits()}"
            )
    parts = _parts(folder.split("test"))
    for name in options.splits or ():
        if name not in parts:
            raise ValueError(f"`evaluation.splits` names `{name}`{close_matches(name, parts)}")
    perturbed_rows(feature_extractor_of(folder), folder, options.perturbation)


def score_model(
    model, folder: PairFolder, options: EvaluationOptions, out: Path, seed: int, network: GeneNetwork | None
) -> str:
    """
    Scores a model and makes its first prediction: writes `results.json` and `figures` beside it.

    Args:
        model ([`GppcForPerturbationPrediction`]): The trained model.
        folder, options, seed, network: See [`evaluate_run`].
        out (`Path`): The model's folder.

    Returns:
        The scores and the first prediction for people.

    Raises:
        ValueError: As [`check_scoring`].
    """
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
    """
    Scores a model on the test pairs of a folder.

    Args:
        model ([`GppcForPerturbationPrediction`]): The trained model.
        folder ([`PairFolder`]): Floors are fitted on `train`, their settings chosen on `validation`.
        options ([`EvaluationOptions`]): Sizes, floors, splits.
        seed (`int`, *optional*, defaults to 0): Of the bootstrap and of the choice of rows.
        network ([`GeneNetwork`], *optional*): The truth behind synthetic cells; adds the method `optimum`, for the
            count form on a sample of each split, named `<split>/ceiling`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show bars.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: As [`check_scoring`].
    """
    check_scoring(folder, options)
    test = folder.split("test")
    parts = _parts(test)
    results = {}
    names = options.splits or list(parts)
    for name in tqdm(names, desc="splits", unit="split", disable=not progress):
        rows = parts[name][sample_rows(len(parts[name]), options.max_pairs, seed)]
        pairs = _dense(folder, test, rows)
        floors = fit_floors(
            pairs_like(folder, "train", pairs, options.max_floor_pairs, seed),
            pairs_like(folder, "validation", pairs, options.max_floor_pairs, seed),
            options.floors,
            progress,
        )
        settings = {"seed": seed, "n_resamples": options.n_resamples, "progress": progress}
        methods = {MODEL_METHOD: ModelPredictor(model)}
        if network is not None and network.config.form == "linear":
            methods[OPTIMUM] = linear_optimum(network, folder.gene_ids)
        results[name] = score_split(pairs, methods, floors=floors, **settings)
        if network is not None and network.config.form == "count":
            few = pairs.select(sample_rows(len(pairs), options.optimum_pairs, seed))
            library = test.column("source_library_size").to_numpy()[rows][few.rows]
            samples = options.optimum_samples
            methods[OPTIMUM] = count_optimum(network, folder.gene_ids, few, library, samples, progress)
            results[f"{name}/ceiling"] = score_split(few, methods, floors=floors, with_gain=False, **settings)
    return {"schema_version": RESULTS_VERSION, "seed": int(seed), "splits": results}


def _labels(table: pa.Table, column: str) -> np.ndarray:
    return table.column(column).to_numpy(zero_copy_only=False).astype(str)


def _parts(table: pa.Table) -> dict[str, np.ndarray]:
    return named_splits(_labels(table, "pairing"), _labels(table, "dataset_id"))


def _dense(folder: PairFolder, table: pa.Table, rows: np.ndarray) -> PairArrays:
    return PairArrays.from_table(table.take(pa.array(rows)), folder.panels, folder.genes.num_rows)


def pairs_like(folder: PairFolder, split: str, pairs: PairArrays, at_most: int, seed: int) -> PairArrays:
    """Pairs of another split with the pairing and data sets of `pairs`, as far as there are enough of them."""
    table = folder.split(split)
    keep = np.ones(table.num_rows, dtype=bool)
    for column, values in (("pairing", pairs.pairing), ("dataset_id", pairs.dataset)):
        alike = keep & np.isin(_labels(table, column), np.unique(values))
        if alike.sum() >= (MIN_FLOOR_PAIRS if split == "train" else 1):
            keep = alike
    rows = np.flatnonzero(keep)
    return _dense(folder, table, rows[sample_rows(len(rows), at_most, seed)])


def _revealed(pairs: PairArrays) -> np.ndarray:
    """Levels of the revealed genes, NaN elsewhere, shape `(n, V)`."""
    revealed = np.full(pairs.source.shape, np.nan)
    row, column = np.nonzero(pairs.revealed_mask)
    revealed[row, pairs.revealed_ids[row, column]] = pairs.revealed_levels[row, column]
    return revealed


def linear_optimum(network: GeneNetwork, gene_ids: list[str]):
    """Exact best predictor of the linear form."""
    from data_scripts.synthetic.best_predictor import optimum

    def predict(pairs: PairArrays) -> tuple[np.ndarray, np.ndarray]:
        known = (pairs.source, pairs.source_measured, _revealed(pairs), list(pairs.pairing))
        mean, variance = optimum(network, *known, gene_ids=gene_ids)
        return mean, np.maximum(variance, 1e-12)

    return predict


def count_optimum(network, gene_ids, pairs: PairArrays, library: np.ndarray, n_samples: int, progress: bool):
    """Estimated best predictor of the count form for these pairs."""
    from data_scripts.synthetic.sampled_best_predictor import monte_carlo_optimum

    mean, _ = monte_carlo_optimum(
        network,
        pairs.source,
        library,
        pairs.source_measured,
        _revealed(pairs),
        list(pairs.pairing),
        gene_ids=gene_ids,
        n_samples=n_samples,
        progress=progress,
    )
    position = {row: index for index, row in enumerate(pairs.rows)}
    return lambda batch: mean[[position[row] for row in batch.rows]]


def load_network_of(output_dir: str | Path) -> GeneNetwork | None:
    """The network behind the cells that a run made, where it made some."""
    from data_scripts.synthetic.network import load_network
    from data_scripts.synthetic.network_store import network_path

    path = network_path(Path(output_dir) / "cells")
    return load_network(path) if path.is_file() else None
