"""Real screens, from the file to folders that anyone loads: the scored figures, and the same numbers on every road."""

import json
import subprocess
import sys

import anndata
import numpy as np
import pytest

import train
from gppc.cli import main
from modeling_gppc.evaluation.screen_model import read_run

pytestmark = [pytest.mark.slow, pytest.mark.real_data]
PAPALEXI = "perturbation/papalexi2021_thp1_ko_303genes.h5ad"
# The form of the literature: training and truth subtract the same mean of controls.
SHARED = ("--mode", "fine-tuned", "--controls", "shared")
# Loads a folder as a stranger does and writes what it answers to the texts.
STRANGER = """
import json, sys
import numpy as np
from transformers import AutoFeatureExtractor, AutoModel
folder, texts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
assert not any(name.startswith("modeling_gppc.") for name in sys.modules), "the package was used"
response = model.respond(**extractor.perturbation_features(texts, model.levels().expand(len(texts), -1)))
np.savez(out, change=response.change.numpy(), variance=response.variance.numpy())
"""


@pytest.fixture(scope="module")
def folds(real_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("folds")
    words = ["--config", "screen", "--data.screen", str(real_data / PAPALEXI), "--folds", "all"]
    words += ["--screen.controls", "shared"]
    assert train.main([*words, "--training.use_cpu", "true", "--output_dir", str(out)]) == 0
    return sorted(out.glob("fold_*/model"))


def evaluate(real_data, out, file, *words):
    words = [
        "evaluate",
        "--screen",
        str(real_data / file),
        "--out",
        str(out),
        "--quiet",
        "--nothing",
        "false",
        *map(str, words),
    ]
    assert main(words) == 0
    return json.loads((out / "evaluation.json").read_text())["methods"]["gppc"]


def stranger(folder, texts, out):
    command = [sys.executable, "-I", "-c", STRANGER, str(folder), json.dumps(texts), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


def test_what_is_scored_is_what_ships(folds, real_data, tmp_path):
    found = evaluate(real_data, tmp_path / "folders", PAPALEXI, *SHARED, "--model", *folds)
    wanted = {
        "pearson_delta": 0.3646,
        "systema_pearson": 0.3695,
        "normalised_squared_error": 0.908,
        "coverage90": 0.909,
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    assert evaluate(real_data, tmp_path / "fitted", PAPALEXI, *SHARED) == found
    # One fold's answers as a stranger gets them, beside those of `gppc predict` and the pipeline.
    held_out = read_run(folds[0])["screen"]["held_out_perturbations"]
    texts = [f"{label}=ko" for label in held_out]
    alone = stranger(folds[0], texts, tmp_path / "stranger.npz")
    whole = json.loads((tmp_path / "folders" / "evaluation.json").read_text())
    assert whole["n_genes"] == alone["change"].shape[1]
    few = anndata.read_h5ad(real_data / PAPALEXI)[:3].copy()
    few.write_h5ad(tmp_path / "cells.h5ad")
    words = [str(folds[0]), str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "out.h5ad"), "--quiet"]
    for text in texts:
        words += ["--perturb", text.replace("=ko", "=delta:-0.4")]
    assert main(["predict", *words]) == 0
    predicted = anndata.read_h5ad(tmp_path / "out.h5ad")
    changed = stranger(folds[0], [text.replace("=ko", "=delta:-0.4") for text in texts], tmp_path / "changed.npz")
    for row, text in enumerate(texts):
        part = predicted[predicted.obs["perturbation"] == text.replace("=ko", "=delta:-0.4")]
        assert np.allclose(part.layers["delta"], changed["change"][row], atol=1e-6)
        assert np.allclose(part.layers["std"] ** 2, changed["variance"][row], atol=1e-6)


def test_in_context(real_data, tmp_path):
    found = evaluate(real_data, tmp_path / "papalexi", PAPALEXI, "--controls", "shared")
    assert found["pearson_delta"] == pytest.approx(0.178, abs=1e-3)
    schraivogel = "perturbation/schraivogel2020_k562_tapseq_crispri_72genes.h5ad"
    found = evaluate(real_data, tmp_path / "schraivogel", schraivogel, "--controls", "shared")
    assert found["pearson_delta"] == pytest.approx(0.305, abs=1e-3)


def test_genes_that_are_not_measured_answer(real_data, tmp_path, capsys):
    """A target that the panel lacks, a gene of the feature table that was never perturbed, and one with neither."""
    table = tmp_path / "features.tsv"
    table.write_text("gene\tterm\nIRF1\tx\nTP53\tx\nIFNGR1\tx\nSTAT1\ty\n")
    words = ["--config", "screen", "--data.screen", str(real_data / PAPALEXI), "--screen.gene_features", str(table)]
    assert train.main([*words, "--training.use_cpu", "true", "--output_dir", str(tmp_path / "run")]) == 0
    few = anndata.read_h5ad(real_data / PAPALEXI)[:3].copy()
    few.write_h5ad(tmp_path / "cells.h5ad")
    capsys.readouterr()
    base = ["predict", str(tmp_path / "run" / "model"), str(tmp_path / "cells.h5ad"), "--overwrite"]
    base += ["--out", str(tmp_path / "out.h5ad")]
    # Where leave-one-out gives features no weight, what is known of a gene never perturbed is what all have in common.
    for text, words in (("IRF1=ko", "(own response)"), ("TP53=ko", "(common response)")):
        assert main([*base, "--perturb", text]) == 0
        assert words in capsys.readouterr().out
    assert main([*base, "--perturb", "NOPE=ko"]) == 2
    assert "`NOPE` is not among the 303 measured genes" in capsys.readouterr().err
