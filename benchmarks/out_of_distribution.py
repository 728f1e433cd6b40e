"""A cell type's response that training never saw: the model against the closed-form linear response.

    python benchmarks/out_of_distribution.py --cells kang2018_pbmc_ifnb_2000cells_9015genes.h5ad --out ood.json
    python benchmarks/out_of_distribution.py --smoke        # made-up cells, seconds

Each of the largest cell types in turn: its stimulated cells are held out, everything else becomes a store, pairs (of one
type and of any type, whatever their condition) and a trained model. Tested on pairs of the type's control and stimulated
cells, with the true change of a few interferon genes imposed. Scores leave the imposed genes out: squared error a cell and
gene, and the correlation of the predicted mean shift with the true one (stimulated minus control). Intervals are 95 %
bootstraps over stimulated cells.
"""

import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from bench_tools import parser_of, run_training, write_result

from data_scripts.cells.anndata_file import open_cells
from data_scripts.pairs.gene_selection import standardized_dispersion
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.store.census_source import CensusSource
from data_scripts.store.local_census import write_census
from modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.evaluation.metrics import cluster_bootstrap, percentile_interval
from modeling_gppc.evaluation.model_predictor import ModelPredictor
from modeling_gppc.evaluation.pair_arrays import PairArrays

IMPOSED = (
    ("ISG15",),
    ("ISG15", "IFI6", "IFIT3"),
    ("ISG15", "IFI6", "IFIT3", "LY6E", "ISG20"),
    ("CXCL10",),
)
ALL_IMPOSED = sorted({symbol for symbols in IMPOSED for symbol in symbols})
SOURCES_PER_TARGET = 4
# Differences below this are rounding: the same response computed in two ways.
ROUNDING = 1e-5
# The rest, the size of the model among it, is the embedded default.
FLAGS = {
    "pairs.matching": "{pairs_per_cell: 24}",
    "pairs.splits.rules": "[{by: cell, fractions: {validation: 0.1, test: 0.02}}]",
}


def smoke_cells(path: Path) -> Path:
    """Writes counts of made-up cells of two types, half of them with a program of the imposed genes switched on."""
    rng = np.random.default_rng(0)
    kind, control = np.arange(480) % 2, rng.random(480) < 0.5
    rate = (rng.normal(size=(2, 40)) + 1)[kind] + ~control[:, None] * (np.arange(40) < 12) * 1.5
    obs = pd.DataFrame({"cell_type": np.array(["a", "b"])[kind], "donor_id": "x", "is_control": control})
    cells = anndata.AnnData(rng.poisson(np.exp(rate)).astype(np.float32), obs.set_index(obs.index.astype(str)))
    cells.var_names = ALL_IMPOSED + [f"G{index}" for index in range(40 - len(ALL_IMPOSED))]
    cells.write_h5ad(path)
    return path


def variable_genes(values: np.ndarray, names: np.ndarray, n_genes: int) -> list[str]:
    """The imposed genes and those that vary most between some cells for their mean."""
    sums, squares = (values.astype(np.float64) ** power for power in (1, 2))
    dispersion = standardized_dispersion(len(values), (values != 0).sum(0), sums.sum(0), squares.sum(0))
    rest = [name for name in names[np.argsort(-dispersion, kind="stable")] if name not in ALL_IMPOSED]
    return ALL_IMPOSED + rest[: n_genes - len(ALL_IMPOSED)]


def train(uri: Path, out: Path, flags: dict, components: int, steps: int) -> GppcForPerturbationPrediction:
    """What `train.py` leaves after so many steps on the cells of a store."""
    flags = flags | {"pairs.query.uri": uri, "training.use_cpu": "true", "model.num_components": components}
    every = {f"training.{name}_steps": max(steps // 8, 1) for name in ("eval", "save", "logging")}
    run_training(out, "default", flags | every | {"training.max_steps": steps, "training.warmup_steps": steps // 5})
    return GppcForPerturbationPrediction.from_pretrained(out / "model").eval()


def imposed_pairs(
    folder: PairFolder, controls: np.ndarray, stimulated: np.ndarray, symbols: tuple[str, ...]
) -> PairArrays:
    """Every stimulated cell behind a few control cells, with the true change of some genes imposed."""
    target = np.repeat(stimulated, SOURCES_PER_TARGET, axis=0)
    source = controls[np.random.default_rng(0).choice(len(controls), len(target))]
    genes = [folder.gene_symbols.index(symbol) for symbol in symbols]
    ids, number, text = np.tile(genes, (len(target), 1)), np.zeros(len(target), int), np.full(len(target), "")
    return PairArrays(
        source=source,
        target=target,
        panels=folder.panels,
        revealed_ids=ids,
        revealed_changes=(target - source)[:, genes],
        revealed_mask=np.ones(ids.shape, bool),
        pairing=np.full(len(target), "same_type"),
        target_id=np.repeat(np.arange(len(stimulated)), SOURCES_PER_TARGET),
        **dict.fromkeys(("source_panel", "target_panel", "source_id", "library_size"), number),
        **dict.fromkeys(("cell_type", "target_cell_type", "dataset", "donor"), text),
    )


@torch.inference_mode()
def predictions(model: GppcForPerturbationPrediction, pairs: PairArrays) -> tuple[np.ndarray, np.ndarray]:
    """Of the model and of its linear response."""
    predictor = ModelPredictor(model)
    outputs = [model(**predictor.inputs(batch)) for batch in pairs.batches(256)]
    return tuple(np.concatenate([getattr(o, name).numpy() for o in outputs]) for name in ("logits", "linear_response"))


def examine(path: Path, held_out: str, n_genes: int, steps: int) -> list[dict]:
    """For one held-out type a row a set of imposed genes and method."""
    with open_cells(path) as cells, tempfile.TemporaryDirectory() as scratch:
        values, names = cells.log_values(cells.check().sizes), cells.genes.labels
        type_of, control = (cells.obs[name].to_numpy() for name in ("cell_type", "is_control"))
        own, control = type_of == held_out, control.astype(bool)
        store, out = Path(scratch) / "store", Path(scratch) / "run"
        write_census(store, [CensusSource(path, "cells", ~own | control)])
        panel = Path(scratch) / "panel.txt"
        panel.write_text("\n".join(variable_genes(values[~own | control], np.array(names), n_genes)))
        flags = FLAGS | {"pairs.panel": f"{{rule: file, file: {panel}}}"}
        model, gaussian = train(store, out, flags, 8, steps), train(store, Path(scratch) / "gaussian", flags, 1, 1)
        folder = PairFolder(out / "pairs")
        position = {name: index for index, name in enumerate(names)}
        values = values[:, [position[symbol] for symbol in folder.gene_symbols]]
        sides = {
            name: (values[control & (type_of == name)], values[~control & (type_of == name)]) for name in set(type_of)
        }
        controls, stimulated = sides.pop(held_out)
        shifts = [
            after.mean(0) - before.mean(0) for before, after in sides.values() if min(len(before), len(after)) >= 20
        ]
        means = {"other_types_shift": controls.mean(0) + np.mean(shifts, axis=0), "control_mean": controls.mean(0)}
        rows = []
        for symbols in IMPOSED:
            pairs = imposed_pairs(folder, controls, stimulated, symbols)
            full, linear = predictions(model, pairs)
            predicted = {"gppc": full, "linear_response": linear, "one_gaussian": predictions(gaussian, pairs)[1]}
            predicted |= {name: np.broadcast_to(mean, full.shape) for name, mean in means.items()}
            keep = pairs.scored[0]
            shift = (stimulated.mean(0) - controls.mean(0))[keep]
            for method, found in predicted.items():
                errors = np.bincount(pairs.target_id, ((found - pairs.target) ** 2)[:, keep].mean(1))
                row = {"held_out": held_out, "imposed": "+".join(symbols), "method": method}
                row["mse"] = errors.mean() / SOURCES_PER_TARGET
                sizes = np.full(len(errors), SOURCES_PER_TARGET)
                row["low"], row["high"] = percentile_interval(cluster_bootstrap(errors, sizes))
                row["shift_correlation"] = np.corrcoef((found.mean(0) - controls.mean(0))[keep], shift)[0, 1]
                rows.append(row)
        return rows


def summary(cases: pd.DataFrame) -> dict:
    """Means over the cases, and the model against one Gaussian: its error and how often it is above the interval."""
    means = cases.groupby("method")[["mse", "shift_correlation"]].mean()
    model, gaussian = (cases[cases["method"] == name].reset_index() for name in ("gppc", "one_gaussian"))
    relative = means["mse"]["gppc"] / means["mse"]["one_gaussian"] - 1
    worse = int((model["mse"] > gaussian["high"] + ROUNDING).sum())
    print(f"{cases.round(4).to_string()}\n\n{means.round(4).to_string()}")
    print(f"gppc against one Gaussian: MSE {relative:+.1%}; above its interval in {worse} of {len(model)} cases")
    return {**means.to_dict(), "relative_mse": relative, "worse": worse}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--cells", type=Path, help="AnnData file of raw counts with `cell_type` and `is_control`")
    parser.add_argument("--genes", type=int, default=400)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            arguments.genes, arguments.steps, arguments.cells = 40, 5, smoke_cells(Path(folder) / "cells.h5ad")
        elif arguments.cells is None:
            parser.error("give --cells FILE.h5ad, or --smoke")
        with open_cells(arguments.cells) as cells:
            types = cells.obs["cell_type"].astype(str).value_counts().index[: 1 if arguments.smoke else 3]
        rows = [row for name in types for row in examine(arguments.cells, name, arguments.genes, arguments.steps)]
    cases = pd.DataFrame(rows)
    write_result({"summary": summary(cases), "cases": cases.to_dict("records")}, arguments.out)


if __name__ == "__main__":
    main()
