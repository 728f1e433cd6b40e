"""A cell type's response that training never saw: the model against the closed-form linear response.

    python benchmarks/out_of_distribution.py --cells kang2018_pbmc_ifnb_2000cells_9015genes.h5ad --out ood.json
    python benchmarks/out_of_distribution.py --smoke        # made-up cells, seconds

Each of the largest cell types in turn: its stimulated cells are held out, everything else is trained on (pairs of one type
and pairs of any type, whatever their condition). Tested on pairs of its control and its stimulated cells, with the true
change of a few interferon genes revealed. Scores leave the revealed genes out: squared error a cell and gene, and the
correlation of the predicted mean shift with the true one (stimulated minus control). Intervals are 95 % bootstraps over
cells. "Worse beyond the bootstrap error" is counted in two readings: the paired interval of the difference lies on the
worse side of zero; the model's score lies on the worse side of the floor's own interval.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from pair_tables import PAIRINGS, Cells, pair_table, read_cells, training_pairs, variable_genes, write_folder
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PerturbationOptions
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.metrics import percentile_interval
from modeling_gppc.evaluation.model_predictor import ModelPredictor
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.evaluation.pair_scores import write_results
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response, keep_departure_if_it_pays
from modeling_gppc.training.arguments import TrainingOptions
from modeling_gppc.training.trainer import make_trainer

REVEALED = (
    ("ISG15",),
    ("ISG15", "IFI6", "IFIT3"),
    ("ISG15", "IFI6", "IFIT3", "LY6E", "ISG20"),
    ("CXCL10",),
)
REVEAL = PerturbationOptions(min_genes=1, max_genes=5)
SOURCES_PER_TARGET = 4
FLOORS = ("linear_response", "one_gaussian")
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


def smoke_cells() -> Cells:
    """Made-up cells of four types, half of them with a program of the revealed genes switched on."""
    rng = np.random.default_rng(0)
    names = sorted({symbol for symbols in REVEALED for symbol in symbols})
    n, n_genes = 480, 40
    cell_type = np.array(["a", "b", "c", "d"])[np.arange(n) % 4]
    perturbed = rng.random(n) < 0.5
    level = rng.normal(size=(4, n_genes)) + 1
    rate = level[np.arange(n) % 4] + perturbed[:, None] * (np.arange(n_genes) < 12) * 1.5
    values = np.log1p(rng.poisson(np.exp(rate)))
    return Cells(
        values=values.astype(np.float32),
        cell_type=cell_type,
        donor=np.full(n, "x"),
        perturbed=perturbed,
        symbols=names + [f"G{index}" for index in range(n_genes - len(names))],
    )


def split_cells(cells: Cells, held_out: str, n_genes: int, seed: int) -> tuple[Cells, np.ndarray, np.ndarray]:
    """Cells with the genes that vary most among the training cells, and the rows to train and to validate on."""
    rows = np.flatnonzero(~((cells.cell_type == held_out) & cells.perturbed))
    always = cells.gene_positions(tuple(sorted({symbol for symbols in REVEALED for symbol in symbols})))
    cells = cells.with_genes(variable_genes(cells.values[rows], n_genes, always))
    validation = np.random.default_rng(seed).random(len(rows)) < 0.1
    return cells, rows[~validation], rows[validation]


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
    collate = PairCollator(folder.panels, REVEAL, seed=seed)
    trainer = make_trainer(model, options, out, seed, train, validation, collate, PairCollator(folder.panels))
    trainer.train()
    keep_departure_if_it_pays(model, trainer.state.log_history)
    return model.eval()


def held_out_pairs(cells: Cells, held_out: str, symbols: tuple[str, ...], pairing: str, seed: int) -> PairArrays:
    """Every stimulated cell of the held-out type behind a few of its control cells."""
    rng = np.random.default_rng(seed)
    own = cells.cell_type == held_out
    targets = np.repeat(np.flatnonzero(own & cells.perturbed), SOURCES_PER_TARGET)
    sources = rng.choice(np.flatnonzero(own & ~cells.perturbed), len(targets))
    ids = np.tile(cells.gene_positions(symbols), (len(targets), 1))
    table = pair_table(cells, sources, targets, ids, np.ones(ids.shape, dtype=bool), pairing)
    n_genes = cells.values.shape[1]
    return PairArrays.from_table(table, np.ones((1, n_genes), dtype=bool), n_genes)


class Case:
    """Scores of one held-out type and one set of revealed genes, with bootstrap draws that all methods share."""

    def __init__(self, cells: Cells, held_out: str, pairs: PairArrays, resamples: int, seed: int = 0):
        self.pairs = pairs
        self.keep = np.ones(pairs.n_genes, dtype=bool)
        self.keep[pairs.revealed_ids[0]] = False
        own = cells.cell_type == held_out
        self.control = cells.values[own & ~cells.perturbed][:, self.keep]
        self.stimulated, self.target = np.unique(pairs.target_id, return_inverse=True)
        self.target = self.target.ravel()
        rng = np.random.default_rng(seed)
        n_targets, n_controls = len(self.stimulated), len(self.control)
        # The first row is the data themselves.
        draws = [rng.multinomial(n, np.full(n, 1 / n), resamples) for n in (n_targets, n_controls)]
        draws = [np.concatenate([np.ones((1, draw.shape[1])), draw]) for draw in draws]
        self.weights, control_weights = (draw / draw.sum(axis=1, keepdims=True) for draw in draws)
        self.control_mean = control_weights @ self.control
        shift = self.weights @ cells.values[self.stimulated][:, self.keep] - self.control_mean
        self.shift = shift - shift.mean(axis=1, keepdims=True)

    def score(self, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """MSE and shift correlation: of the data, then of every resample; each `(1 + resamples,)`."""
        predicted = predicted[:, self.keep]
        error = ((predicted - self.pairs.target[:, self.keep]) ** 2).mean(axis=1)
        count = np.bincount(self.target)
        per_target = np.bincount(self.target, weights=error) / count
        means = np.zeros((len(count), predicted.shape[1]))
        np.add.at(means, self.target, predicted)
        shift = self.weights @ (means / count[:, None]) - self.control_mean
        shift = shift - shift.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(shift, axis=1) * np.linalg.norm(self.shift, axis=1)
        return self.weights @ per_target, (shift * self.shift).sum(axis=1) / np.maximum(norms, 1e-12)


def other_types_shift(cells: Cells, held_out: str) -> np.ndarray:
    """Mean shift of the other types that have cells of both conditions; reads labels and conditions."""
    shifts = []
    for name in np.unique(cells.cell_type):
        own = cells.cell_type == name
        if name != held_out and min((own & cells.perturbed).sum(), (own & ~cells.perturbed).sum()) >= 20:
            shifts.append(cells.values[own & cells.perturbed].mean(0) - cells.values[own & ~cells.perturbed].mean(0))
    return np.mean(shifts, axis=0)


def predictions(model: GppcForPerturbationPrediction, pairs: PairArrays) -> dict[str, np.ndarray]:
    """Of the model, of its linear response, and how far the two are apart."""
    predictor = ModelPredictor(model)
    parts = {"gppc": [], "linear": [], "departure": []}
    with torch.inference_mode():
        for batch in pairs.batches(256):
            output = model(**predictor.inputs(batch))
            for name, tensor in zip(parts, (output.logits, output.linear_response, output.departure)):
                parts[name].append(tensor.numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def examine(cells: Cells, held_out: str, arguments: argparse.Namespace, options: TrainingOptions) -> list[dict]:
    """One entry a set of revealed genes for one held-out type."""
    cells, train, validation = split_cells(cells, held_out, arguments.genes, arguments.seed)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        splits = {
            "train": training_pairs(cells, train, arguments.pairs_per_cell, arguments.seed, REVEAL),
            "validation": training_pairs(cells, validation, 6, arguments.seed + 1, REVEAL),
        }
        folder = write_folder(Path(scratch) / "pairs", cells, splits)
        gaussian = untrained(folder, arguments.seed, num_components=1)
        model = trained(folder, options, Path(scratch) / "run", arguments.seed, num_components=arguments.states)
        for symbols in REVEALED:
            pairs = held_out_pairs(cells, held_out, symbols, arguments.pairing, arguments.seed)
            case = Case(cells, held_out, pairs, arguments.resamples)
            own = cells.cell_type == held_out
            control = cells.values[own & ~cells.perturbed].mean(0)
            output = predictions(model, pairs)
            predicted = {
                "gppc": output["gppc"],
                "linear_response": output["linear"],
                "one_gaussian": predictions(gaussian, pairs)["linear"],
                "other_types_shift": np.broadcast_to(control + other_types_shift(cells, held_out), pairs.target.shape),
                "control_mean": np.broadcast_to(control, pairs.target.shape),
                "stimulated_mean": np.broadcast_to(cells.values[own & cells.perturbed].mean(0), pairs.target.shape),
            }
            scores = {name: case.score(values) for name, values in predicted.items()}
            entry = {
                "held_out": held_out,
                "revealed": list(symbols),
                "n_targets": len(case.stimulated),
                "departure": float(output["departure"].mean()),
                "methods": {
                    name: {
                        "mse": float(mse[0]),
                        "mse_ci95": percentile_interval(mse[1:]),
                        "shift_correlation": float(correlation[0]),
                        "shift_correlation_ci95": percentile_interval(correlation[1:]),
                    }
                    for name, (mse, correlation) in scores.items()
                },
            }
            for floor in FLOORS:
                error, correlation = (scores["gppc"][part] - scores[floor][part] for part in (0, 1))
                entry[f"gppc_minus_{floor}"] = {
                    "mse": float(error[0]),
                    "mse_ci95": percentile_interval(error[1:]),
                    "shift_correlation": float(correlation[0]),
                    "shift_correlation_ci95": percentile_interval(correlation[1:]),
                }
            results.append(entry)
    return results


def summary(results: list[dict]) -> dict:
    """Means over the cases, and the cases in which the model is worse beyond the bootstrap error."""
    output = {"mse": {}, "shift_correlation": {}, "relative_mse": {}, "mean_relative_mse": {}, "worse": {}}
    for part in ("mse", "shift_correlation"):
        for name in results[0]["methods"]:
            output[part][name] = float(np.mean([entry["methods"][name][part] for entry in results]))
    for floor in FLOORS:
        output["relative_mse"][floor] = output["mse"]["gppc"] / output["mse"][floor] - 1
        differences = [entry[f"gppc_minus_{floor}"] for entry in results]
        scores = [(entry["methods"]["gppc"], entry["methods"][floor]) for entry in results]
        output["mean_relative_mse"][floor] = float(np.mean([model["mse"] / own["mse"] - 1 for model, own in scores]))
        output["worse"][floor] = {
            "paired": {
                "mse": sum(difference["mse_ci95"][0] > ROUNDING for difference in differences),
                "shift_correlation": sum(
                    difference["shift_correlation_ci95"][1] < -ROUNDING for difference in differences
                ),
            },
            "unpaired": {
                "mse": sum(model["mse"] > own["mse_ci95"][1] + ROUNDING for model, own in scores),
                "shift_correlation": sum(
                    model["shift_correlation"] < own["shift_correlation_ci95"][0] - ROUNDING for model, own in scores
                ),
            },
        }
    return output


def report(results: list[dict], means: dict) -> str:
    """A row a case, then what they come to."""
    names = list(results[0]["methods"])
    rows = []
    for entry in results:
        row = [entry["held_out"], "+".join(entry["revealed"])]
        for name in names:
            score = entry["methods"][name]
            row.append(f"{score['mse']:.4f} / {score['shift_correlation']:.3f}")
        difference, own = entry["gppc_minus_one_gaussian"], entry["methods"]["one_gaussian"]
        for part, digits in (("mse", 4), ("shift_correlation", 3)):
            low, high = difference[f"{part}_ci95"]
            row.append(f"{difference[part]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
            row.append("[{:.{d}f}, {:.{d}f}]".format(*own[f"{part}_ci95"], d=digits))
        row.append(f"{entry['departure']:.3f}")
        rows.append(row)
    rows.append(
        ["mean", ""]
        + [f"{means['mse'][name]:.4f} / {means['shift_correlation'][name]:.3f}" for name in names]
        + [f"{means['relative_mse']['one_gaussian']:+.1%}", "", "", "", ""]
    )
    compared = ["gppc - one Gaussian (MSE)", "one Gaussian's own", "the same (correlation)", "one Gaussian's own"]
    table = text_table(["held out", "revealed", *names, *compared, "departure"], rows)
    lines = [
        f"against {floor}: mean MSE {means['relative_mse'][floor]:+.1%}, a case {means['mean_relative_mse'][floor]:+.1%} on "
        f"average; worse beyond the bootstrap error in so many of {len(results)} cases: "
        + "; ".join(
            f"{reading} {counts['mse']} (MSE), {counts['shift_correlation']} (shift correlation)"
            for reading, counts in worse.items()
        )
        for floor, worse in means["worse"].items()
    ]
    return "\n".join([table, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, help="AnnData file of raw counts with `cell_type` and `is_control`")
    parser.add_argument("--types", nargs="*", help="cell types to hold out; default: the three largest")
    parser.add_argument("--genes", type=int, default=400)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--pairs-per-cell", type=int, default=12)
    parser.add_argument("--pairing", choices=PAIRINGS, default="same_type", help="context assumed at the test")
    parser.add_argument("--states", type=int, default=SMALL["num_components"], help="cell states at most")
    parser.add_argument("--resamples", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="made-up cells, few steps")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.genes, arguments.steps, arguments.resamples, arguments.pairs_per_cell = 30, 4, 50, 2
    elif arguments.cells is None:
        parser.error("give --cells FILE.h5ad, or --smoke")
    transformers_logging.set_verbosity_error()
    cells = smoke_cells() if arguments.smoke else read_cells(arguments.cells)
    names, counts = np.unique(cells.cell_type, return_counts=True)
    types = arguments.types or names[np.argsort(-counts, kind="stable")][:3].tolist()
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
    if arguments.out is not None:
        write_results({"summary": means, "cases": results, "seed": arguments.seed}, arguments.out)


if __name__ == "__main__":
    main()
