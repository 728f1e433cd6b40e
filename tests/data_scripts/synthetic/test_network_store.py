"""Synthetic stores: read by the official calls, equal to the cells they came from, made by one command."""

import cellxgene_census
import numpy as np
import pytest
from known_network import make_anndata

from data_scripts.command_line import read_options
from data_scripts.synthetic import network_store
from data_scripts.synthetic.network import SyntheticConfig, load_network, make_network
from data_scripts.synthetic.network_store import network_path, write_synthetic
from data_scripts.synthetic.synthetic_cli import OPTIONS
from gppc.cli import main

SMALL = {"n_genes": 30, "n_regulators": 4, "n_cell_types": 3, "n_donors": 4, "n_datasets": 2, "n_cells": 90}


@pytest.mark.parametrize("form, layer", [("linear", "log_values"), ("count", "raw")])
def test_census_reads_back_the_very_cells(tmp_path, monkeypatch, form, layer):
    monkeypatch.setattr(network_store, "PART_CHUNKS", 1)
    monkeypatch.setattr("data_scripts.synthetic.network_cells.CHUNK", 20)  # several parts a data set
    store = tmp_path / "cells"
    report, network = write_synthetic(store, SyntheticConfig(form=form, **SMALL))
    assert report.n_obs == 90
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "cells.network.safetensors"]
    with cellxgene_census.open_soma(uri=str(store)) as census:
        presence = cellxgene_census.get_presence_matrix(census, "Homo sapiens", "RNA").toarray().astype(bool)
        for dataset in range(2):
            expected = make_anndata(network, dataset)
            read = cellxgene_census.get_anndata(
                census, "Homo sapiens", X_name=layer, obs_value_filter=f"dataset_id == 'dataset{dataset + 1}'"
            )
            columns = read.var.set_index("feature_id").index.get_indexer(expected.var_names)
            np.testing.assert_array_equal(read.X[:, columns].toarray(), expected.X.toarray())
            assert read.obs["cell_type"].astype(str).tolist() == expected.obs["cell_type"].tolist()
            assert read.obs["donor_id"].astype(str).tolist() == expected.obs["donor_id"].tolist()
            assert read.var["feature_name"].iloc[columns].tolist() == expected.var["feature_name"].tolist()
            assert sorted(np.flatnonzero(presence[dataset])) == sorted(columns)
            if form == "count":
                np.testing.assert_array_equal(read.obs["raw_sum"], np.asarray(expected.X.sum(axis=1)).ravel())


def test_network_lies_beside_the_store(tmp_path):
    config = SyntheticConfig(**SMALL)
    _, network = write_synthetic(tmp_path / "cells", config)
    loaded = load_network(network_path(tmp_path / "cells"))
    assert loaded.config == config
    np.testing.assert_array_equal(loaded.weights, network.weights)
    np.testing.assert_array_equal(loaded.weights, make_network(config).weights)


def test_existing_store_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "cells").mkdir()
    monkeypatch.setattr(network_store, "make_network", lambda config: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"`store` .*cells exists already"):
        write_synthetic(tmp_path / "cells", SyntheticConfig(**SMALL))


def test_failure_leaves_no_temporary_cells(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(network_store, "write_census", fail)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic(tmp_path / "cells", SyntheticConfig(**SMALL))
    assert list(tmp_path.iterdir()) == []


def test_command_writes_store_and_network(tmp_path, capsys):
    flags = (
        "--form count --n-cells 60 --n_genes 30 --n_regulators 4 --n-cell-types 3 --n_donors 4 --n_datasets 2 --seed 7"
    )
    store = tmp_path / "cells"
    assert main(["make-synthetic", str(store), *flags.split(), "--dropout", "0.3"]) == 0
    assert "60 cells x" in capsys.readouterr().out
    config = load_network(network_path(store)).config
    assert (config.form, config.n_cells, config.n_genes, config.seed, config.dropout) == ("count", 60, 30, 7, 0.3)
    assert main(["make-synthetic", str(store), *flags.split()]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["make-synthetic", str(store), *flags.split(), "--overwrite"]) == 0


def test_config_file_then_flags(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("form: count\nn_genes: 50\nn_cells: 10\nseed: 1\n")
    where, config = read_options(["x", "--config", str(path), "--n_genes", "60", "--n-cells=30"], *OPTIONS)
    assert (where.store, config.form, config.n_genes, config.n_cells, config.seed) == ("x", "count", 60, 30, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--form", "counts"], "`form` is 'counts'"),
        (["--n_gene", "5"], "`--n_gene` is not an option; did you mean `n_genes`"),
        (["--n_genes"], "`--n_genes` has no value; wanted `--n_genes INTEGER`"),
        (["--dropout", "much"], "`dropout` is 'much'"),
        (["--n_genes", "2"], "`n_genes` is 2; wanted a number >= 3"),
    ],
)
def test_bad_flags_end_with_one_line(tmp_path, capsys, flags, message):
    assert main(["make-synthetic", str(tmp_path / "cells"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert list(tmp_path.iterdir()) == []
