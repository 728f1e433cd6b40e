"""A cell type's response that training never saw: the model against the closed-form linear response.

    python benchmarks/out_of_distribution.py --cells kang2018_pbmc_ifnb_2000cells_9015genes.h5ad --out ood.json
    python benchmarks/out_of_distribution.py --smoke        # made-up cells, seconds

Each of the largest cell types in turn: its stimulated cells are held out, everything else is trained on (pairs of one type
and pairs of any type, whatever their condition). Tested on pairs of its control and its stimulated cells, with the true
change of a few interferon genes imposed. Scores leave the imposed genes out: squared error a cell and gene, and the
correlation of the predicted mean shift with the true one (stimulated minus control). Intervals are 95 % bootstraps over
cells. "Worse beyond the bootstrap error" is counted in two readings: the paired interval of the difference lies on the
worse side of zero; the model's score lies on the worse side of the floor's own interval.
"""

import argparse
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse
import torch
from bench_tools import parser_of, write_result
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.gene_selection import standardized_dispersion
from data_scripts.pairs.pair_folder import PairFolder, write_pair_folder
from data_scripts.pairs.pair_options import PerturbationOptions
from data_scripts.pairs.perturbation_sampling import sample_from_changes
from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.metrics import percentile_interval
from modeling_gppc.evaluation.model_predictor import ModelPredictor
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.feature_extraction_gppc import normalize_counts
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response, keep_network_if_it_pays
from modeling_gppc.training.arguments import TrainingOptions
from modeling_gppc.training.trainer import make_trainer

PAIRINGS = {"same_type": "cell_type", "same_dataset": "donor_id"}
IMPOSED = (
    ("ISG15",),
    ("ISG15", "IFI6", "IFIT3"),
    ("ISG15", "IFI6", "IFIT3", "LY6E", "ISG20"),
    ("CXCL10",),
)
ALL_IMPOSED = sorted({symbol for symbols in IMPOSED for symbol in symbols})
DRAWN = PerturbationOptions(min_genes=1, max_genes=5)
SOURCES_PER_TARGET = 4
FLOORS = ("linear_response", "one_gaussian")
SCORES = ("mse", "shift_correlation")
# Differences below this are rounding: the same response computed in two ways.
ROUNDING = 1e-5
SMALL = {
    "num_factors": 16,
    "num_components": 8,
    "num_latents": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "readout_size": 64,
    "hidden_dropout_prob": 0.2,
}


def smoke_cells() -> anndata.AnnData:
    """Made-up cells of four types, half of them with a program of the imposed genes switched on."""
    rng = np.random.default_rng(0)
    n, n_genes = 480, 40
    kind, perturbed = np.arange(n) % 4, rng.random(n) < 0.5
    rate = (rng.normal(size=(4, n_genes)) + 1)[kind] + perturbed[:, None] * (np.arange(n_genes) < 12) * 1.5
    cells = anndata.AnnData(np.log1p(rng.poisson(np.exp(rate))).astype(np.float32))
    cells.var_names = ALL_IMPOSED + [f"G{index}" for index in range(n_genes - len(ALL_IMPOSED))]
    cells.obs = pd.DataFrame({"cell_type": np.array(list("abcd"))[kind], "donor_id": "x", "perturbed": perturbed})
    return cells


def read_cells(path: Path) -> anndata.AnnData:
    """Log values of an AnnData file of raw counts with `cell_type`, `donor_id`, `n_counts_full` and `is_control`."""
    cells = anndata.read_h5ad(path)
    counts = cells.X.toarray() if scipy.sparse.issparse(cells.X) else np.asarray(cells.X)
    library = cells.obs["n_counts_full"].to_numpy() if "n_counts_full" in cells.obs else counts.sum(axis=1)
    cells.X = normalize_counts(counts, library.astype(np.float64)[:, None])
    cells.obs["perturbed"] = ~cells.obs["is_control"].to_numpy(bool)
    cells.var_names = cells.var.get("symbol", cells.var_names).astype(str)
    return cells


def variable_genes(values: np.ndarray, n_genes: int, always: np.ndarray) -> np.ndarray:
    """Columns of the genes that vary most between some cells for their mean, ascending, `always` among them."""
    sums = values.sum(axis=0, dtype=np.float64)
    squares = (values.astype(np.float64) ** 2).sum(axis=0)
    order = np.argsort(-standardized_dispersion(len(values), (values != 0).sum(axis=0), sums, squares), kind="stable")
    rest = order[~np.isin(order, always)][: max(n_genes - len(always), 0)]
    return np.sort(np.concatenate([always, rest]))


def training_pairs(cells: anndata.AnnData, rows: np.ndarray, pairs_per_cell: int, seed: int) -> pa.Table:
    """Pairs of some of the cells in each pairing, each target behind sources drawn from the others of its group."""
    rng = np.random.default_rng(seed)
    tables = []
    for pairing, key in PAIRINGS.items():
        sources, targets = [], []
        group = cells.obs[key].astype(str).to_numpy()
        for name in np.unique(group[rows]):
            members = rows[group[rows] == name]
            if len(members) < 2:
                continue
            place = np.tile(np.arange(len(members)), pairs_per_cell)
            sources.append(members[(place + rng.integers(1, len(members), len(place))) % len(members)])
            targets.append(members[place])
        sources, targets = np.concatenate(sources), np.concatenate(targets)
        changes = scipy.sparse.csr_matrix(cells.X[targets] - cells.X[sources])
        numbers = rng.integers(DRAWN.min_genes, DRAWN.max_genes + 1, len(targets))
        lengths, imposed, _ = sample_from_changes(changes, numbers, rng)
        tables.append(pair_table(cells, sources, targets, pairing, lengths, imposed))
    return pa.concat_tables(tables)


def lists(lengths: np.ndarray, flat: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Lists of some lengths from their concatenated values."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


def pair_table(
    cells: anndata.AnnData,
    sources: np.ndarray,
    targets: np.ndarray,
    pairing: str,
    lengths: np.ndarray,
    imposed: np.ndarray,
) -> pa.Table:
    """Rows in `PAIR_SCHEMA` for pairs of cells.

    Args:
        cells (`AnnData`): The cells.
        sources, targets (`np.ndarray`): Row numbers of cells, shape `(n,)`.
        pairing (`str`): Name of the pairing.
        lengths (`np.ndarray`): Number of imposed genes of each pair, shape `(n,)`.
        imposed (`np.ndarray`): Their columns, concatenated.
    """
    n = len(sources)
    rows = np.repeat(np.arange(n), lengths)
    changes = cells.X[targets[rows], imposed] - cells.X[sources[rows], imposed]
    columns = {
        "perturbation_gene_ids": lists(lengths, imposed, pa.int32()),
        "perturbation_values": lists(lengths, changes, pa.float32()),
        "source_panel": np.zeros(n, np.int32),
        "target_panel": np.zeros(n, np.int32),
        "pairing": np.full(n, pairing),
        "dataset_id": np.full(n, "cells"),
        "is_control": ~cells.obs["perturbed"].to_numpy()[sources],
    }
    for side, which, prefix in (("source", sources, ""), ("target", targets, "target_")):
        nonzero, genes = np.nonzero(cells.X[which])
        counts = np.bincount(nonzero, minlength=n)
        columns[f"{side}_gene_ids"] = lists(counts, genes, pa.int32())
        columns[f"{side}_values"] = lists(counts, cells.X[which][nonzero, genes], pa.float32())
        columns[f"{side}_soma_joinid"] = which.astype(np.int64)
        for name in ("cell_type", "donor_id"):
            columns[prefix + name] = cells.obs[name].astype(str).to_numpy()[which]
    empty = {field.name: pa.nulls(n, field.type) for field in PAIR_SCHEMA}
    return pa.table([pa.array({**empty, **columns}[f.name], type=f.type) for f in PAIR_SCHEMA], schema=PAIR_SCHEMA)


def write_folder(path: Path, cells: anndata.AnnData, splits: dict[str, pa.Table]) -> PairFolder:
    """A pairs folder with one panel of all genes."""
    n_cells, n_genes = cells.shape
    columns = {
        "gene_id": list(cells.var_names),
        "gene_symbol": list(cells.var_names),
        "feature_length": np.full(n_genes, np.nan),
        "n_cells_measured": np.full(n_genes, n_cells),
        "n_cells_expressed": (cells.X != 0).sum(axis=0),
        "n_datasets_measured": np.ones(n_genes, dtype=np.int64),
        "mean": cells.X.mean(axis=0),
        "variance": cells.X.var(axis=0),
    }
    genes = pa.table([pa.array(columns[field.name], type=field.type) for field in GENE_SCHEMA], schema=GENE_SCHEMA)
    return write_pair_folder(path, splits, genes, np.ones((1, n_genes), dtype=bool), pairings=list(PAIRINGS))


def untrained(folder: PairFolder, seed: int, **settings) -> GppcForPerturbationPrediction:
    """A model with its closed-form start."""
    set_seed(seed)
    config = GppcConfig(vocab_size=folder.genes.num_rows, pairings=folder.pairings, **(SMALL | settings))
    model = GppcForPerturbationPrediction(config)
    datasets = [PairDataset(folder.split(name), folder.pairings) for name in ("train", "validation")]
    initialize_linear_response(model, *datasets, folder.panels, seed=seed)
    return model.eval()


def trained(folder: PairFolder, options: TrainingOptions, out: Path, seed: int, **settings):
    """A model trained the way `train.py` trains one."""
    model = untrained(folder, seed, **settings)
    train, validation = (PairDataset(folder.split(name), folder.pairings) for name in ("train", "validation"))
    collate = PairCollator(folder.panels, DRAWN, seed=seed)
    trainer = make_trainer(model, options, out, seed, train, validation, collate, PairCollator(folder.panels))
    trainer.train()
    keep_network_if_it_pays(model, trainer.state.log_history)
    return model.eval()


class Case:
    """Scores of one held-out type and one set of imposed genes, with bootstrap draws that all methods share."""

    def __init__(self, cells: anndata.AnnData, own: np.ndarray, pairs: PairArrays, resamples: int):
        self.pairs = pairs
        self.keep = np.ones(pairs.n_genes, dtype=bool)
        self.keep[pairs.revealed_ids[0]] = False
        control = cells.X[own & ~cells.obs["perturbed"].to_numpy()][:, self.keep]
        stimulated, target = np.unique(pairs.target_id, return_inverse=True)
        self.target, self.n_targets = target.ravel(), len(stimulated)
        rng = np.random.default_rng(0)
        # The first row is the data themselves.
        draws = [rng.multinomial(n, np.full(n, 1 / n), resamples) for n in (self.n_targets, len(control))]
        draws = [np.concatenate([np.ones((1, draw.shape[1])), draw]) for draw in draws]
        self.weights, control_weights = (draw / draw.sum(axis=1, keepdims=True) for draw in draws)
        self.control_mean = control_weights @ control
        shift = self.weights @ cells.X[stimulated][:, self.keep] - self.control_mean
        self.shift = shift - shift.mean(axis=1, keepdims=True)

    def score(self, predicted: np.ndarray) -> np.ndarray:
        """MSE and shift correlation: of the data, then of every resample; shape `(2, 1 + resamples)`."""
        predicted = predicted[:, self.keep]
        error = ((predicted - self.pairs.target[:, self.keep]) ** 2).mean(axis=1)
        count = np.bincount(self.target)
        per_target = np.bincount(self.target, weights=error) / count
        means = np.zeros((len(count), predicted.shape[1]))
        np.add.at(means, self.target, predicted)
        shift = self.weights @ (means / count[:, None]) - self.control_mean
        shift = shift - shift.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(shift, axis=1) * np.linalg.norm(self.shift, axis=1)
        return np.stack([self.weights @ per_target, (shift * self.shift).sum(axis=1) / np.maximum(norms, 1e-12)])


def figures(scores: np.ndarray) -> dict:
    """Both scores of [`Case.score`], or of a difference of two, with their intervals."""
    entry = {name: float(values[0]) for name, values in zip(SCORES, scores)}
    return entry | {f"{name}_ci95": percentile_interval(values[1:]) for name, values in zip(SCORES, scores)}


def mean_shift(cells: anndata.AnnData, held_out: str) -> np.ndarray:
    """Mean shift of the other types that have cells of both conditions; reads labels and conditions."""
    shifts, perturbed = [], cells.obs["perturbed"].to_numpy()
    for name in np.unique(cells.obs["cell_type"].astype(str)):
        sides = [cells.X[(cells.obs["cell_type"] == name).to_numpy() & side] for side in (perturbed, ~perturbed)]
        if name != held_out and min(map(len, sides)) >= 20:
            shifts.append(sides[0].mean(0) - sides[1].mean(0))
    return np.mean(shifts, axis=0)


def predictions(model: GppcForPerturbationPrediction, pairs: PairArrays) -> list[np.ndarray]:
    """Of the model, of its linear response, and the size of the network's contribution, root mean square over genes."""
    predictor, parts = ModelPredictor(model), []
    with torch.inference_mode():
        for batch in pairs.batches(256):
            output = model(**predictor.inputs(batch))
            size = (output.logits - output.linear_response).square().mean(1).sqrt()
            parts.append([part.numpy() for part in (output.logits, output.linear_response, size)])
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def examine(
    cells: anndata.AnnData, held_out: str, arguments: argparse.Namespace, options: TrainingOptions
) -> list[dict]:
    """One entry a set of imposed genes for one held-out type."""
    own, perturbed = (cells.obs["cell_type"] == held_out).to_numpy(), cells.obs["perturbed"].to_numpy()
    rows = np.flatnonzero(~(own & perturbed))
    cells = cells[:, variable_genes(cells.X[rows], arguments.genes, cells.var_names.get_indexer(ALL_IMPOSED))].copy()
    validation = np.random.default_rng(arguments.seed).random(len(rows)) < 0.1
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        splits = {
            "train": training_pairs(cells, rows[~validation], arguments.pairs_per_cell, arguments.seed),
            "validation": training_pairs(cells, rows[validation], 6, arguments.seed + 1),
        }
        folder = write_folder(Path(scratch) / "pairs", cells, splits)
        gaussian = untrained(folder, arguments.seed, num_components=1)
        model = trained(folder, options, Path(scratch) / "run", arguments.seed, num_components=arguments.states)
        for symbols in IMPOSED:
            # Every stimulated cell of the held-out type behind a few of its control cells.
            targets = np.repeat(np.flatnonzero(own & perturbed), SOURCES_PER_TARGET)
            controls = np.flatnonzero(own & ~perturbed)
            sources = np.random.default_rng(arguments.seed).choice(controls, len(targets))
            ids = np.tile(cells.var_names.get_indexer(symbols), len(targets))
            lengths = np.full(len(targets), len(symbols))
            table = pair_table(cells, sources, targets, arguments.pairing, lengths, ids)
            pairs = PairArrays.from_table(table, folder.panels, cells.n_vars)
            case = Case(cells, own, pairs, arguments.resamples)
            full, linear, network = predictions(model, pairs)
            means = {
                "other_types_shift": cells.X[controls].mean(0) + mean_shift(cells, held_out),
                "control_mean": cells.X[controls].mean(0),
                "stimulated_mean": cells.X[own & perturbed].mean(0),
            }
            predicted = {"gppc": full, "linear_response": linear, "one_gaussian": predictions(gaussian, pairs)[1]}
            predicted |= {name: np.broadcast_to(mean, pairs.target.shape) for name, mean in means.items()}
            scores = {name: case.score(values) for name, values in predicted.items()}
            entry = {"held_out": held_out, "imposed": list(symbols), "n_targets": case.n_targets}
            entry |= {"network": float(network.mean())}
            entry |= {"methods": {name: figures(found) for name, found in scores.items()}}
            entry |= {f"gppc_minus_{floor}": figures(scores["gppc"] - scores[floor]) for floor in FLOORS}
            results.append(entry)
    return results


def summary(results: list[dict]) -> dict:
    """Means over the cases, and the cases in which the model is worse beyond the bootstrap error."""

    def mean(name: str, score: str) -> float:
        return float(np.mean([entry["methods"][name][score] for entry in results]))

    output = {score: {name: mean(name, score) for name in results[0]["methods"]} for score in SCORES}
    output |= {"relative_mse": {}, "mean_relative_mse": {}, "worse": {}}
    for floor in FLOORS:
        gaps = [entry[f"gppc_minus_{floor}"] for entry in results]
        both = [(entry["methods"]["gppc"], entry["methods"][floor]) for entry in results]
        output["relative_mse"][floor] = output["mse"]["gppc"] / output["mse"][floor] - 1
        output["mean_relative_mse"][floor] = float(np.mean([model["mse"] / own["mse"] - 1 for model, own in both]))
        output["worse"][floor] = {
            "paired": {
                "mse": sum(gap["mse_ci95"][0] > ROUNDING for gap in gaps),
                "shift_correlation": sum(gap["shift_correlation_ci95"][1] < -ROUNDING for gap in gaps),
            },
            "unpaired": {
                "mse": sum(model["mse"] > own["mse_ci95"][1] + ROUNDING for model, own in both),
                "shift_correlation": sum(
                    model["shift_correlation"] < own["shift_correlation_ci95"][0] - ROUNDING for model, own in both
                ),
            },
        }
    return output


def report(results: list[dict], means: dict) -> str:
    """A row a case, then what they come to."""
    names = list(results[0]["methods"])
    rows = []
    for entry in results:
        scores = [entry["methods"][name] for name in names]
        row = [entry["held_out"], "+".join(entry["imposed"])]
        row += [f"{score['mse']:.4f} / {score['shift_correlation']:.3f}" for score in scores]
        gap = entry["gppc_minus_one_gaussian"]
        for name, digits in zip(SCORES, (4, 3)):
            low, high = gap[f"{name}_ci95"]
            row.append(f"{gap[name]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
        rows.append([*row, f"{entry['network']:.3f}"])
    averages = [f"{means['mse'][name]:.4f} / {means['shift_correlation'][name]:.3f}" for name in names]
    rows.append(["mean", "", *averages, "", "", ""])
    header = ["held out", "imposed", *names, "gppc - one Gaussian (MSE)", "the same (correlation)", "network"]
    lines = [text_table(header, rows)]
    for floor, worse in means["worse"].items():
        counts = [f"{reading} {found['mse']} (MSE), {found[SCORES[1]]} (shift)" for reading, found in worse.items()]
        lines.append(
            f"against {floor}: mean MSE {means['relative_mse'][floor]:+.1%}, a case "
            f"{means['mean_relative_mse'][floor]:+.1%} on average; worse beyond the bootstrap error in so many of "
            f"{len(results)} cases: {'; '.join(counts)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cells", type=Path, help="AnnData file of raw counts with `cell_type` and `is_control`")
    parser.add_argument("--types", nargs="*", help="cell types to hold out; default: the three largest")
    parser.add_argument("--genes", type=int, default=400)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--pairs-per-cell", type=int, default=12)
    parser.add_argument("--pairing", choices=PAIRINGS, default="same_type", help="context assumed at the test")
    parser.add_argument("--states", type=int, default=SMALL["num_components"], help="cell states at most")
    parser.add_argument("--resamples", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.genes, arguments.steps, arguments.resamples, arguments.pairs_per_cell = 30, 4, 50, 2
    elif arguments.cells is None:
        parser.error("give --cells FILE.h5ad, or --smoke")
    transformers_logging.set_verbosity_error()
    cells = smoke_cells() if arguments.smoke else read_cells(arguments.cells)
    types = arguments.types or cells.obs["cell_type"].astype(str).value_counts(sort=True).index[:3].tolist()
    step = max(arguments.steps // 8, 1)
    options = TrainingOptions(
        max_steps=arguments.steps,
        warmup_steps=min(50, arguments.steps),
        eval_steps=step,
        save_steps=step,
        logging_steps=step,
        dataloader_num_workers=0,
        use_cpu=True,
    )
    results = []
    for held_out in types[:1] if arguments.smoke else types:
        results += examine(cells, held_out, arguments, options)
    means = summary(results)
    print(report(results, means))
    write_result({"summary": means, "cases": results, "seed": arguments.seed}, arguments.out)


if __name__ == "__main__":
    main()
