"""Counts recovered from scanpy's blood cells."""

import numpy as np
import pytest
import scanpy

from data_scripts.cells.example_cells import library_cells_pbmc68k
from modeling_gppc.normalization_gppc import check_raw_counts, normalize_counts


@pytest.fixture(scope="module")
def cells():
    return library_cells_pbmc68k()


def test_counts_are_raw_and_give_back_the_shipped_values(cells):
    check_raw_counts(cells.X.data)
    assert cells.shape == (700, 765)
    assert cells.X.data.min() == 1
    again = normalize_counts(cells.X.toarray(), cells.obs["n_counts_full"].to_numpy()[:, None], target_sum=1e4)
    shipped = scanpy.datasets.pbmc68k_reduced().raw.X.toarray()
    assert ((again > 0) == (shipped > 0)).all()
    assert np.abs(np.expm1(again) - np.expm1(shipped)).max() < 0.01 * np.expm1(shipped).max()
    np.testing.assert_allclose(again, shipped, atol=2e-2)


def test_smallest_value_of_every_cell_is_one_count(cells):
    """The other way to the same counts: dividing by each cell's smallest value."""
    shipped = scanpy.datasets.pbmc68k_reduced().raw.X.tocsr()
    for row in range(0, shipped.shape[0], 35):
        values = np.expm1(shipped[row].data.astype(np.float64))
        np.testing.assert_array_equal(np.rint(values / values.min()), cells.X[row].data)


def test_obs(cells):
    assert cells.obs["cell_type"].nunique() == 10
    assert cells.obs["donor_id"].nunique() == 1
    assert sorted(cells.obs["sample"].unique()) == [f"lane{lane}" for lane in range(1, 9)]
    sums = np.asarray(cells.X.sum(axis=1)).ravel()
    assert (cells.obs["n_counts_full"].to_numpy() > sums).all()
    assert cells.obs_names.is_unique and cells.var_names.is_unique
