"""Cells in, a loadable and scored model out."""

import json
from pathlib import Path

import pytest
import torch

import train
from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from gppc.run_options import parse_options
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.training.arguments import find_config

CELLS = "{form: linear, n_genes: 40, n_regulators: 5, n_cells: 2500, n_donors: 50, n_datasets: 2, n_cell_types: 8}"
BUDGET = [
    *("--training.max_steps", "60", "--training.eval_steps", "30", "--training.save_steps", "30"),
    *("--training.warmup_steps", "20", "--training.per_device_train_batch_size", "64", "--training.use_cpu", "true"),
    *("--evaluation.n_resamples", "100", "--evaluation.max_pairs", "800"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The linear form, small: store, pairs, training, scores."""
    out = tmp_path_factory.mktemp("run") / "linear"
    flags = ["--data.synthetic", CELLS, "--pairs.matching.pairs_per_cell", "4", "--model.num_factors", "8"]
    assert train.main(["--config", "linear", "--output_dir", str(out), *flags, *BUDGET]) == 0
    return out


def scores(run: Path) -> dict:
    return json.loads((run / "model" / "results.json").read_text())["splits"]


def test_model_comes_close_to_the_known_optimum(run):
    for name in ("same_type", "same_dataset"):
        methods = scores(run)[name]["methods"]
        assert methods["optimum"]["r2"] > 0.2
        assert methods["gppc"]["r2"] >= 0.95 * methods["optimum"]["r2"]


def test_model_folder_holds_what_a_stranger_needs(run):
    model = run / "model"
    names = {path.name for path in model.iterdir()}
    code = {"configuration_gppc.py", "modeling_gppc.py", "feature_extraction_gppc.py"}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", "results.json"} <= names
    assert code <= names
    assert {"scores.png", "learning_curve.png", "first_prediction.png"} <= {
        path.name for path in (model / "figures").iterdir()
    }
    assert str(run) not in (model / "README.md").read_text()


def test_departed_model_tells_unperturbed_genes_apart(run):
    model = GppcForPerturbationPrediction.from_pretrained(run / "model").eval()
    folder = PairFolder(run / "pairs")
    batch = PairCollator(folder.panels)(PairDataset(folder.split("test"), folder.pairings)[range(16)])
    del batch["labels"]
    with torch.inference_mode():
        assert model(**batch).logits.std(dim=1).min() > 0.1


@pytest.mark.parametrize("name", ["default", "linear", "synthetic", "census_naive_b"])
def test_shipped_configs_are_valid(name):
    options = parse_options(name, [])
    assert options.output_dir == f"runs/{name}"
    assert isinstance(options.model_config(10, ["same_type"]), GppcConfig)


def test_pbmc_config_wants_a_store():
    assert find_config("pbmc").name == "pbmc.yaml"
    with pytest.raises(ValueError, match=r"wanted exactly one of .*pairs\.query\.uri"):
        parse_options("pbmc", [])
    assert parse_options("pbmc", ["--pairs.query.uri", "cells.soma"]).pairs.panel.n_genes == 1000
