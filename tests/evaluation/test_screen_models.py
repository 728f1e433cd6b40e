"""Models that train.py leaves, scored by `gppc evaluate`; held-out batches and cell lines; features of genes."""

import json
import shutil

import numpy as np
import pytest
from tiny_screens import make_adata

import train
from data_scripts.cells.screen_cells import perturbed_digest, some_cells
from data_scripts.cells.screen_splits import group_folds, stated_fold
from data_scripts.cells.screens import ScreenOptions, read_screen
from data_scripts.pairs.leak_guards import guard_model, model_leak
from gppc.cli import main
from gppc.run_options import parse_options
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_baselines import ScreenContext
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen, score_prediction_pearson
from modeling_gppc.evaluation.screen_model import ScreenModel, read_run
from modeling_gppc.evaluation.screen_runs import shuffled_null
from modeling_gppc.evaluation.screen_scores import ScreenPrediction, score_prediction
from modeling_gppc.evaluation.screen_truth import observe
from modeling_gppc.fitting.fit_screen import fit_screen
from modeling_gppc.training.arguments import CONFIGS


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("screens") / "screen.h5ad"
    make_adata(n=40, controls=300).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def screen(file):
    return read_screen(file, ScreenOptions(value_kind="log"))


CONTROLS, FOLDS = ("--screen.train_on", "controls"), ("--screen.folds", "2", "--folds", "all")
SHARED = ("--screen.controls", "shared")


def train_on(file, out, *flags):
    base = ["--config", "screen", "--data.screen", str(file), "--data.screen_options.value_kind", "log"]
    assert train.main([*base, "--training.use_cpu", "true", "--output_dir", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def in_context(file, tmp_path_factory):
    return train_on(file, tmp_path_factory.mktemp("in_context"), *CONTROLS, *SHARED) / "model"


@pytest.fixture(scope="module")
def folds(file, tmp_path_factory):
    out = train_on(file, tmp_path_factory.mktemp("folds"), *FOLDS, *SHARED)
    return sorted(out.glob("fold_*/model"))


def evaluate(file, out, *arguments):
    base = [
        "evaluate",
        "--screen",
        str(file),
        "--value-kind",
        "log",
        "--out",
        str(out),
        "--quiet",
        "--nothing",
        "false",
    ]
    return main([*base, *map(str, arguments)])


def test_a_model_of_controls_is_scored_in_context(in_context, file, screen, tmp_path, capsys):
    run = read_run(in_context)
    assert run["screen"]["train_on"] == "controls" and run["screen"]["held_out_perturbations"] == []
    assert run["datasets"] == ["screen"] and run["screen"]["cells_digest"] == perturbed_digest(screen)
    shared = ("--mode", "in-context", "--controls", "shared")
    assert evaluate(file, tmp_path / "out", *shared, "--model", in_context) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    method = summary["methods"]["gppc"]
    assert summary["model"] == "folder" and not method["reads_perturbed_cells"] and summary["notes"] == []
    assert method["pearson_delta"] > 0.8 and method["normalised_squared_error"] < 1
    # The very numbers of an evaluation that fits the model itself.
    assert evaluate(file, tmp_path / "here", *shared) == 0
    assert json.loads((tmp_path / "here" / "evaluation.json").read_text())["methods"]["gppc"] == method
    for mode, words in (("zero-shot", "was among what"), ("fine-tuned", "wants a model trained on perturbations")):
        assert evaluate(file, tmp_path / mode, "--mode", mode, "--model", in_context) == 2
        assert words in capsys.readouterr().err


def test_models_of_folds_are_scored_on_what_they_did_not_see(folds, file, tmp_path, capsys):
    seen = [read_run(folder)["screen"] for folder in folds]
    assert not set(seen[0]["held_out_perturbations"]) & set(seen[0]["train_perturbations"])
    assert sorted(seen[0]["held_out_perturbations"] + seen[1]["held_out_perturbations"]) == [f"G{i}" for i in range(6)]
    flags = ["--mode", "fine-tuned", "--folds", 2, "--controls", "shared"]
    assert evaluate(file, tmp_path / "out", *flags, "--model", *folds) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["n_perturbations"] == 6 and summary["methods"]["gppc"]["reads_perturbed_cells"]
    assert evaluate(file, tmp_path / "here", *flags) == 0
    assert json.loads((tmp_path / "here" / "evaluation.json").read_text())["methods"] == summary["methods"]
    assert evaluate(file, tmp_path / "twice", "--mode", "fine-tuned", "--model", folds[0], folds[0]) == 2
    assert "two folders hold out the same perturbation" in capsys.readouterr().err
    assert evaluate(file, tmp_path / "context", "--model", folds[0]) == 2
    assert "wants a model trained on controls" in capsys.readouterr().err


def test_a_model_is_judged_by_controls_that_it_was_fitted_without(in_context, file, tmp_path, capsys):
    """Half of the controls are left out of a fold; a model that read them all has none left to be judged by."""
    folds = sorted(train_on(file, tmp_path / "folds", *FOLDS).glob("fold_*/model"))
    flags = ["--mode", "fine-tuned", "--folds", 2]
    assert evaluate(file, tmp_path / "out", *flags, "--model", *folds) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["n_divisions"] == 1 and summary["n_controls"] == 150
    assert evaluate(file, tmp_path / "here", *flags) == 0
    assert json.loads((tmp_path / "here" / "evaluation.json").read_text())["n_divisions"] == 6
    capsys.readouterr()
    assert evaluate(file, tmp_path / "none", "--mode", "in-context", "--model", in_context) == 2
    assert "no control cell is left to measure the truth with" in capsys.readouterr().err
    assert evaluate(file, tmp_path / "seed", *flags, "--seed", 1, "--model", *folds) == 2
    assert "was not fitted on one half" in capsys.readouterr().err


def test_shipped_configs_trip_no_guard(in_context, folds, screen):
    """What the screen configuration leaves passes in the mode it is for; the others read no screen at all."""
    guard_model(read_run(in_context), screen.name, perturbed_digest(screen), "in-context")
    for folder in folds:
        guard_model(read_run(folder), screen.name, perturbed_digest(screen), "fine-tuned")
    for path in CONFIGS.glob("*.yaml"):
        flags = ["--data.screen", "x.h5ad"] if path.stem == "screen" else []
        flags += ["--pairs.query.uri", "cells"] if path.stem in ("own", "pbmc") else []
        assert (parse_options(path.stem, flags).data.screen is not None) == (path.stem == "screen")


CLEAN = {"datasets": ["screen"], "screen": {"cells_digest": "d", "train_on": "controls", "name": "screen"}}


@pytest.mark.parametrize(
    ("run", "mode", "reason"),
    [
        ({"datasets": ["atlas", "screen"]}, "zero-shot", "was among what the model was trained on"),
        ({"datasets": [], "screen": {"cells_digest": "d"}}, "zero-shot", "was among what the model was trained on"),
        ({"datasets": ["atlas"]}, "in-context", "wants a model of this screen"),
        (CLEAN | {"screen": CLEAN["screen"] | {"cells_digest": "e"}}, "in-context", "trained on other cells"),
        (CLEAN, "fine-tuned", "wants a model trained on perturbations"),
        (CLEAN | {"screen": CLEAN["screen"] | {"train_on": "perturbations"}}, "in-context", "trained on controls"),
    ],
)
def test_a_model_that_saw_too_much_is_refused(run, mode, reason):
    assert reason in model_leak(run, "screen", "d", mode)
    with pytest.raises(ValueError, match="`model` leaks"):
        guard_model(run, "screen", "d", mode)


def test_clean_models_pass():
    assert model_leak(CLEAN, "screen", "d", "in-context") is None
    assert model_leak({"datasets": ["atlas"]}, "screen", "d", "zero-shot") is None
    assert model_leak(None, "screen", "d", "zero-shot") is None


def test_a_model_without_its_run_is_scored_with_a_note(in_context, screen, tmp_path):
    shutil.copytree(in_context, tmp_path / "model")
    (tmp_path / "model" / "run.json").unlink()
    options = EvaluateOptions(mode="zero-shot", model=[str(tmp_path / "model")], n_shuffles=1)
    assert "is not stated" in evaluate_screen(screen, options, progress=False).summary["notes"][0]


def test_some_cells_keeps_the_panel(screen):
    few = some_cells(screen, np.flatnonzero(np.isin(screen.label, ["control", "G2"])))
    assert few.panel_targets.tolist() == screen.panel_targets.tolist()
    assert few.perturbations["G2"].n_cells == 40 and few.perturbations["G1"].n_cells == 0


@pytest.mark.parametrize("hold_out", ["batch", "batch=b2"])
def test_a_batch_is_predicted_from_the_others(screen, hold_out, monkeypatch):
    read = []
    build = ScreenContext.build.__func__
    monkeypatch.setattr(
        ScreenContext,
        "build",
        classmethod(lambda cls, s, *a, **k: read.append(set(s.batch)) or build(cls, s, *a, **k)),
    )
    options = EvaluateOptions(mode="fine-tuned", hold_out=hold_out, nothing=False)
    evaluation = evaluate_screen(screen, options, progress=False)
    groups = ["b2"] if "=" in hold_out else ["b1", "b2"]
    assert evaluation.truth.labels == [f"G{i} @ {group}" for group in groups for i in range(6)]
    # Nothing was built from a cell of the batch that is predicted.
    assert read == [{"b1", "b2"} - {group} for group in groups]
    inside = screen.batch == "b2"
    here = screen.values[inside & (screen.label == "G3")].mean(axis=0) - screen.values[
        inside & screen.is_control
    ].mean(axis=0)
    assert np.allclose(evaluation.truth.delta[-3], here, atol=1e-5)
    methods = evaluation.summary["methods"]
    # The same perturbation was seen in the other batch, and says more than the mean of all.
    assert methods["gppc"]["pearson_delta"] > 0.95 > methods["mean"]["pearson_delta"]
    assert 0.8 < methods["gppc"]["coverage90"] <= 1


def test_one_stimulus_is_predicted_from_cell_line_to_cell_line():
    adata = make_adata(("control", "G0"), n=80, controls=200)
    adata.obs["cell_line"] = np.array(["x", "y", "z", "x"])[np.arange(adata.n_obs) % 4]
    screen = read_screen(adata, ScreenOptions(value_kind="log"))
    options = EvaluateOptions(mode="fine-tuned", hold_out="cell_line")
    evaluation = evaluate_screen(screen, options, progress=False)
    assert evaluation.truth.labels == ["G0 @ x", "G0 @ y", "G0 @ z"]
    methods = evaluation.summary["methods"]
    assert methods["gppc"]["pearson_delta"] > 0.9 and {"mean", "covariance"} <= set(methods)


def test_groups_that_cannot_be_held_out_are_named(screen):
    assert [fold.group for fold in group_folds(screen, "batch")] == ["b1", "b2"]
    for value in ("batch=b9", "cell_line"):
        with pytest.raises(ValueError, match="cannot be held out"):
            group_folds(screen, value)
    with pytest.raises(ValueError, match="choosing some would read controls of the group"):
        evaluate_screen(screen, EvaluateOptions(mode="fine-tuned", hold_out="batch", max_genes=10), progress=False)
    with pytest.raises(ValueError, match="which this one lacks"):
        stated_fold(screen, "model", ["G0"], ["STAT1"])
    with pytest.raises(ValueError, match="nothing is left to be scored"):
        stated_fold(screen, "model", ["G0"], [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hold_out": "batch"}, "only 'fine-tuned' trains"),
        ({"mode": "fine-tuned", "hold_out": "donor"}, "wanted batch or cell_line"),
        ({"mode": "fine-tuned", "hold_out": "batch", "split": "combinations"}, "without `split`"),
        ({"mode": "fine-tuned", "model": ["gppc", "x"]}, "several models are several folders"),
        ({"change": "guessed"}, "`change` is 'guessed'"),
        ({"gene_features": "nowhere.tsv"}, "is not a file"),
    ],
)
def test_bad_options_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        EvaluateOptions(**arguments)


def test_the_null_does_not_score_what_was_imposed(screen):
    """A random gene in the target's place is imposed like the target, and like it must not be scored."""
    context = ScreenContext.build(screen, [], sorted(screen.perturbations))
    model = ScreenModel(*fit_screen(screen, [], EvaluateOptions(n_factors=3)))
    null = shuffled_null(model.predict, context, EvaluateOptions(n_shuffles=3))
    assert len(null) == 3
    for prediction, imposed in null:
        assert (imposed.sum(axis=1) == 1).all() and not imposed[:, screen.panel_targets].any()
        changes = [context.changes(label)[1][0] for label in context.test]
        assert prediction.delta[imposed] == pytest.approx(changes)
    truth = observe(screen, context.test, n_splits=1)
    prediction, imposed = null[0]
    spoiled = ScreenPrediction(np.where(imposed, 1e6, prediction.delta))
    assert score_prediction_pearson(spoiled, truth, imposed) == pytest.approx(
        score_prediction_pearson(prediction, truth, imposed)
    )
    assert np.abs(score_prediction_pearson(spoiled, truth)).max() < 0.9


def test_coverage_is_told_by_genes_that_could_be_counted():
    """Genes that no cell expresses are covered by any interval; they say nothing about it."""
    adata = make_adata(n=20, controls=100)
    adata.X[:, 10:] = 0
    screen = read_screen(adata, ScreenOptions(value_kind="log"))
    truth = observe(screen, sorted(screen.perturbations), n_splits=1)
    assert truth.countable[:, 6:10].all() and not truth.countable[:, 10:].any()
    far = ScreenPrediction(np.where(truth.countable, 99.0, 0.0), np.ones(truth.delta.shape))
    scores = score_prediction(far, truth, np.zeros(truth.delta.shape))
    assert scores["coverage90"] == pytest.approx(0)
