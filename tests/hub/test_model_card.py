"""The model card: valid metadata, and every figure that of results.json."""

import copy
import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from hub_card.model_card import METRICS, add_transfer, portable, render_model_card, shown, write_model_card
from modeling_gppc.evaluation.transfer_scorecard import weights_digest

CONFIG = {"model_type": "gppc", "pairings": ["same_type", "same_dataset"]}
PREPROCESSOR = {
    "gene_ids": ["ENSG01", "ENSG02"],
    "gene_symbols": ["STAT1", "IRF1"],
    "normalization": "log1p",
    "target_sum": 10000.0,
    "organism": "homo_sapiens",
}
RESULTS = {
    "schema_version": 1,
    "splits": {
        "test": {
            "n_pairs": 1234,
            "n_genes": 765,
            "methods": {
                "gppc": {
                    "mse": 0.123456789,
                    "mse_ci95": [0.12, 0.13],
                    "r2": 0.2217,
                    "pearson_delta": 0.46,
                    "coverage90": 0.88,
                },
                "mean": {"mse": 0.2, "mse_ci95": [0.19, 0.21], "r2": 0.0, "pearson_delta": float("nan")},
                "context_mean": {
                    "mse": 0.17,
                    "mse_ci95": None,
                    "r2": 0.15,
                    "pearson_delta": None,
                    "pearson_delta_ci95": [None, None],
                    "uses_labels": True,
                },
            },
        },
        "validation": {"n_pairs": 7, "n_genes": 765, "methods": {"gppc": {"mse": 1.5, "r2": -0.1}}},
    },
}
RUN = {
    "store": "census 2025-11-08",
    "filters": "is_primary_data == True and tissue in ['lung', 'blood']",
    "cells": 700,
    "genes": 765,
    "pairs": 650,
    "seconds": 91.4,
    "flop": 1.25e12,
    "seed": 7,
    "command": "accelerate launch train.py --config a|b.yaml",
}


@pytest.fixture
def folder(tmp_path):
    for name, content in zip(
        ("config", "preprocessor_config", "results", "run"), (CONFIG, PREPROCESSOR, RESULTS, RUN), strict=True
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_metadata_are_valid_and_equal_results(folder):
    card = ModelCard.load(write_model_card(folder))
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    found = {
        (entry.dataset_split, entry.metric_name, entry.metric_type): (entry.metric_value, entry.metric_args)
        for entry in card.data.eval_results
    }
    wanted = {}
    for split, content in RESULTS["splits"].items():
        for method, scores in content["methods"].items():
            for metric, meaning in METRICS.items():
                if scores.get(metric) is not None and scores[metric] == scores[metric]:
                    name = meaning if method == "gppc" else f"{meaning} (floor: {method})"
                    interval = scores.get(f"{metric}_ci95")
                    wanted[split, name, metric] = (scores[metric], {"ci95": interval} if interval else None)
    assert found == wanted
    assert len(found) == 10  # 4 of gppc, 2 of mean and of context_mean; 2 of the other split


def test_every_figure_of_the_tables_is_that_of_results(folder):
    text = render_model_card(folder)
    scores = text.split("## Scores beside the floors")[1].split("## On real")[0]
    tables = re.split(r"\*\*(\w+)\*\* \(([\d,]+) pairs, ([\d,]+) genes\)", scores)[1:]
    seen = 0
    for split, n_pairs, n_genes, body in zip(*(tables[start::4] for start in range(4)), strict=True):
        content = RESULTS["splits"][split]
        assert (shown(content["n_pairs"]), shown(content["n_genes"])) == (n_pairs, n_genes)
        rows = {
            cells[0].strip("* ").removesuffix(" (labels)"): cells[1:]
            for cells in (line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|"))
            if cells[0] != "method" and not cells[0].startswith("---")
        }
        assert list(rows) == list(content["methods"])
        metrics = list(METRICS)[:4] if split == "test" else ["mse", "r2"]
        for method, cells in rows.items():
            for metric, cell in zip(metrics, cells, strict=True):
                wanted = content["methods"][method].get(metric)
                figures = [float(figure) for figure in re.findall(r"-?\d+\.\d+", cell)]
                if wanted is None or wanted != wanted:
                    assert cell == "-"
                    continue
                interval = content["methods"][method].get(f"{metric}_ci95") or []
                assert figures == [round(value, 4) for value in [wanted, *interval]]
                seen += len(figures)
    assert seen == 14
    assert "| context_mean (labels) |" in text and "| **gppc** |" in text


def test_facts_of_the_run_are_shown(folder):
    text = render_model_card(folder)
    for fact in ("census 2025-11-08", "| cells | 700 |", "| training pairs | 650 |", "same_type, same_dataset"):
        assert fact in text
    assert "91 s" in text and "1.25e+12" in text
    assert "a&#124;b.yaml" in text  # a pipe would break the table
    assert "$" not in text
    assert "correlation is not causation" in text.lower()
    assert "was not scored on a real perturbation screen" in text


def test_figures_are_shown_where_there_are_any(folder):
    assert "![" not in render_model_card(folder)
    (folder / "figures").mkdir()
    (folder / "figures" / "learning_curve.png").write_bytes(b"")
    assert "![learning curve](figures/learning_curve.png)" in render_model_card(folder)


EVALUATION = {
    "schema_version": 1,
    "screen": "papalexi",
    "mode": "zero-shot",
    "n_perturbations": 25,
    "n_scored_genes": 1_975,
    "subject": "gppc",
    "ceiling": {"split_half_pearson": 0.612345, "n_above_half": 9},
    "methods": {
        "context_mean": {"pearson_delta": 0.251, "pearson_delta_ci95": [0.2, 0.3], "reads_perturbed_cells": True},
        "no_change": {"pearson_delta": None, "normalised_squared_error": 1.0, "reads_perturbed_cells": False},
        "gppc": {
            "pearson_delta": 0.151234,
            "pearson_delta_ci95": [0.1, 0.2],
            "normalised_squared_error": 0.987654,
            "matched_minus_shuffled": 0.0123,
            "matched_minus_shuffled_ci95": [-0.01, 0.03],
            "l2_top_expressed": 3.0,
            "reads_perturbed_cells": False,
        },
    },
}


@pytest.fixture
def evaluation(folder):
    """Writes `evaluation.json` of the model in `folder`, changed as asked for."""
    save_file({"weight": np.ones(3)}, folder / "model.safetensors")

    def write(name="evaluation", **changes):
        found = folder.parent / name
        found.mkdir(exist_ok=True)
        content = {**copy.deepcopy(EVALUATION), "weights": [weights_digest(folder)], **changes}
        (found / "evaluation.json").write_text(json.dumps(content))
        return found

    return write


def test_every_figure_on_screens_is_that_of_the_evaluation(folder, evaluation):
    other = evaluation("other", screen="replogle")
    add_transfer(folder, [evaluation(), other])
    assert [entry["screen"] for entry in json.loads((folder / "transfer.json").read_text())["screens"]] == [
        "papalexi",
        "replogle",
    ]
    text = (folder / "README.md").read_text().split("## On real")[1].split("## Limits")[0]
    assert "was not scored" not in text
    head = "**papalexi**, zero-shot (25 perturbations, 1,975 genes; a replicate would correlate 0.6123)"
    assert head in text and head.replace("papalexi", "replogle") in text
    table = text.split(head)[1].split("**replogle**")[0].strip().splitlines()
    assert table[0].count("|") == 5  # metrics that nobody has are left out
    assert table[2:] == [
        "| **gppc** | 0.1512 [0.1000, 0.2000] | 0.9877 | 0.0123 [-0.0100, 0.0300] |",
        "| context_mean (perturbed cells) | 0.2510 [0.2000, 0.3000] | - | - |",
        "| no_change | - | 1.0000 | - |",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": ["0" * 64]}, r"scored another model \(00000000, not "),
        ({"weights": []}, "scored no model folder"),
        ({"weights": ["0" * 64, "1" * 64]}, "scored another model"),
        ({"methods": {"gppc": {}}}, "is not what `gppc evaluate` writes"),
        ({"ceiling": None}, "is not what `gppc evaluate` writes"),
    ],
)
def test_evaluations_that_are_not_of_this_model_are_refused(folder, evaluation, changes, message):
    with pytest.raises(ValueError, match=message):
        add_transfer(folder, [evaluation(**changes)])
    assert not (folder / "transfer.json").exists()


def test_other_bad_evaluations(folder, evaluation, tmp_path):
    with pytest.raises(ValueError, match=r"holds no evaluation\.json"):
        add_transfer(folder, [tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"'papalexi' [(]zero-shot[)] is given twice"):
        add_transfer(folder, [evaluation(), evaluation("again")])
    (folder / "transfer.json").write_text(json.dumps({"schema_version": 1, "splits": {}}))
    with pytest.raises(ValueError, match="--evaluation DIR"):
        render_model_card(folder)


def test_the_card_of_a_run_that_goes_on(folder):
    progress = {"step": 250, "max_steps": 3000, "eval_mse": 0.123456, "eval_linear_mse": 0.125, "eval_r2": 0.3}
    (folder / "run.json").write_text(json.dumps({**RUN, "unfinished": progress}))
    (folder / "results.json").unlink()
    card = ModelCard.load(write_model_card(folder))
    assert card.data.eval_results is None and card.data.license == "apache-2.0"
    assert "this is step 250 of 3,000" in card.text and "0.1235 (linear response alone 0.1250)" in card.text
    (folder / "run.json").write_text(json.dumps({**RUN, "unfinished": {"step": 1, "max_steps": 2}}))
    assert "Last validation" not in render_model_card(folder)


@pytest.mark.parametrize("key", ["store", "filters", "cells", "genes", "seconds", "flop", "seed", "command"])
def test_a_missing_fact_is_named(folder, key):
    run = {name: value for name, value in RUN.items() if name != key}
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=f"`run.json` lacks `{key}`"):
        write_model_card(folder)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("results", {"schema_version": 2}, "schema_version"),
        ("results", {"splits": {}}, "splits"),
        ("results", {"splits": {"test": {"n_pairs": 1, "n_genes": 1}}}, "lacks `methods`"),
    ],
)
def test_malformed_facts_are_refused(folder, file, change, message):
    content = copy.deepcopy(json.loads((folder / f"{file}.json").read_text())) | change
    (folder / f"{file}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        render_model_card(folder)


@pytest.mark.parametrize("name", ["config", "preprocessor_config", "results", "run"])
def test_missing_and_broken_files_are_named(folder, name):
    (folder / f"{name}.json").write_text("{")
    with pytest.raises(ValueError, match=f"`{name}.json` .* not valid JSON"):
        render_model_card(folder)
    (folder / f"{name}.json").unlink()
    if name == "results":
        assert "has not been scored yet" in render_model_card(folder)
        return
    with pytest.raises(ValueError, match=f"no `{name}.json`"):
        render_model_card(folder)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/some/where/store.soma", "store.soma"),
        ("file:///some/where/store.soma", "store.soma"),
        ("train.py --pairs /some/where/pairs --out=/a/b/", "train.py --pairs pairs --out=."),
        ("s3://bucket/census/2025-11-08", "s3://bucket/census/2025-11-08"),
        ("configs/pbmc.yaml", "configs/pbmc.yaml"),
        ("cells/s and 1 / 2", "cells/s and 1 / 2"),
    ],
)
def test_absolute_paths_do_not_reach_the_card(text, wanted):
    assert portable(text) == wanted
