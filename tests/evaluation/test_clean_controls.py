"""What an evaluation gives when there is nothing: no score, for any method; and what shared controls make of it."""

import dataclasses

import anndata
import numpy as np
import pytest
from tiny_screens import make_adata

from data_scripts.cells.log_values import LogValues
from data_scripts.cells.screen_cells import shuffle_labels
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import read_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.evaluation.screen_report import render_evaluation

REAL = {
    "papalexi": "papalexi2021_thp1_ko_303genes",
    "norman": "norman2019_k562_crispra_500hvg",
    "schraivogel": "schraivogel2020_k562_tapseq_crispri_72genes",
    "gasperini": "gasperini2019_k562_crispri_366genes",
}


def nothing_scores(methods):
    for name, entry in methods.items():
        low, high = entry["pearson_delta_ci95"]
        assert abs(entry["pearson_delta"]) <= 0.03 or low <= 0 <= high, (name, entry["pearson_delta"], low, high)


def empty_screen(seed):
    """Twenty perturbations of cells that are all alike, and few controls: their mean is known badly."""
    labels = np.repeat(["control", *(f"G{i}" for i in range(20))], [60, *[40] * 20])
    adata = anndata.AnnData(np.random.default_rng(seed).normal(3, 1, (len(labels), 150)).astype(np.float32))
    adata.var_names = [f"G{i}" for i in range(150)]
    adata.obs_names = [f"c{i}" for i in range(len(labels))]
    adata.obs["perturbation"] = labels
    return read_screen(adata, ScreenOptions(value_kind="log"))


@pytest.fixture(scope="module")
def empty():
    return empty_screen(0)


def test_screens_of_nothing_score_nothing():
    """The mean over screens: in one, few controls err for all perturbations alike, either way."""
    options = EvaluateOptions(mode="fine-tuned", n_factors=3, n_shuffles=0)
    found = [evaluate_screen(empty_screen(seed), options, progress=False).summary["methods"] for seed in range(4)]
    for name in found[0]:
        assert abs(np.mean([methods[name]["pearson_delta"] for methods in found])) < 0.08, name


def test_shared_controls_score_their_own_noise(empty):
    options = EvaluateOptions(mode="fine-tuned", controls="shared", n_factors=3, n_shuffles=0)
    summary = evaluate_screen(empty, options, progress=False).summary
    assert summary["methods"]["mean"]["pearson_delta"] > 0.4 and summary["n_divisions"] == 1


def test_no_cell_of_the_truth_is_read(empty):
    """Whatever the controls of the truth hold, predictions are the same; the truth is not."""
    options = EvaluateOptions(mode="fine-tuned", divisions=1, n_factors=3, n_shuffles=0)
    before = evaluate_screen(empty, options, progress=False)
    values = np.array(empty.values)
    # The truth of the first direction is measured from these, and nothing else of it reads them.
    values[np.isin(empty.barcodes, before.screen.barcodes[before.screen.is_control])] += 5.0
    after = evaluate_screen(dataclasses.replace(empty, values=LogValues(values)), options, progress=False)
    for name, prediction in before.predictions.items():
        assert np.array_equal(prediction.delta, after.predictions[name].delta), name
    assert not np.allclose(before.truth.delta, after.truth.delta)


def test_every_score_stands_beside_that_of_nothing(tmp_path):
    """The same methods on shuffled labels: no score where controls are apart, one where they are shared, and it is said."""
    screen = read_screen(make_adata(), ScreenOptions(value_kind="log"))
    options = EvaluateOptions(mode="fine-tuned", folds=2, divisions=1, n_factors=3)
    entry = evaluate_screen(screen, options, progress=False).summary["methods"]["mean"]
    low, high = entry["nothing_pearson_ci95"]
    assert low <= 0 <= high and entry["nothing_pearson"] != entry["pearson_delta"]
    shared = evaluate_screen(empty_screen(0), dataclasses.replace(options, controls="shared"), progress=False)
    assert shared.summary["methods"]["mean"]["nothing_pearson_ci95"][0] > 0
    assert "this evaluation is not clean" in render_evaluation(shared.summary)


def test_a_constant_prediction_tells_nothing_apart(empty):
    """The mean of training misses each perturbation that it leaves out; among those left out together that cancels."""
    options = EvaluateOptions(mode="fine-tuned", model=["covariance"], n_shuffles=0, nothing=False)
    methods = evaluate_screen(empty, options, progress=False).summary["methods"]
    for name in ("mean", "no_change"):
        assert methods[name]["discrimination_l1"] == pytest.approx(0.5, abs=1e-9), name
        assert methods[name]["discrimination_cosine"] == pytest.approx(0.5, abs=1e-9), name


def test_labels_are_shuffled_within_groups():
    screen = read_screen(make_adata(), ScreenOptions(value_kind="log"))
    mixed = shuffle_labels(screen, seed=1)
    assert (mixed.label != screen.label).any() and mixed.values is screen.values
    for batch in np.unique(screen.batch):
        rows = screen.batch == batch
        assert sorted(mixed.label[rows]) == sorted(screen.label[rows])


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_permuted_labels_score_nothing_on_real_screens(name, real_data):
    screen = read_screen(real_data / "perturbation" / f"{REAL[name]}.h5ad")
    options = EvaluateOptions(mode="fine-tuned", n_shuffles=0, shuffle_labels=True)
    nothing_scores(evaluate_screen(screen, options, progress=False).summary["methods"])
