"""A small screen through every mode: baselines by hand, peers, guards, files."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats
import torch
from energy_distance import energy_distance
from tiny_screens import N_GENES, make_adata

from data_scripts.cells.screen_cells import keep_genes
from data_scripts.cells.screen_splits import combination_folds, group_folds, perturbation_folds
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
from modeling_gppc.evaluation.screen_intervals import bootstrap_perturbations
from modeling_gppc.evaluation.screen_report import render_evaluation, write_evaluation
from modeling_gppc.evaluation.screen_scores import (
    ScreenPrediction,
    discriminations,
    energy_distances,
    score_prediction,
    swapped_pearson,
)
from modeling_gppc.evaluation.screen_truth import observe, rank_sum_z
from modeling_gppc.evaluation.transfer_scorecard import transfer_scorecard
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction


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


def test_rank_sums_equal_scipy():
    """Counts with many zeros, negative values, groups of different sizes, cells that belong to none."""
    generator = np.random.default_rng(0)
    values = generator.poisson(1.0, (160, 5)) - generator.poisson(0.3, (160, 5))
    values[:, 4] = 2
    group = np.repeat([0, 2, 1, -1], [40, 70, 30, 20])
    z = rank_sum_z(scipy.sparse.csc_matrix(values.astype(float)), group, 2)
    for row in (0, 1):
        theirs = scipy.stats.mannwhitneyu(
            values[group == row], values[group == 2], use_continuity=False, method="asymptotic"
        ).pvalue
        assert 2 * scipy.stats.norm.sf(np.abs(z[row, :4])) == pytest.approx(theirs[:4], rel=1e-9)
    assert z[:, 4].tolist() == [0, 0]


def test_many_perturbations_are_told_apart_in_groups():
    """The right prediction is best among any rivals; a useless one is at the middle."""
    generator = np.random.default_rng(0)
    observed = generator.normal(size=(700, 8))
    exact = discriminations(observed, observed)
    assert all(len(values) == 700 for values in exact.values())
    assert exact["discrimination_l1"].min() == 1 and exact["perturbench_rank"].max() == 0
    random = discriminations(generator.normal(size=observed.shape), observed)
    assert random["discrimination_cosine"].mean() == pytest.approx(0.5, abs=0.04)


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
    (fold,) = group_folds(screen, "batch=b1")
    assert (screen.batch[fold.test_cells] == "b1").all() and (screen.batch[fold.train_cells] == "b2").all()
    for call, words in (
        (lambda: perturbation_folds(screen, 9), "`folds` is 9"),
        (lambda: group_folds(screen, "batch=b3"), "cannot be held out"),
        (lambda: group_folds(screen, "donor=x"), "'batch' or 'cell_line'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_scores_of_the_truth_and_of_nothing(screen):
    labels = sorted(screen.perturbations)
    truth = observe(screen, labels, n_splits=2)
    reference = np.tile(truth.delta.mean(axis=0), (len(labels), 1))
    exact = score_prediction(ScreenPrediction(truth.delta, 0 * truth.delta), truth, reference)
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
    nothing = score_prediction(ScreenPrediction(0 * truth.delta), truth, reference)
    assert nothing["pearson_delta"] == pytest.approx(0) and nothing["normalised_squared_error"] == pytest.approx(1)
    methods = {"exact": ScreenPrediction(truth.delta), "nothing": ScreenPrediction(0 * truth.delta)}
    distances = energy_distances(screen, truth, methods, max_cells=1_000)
    assert distances["exact"].mean() < distances["nothing"].mean()
    moved = screen.values[screen.cells_of("control")] + truth.delta[0]
    cells = screen.values[screen.cells_of(labels[0])]
    by_hand = energy_distance(moved[:, truth.mask], cells[:, truth.mask])
    assert distances["exact"][0] == pytest.approx(by_hand, abs=1e-5)
    swapped = swapped_pearson(ScreenPrediction(truth.delta), truth)
    table = np.corrcoef(truth.delta[:, truth.mask])
    assert swapped == pytest.approx((table.sum(axis=1) - 1) / (len(labels) - 1))
    low, high = bootstrap_perturbations(np.array([1.0, 2.0, 3.0, np.nan]))
    assert 1 <= low < 2 < high <= 3


@pytest.fixture(scope="module")
def in_context(screen):
    options = EvaluateOptions(mode="in-context", n_shuffles=4)
    return evaluate_screen(screen, options, progress=False)


def test_in_context_finds_the_programs(in_context):
    methods = in_context.summary["methods"]
    assert methods["gppc"]["pearson_delta"] > 0.9 and methods["covariance"]["pearson_delta"] > 0.9
    assert methods["gppc"]["matched_minus_shuffled_ci95"][0] > 0
    assert methods["gppc"]["normalised_squared_error"] < 1
    assert not methods["gppc"]["reads_perturbed_cells"]
    assert in_context.summary["comparisons"]["covariance"]["above_ceiling_half"]["n"] == 6


def test_fine_tuned_beats_the_mean(screen):
    options = EvaluateOptions(mode="fine-tuned", folds=2)
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
        "gppc",
    }
    assert methods["gppc"]["pearson_delta"] > methods["mean"]["pearson_delta"]
    assert methods["gppc"]["systema_pearson"] > 0 == methods["mean"]["systema_pearson"]
    gap = summary["comparisons"]["mean"]["systema_pearson"]
    assert gap["difference"] == pytest.approx(methods["gppc"]["systema_pearson"])
    assert gap["ci95"][0] < gap["difference"] < gap["ci95"][1]
    assert 0.5 < methods["gppc"]["coverage90"] <= 1


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_doubles_by_members_seen(doubles, seen):
    options = EvaluateOptions(mode="fine-tuned", split="combinations", seen=seen)
    evaluation = evaluate_screen(doubles, options, progress=False)
    expected = {0: ["G0+G5", "G3+G4"], 1: ["G0+G1", "G0+G5", "G1+G2"], 2: ["G0+G1", "G1+G2"]}[seen]
    assert evaluation.truth.labels == expected
    methods = evaluation.summary["methods"]
    if seen == 2:  # the cells are additive
        assert methods["additive"]["pearson_delta"] > 0.95 and methods["gppc"]["pearson_delta"] > 0.95
        assert methods["gppc"]["normalised_squared_error"] < 0.3


def test_a_saved_model_is_scored_as_it_is(screen, tmp_path):
    """Zero-shot: genes are found by symbol; those the model does not know do not change."""
    order = np.arange(N_GENES)[::-1]
    extractor = GppcFeatureExtractor(gene_ids=[f"G{i}" if i else "unknown" for i in order], normalization="none")
    torch.manual_seed(0)
    model = GppcForPerturbationPrediction(GppcConfig.from_size("tiny", vocab_size=N_GENES, num_components=1)).eval()
    model.model.linear_response.loadings.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    options = EvaluateOptions(mode="zero-shot", model=[str(tmp_path)], controls="shared", n_shuffles=2)
    evaluation = evaluate_screen(screen, options, progress=False)
    assert evaluation.summary["model"] == "folder" and str(tmp_path) not in json.dumps(evaluation.summary)
    prediction = evaluation.predictions["gppc"].delta
    row = evaluation.truth.labels.index("G2")
    change = ScreenContext.build(screen, [], ["G2"]).changes("G2")[1].item()
    # What the model itself answers to, by hand.
    cells = screen.cells_of("control")
    cells = cells[np.random.default_rng(0).permutation(len(cells))[:256]]
    state = screen.values[cells][:, order].copy()
    measured = np.tile(order != 0, (len(cells), 1))
    encoded = model.encode(**extractor.from_values(state, measured))
    features = extractor.perturbation_features(f"G2=delta:{change!r}", state)
    response = model.respond(encoded, **features).change.mean(dim=0).numpy()
    others = np.setdiff1d(np.arange(N_GENES), 0)
    assert np.allclose(prediction[row, others], response[N_GENES - 1 - others], atol=1e-5)
    assert np.abs(response).max() > 0.01
    assert prediction[row, 0] == 0 and not prediction[evaluation.truth.labels.index("G0")].any()
    # What the run leaves is what a card of this model takes its scorecard from.
    (found,) = transfer_scorecard(tmp_path, [write_evaluation(evaluation, tmp_path / "scored")])["screens"]
    assert found["subject"] == "gppc" and found["n_genes"] == evaluation.summary["n_scored_genes"]
    for name, scores in evaluation.summary["methods"].items():
        assert found["methods"][name]["pearson_delta"] == scores["pearson_delta"]


def test_a_model_of_other_values_is_refused(screen, tmp_path):
    GppcForPerturbationPrediction(GppcConfig.from_size("tiny", vocab_size=N_GENES)).save_pretrained(tmp_path)
    GppcFeatureExtractor(gene_ids=[f"G{i}" for i in range(N_GENES)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="normalised by log1p to 10000, the screen was read by none"):
        evaluate_screen(screen, EvaluateOptions(mode="zero-shot", model=[str(tmp_path)]), progress=False)


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


def test_genes_are_kept_without_perturbed_cells(screen):
    small = keep_genes(screen, 12)
    assert len(small.gene_ids) == 12 and small.values.shape[1] == 12
    assert small.panel_targets.tolist() == [small.gene_ids.index(f"G{i}") for i in range(6)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "in_context"}, "`mode` is 'in_context'"),
        ({"model": ["nowhere"]}, "neither a model folder nor one of"),
        ({"mode": "zero-shot"}, "wanted a model folder"),
        ({"hold_targets": -1}, "`hold_targets` is -1"),
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
    assert main(base) == 0
    printed = capsys.readouterr().out
    assert "3 perturbations" in printed and "covariance" in printed
    assert (out / "report.html").is_file()
    assert main([*base, "--mode", "sideways"]) == 2
    assert "`mode` is 'sideways'" in capsys.readouterr().err
    assert main(["evaluate", "--screen", str(path), "--out", str(tmp_path)]) == 2
    assert "holds something else than an evaluation" in capsys.readouterr().err
    assert main(["evaluate", "--screen", str(path), "--out", str(tmp_path / "new")]) == 2
    assert "non-integer" in capsys.readouterr().err
