"""From the options of a run to its pairs: made once, finished after a kill, or opened."""

import shutil

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from pair_writer import write_pair_folder
from tiny_pairs import tiny_genes, tiny_rows
from tiny_runs import write_run_pairs

from data_scripts.options import from_mapping
from data_scripts.pairs import census_pairs
from data_scripts.store import local_census
from gppc.run_options import RunOptions


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Two files of 30 cells and 12 genes."""
    folder = tmp_path_factory.mktemp("cells")
    for seed, name in enumerate(("first", "second")):
        rng = np.random.default_rng(seed)
        counts = rng.poisson(2.0, (30, 12)).astype(np.float32)
        counts[:, 0] += 1
        adata = anndata.AnnData(sp.csr_matrix(counts))
        adata.var_names = [f"ENSG{index:011d}" for index in range(12)]
        adata.obs_names = [f"{name}{index}" for index in range(30)]
        adata.obs["cell_type"] = "T cell"
        adata.obs["person"] = [f"{name}{index % 2}" for index in range(30)]
        adata.write_h5ad(folder / f"{name}.h5ad")
    return folder


def options(out, **data) -> RunOptions:
    splits = {"rules": [{"by": "cell", "fractions": {"test": 0.2, "validation": 0.2}}]}
    pairs = {"panel": {"rule": "all"}, "splits": splits, "matching": {"pairs_per_cell": 2}}
    return from_mapping(RunOptions, {"output_dir": str(out), "data": data, "pairs": pairs})


def files(cells) -> list[str]:
    return [str(cells / "first.h5ad"), str(cells / "second.h5ad")]


def test_files_become_pairs_once(cells, tmp_path, monkeypatch):
    run = options(tmp_path / "run", files=files(cells), file_options={"donor_column": "person"})
    folder = run.prepare_pairs(progress=False)
    assert folder.splits == ["train", "validation", "test"] and folder.genes.num_rows == 12
    assert set(folder.split("train").column("dataset_id").to_pylist()) == {"first", "second"}
    assert set(folder.split("train").column("donor_id").to_pylist()) <= {"first0", "first1", "second0", "second1"}
    monkeypatch.setattr(local_census, "write_census", None)  # neither is called again
    monkeypatch.setattr(census_pairs, "build_shard", None)
    again = run.prepare_pairs(progress=False)
    assert again.manifest["digest"] == folder.manifest["digest"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_killed_build_is_finished(cells, tmp_path, monkeypatch, call):
    whole = options(tmp_path / "whole", files=files(cells)).prepare_pairs(progress=False)
    run = options(tmp_path / "run", files=files(cells))
    with monkeypatch.context() as patch:
        owner, name = ((local_census, "write_census"), (census_pairs, "finish"))[call - 1]

        def killed(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run.prepare_pairs(progress=False)
    resumed = run.prepare_pairs(progress=False)
    for split in whole.splits:
        assert resumed.split(split).equals(whole.split(split))


def test_finished_pairs_are_opened(tmp_path):
    pairs = write_run_pairs(tmp_path / "pairs")
    folder = options(tmp_path / "run", pairs=str(pairs)).prepare_pairs(progress=False)
    assert folder.path == pairs and not (tmp_path / "run").exists()


def test_finished_pairs_whose_splits_share_a_cell(tmp_path):
    rows = {name: tiny_rows(4, seed=seed) for seed, name in enumerate(("train", "validation", "test"))}
    write_pair_folder(tmp_path / "pairs", rows, tiny_genes(), np.ones((2, 12), dtype=bool), pairings=["same_type"])
    with pytest.raises(ValueError, match=r"`data.pairs` .*pairs: splits train and validation share soma_joinid"):
        options(tmp_path / "run", pairs=str(tmp_path / "pairs")).prepare_pairs(progress=False)


def test_linear_cells_keep_their_values(tmp_path):
    synthetic = {"form": "linear", "n_cells": 60, "n_genes": 20, "n_regulators": 4, "seed": 0}
    folder = options(tmp_path / "run", synthetic=synthetic).prepare_pairs(progress=False)
    assert folder.manifest["normalization"] == "none"
    assert (tmp_path / "run" / "cells.network.safetensors").is_file()


def test_two_files_of_one_name(cells, tmp_path):
    copies = [str(cells / "first.h5ad"), str(tmp_path / "first.h5ad")]
    with pytest.raises(ValueError, match="does not exist"):
        options(tmp_path / "run", files=copies).check_files()
    shutil.copy(*copies)
    with pytest.raises(ValueError, match="two files named 'first'"):
        options(tmp_path / "run", files=copies).check_files()
