"""The files for cell-eval and cell-eval2: what they hold, and what the real command lines say of them."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from tiny_screens import make_adata

from data_scripts.cells.screens import ScreenOptions, read_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.peer_files import cells_with_means, peer_metrics
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.evaluation.screen_report import sentences, write_evaluation


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A screen with batches of other levels, uneven numbers of cells, and genes that hardly a cell expresses."""
    adata = make_adata(n=25, controls=90)
    adata.obs["batch"] = np.where(np.random.default_rng(0).random(adata.n_obs) < 0.3, "b1", "b2")
    adata.X = adata.X + 0.3 * (adata.obs["batch"] == "b1").to_numpy()[:, None]
    adata.X[:, 20:] *= np.random.default_rng(1).random((adata.n_obs, 10)) < 0.03
    screen = read_screen(adata, ScreenOptions(value_kind="log"))
    options = EvaluateOptions(n_shuffles=2, divisions=1, nothing=False)
    evaluation = evaluate_screen(screen, options, progress=False)
    evaluation.predictions["gppc"].delta[2, 8] = -5.0  # a mean below zero
    return evaluation, write_evaluation(evaluation, tmp_path_factory.mktemp("peers") / "out")


def test_cells_have_the_means_given():
    cells = np.array([[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.01, 0.0]], dtype=np.float32)
    made = cells_with_means(cells, np.array([0.5, 1.0, 1.0, 0.0]), largest=1.5)
    assert made.mean(axis=0) == pytest.approx([0.5, 1.0, 1.0, 0.0])
    assert made[:, 1] == pytest.approx([0.5, 1.5]) and made[:, 0] == pytest.approx([0.5, 0.5])
    assert made[:, 2] == pytest.approx([0.25, 1.75]) and not made[:, 3].any()


def test_files_hold_all_cells_of_the_scored_genes(written):
    evaluation, folder = written
    predicted, observed = (anndata.read_h5ad(folder / f"{name}.h5ad") for name in ("predicted", "observed"))
    truth, screen = evaluation.truth, evaluation.screen
    level = screen.values[screen.cells_of("control")][:, truth.mask].mean(axis=0)
    for adata, delta in ((predicted, evaluation.predictions["gppc"].delta), (observed, truth.delta)):
        assert adata.var_names.tolist() == [s for s, kept in zip(screen.gene_symbols, truth.mask) if kept]
        assert adata.X.dtype == np.float32 and adata.X.min() >= 0 and adata.X.max() < 15
        assert (adata.obs["target"] == "non-targeting").sum() == len(screen.cells_of("control"))
        for row, label in enumerate(truth.labels):
            cells = adata[adata.obs["target"] == label]
            assert cells.n_obs == truth.n_cells[row]
            wanted = np.maximum(level + delta[row, truth.mask], 0)
            assert np.asarray(cells.X.mean(axis=0)).ravel() == pytest.approx(wanted, abs=1e-5)
    said = json.loads((folder / "evaluation.json").read_text())["files"]
    assert said["method"] == "gppc" and said["n_genes"] == 24 and said["negative_means"]["predicted.h5ad"] >= 1
    for name, values in peer_metrics(predicted, observed).items():
        assert said["metrics"][name] == pytest.approx(values.mean())
    assert any("would be below 0" in sentence for sentence in sentences(evaluation.summary))


def by_metric(path: Path, long: bool) -> dict[str, list[float]]:
    """Values of each metric in the order of the perturbations."""
    rows = sorted(csv.DictReader(path.open()), key=lambda row: row["perturbation"])
    if not long:
        return {name: [float(row[name] or "nan") for row in rows] for name in rows[0] if name != "perturbation"}
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["metric"], []).append(float(row["value"] or "nan"))
    return found


def command(name: str, folder: Path, out: Path, *words: str) -> subprocess.CompletedProcess:
    files = ["-ap", str(folder / "predicted.h5ad"), "-ar", str(folder / "observed.h5ad"), "-o", str(out)]
    program = str(Path(sys.executable).with_name(name))
    return subprocess.run([program, "run", *files, "--pert-col", "target", *words], capture_output=True, text=True)


def test_cell_eval_runs_and_agrees(written, tmp_path):
    pytest.importorskip("cell_eval")
    _, folder = written
    done = command("cell-eval", folder, tmp_path, "--control-pert", "non-targeting")
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = by_metric(tmp_path / "results.csv", long=False)
    ours = peer_metrics(*(anndata.read_h5ad(folder / f"{name}.h5ad") for name in ("predicted", "observed")))
    shared = [name for name in ours if not name.startswith("pds_")]
    assert len(shared) == 6
    for name in shared:
        assert theirs[name] == pytest.approx(ours[name].tolist(), abs=1e-3), name


def test_cell_eval2_runs_and_agrees(written, tmp_path):
    pytest.importorskip("cell_eval2")
    _, folder = written
    words = ["--preset", "vcc2026", "--input-type", "lognorm", "--no-target-genes", "--profile", "full"]
    done = command("cell-eval2", folder, tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = by_metric(tmp_path / "results.csv", long=True)
    ours = peer_metrics(*(anndata.read_h5ad(folder / f"{name}.h5ad") for name in ("predicted", "observed")))
    names = {"delta_pearson": "pearson_delta", "delta_mse": "mse_delta", "delta_mae": "mae_delta"}
    names |= {f"pds_{distance}": f"pds_{distance}" for distance in ("l1", "l2", "cosine")}
    for name, own in names.items():
        assert theirs[name] == pytest.approx(ours[own].tolist(), abs=1e-3), name
