"""Cells: counts with the promised distribution, libraries, sparsity, chunks, screens."""

import numpy as np
import pytest
from known_network import make_anndata
from known_responses import make_screen
from scipy.stats import nbinom, poisson

from data_scripts.synthetic import network_cells
from data_scripts.synthetic.network import SyntheticConfig, make_network
from data_scripts.synthetic.network_cells import dataset_sizes, iterate_cells, sample_counts

CONFIG = {"n_genes": 150, "n_regulators": 6, "n_cell_types": 4, "n_donors": 6, "n_datasets": 2, "n_cells": 2_500}


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
@pytest.mark.parametrize("mean", [0.05, 1.0, 7.5, 20.0])
def test_counts_follow_the_distribution(mean, dispersion):
    n = 100_000
    counts = sample_counts(np.random.default_rng(0), np.full((n, 1), np.log(mean)), dispersion, 0.0).toarray()[:, 0]
    support = np.arange(int(counts.max()) + 1)
    if dispersion > 0:
        expected = nbinom.pmf(support, 1 / dispersion, 1 / (1 + dispersion * mean))
    else:
        expected = poisson.pmf(support, mean)
    np.testing.assert_allclose(np.bincount(counts.astype(int)) / n, expected, atol=5 * 0.5 / np.sqrt(n))


def test_dropout_removes_its_share_of_the_expressed_entries():
    counts = sample_counts(np.random.default_rng(0), np.full((500, 200), 2.0), 0.0, 0.25)
    assert counts.nnz / 100_000 == pytest.approx(0.75 * (1 - np.exp(-np.exp(2.0))), abs=0.01)


def test_count_cells_are_integers_with_the_expected_library_and_sparsity():
    network = make_network(SyntheticConfig(form="count", library_mean=400.0, **CONFIG))
    cells = make_anndata(network, 0)
    assert cells.shape == (1_250, network.measured[0].sum())
    assert (cells.X.data == np.rint(cells.X.data)).all() and cells.X.data.min() >= 1
    library = np.asarray(cells.X.sum(axis=1)).ravel()
    assert library.mean() == pytest.approx(400, rel=0.05)
    assert np.log(library).std() == pytest.approx(network.config.library_spread, rel=0.25)
    assert 0.2 < cells.X.nnz / np.prod(cells.shape) < 0.8


def test_twenty_thousand_genes_express_about_sixteen_hundred():
    config = SyntheticConfig(form="count", n_genes=20_000, n_regulators=20, n_cells=150, n_datasets=1, n_donors=4)
    values, _ = next(iterate_cells(make_network(config), 0))
    assert 1_200 < values.nnz / values.shape[0] < 2_000


@pytest.mark.parametrize("form", ["linear", "count"])
def test_same_seed_same_cells_and_data_sets_differ(form):
    first, again = (make_anndata(make_network(SyntheticConfig(form=form, **CONFIG)), 1) for _ in range(2))
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs) and first.var.equals(again.var)
    other = make_anndata(make_network(SyntheticConfig(form=form, **CONFIG)), 0)
    assert not other.var.index.equals(first.var.index)
    assert not set(other.obs["donor_id"]) & set(first.obs["donor_id"])


def test_chunks_hold_every_cell_once(monkeypatch):
    network = make_network(SyntheticConfig(**CONFIG))
    monkeypatch.setattr(network_cells, "CHUNK", 400)
    for dataset, size in enumerate(dataset_sizes(network)):
        chunks = list(iterate_cells(network, dataset))
        assert [len(obs) for _, obs in chunks] == [400, 400, 400, 50]
        assert sum(values.shape[0] for values, _ in chunks) == size
        names = [name for _, obs in chunks for name in obs.index]
        assert len(set(names)) == size


def test_data_sets_share_out_all_cells():
    network = make_network(SyntheticConfig(**{**CONFIG, "n_cells": 2_501}))
    assert dataset_sizes(network).tolist() == [1_251, 1_250]


@pytest.mark.parametrize("form", ["linear", "count"])
def test_screen_has_controls_and_perturbed_cells(form):
    network = make_network(SyntheticConfig(form=form, **CONFIG))
    screen = make_screen(
        network, {"REG1": {"REG1": "ko"}, "both": {"REG1": "ko", "REG2": 5.0}}, n_control=40, n_cells=9
    )
    assert screen.obs["perturbation"].value_counts().to_dict() == {"control": 40, "REG1": 9, "both": 9}
    assert screen.obs["is_control"].sum() == 40
    assert screen.obs_names.is_unique
    if form == "count":
        column = screen.var["feature_name"].tolist().index("REG1")
        assert screen.X[~screen.obs["is_control"].to_numpy()][:, [column]].nnz == 0
