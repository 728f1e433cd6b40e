"""Tables, sentences and figures of a run."""

import numpy as np
import pytest
from test_pair_floors import make_pairs

from modeling_gppc.evaluation.pair_floors import fit_floors
from modeling_gppc.evaluation.pair_scores import score_split
from modeling_gppc.evaluation.plots import plot_learning_curve, plot_scores
from modeling_gppc.evaluation.report import markdown_table, render_results, table_rows, text_table, verdict


def make_split(difference, interval, label_free=None):
    entry = {
        "mse": 1.0,
        "r2": 0.2,
        "difference_from_best_floor": {"floor": "knn", "mse": difference, "ci95": interval},
    }
    if label_free:
        entry["difference_from_best_label_free_floor"] = {"floor": "mean", "mse": label_free[0], "ci95": label_free[1]}
    best_label_free = "mean" if label_free else "knn"
    return {
        "n_pairs": 5,
        "n_genes": 3,
        "best_floor": "knn",
        "best_label_free_floor": best_label_free,
        "methods": {"gppc": entry, "knn": {"mse": 1.1, "r2": 0.1}, "mean": {"mse": 1.2, "r2": 0.0}},
    }


@pytest.mark.parametrize(
    ("split", "said", "unsaid"),
    [
        (make_split(-0.1, [-0.2, -0.05]), ["beats every floor", "excludes 0"], ["cannot"]),
        (make_split(-0.1, [-0.2, 0.05]), ["cannot be told apart from the best floor (knn"], ["beats"]),
        (make_split(0.1, [0.05, 0.2]), ["is worse than the best floor (knn"], ["beats"]),
        (
            make_split(0.1, [-0.05, 0.2], (-0.1, [-0.2, -0.05])),
            ["cannot be told apart", "; but gppc beats every floor without labels"],
            ["worse"],
        ),
    ],
)
def test_the_sentence_says_what_the_interval_allows(split, said, unsaid):
    sentence = verdict(split)
    assert all(words in sentence for words in said), sentence
    assert not any(words in sentence for words in unsaid), sentence
    assert sentence.endswith(".")


def test_tables_align():
    text = text_table(["a", "number"], [["long name", "1"], ["b", "22"]])
    assert text.split("\n") == ["a          number", "---------  ------", "long name       1", "b              22"]
    assert markdown_table(["a"], [["b"]]) == "| a |\n|---|\n| b |"


@pytest.fixture(scope="module")
def results():
    test = make_pairs(n=100, seed=2)
    names = ["mean", "no_change", "context_mean"]
    floors = fit_floors(make_pairs(), make_pairs(n=50, seed=1), names=names, progress=False)
    methods = {"gppc": lambda batch: batch.target * 0.5, "optimum": lambda batch: batch.target * 0.9}
    split = score_split(test, methods, floors=floors, n_resamples=50, progress=False)
    return {"splits": {"same_type": split}}


def test_whole_report(results):
    text = render_results(results)
    assert "same_type: 100 pairs" in text and "context_mean * +" in text and "% of the best possible r2" in text
    assert [row[0].split()[0] for row in table_rows(results["splits"]["same_type"])] == [
        "gppc",
        "optimum",
        "no_change",
        "mean",
        "context_mean",
    ]


def test_figures_are_written(results, tmp_path):
    assert plot_scores(results, tmp_path / "scores.png").stat().st_size > 5_000
    history = [{"step": s, "loss": 1 / s} for s in range(1, 9)] + [
        {"step": 8, "eval_mse": 0.2},
        {"train_runtime": 1.0},
    ]
    assert plot_learning_curve(history, tmp_path / "curve.svg").stat().st_size > 2_000
    assert plot_learning_curve([], tmp_path / "empty.png").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.svg", "empty.png", "scores.png"]
    assert np.isfinite(results["splits"]["same_type"]["methods"]["gppc"]["mse"])
