"""A small screen through every mode: baselines by hand, peers, guards, files."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from modeling_gppc.evaluation.in_context_model import InContextModel
from modeling_gppc.evaluation.response_size import ResponseSize, batch_drift
from modeling_gppc.training.response_check import ResponseCheck

from data_scripts.cells.screen_cells import keep_genes, technical_residuals
from data_scripts.cells.screen_splits import combination_folds, held_out_group, perturbation_folds
from data_scripts.cells.screens import ScreenOptions, read_screen
from gppc.cli import main
from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.evaluation import metrics
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_baselines import (
    ScreenContext,
    additive,
    covariance,
    matching_mean,
    mean_of_training,
    nearest,
    ridge,
    target_only,
)
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.evaluation.screen_report import render_evaluation, response_anndatas, write_evaluation
from modeling_gppc.evaluation.screen_scores import (
    ScreenPrediction,
    bootstrap_perturbations,
    observe,
    rank_sum_z,
    score_prediction,
    swapped_pearson,
)
from modeling_gppc.evaluation.transfer_scorecard import transfer_scorecard
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction

N_GENES = 30


def make_adata(labels=("control", "G0", "G1", "G2", "G3", "G4", "G5"), n=60, controls=400, seed=0):
    """Cells of a linear network of three programs; knocking a gene down moves its program."""
    generator = np.random.default_rng(seed)
    loadings = np.random.default_rng(7).normal(size=(N_GENES, 3)) * 0.3
    names = np.repeat(labels, [controls if label == "control" else n for label in labels])
    state = generator.normal(size=(len(names), 3))
    for label in labels[1:]:
        for gene in label.split("+"):
            state[names == label] -= 2.0 * loadings[int(gene[1:])] / np.linalg.norm(loadings[int(gene[1:])])
    values = np.maximum(1.5 + state @ loadings.T + 0.3 * generator.normal(size=(len(names), N_GENES)), 0)
    adata = anndata.AnnData(values.astype(np.float32))
    adata.var_names = [f"G{i}" for i in range(N_GENES)]
    adata.obs_names = [f"c{i}" for i in range(len(names))]
    adata.obs["perturbation"] = pd.Categorical(names)
    adata.obs["batch"] = np.where(np.arange(len(names)) % 2, "b1", "b2")
    return adata


@pytest.fixture(scope="module")
def screen():
    return read_screen(make_adata(), ScreenOptions(value_kind="log"))


@pytest.fixture(scope="module")
def doubles():
    labels = ("control", "G0", "G1", "G2", "G0+G1", "G1+G2", "G3+G4", "G0+G5")
    return read_screen(make_adata(labels), ScreenOptions(value_kind="log"))


def test_observed_responses_by_hand(screen):
    truth = observe(screen, ["G0", "G1"], n_splits=3)
    cells, controls = screen.cells_of("G1"), screen.cells_of("control")
    assert np.allclose(truth.delta[1], screen.values[cells].mean(0) - screen.values[controls].mean(0), atol=1e-6)
    assert np.flatnonzero(~truth.mask).tolist() == [0, 1, 2, 3, 4, 5]  # targets of the whole panel
    assert (truth.ceiling > 0.9).all() and truth.n_cells.tolist() == [60, 60]
    deviations = [
        screen.values[screen.cells_of(label)] - screen.values[screen.cells_of(label)].mean(axis=0)
        for label in np.unique(screen.label)
    ]
    within = (np.concatenate(deviations).astype(float) ** 2).sum(axis=0) / (len(screen.values) - len(deviations))
    assert np.allclose(truth.sampling_variance[1], within * (1 / len(cells) + 1 / len(controls)), rtol=1e-4)


def test_rank_sum_equals_scipy():
    generator = np.random.default_rng(0)
    first, second = generator.poisson(1.0, (40, 5)), generator.poisson(1.4, (70, 5))
    theirs = scipy.stats.mannwhitneyu(first, second, use_continuity=False, method="asymptotic").pvalue
    z = rank_sum_z(first, second)
    assert 2 * scipy.stats.norm.sf(np.abs(z)) == pytest.approx(theirs, rel=1e-9)
    assert rank_sum_z(np.ones((3, 1)), np.ones((4, 1)))[0] == 0


def test_baselines_by_hand(doubles):
    train, test = ["G0", "G1", "G2"], ["G0+G1", "G0+G5"]
    context = ScreenContext.build(doubles, train, test)
    delta = dict(zip(train, context.train_delta))
    mean = np.mean(list(delta.values()), axis=0)
    assert np.allclose(mean_of_training(context).delta, mean)
    assert np.allclose(additive(context).delta, [delta["G0"] + delta["G1"], delta["G0"] + mean])
    assert np.allclose(matching_mean(context).delta, [(delta["G0"] + delta["G1"]) / 2, delta["G0"]])
    genes, changes = context.changes("G0+G1")
    assert genes.tolist() == [0, 1] and np.allclose(target_only(context).delta[0, [0, 1]], changes)
    sigma = np.cov(doubles.values[doubles.cells_of("control")].T.astype(float))
    expected = sigma[:, genes] @ np.linalg.solve(sigma[np.ix_(genes, genes)], changes)
    assert np.allclose(covariance(context).delta[0], expected, atol=1e-8)
    single = ScreenContext.build(doubles, [], ["G2"])
    change = single.changes("G2")[1][0]
    assert np.allclose(covariance(single).delta[0], sigma[:, 2] / sigma[2, 2] * change, atol=1e-6)


def test_feature_baselines_use_the_features(screen):
    """Responses that are linear in given features are found by ridge; equal features by the neighbours."""
    labels = sorted(screen.perturbations)
    features = {label: np.eye(6)[i // 2] for i, label in enumerate(labels)}
    context = ScreenContext.build(screen, labels[:5], labels[5:], features=features)
    twin = context.train_delta[4]
    mean = context.mean_response
    for method in (ridge(context).delta[0], nearest(context, k=1).delta[0]):
        assert np.linalg.norm(method - twin) < np.linalg.norm(mean - twin)
    unknown = ScreenContext.build(screen, labels[:5], labels[5:], features={"G0": np.ones(2)})
    assert np.allclose(nearest(unknown).delta[0], mean)


def test_covariance_has_the_direction_of_cipher(tmp_path):
    cipher = pytest.importorskip("cipher")
    adata = make_adata(controls=300)
    counts = np.random.default_rng(0).poisson(np.expm1(adata.X) + 0.1).astype(np.float32)
    adata.X = counts
    path = tmp_path / "screen.h5ad"
    adata.write_h5ad(path)
    screen = read_screen(path)
    labels = sorted(screen.perturbations)
    context = ScreenContext.build(screen, [], labels)
    ours = covariance(context).delta
    result = cipher.forward_prediction(
        str(path),
        normalization="log1CP10k",
        exclude_target_from_fit=True,
        exclude_target_from_eval=True,
        expression_threshold=0.0,
        min_samples=10,
        min_train_genes=5,
        min_test_genes=5,
        progress=False,
        cov_max_cells=None,
    ).results.set_index("perturbation")
    truth = observe(screen, labels, n_splits=1)
    for row, label in enumerate(labels):
        others = np.arange(N_GENES) != screen.perturbations[label].gene_index[0]
        r = metrics.pearson_delta(ours[[row]], truth.delta[[row]], others)[0]
        # Theirs fits the sign on the response it scores; ours has the sign of the target's own change.
        sign = np.sign(result.loc[label, "a_hat"]) * np.sign(context.changes(label)[1][0])
        assert result.loc[label, "pearson_real"] == pytest.approx(r * sign, abs=1e-6)


@pytest.mark.real_data
def test_covariance_has_the_direction_of_cipher_on_a_real_screen(real_data, tmp_path):
    cipher = pytest.importorskip("cipher")
    path = real_data / "perturbation" / "schraivogel2020_k562_tapseq_crispri_72genes.h5ad"
    screen = read_screen(path)
    symbols = anndata.read_h5ad(path)
    symbols.var_names = screen.gene_symbols
    symbols.write_h5ad(tmp_path / "symbols.h5ad")
    theirs = cipher.forward_prediction(
        str(tmp_path / "symbols.h5ad"),
        normalization="log1CP10k",
        exclude_target_from_fit=True,
        exclude_target_from_eval=True,
        expression_threshold=0.0,
        min_train_genes=20,
        min_test_genes=20,
        progress=False,
        nulls=(),
    ).results.set_index("perturbation")
    labels = sorted(screen.perturbations)
    ours = covariance(ScreenContext.build(screen, [], labels)).delta
    # Their means are taken in single precision, which moves a correlation by up to 1e-5.
    control = screen.values[screen.cells_of("control")].mean(axis=0)
    for row, label in enumerate(labels):
        observed = (screen.values[screen.cells_of(label)].mean(axis=0) - control).astype(np.float64)
        others = np.arange(len(observed)) != screen.perturbations[label].gene_index[0]
        r = metrics.pearson_delta(ours[[row]], observed[None], others)[0]
        assert abs(theirs.loc[label, "pearson_real"]) == pytest.approx(abs(r), abs=1e-6)


def test_folds_are_clean(screen, doubles):
    folds = perturbation_folds(screen, 3, seed=1)
    assert sorted(label for fold in folds for label in fold.test) == sorted(screen.perturbations)
    for fold in perturbation_folds(doubles, 3):
        tested = {g for label in fold.test for g in label.split("+")}
        assert not any(tested & set(label.split("+")) for label in fold.train)
        assert not set(fold.train_cells) & set(fold.test_cells)
    seen = combination_folds(doubles)
    assert [fold.test[0] for fold in seen[2]] == ["G0+G1", "G1+G2"] and seen[2][0].train == ["G0", "G1", "G2"]
    assert [(fold.test[0], fold.train) for fold in seen[1]] == [
        ("G0+G1", ["G0", "G2"]),
        ("G0+G5", ["G0", "G1", "G2"]),
        ("G1+G2", ["G0", "G1"]),
    ]
    assert [(fold.test[0], fold.train) for fold in seen[0]] == [("G0+G5", ["G1", "G2"]), ("G3+G4", ["G0", "G1", "G2"])]
    fold = held_out_group(screen, "batch", "b1")
    assert (screen.batch[fold.test_cells] == "b1").all() and (screen.batch[fold.train_cells] == "b2").all()
    for call, words in (
        (lambda: perturbation_folds(screen, 9), "`folds` is 9"),
        (lambda: held_out_group(screen, "batch", "b3"), "cannot be held out"),
        (lambda: held_out_group(screen, "donor", "x"), "'batch' or 'cell_line'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_scores_of_the_truth_and_of_nothing(screen):
    labels = sorted(screen.perturbations)
    truth = observe(screen, labels, n_splits=2)
    reference = np.tile(truth.delta.mean(axis=0), (len(labels), 1))
    exact = score_prediction(ScreenPrediction(truth.delta, 0 * truth.delta), truth, reference, screen)
    for name in (
        "pearson_delta",
        "systema_pearson",
        "discrimination_l1",
        "centroid_accuracy",
        "coverage90",
        "r2_delta",
    ):
        assert exact[name] == pytest.approx(1), name
    assert exact["normalised_squared_error"] == pytest.approx(0) and exact["perturbench_rank"] == pytest.approx(0)
    nothing = score_prediction(ScreenPrediction(0 * truth.delta), truth, reference, screen)
    assert nothing["pearson_delta"] == pytest.approx(0) and nothing["normalised_squared_error"] == pytest.approx(1)
    assert exact["energy_distance"].mean() < nothing["energy_distance"].mean()
    swapped = swapped_pearson(ScreenPrediction(truth.delta), truth)
    table = np.corrcoef(truth.delta[:, truth.mask])
    assert swapped == pytest.approx((table.sum(axis=1) - 1) / (len(labels) - 1))
    low, high = bootstrap_perturbations(np.array([1.0, 2.0, 3.0, np.nan]))
    assert 1 <= low < 2 < high <= 3


def test_technical_covariates_are_taken_out_where_the_library_is_complete():
    adata = make_adata()
    adata.X = np.random.default_rng(0).poisson(3.0, adata.shape).astype(np.float32)
    adata.obs["n_counts_full"] = np.linspace(500, 5_000, adata.n_obs)
    screen = read_screen(adata)
    cells = screen.cells_of("control")
    freed = technical_residuals(screen, cells)
    depth = np.log(screen.library_size[cells])
    assert np.abs([np.corrcoef(depth, column)[0, 1] for column in freed.T]).max() < 1e-6
    assert np.allclose(freed.mean(axis=0), screen.values[cells].mean(axis=0), atol=1e-6)
    del adata.obs["n_counts_full"]
    partial = read_screen(adata)
    assert np.array_equal(technical_residuals(partial, cells), partial.values[cells].astype(float))


def test_size_keeps_the_direction():
    size, deviation = ResponseSize(share=0.5, drift=0.1), np.array([3.0, 4.0])
    small, large = np.array([0.003, -0.004]), np.array([3000.0, -4000.0])
    assert size(small, deviation) == pytest.approx(small / 2, rel=1e-3)
    # However large, no more than the share of what batches drift: 0.1 x |(3, 4)|.
    assert np.linalg.norm(size(large, deviation)) == pytest.approx(0.25, rel=1e-3)
    assert np.corrcoef(size(large, deviation), small)[0, 1] == pytest.approx(1)
    assert size(large, deviation, np.array([True, False])) == pytest.approx(0.5 * 0.3 * large / 3000, rel=1e-3)


def test_drift_is_how_far_batches_of_controls_lie_beyond_sampling_error():
    generator = np.random.default_rng(0)
    adata = make_adata(("control", "G0", "G1"), n=20, controls=4_000)
    adata.X = (generator.normal(size=adata.shape) + 5).astype(np.float32)
    still = read_screen(adata, ScreenOptions(value_kind="log"))
    assert batch_drift(still) < 0.02
    shift = generator.normal(size=N_GENES) * 0.3
    adata.X[(adata.obs["batch"] == "b1").to_numpy()] += shift
    moved = read_screen(adata, ScreenOptions(value_kind="log"))
    # Two batches of one size lie half their distance from the whole.
    expected = np.sqrt(np.mean((shift / 2) ** 2 / (1 + (shift / 2) ** 2)))
    assert batch_drift(moved) == pytest.approx(expected, rel=0.1)
    del adata.obs["batch"]
    assert batch_drift(read_screen(adata, ScreenOptions(value_kind="log"))) == 0.06


def test_in_context_reads_no_perturbed_cell(screen):
    labels = sorted(screen.perturbations)
    context = ScreenContext.build(screen, [], labels)
    before = InContextModel(screen, n_factors=3).predict(context)
    # Everything about perturbed cells but their target's change is replaced by garbage.
    spoiled = read_screen(make_adata(), ScreenOptions(value_kind="log"))
    perturbed = np.flatnonzero(~spoiled.is_control)
    keep = spoiled.values[perturbed][:, spoiled.panel_targets].copy()
    spoiled.values[perturbed] = 9.0
    spoiled.values[np.ix_(perturbed, spoiled.panel_targets)] = keep
    after = InContextModel(spoiled, n_factors=3).predict(ScreenContext.build(spoiled, [], labels))
    assert np.array_equal(before.delta, after.delta)


CHECK = "modeling_gppc.evaluation.in_context_model.check_responses"
PAYS = ResponseCheck(0.9, 1.0, 0.6, 0.5)


@pytest.mark.parametrize(
    ("check", "kept"),
    [
        (PAYS, True),
        (ResponseCheck(1.0, 1.0, 0.5, 0.5), False),
        (ResponseCheck(1.1, 1.0, 0.6, 0.5), False),
        (ResponseCheck(0.9, 1.0, 0.4, 0.5), False),
    ],
)
def test_departure_is_kept_if_it_brings_responses_nearer(screen, monkeypatch, check, kept):
    monkeypatch.setattr(CHECK, lambda model, values: check)
    model = InContextModel(screen, n_factors=3, steps=2)
    assert (model.model is not None) == kept and model.check == check
    context = ScreenContext.build(screen, [], sorted(screen.perturbations))
    linear = InContextModel(screen, n_factors=3).predict(context).delta
    assert np.array_equal(model.predict(context).delta, linear) != kept


def test_departure_is_what_the_network_adds(screen, monkeypatch):
    monkeypatch.setattr(CHECK, lambda model, values: PAYS)
    network = InContextModel(screen, n_factors=3, steps=2)
    added = network.departure(np.array([0]), np.array([-0.5]))
    assert 0 < np.abs(added).max() < 0.05
    for parameter in network.model.readout.parameters():
        parameter.data.zero_()
    assert not network.departure(np.array([0]), np.array([-0.5])).any()


def test_slope_is_the_conditional_gaussian(screen):
    model = InContextModel(screen, n_factors=3, hold=0.0)
    sigma = model.factors.loadings @ model.factors.loadings.T
    within = sigma[0, 0] + model.factors.noise[0]
    assert np.allclose(model.slope(np.array([0]), np.array([-0.5])), sigma[:, 0] / within * -0.5)
    # Held firmly, the other targets hardly move.
    firm = InContextModel(screen, n_factors=3, hold=1e4).slope(np.array([0]), np.array([-0.5]))
    held = screen.panel_targets[screen.panel_targets != 0]
    assert np.abs(firm[held]).max() < 0.05 < np.abs(model.slope(np.array([0]), np.array([-0.5]))[held]).max()


@pytest.fixture(scope="module")
def in_context(screen):
    options = EvaluateOptions(mode="in-context", model="gppc", seeds=2, steps=3, n_shuffles=4)
    return evaluate_screen(screen, options, progress=False)


def test_in_context_finds_the_programs(in_context):
    methods = in_context.summary["methods"]
    assert methods["gppc"]["pearson_delta"] > 0.9 and methods["covariance"]["pearson_delta"] > 0.9
    assert methods["gppc"]["matched_minus_shuffled_ci95"][0] > 0
    assert methods["gppc"]["normalised_squared_error"] < 1
    assert not methods["gppc"]["reads_perturbed_cells"]
    assert len(methods["gppc"]["seeds"]["pearson_delta"]) == 2
    assert in_context.summary["comparisons"]["covariance"]["above_ceiling_half"]["n"] == 6


def test_fine_tuned_beats_the_mean(screen):
    options = EvaluateOptions(mode="fine-tuned", model="factor", folds=2)
    summary = evaluate_screen(screen, options, progress=False).summary
    methods = summary["methods"]
    assert set(methods) == {
        "no_change",
        "target_only",
        "covariance",
        "mean",
        "matching_mean",
        "additive",
        "ridge",
        "bilinear",
        "knn",
        "factor",
    }
    assert methods["factor"]["pearson_delta"] > methods["mean"]["pearson_delta"]
    assert methods["factor"]["systema_pearson"] > 0 == methods["mean"]["systema_pearson"]
    gap = summary["comparisons"]["mean"]["systema_pearson"]
    assert gap["difference"] == pytest.approx(methods["factor"]["systema_pearson"])
    assert gap["ci95"][0] < gap["difference"] < gap["ci95"][1]
    assert 0.5 < methods["factor"]["coverage90"] <= 1


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_doubles_by_members_seen(doubles, seen):
    options = EvaluateOptions(mode="fine-tuned", model="factor", split="combinations", seen=seen)
    evaluation = evaluate_screen(doubles, options, progress=False)
    expected = {0: ["G0+G5", "G3+G4"], 1: ["G0+G1", "G0+G5", "G1+G2"], 2: ["G0+G1", "G1+G2"]}[seen]
    assert evaluation.truth.labels == expected
    methods = evaluation.summary["methods"]
    if seen == 2:  # the cells are additive
        assert methods["additive"]["pearson_delta"] > 0.95 and methods["factor"]["pearson_delta"] > 0.95
        assert methods["factor"]["normalised_squared_error"] < 0.3


def test_a_saved_model_is_scored_as_it_is(screen, tmp_path):
    """Zero-shot: genes are found by symbol; those the model does not know do not change."""
    config = GppcConfig(
        vocab_size=N_GENES,
        num_factors=4,
        hidden_size=8,
        readout_size=8,
        num_latents=2,
        use_departure=False,
    )
    model = GppcForPerturbationPrediction(config)
    fitted = InContextModel(screen, n_factors=4, hold=0.0)
    order = np.arange(N_GENES)[::-1].copy()
    response = model.model.linear_response
    with torch.no_grad():
        response.loadings.copy_(torch.as_tensor(fitted.factors.loadings[order]))
        response.noise.copy_(torch.as_tensor(fitted.factors.noise[order]))
        response.gene_mean.copy_(torch.as_tensor(fitted.factors.mean[order]))
    model.save_pretrained(tmp_path)
    names = [f"G{i}" if i else "unknown" for i in order]
    GppcFeatureExtractor(gene_ids=names).save_pretrained(tmp_path)
    options = EvaluateOptions(mode="zero-shot", model=str(tmp_path), n_shuffles=2)
    evaluation = evaluate_screen(screen, options, progress=False)
    assert evaluation.summary["model"] == "folder" and str(tmp_path) not in json.dumps(evaluation.summary)
    prediction = evaluation.predictions["gppc"].delta
    row = evaluation.truth.labels.index("G2")
    genes, changes = ScreenContext.build(screen, [], ["G2"]).changes("G2")
    response = fitted.slope(genes, changes)
    response[0] = 0
    spread = screen.values[screen.is_control].std(axis=0)
    others = np.setdiff1d(np.arange(N_GENES), screen.panel_targets)
    expected = ResponseSize().of(screen)(response, spread, others)
    assert np.allclose(prediction[row, others], expected[others], atol=1e-4)
    assert prediction[row, 0] == 0 and not prediction[evaluation.truth.labels.index("G0")].any()
    # What the run leaves is what a card of this model takes its scorecard from.
    (found,) = transfer_scorecard(tmp_path, [write_evaluation(evaluation, tmp_path / "scored")])["screens"]
    assert found["subject"] == "gppc" and found["n_genes"] == evaluation.summary["n_scored_genes"]
    for name, scores in evaluation.summary["methods"].items():
        assert found["methods"][name]["pearson_delta"] == scores["pearson_delta"]


def test_files_and_page(in_context, tmp_path):
    folder = write_evaluation(in_context, tmp_path / "out")
    loaded = json.loads((folder / "evaluation.json").read_text())
    assert loaded["schema_version"] == 1 and loaded["methods"]["gppc"]["n_perturbations"] == 6
    table = pd.read_csv(folder / "per_perturbation.csv")
    assert len(table) == 6 * len(in_context.predictions) and "pearson_delta" in table
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page and "http" not in page
    assert {file.name for file in (folder / "figures").iterdir()} == {"scores.png", "responses.png", "calibration.png"}
    text = render_evaluation(in_context.summary)
    assert "gppc" in text and "matched minus target-shuffled" in text
    assert "| gppc |" in render_evaluation(in_context.summary, markdown=True)


def test_cell_eval_reads_predictions_unchanged(in_context):
    types = pytest.importorskip("cell_eval._types")
    peer = pytest.importorskip("cell_eval.metrics._anndata")
    predicted, observed = response_anndatas(in_context, "gppc")
    data = types.PerturbationAnndataPair(
        real=observed, pred=predicted, pert_col="target", control_pert="non-targeting"
    )
    theirs = peer.pearson_delta(data)
    truth, prediction = in_context.truth, in_context.predictions["gppc"]
    ours = metrics.pearson_delta(prediction.delta, truth.delta)
    assert list(theirs) == truth.labels
    assert list(theirs.values()) == pytest.approx(ours.tolist(), abs=1e-5)


def test_genes_are_kept_without_perturbed_cells(screen):
    small = keep_genes(screen, 12)
    assert len(small.gene_ids) == 12 and small.values.shape[1] == 12
    assert small.panel_targets.tolist() == [small.gene_ids.index(f"G{i}") for i in range(6)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "in_context"}, "`mode` is 'in_context'"),
        ({"model": "nowhere"}, "neither a model folder nor one of"),
        ({"mode": "zero-shot"}, "wanted a model folder"),
        ({"seeds": 0}, "`seeds` is 0"),
        ({"split": "cells"}, "`split` is 'cells'"),
        ({"split": "combinations"}, "only 'fine-tuned' trains"),
        ({"seen": 3, "mode": "fine-tuned"}, "`seen` is 3"),
    ],
)
def test_bad_options_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        EvaluateOptions(**arguments)


def test_command(tmp_path, capsys):
    path, out = tmp_path / "screen.h5ad", tmp_path / "out"
    make_adata(("control", "G0", "G1", "G2"), n=30, controls=100).write_h5ad(path)
    base = ["evaluate", "--screen", str(path), "--out", str(out), "--quiet", "--value-kind", "log"]
    assert main([*base, "--model", "factor"]) == 0
    printed = capsys.readouterr().out
    assert "3 perturbations" in printed and "covariance" in printed
    assert (out / "report.html").is_file()
    assert main([*base, "--mode", "sideways"]) == 2
    assert "`mode` is 'sideways'" in capsys.readouterr().err
    assert main(["evaluate", "--screen", str(path), "--out", str(tmp_path)]) == 2
    assert "holds something else than an evaluation" in capsys.readouterr().err
    assert main(["evaluate", "--screen", str(path), "--out", str(tmp_path / "new")]) == 2
    assert "non-integer" in capsys.readouterr().err
