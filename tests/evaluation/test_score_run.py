"""Scores at the end of a run: the model beside its floors, split by split."""

import json

import numpy as np
import pytest
import torch
from tiny_runs import N_GENES, write_run_pairs

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.score_options import EvaluationOptions
from modeling_gppc.evaluation.score_run import evaluate_run, load_network_of
from modeling_gppc.modeling_gppc import IGNORED_LABEL

SIZES = {"num_factors": 3, "num_components": 2, "num_latents": 2, "hidden_size": 8, "intermediate_size": 16}
SMALL = {**SIZES, "readout_size": 8, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return PairFolder(write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = GppcForPerturbationPrediction(GppcConfig(vocab_size=N_GENES, pairings=["same_type"], **SMALL))
    torch.nn.init.normal_(made.readout.gene_vectors, std=0.3)
    return made.eval()


QUICK = {"n_resamples": 20, "floors": ["mean", "no_change"]}


def test_scores_are_those_of_the_test_rows(folder, model):
    results = evaluate_run(model, folder, EvaluationOptions(**QUICK), progress=False)
    rows = PairDataset(folder.split("test"), folder.pairings)
    batch = PairCollator(folder.panels)(rows.__getitems__(range(len(rows))))
    labels = batch.pop("labels").numpy()
    with torch.no_grad():
        logits = model(**batch).logits.numpy()
    scored = labels != IGNORED_LABEL
    entry = results["splits"]["same_type"]
    assert entry["n_pairs"] == 21 and set(entry["methods"]) == {"gppc", "mean", "no_change"}
    assert entry["methods"]["gppc"]["mse"] == pytest.approx(np.mean((logits - labels)[scored] ** 2), rel=1e-5)
    low, high = entry["methods"]["gppc"]["mse_ci95"]
    assert low <= entry["methods"]["gppc"]["mse"] <= high
    assert entry["methods"]["mean"]["r2"] == pytest.approx(0, abs=1e-9)
    assert json.loads(json.dumps(results))["schema_version"] == 1


def test_the_same_twice_and_of_fewer_pairs(folder, model):
    options = EvaluationOptions(max_pairs=9, **QUICK)
    first = evaluate_run(model, folder, options, seed=3, progress=False)
    again = evaluate_run(model, folder, options, seed=3, progress=False)
    assert json.dumps(first) == json.dumps(again)
    assert first["splits"]["same_type"]["n_pairs"] == 9


def test_an_unknown_split_is_named(folder, model):
    with pytest.raises(ValueError, match="did you mean `same_type`"):
        evaluate_run(model, folder, EvaluationOptions(splits=["same_typ"], **QUICK), progress=False)


def test_cells_without_a_network_have_no_optimum(tmp_path):
    assert load_network_of(tmp_path) is None
