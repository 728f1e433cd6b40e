"""Scores by hand, intervals by simulation, and the file that holds them."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
from test_pair_floors import make_pairs

from modeling_gppc.evaluation.metrics import (
    cluster_bootstrap,
    gaussian_crps,
    interval_coverage,
    percentile_interval,
    row_pearson,
)
from modeling_gppc.evaluation.pair_floors import fit_floors
from modeling_gppc.evaluation.pair_scores import score_predictions, score_split, write_results
from modeling_gppc.evaluation.score_run import parts_of


def test_row_pearson_by_hand():
    first = np.array([[1.0, 2.0, 3.0, 9.0], [1.0, 1.0, 1.0, 5.0], [1.0, 2.0, 0.0, 0.0]])
    second = np.array([[2.0, 4.0, 6.0, -9.0], [1.0, 2.0, 3.0, 4.0], [5.0, 3.0, 0.0, 0.0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    found = row_pearson(first, second, mask)
    assert found[0] == pytest.approx(1.0) and np.isnan(found[1]) and found[2] == pytest.approx(-1.0)
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5, 30))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second)]
    assert np.allclose(row_pearson(first, second, np.ones((5, 30), bool)), expected)


def test_crps_and_coverage_of_gaussians():
    # At the mean of a standard Gaussian: 2 phi(0) - 1 / sqrt(pi).
    expected = 2 / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi)
    assert gaussian_crps(np.zeros(1), np.ones(1), np.zeros(1))[0] == pytest.approx(expected, abs=1e-7)
    generator = np.random.default_rng(0)
    # E|X - y| - E|X - X'| / 2 by Monte Carlo.
    draws = generator.normal(1.0, 2.0, size=(2, 200_000))
    sampled = np.abs(draws[0] - 3.0).mean() - 0.5 * np.abs(draws[0] - draws[1]).mean()
    assert gaussian_crps(np.array([1.0]), np.array([4.0]), np.array([3.0]))[0] == pytest.approx(sampled, abs=0.02)
    observed = generator.normal(1.0, 2.0, size=50_000)
    assert interval_coverage(1.0, np.array(4.0), observed).mean() == pytest.approx(0.9, abs=0.01)


def test_scores_by_hand():
    pairs = make_pairs(n=4, width=1, n_panels=2)
    pairs.source[...], pairs.target[...] = 0.0, 0.0
    pairs.target[:, 5] = 2.0
    pairs.revealed_ids[...], pairs.revealed_mask[...] = 5, [[True], [True], [False], [False]]
    scores = score_predictions(lambda batch: np.ones_like(batch.target), pairs, batch_size=3)
    n_measured = pairs.target_measured.sum(axis=1)
    assert scores["n_scored"].tolist() == (n_measured - [1, 1, 0, 0]).tolist()
    assert scores["squared_error"].tolist() == scores["n_scored"].tolist()  # (1 - 0)^2 and (1 - 2)^2 are both 1
    scores = score_predictions(lambda batch: (np.zeros_like(batch.target), np.ones_like(batch.target)), pairs)
    assert scores["squared_error"].tolist() == [0, 0, 4, 4]
    assert scores["covered"].tolist() == (scores["n_scored"] - [0, 0, 1, 1]).tolist()


def test_revealed_and_unmeasured_genes_do_not_score():
    pairs = make_pairs(n=50)
    scored = pairs.scored

    def predict(batch):
        return np.where(batch.scored, batch.target, 1e6)

    scores = score_predictions(predict, pairs)
    assert not scores["squared_error"].any() and scores["n_scored"].sum() == scored.sum()


def test_wrong_predictions_are_named():
    pairs = make_pairs(n=5)
    with pytest.raises(ValueError, match=r"shape \(5, 3\)"):
        score_predictions(lambda batch: np.zeros((5, 3)), pairs)
    with pytest.raises(ValueError, match="NaN"):
        score_predictions(lambda batch: np.full(batch.target.shape, np.nan), pairs)


def test_bootstrap_covers_the_truth_and_respects_groups():
    generator = np.random.default_rng(0)
    hits = clustered_hits = 0
    for trial in range(200):
        values = generator.normal(1.0, 1.0, size=40)
        low, high = percentile_interval(cluster_bootstrap(values, np.ones(40), 400, seed=trial)[:, 0])
        hits += low <= 1.0 <= high
        # Each of 20 cells is the target of ten pairs: as many pairs, far less information.
        repeated = np.repeat(generator.normal(1.0, 1.0, size=20), 10)
        group = np.repeat(np.arange(20), 10)
        sums = np.bincount(group, weights=repeated)
        low, high = percentile_interval(cluster_bootstrap(sums, np.full(20, 10.0), 400, seed=trial)[:, 0])
        clustered_hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert 0.86 <= clustered_hits / 200 <= 0.99


def test_bootstrap_draws_are_shared_between_methods():
    values = np.random.default_rng(0).normal(size=100)
    samples = cluster_bootstrap(np.stack([values, values + 1.0]), np.ones(100), 300, seed=1)
    assert np.allclose(samples[:, 1] - samples[:, 0], 1.0)
    assert np.array_equal(samples, cluster_bootstrap(np.stack([values, values + 1.0]), np.ones(100), 300, seed=1))


def test_results_hold_every_number_the_table_needs(tmp_path):
    train, validation, test = make_pairs(), make_pairs(n=100, seed=1), make_pairs(n=300, seed=2)
    floors = fit_floors(train, validation, progress=False)
    sharp = floors["conditional_gaussian"].predict_moments
    truth = {"optimum": lambda batch: batch.target * 0.999, "gppc": floors["linear_joint"].predict}
    truth["narrow"] = lambda batch: (sharp(batch)[0], 0.01 * sharp(batch)[1])
    summary = score_split(test, truth, floors=floors, seed=3, n_resamples=200, progress=False)
    assert summary["n_pairs"] == 300 and summary["n_targets"] == 300
    methods = summary["methods"]
    assert methods["mean"]["r2"] == 0 and methods["mean"]["r2_ci95"] == [0, 0]
    assert methods["gppc"]["r2"] == pytest.approx(1 - methods["gppc"]["mse"] / methods["mean"]["mse"])
    assert summary["best_floor"] == "conditional_gaussian_labelled"
    assert not methods[summary["best_label_free_floor"]]["uses_labels"]
    assert methods["optimum"]["difference_from_best_floor"]["ci95"][1] < 0
    assert "difference_from_best_floor" not in methods[summary["best_floor"]]
    assert methods["gppc"]["gain_from_revealed"]["mse"] == methods["linear_joint"]["gain_from_revealed"]["mse"] > 0
    assert "gain_from_revealed" not in methods["context_mean"] and methods["context_mean"]["uses_labels"]
    # The same mean with a tenth of the spread covers less and scores worse; a floor without a variance has neither.
    narrow, gaussian = methods["narrow"], methods["conditional_gaussian"]
    assert narrow["mse"] == pytest.approx(gaussian["mse"])
    assert narrow["coverage90"] < gaussian["coverage90_ci95"][0] < 0.95 and "crps" not in methods["linear_joint"]
    assert narrow["crps"] > gaussian["crps_ci95"][1]
    for entry in methods.values():
        low, high = entry["mse_ci95"]
        assert low < entry["mse"] < high
        assert {"mse", "mse_ci95", "r2", "pearson_delta", "uses_labels"} <= set(entry)
    path = tmp_path / "results.json"
    write_results({"splits": {"test": summary, "odd": {"value": math.nan}}}, path)
    loaded = json.loads(path.read_text())
    assert loaded["splits"]["odd"]["value"] is None
    assert loaded["splits"]["test"]["floor_settings"]["conditional_gaussian"]["n_factors"] >= 1
    assert loaded["splits"]["test"]["methods"]["no_change"]["mse"] == methods["no_change"]["mse"]
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_parts_of_a_split():
    def sizes(datasets):
        pairing = np.where(np.arange(200) < 120, "same_type", "same_dataset")
        table = pa.table({"pairing": pa.array(pairing), "dataset_id": pa.array(datasets)})
        return {name: len(rows) for name, rows in parts_of(table).items()}

    assert sizes(["d"] * 200) == {"same_dataset": 80, "same_type": 120}
    assert sorted(sizes(["a", "b"] * 100)) == ["a/same_type", "b/same_type", "same_dataset", "same_type"]
