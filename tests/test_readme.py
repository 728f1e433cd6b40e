"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from tiny_model import SYMBOLS, tiny_model, tiny_pipeline

from gppc import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with `runs/default/model`, of twelve genes, and `cells.h5ad`."""
    tiny_pipeline().save_pretrained(tmp_path / "runs" / "default" / "model")
    counts = np.random.default_rng(0).poisson(2.0, size=(5, 12)).astype(np.float32)
    anndata.AnnData(counts, var=pd.DataFrame(index=SYMBOLS)).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_predicts_every_gene(beside):
    example = next(block for block in blocks("python") if "AutoModel" in block)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["output"].logits.shape == names["output"].logvar.shape == (5, tiny_model().config.vocab_size)
    assert torch.isfinite(names["output"].logits).all()
    response = names["response"]
    assert response.change.shape == response.expression.shape == response.direction.shape == (5, len(SYMBOLS))


def test_the_predict_command_writes_a_file(beside):
    command = next(line for block in blocks("bash") for line in block.splitlines() if line.startswith("gppc predict"))
    words = command.replace('"', "").split()[1:]
    assert cli.main(words) == 0
    predicted = anndata.read_h5ad(beside / "predicted.h5ad")
    assert predicted.n_obs == 2 * 5


def test_every_command_exists():
    named = set(re.findall(r"^gppc ([a-z-]+)", "\n".join(blocks("bash")), flags=re.M))
    assert named and named <= set(cli.COMMANDS)


def test_every_shipped_run_is_named():
    configs = Path(__file__).parents[1] / "modeling_gppc" / "training" / "configs"
    table = README.split("| `--config` |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `([a-z_]+)` \|", table, flags=re.M))
    assert named == {path.stem for path in configs.glob("*.yaml")}


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
