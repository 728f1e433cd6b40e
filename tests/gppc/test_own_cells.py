"""Cells of one's own: from an AnnData file to a scored, pushable model with two commands, and scored again with a third."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from tiny_runs import FLAGS, ROOT, environment, train_module

from data_scripts.pairs.pair_folder import PairFolder
from gppc import cli
from hub_card.push import check_model
from hub_card.upload_scan import MODEL_FILES, select_files
from modeling_gppc.evaluation import score_run
from modeling_gppc.inference.loading import load_model

TINY = [part for name, value in FLAGS.items() for part in (f"--{name}", str(value))]
SPLITS = {1: "single cells, for there are too few donors", 5: "whole donors (test "}


def write_cells(path: Path, n_donors: int) -> Path:
    """Counts of 200 cells x 30 genes in two cell types, one of them rare."""
    rng = np.random.default_rng(n_donors)
    rates = rng.gamma(1.0, 2.0, (2, 30))
    types = (rng.random(200) < 0.1).astype(int)
    counts = rng.poisson(rates[types]).astype(np.float32)
    counts[:, 0] += 1
    cells = anndata.AnnData(sp.csr_matrix(counts))
    cells.var_names = [f"ENSG{index:011d}" for index in range(30)]
    cells.obs_names = [f"cell{index}" for index in range(200)]
    cells.obs["cell_type"] = np.array(["T cell", "rare cell"])[types]
    cells.obs["donor_id"] = [f"donor{index % n_donors}" for index in range(200)]
    cells.write_h5ad(path)
    return path


def is_complete(model: Path) -> bool:
    """Whether a model folder is scored, can be loaded and may be pushed."""
    files, _ = select_files(model, MODEL_FILES)
    check_model(model, files)
    load_model(model, "cpu")
    return {"results.json", "README.md", "figures/scores.png", "figures/first_prediction.png"} <= set(files)


@pytest.fixture(scope="module", params=SPLITS)
def trained(request, tmp_path_factory):
    """The run of a file with so many donors, and their number."""
    folder = tmp_path_factory.mktemp(f"donors{request.param}")
    file, store = write_cells(folder / "mine.h5ad", request.param), folder / "mine.soma"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["make-census", str(store), str(file)]) == 0
        assert train_module().main(["--pairs.query.uri", str(store), *TINY]) == 0
    return folder / "runs" / "mine", request.param


def test_a_file_becomes_a_model_that_may_be_pushed(trained):
    out, n_donors = trained
    pairs = PairFolder(out / "pairs")
    assert is_complete(out / "model")
    assert pairs.describe_splits().startswith(f"Splits by {SPLITS[n_donors]}")
    assert "\n" not in pairs.describe_splits()
    donors = [set(pairs.split(name).column("donor_id").to_pylist()) for name in pairs.splits]
    assert len(donors) == 3 and len(set.union(*donors)) == n_donors
    assert n_donors == 1 or sum(map(len, donors)) == n_donors
    assert f"| split by | {SPLITS[n_donors]}" in (out / "model" / "README.md").read_text()


def results_of(out: Path) -> dict:
    return json.loads((out / "model" / "results.json").read_text())["splits"]


def test_a_run_is_scored_again_as_it_was_and_otherwise(trained, capsys):
    out, _ = trained
    before = results_of(out)
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert cli.main(["score", str(out)]) == 0
    for name, split in results_of(out).items():
        for method, scores in split["methods"].items():
            assert scores["mse"] == pytest.approx(before[name]["methods"][method]["mse"], rel=1e-5)
    more = ["--evaluation.floors", "[mean, context_mean]", "--evaluation.splits", "[same_type]"]
    assert cli.main(["score", str(out / "model"), *more, "--evaluation.perturbation", "ENSG00000000003=x3"]) == 0
    assert {name: set(split["methods"]) for name, split in results_of(out).items()} == {
        "same_type": {"gppc", "mean", "context_mean"}
    }
    assert "First prediction: ENSG00000000003=x3" in capsys.readouterr().out
    assert "context_mean" in (out / "model" / "README.md").read_text()
    assert (out / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--evaluation.floors", "[meen]"], "`evaluation.floors` names 'meen'"),
        (["--evaluation.splits", "[mine/same_typ]"], "`evaluation.splits` names"),
        (["--evaluation.perturbation", "NOPE=ko"], "`evaluation.perturbation`"),
        (["--evaluation.max_pairs", "0"], "`evaluation.max_pairs` is 0"),
    ],
)
def test_a_wrong_option_of_scoring_leaves_the_scores(trained, flags, words, capsys):
    out, _ = trained
    before = (out / "model" / "results.json").read_text()
    assert cli.main(["score", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("gppc score: error:") and words in error
    assert (out / "model" / "results.json").read_text() == before


def test_only_a_finished_run_is_scored(trained, tmp_path, capsys):
    out, _ = trained
    for folder, words in ((tmp_path, "lacks options.json"), (tmp_path / "half", "lacks model")):
        folder.mkdir(exist_ok=True)
        if folder.name == "half":
            shutil.copy(out / "options.json", folder)
        assert cli.main(["score", str(folder)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("no such thing"), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_scoring_that_fails_leaves_the_model_and_says_how_to_go_on(error, tmp_path, monkeypatch, capsys):
    file = write_cells(tmp_path / "mine.h5ad", 1)
    monkeypatch.setattr(score_run, "score_split", lambda *_, **__: (_ for _ in ()).throw(error))
    command = [
        "--data.files",
        f"[{file}]",
        "--output_dir",
        str(tmp_path / "runs" / "mine"),
        *TINY,
        "--training.max_steps",
        "20",
    ]
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            train_module().main(command)
    else:
        assert train_module().main(command) == (2 if isinstance(error, ValueError) else 130)
    assert f"gppc score {tmp_path / 'runs' / 'mine' / 'model'}" in capsys.readouterr().err
    model = tmp_path / "runs" / "mine" / "model"
    assert "has not been scored yet" in (model / "README.md").read_text() and not (model / "results.json").exists()
    monkeypatch.undo()
    assert cli.main(["score", str(model)]) == 0
    assert is_complete(model) and "has not been scored yet" not in (model / "README.md").read_text()


def test_options_of_scoring_may_change_on_resume(trained, monkeypatch):
    out, _ = trained
    weights = (out / "model" / "model.safetensors").read_bytes()
    monkeypatch.chdir(out.parents[1])
    command = [
        "--pairs.query.uri",
        str(out.parents[1] / "mine.soma"),
        *TINY,
        "--evaluation.floors",
        "[no_change]",
        "--resume",
    ]
    assert train_module().main(command) == 0
    assert set(results_of(out)["same_type"]["methods"]) == {"gppc", "no_change"}
    assert (out / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["pbmc3k_2638x13714", "kang2018_ctrl_pbmc_8684x2511"])
def test_real_files_with_the_two_commands_of_the_readme(name, real_data, tmp_path):
    section = (ROOT / "README.md").read_text().split("## Train on your own cells")[1]
    commands = re.search(r"```bash\n(.*?)```", section, flags=re.S)[1].strip().splitlines()
    assert [command.split()[0] for command in commands] == ["gppc", "accelerate"]
    shutil.copy(real_data / "singlecell" / f"{name}.h5ad", tmp_path / "cells.h5ad")
    for command in commands:
        words = shlex.split(command, comments=True)
        module = {"gppc": "gppc.cli", "accelerate": "accelerate.commands.accelerate_cli"}[words[0]]
        arguments = [str(ROOT / word) if word == "train.py" else word for word in words[1:]]
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
    assert is_complete(tmp_path / "runs" / "cells" / "model")
    for split in results_of(tmp_path / "runs" / "cells").values():
        methods = split["methods"]
        assert methods["gppc"]["mse"] < methods[split["best_label_free_floor"]]["mse"]
