"""How close a run on synthetic cells comes to the best possible predictor, for fixed numbers of revealed genes.

    accelerate launch train.py --config linear && python benchmarks/known_optimum.py --run runs/linear --revealed 1 3 10
    accelerate launch train.py --config synthetic && python benchmarks/known_optimum.py --run runs/synthetic
    python benchmarks/known_optimum.py --smoke         # tiny cells of both forms, to see that it runs

Linear form: r2 as a share of the exact optimum's. Count form: the excess error (MSE above the estimated optimum's) of the
model and of every linear floor on the same pairs; the saving is 1 - excess of the model / excess of the best floor.
Intervals are 95 % bootstraps over target cells.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from pair_tables import draw_revealed
from tqdm.auto import tqdm

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PerturbationOptions
from modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.evaluation.metrics import cluster_bootstrap, percentile_interval
from modeling_gppc.evaluation.model_predictor import ModelPredictor
from modeling_gppc.evaluation.pair_arrays import PairArrays, sample_rows
from modeling_gppc.evaluation.pair_floors import fit_floors
from modeling_gppc.evaluation.pair_scores import score_predictions, write_results
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.evaluation.score_run import count_optimum, linear_optimum, load_network_of, pairs_like

LINEAR_FLOORS = ("linear_revealed", "linear_joint", "conditional_gaussian")
LABELLED = "conditional_gaussian_labelled"


def with_revealed(pairs: PairArrays, n_revealed: int, seed: int) -> PairArrays:
    """The same pairs with exactly so many genes revealed, drawn among those that differ (fewer where fewer differ)."""
    options = PerturbationOptions(distribution="fixed", min_genes=n_revealed, max_genes=n_revealed)
    changes = (pairs.target - pairs.source) * (pairs.source_measured & pairs.target_measured)
    ids, changes, mask = draw_revealed(changes, np.random.default_rng(seed), options)
    fields = dict(pairs.__dict__)
    fields.update(revealed_ids=ids, revealed_changes=changes, revealed_mask=mask)
    return PairArrays(**fields)


def sums_by_target(values: np.ndarray, pairs: PairArrays) -> np.ndarray:
    """Sums of an entry a pair over the pairs of each target cell."""
    _, group = np.unique(pairs.target_id, return_inverse=True)
    return np.bincount(group.ravel(), weights=values)


def compare(pairs: PairArrays, methods: dict, resamples: int) -> tuple[dict, np.ndarray]:
    """MSE of each method, and its bootstrap samples `(resamples, methods)`, paired."""
    scores = {name: score_predictions(predict, pairs) for name, predict in methods.items()}
    counts = sums_by_target(next(iter(scores.values())).n_scored, pairs)
    errors = np.stack([sums_by_target(score.squared_error, pairs) for score in scores.values()])
    samples = cluster_bootstrap(errors, counts, resamples)
    return dict(zip(scores, errors.sum(axis=1) / counts.sum())), samples


def examine(run: Path, revealed: list[int | None], n_pairs: int, resamples: int, samples: int = 512) -> list[dict]:
    """One entry a pairing and number of revealed genes; `None` is what the pairs store."""
    folder = PairFolder(run / "pairs")
    network = load_network_of(run)
    if network is None:
        raise ValueError(f"`run` {run} holds no network; wanted the folder of a run on synthetic cells.")
    linear = network.config.form == "linear"
    model = GppcForPerturbationPrediction.from_pretrained(run / "model")
    table = folder.split("test")
    names = table.column("pairing").to_numpy(zero_copy_only=False).astype(str)
    results = []
    for pairing in tqdm(folder.pairings, desc="pairings", unit="pairing"):
        rows = np.flatnonzero(names == pairing)
        rows = rows[sample_rows(len(rows), n_pairs, 0)]
        pairs = PairArrays.from_table(table.take(rows), folder.panels, folder.genes.num_rows)
        floors = fit_floors(
            pairs_like(folder, "train", pairs, 12_000, 0),
            pairs_like(folder, "validation", pairs, 12_000, 0),
            pairs,
            names=("mean", *LINEAR_FLOORS, LABELLED),
            progress=False,
        ).floors
        for number in revealed:
            asked = pairs if number is None else with_revealed(pairs, number, seed=1)
            methods = {"gppc": ModelPredictor(model)} | {name: floor.predict for name, floor in floors.items()}
            noise = 0.0
            if linear:
                methods["optimum"] = linear_optimum(network, folder.gene_ids)
            else:
                library = table.column("source_library_size").to_numpy()[rows]
                methods["optimum"], noise = count_optimum(
                    network, folder.gene_ids, asked, library, samples, progress=True
                )
            mse, draws = compare(asked, methods, resamples)
            entry = {"pairing": pairing, "revealed": number, "n_pairs": len(pairs), "mse": mse}
            entry |= shares(mse, draws, list(methods)) if linear else excesses(mse, draws, list(methods), noise)
            results.append(entry)
    return results


def shares(mse: dict, draws: np.ndarray, names: list[str]) -> dict:
    """r2 of the model as a share of the optimum's."""
    column = {name: index for index, name in enumerate(names)}
    gained = [draws[:, column["mean"]] - draws[:, column[name]] for name in ("gppc", "optimum")]
    return {
        "r2": {name: 1 - mse[name] / mse["mean"] for name in names},
        "share_of_optimum": (mse["mean"] - mse["gppc"]) / (mse["mean"] - mse["optimum"]),
        "share_of_optimum_ci95": percentile_interval(gained[0] / gained[1]),
    }


def excesses(mse: dict, draws: np.ndarray, names: list[str], noise: float) -> dict:
    """Error above the optimum's, whose Monte-Carlo noise is taken off, and what the model saves of the best floor's."""
    column = {name: index for index, name in enumerate(names)}
    best = mse["optimum"] - noise
    entry = {"excess": {name: mse[name] - best for name in names if name != "optimum"}, "optimum_noise": noise}
    for kind, floors in (("label_free", LINEAR_FLOORS), ("any", (*LINEAR_FLOORS, LABELLED))):
        floor = min(floors, key=mse.get)
        at_best = draws[:, column["optimum"]] - noise
        ratio = (draws[:, column["gppc"]] - at_best) / (draws[:, column[floor]] - at_best)
        entry[f"saving_{kind}"] = {
            "floor": floor,
            "saving": 1 - entry["excess"]["gppc"] / entry["excess"][floor],
            "ci95": percentile_interval(1 - ratio),
        }
    return entry


def report(results: list[dict]) -> str:
    """A table a form."""
    rows = []
    for entry in results:
        number = "as stored" if entry["revealed"] is None else str(entry["revealed"])
        row = [entry["pairing"], number, str(entry["n_pairs"]), f"{entry['mse']['gppc']:.4f}"]
        if "r2" in entry:
            low, high = entry["share_of_optimum_ci95"]
            row += [f"{entry['r2']['gppc']:.4f}", f"{entry['r2']['optimum']:.4f}"]
            row += [f"{entry['share_of_optimum']:.2%} [{low:.2%}, {high:.2%}]"]
        else:
            for kind in ("label_free", "any"):
                saving = entry[f"saving_{kind}"]
                low, high = saving["ci95"]
                row += [
                    f"{entry['excess']['gppc']:.4f} of {entry['excess'][saving['floor']]:.4f} ({saving['floor']}): "
                    f"{saving['saving']:.0%} [{low:.0%}, {high:.0%}]"
                ]
        rows.append(row)
    linear = "r2" in results[0]
    tail = ["r2", "optimum's r2", "share"] if linear else ["excess error, label-free floor", "any linear floor"]
    return text_table(["pairing", "revealed genes", "pairs", "MSE", *tail], rows)


def smoke(folder: Path) -> list[Path]:
    """Untrained models of tiny cells of both forms, laid out as a run leaves them."""
    from data_scripts.batches.pair_dataset import PairDataset
    from gppc.run_options import parse_options
    from modeling_gppc.fitting.fit_linear_response import initialize_linear_response

    runs = []
    for form in ("linear", "count"):
        run = folder / form
        flags = {
            "output_dir": run,
            "data.synthetic": f"{{form: {form}, n_genes: 30, n_cells: 900, n_datasets: 1, n_donors: 6}}",
            "model.num_factors": 4,
            "model.num_components": 2,
            "pairs.splits.rules": "[{by: cell, fractions: {test: 0.2, validation: 0.2}}]",
        }
        options = parse_options(
            "linear", [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        )
        pairs = options.prepare_pairs(progress=False)
        model = GppcForPerturbationPrediction(options.model_config(pairs.genes.num_rows, pairs.pairings))
        datasets = [PairDataset(pairs.split(name), pairs.pairings) for name in ("train", "validation")]
        initialize_linear_response(model, *datasets, pairs.panels, max_cells=500, n_iterations=5)
        model.save_pretrained(run / "model")
        runs.append(run)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run on synthetic cells, with `model` and `pairs` in it")
    parser.add_argument("--revealed", type=int, nargs="*", help="numbers of revealed genes; default: as stored")
    parser.add_argument("--pairs", type=int, help="test pairs a pairing; default 4,000 (linear), 600 (count)")
    parser.add_argument("--samples", type=int, default=512, help="states drawn for each cell of the estimated optimum")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--smoke", action="store_true", help="tiny cells, seconds")
    arguments = parser.parse_args()
    if not arguments.smoke and arguments.run is None:
        parser.error("give --run FOLDER, or --smoke")
    with tempfile.TemporaryDirectory() as scratch:
        runs = smoke(Path(scratch)) if arguments.smoke else [arguments.run]
        for run in runs:
            linear = load_network_of(run) is None or load_network_of(run).config.form == "linear"
            n_pairs = arguments.pairs or (20 if arguments.smoke else 4_000 if linear else 600)
            results = examine(
                run,
                arguments.revealed or [None],
                n_pairs,
                resamples=100 if arguments.smoke else 1_000,
                samples=32 if arguments.smoke else arguments.samples,
            )
            print(report(results))
    if arguments.out is not None:
        write_results({"results": results}, arguments.out)


if __name__ == "__main__":
    main()
