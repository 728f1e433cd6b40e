"""Responses carried over to other cells: what a batch gets, and that it depends on the row alone."""

import numpy as np
import pytest
import torch
from test_linear_start import GENES, PAIRINGS, pair_table, started

from data_scripts.pair_options import PerturbationOptions
from modeling_gppc.training.data_collator import IGNORED_LABEL, PairCollator
from modeling_gppc.training.pair_dataset import PairDataset
from modeling_gppc.training.transported_pairs import TransportCollator, TransportedPairs

PANELS = np.ones((1, GENES), dtype=bool)
REVEAL = PerturbationOptions(min_genes=1, max_genes=3)


@pytest.fixture(scope="module")
def model():
    return started(pair_table(1500, seed=10), pair_table(300, seed=11), components=1)


@pytest.fixture(scope="module")
def dataset():
    return PairDataset(pair_table(400, seed=12), PAIRINGS)


def make_collator(model, dataset, share=0.5, **options):
    transport = TransportedPairs(model.model.linear_response, dataset, PANELS, REVEAL, **options)
    return TransportCollator(PairCollator(PANELS, REVEAL, seed=3), transport, share)


def test_share_of_rows_gets_a_target_that_agrees_with_what_is_revealed(model, dataset):
    rows = dataset[np.arange(300)]
    plain, batch = PairCollator(PANELS, REVEAL, seed=3)(rows), make_collator(model, dataset)(rows)
    assert plain.keys() == batch.keys()
    for name in ("input_ids", "expression_values", "attention_mask", "measured_mask", "pairing_ids"):
        assert torch.equal(plain[name], batch[name]), name
    replaced = (plain["labels"] != batch["labels"]).any(1)
    assert 0.4 < replaced.float().mean() < 0.6
    # The others are untouched, and everywhere the revealed genes do not score.
    for name in ("labels", "perturbation_ids", "perturbation_values", "perturbation_mask"):
        assert torch.equal(plain[name][~replaced], batch[name][~replaced]), name
    hidden = torch.zeros_like(batch["labels"], dtype=torch.long)
    hidden.scatter_add_(1, batch["perturbation_ids"], batch["perturbation_mask"])
    assert torch.equal(batch["labels"] == IGNORED_LABEL, hidden > 0)


def test_the_response_of_the_donor_comes_over(model, dataset):
    """With a single donor the target is the donor's, moved by the difference of what the two cells let expect."""
    transport = TransportedPairs(model.model.linear_response, dataset, PANELS, REVEAL)
    donor = 6
    transport.donors = [np.array([donor]), np.array([donor + 1])]
    transport.place = [place[:1] for place in transport.place]
    rows = dataset[np.array([0, 2, 4])]  # of the first pairing
    values = dataset.dense_cells("source", rows.rows, GENES)
    got = transport(rows, values, np.arange(3))
    response = model.model.linear_response
    loadings = response.loadings.double().numpy()
    weighted = loadings / response.noise.double().numpy()[:, None]
    weights = response.coupling[0].double().numpy() @ np.linalg.inv(np.eye(loadings.shape[1]) + loadings.T @ weighted)

    def expected(cell):
        return loadings @ weights @ (weighted.T @ (cell - response.gene_mean.numpy()))

    before, after = (dataset.dense_cells(side, [donor], GENES)[0] for side in ("source", "target"))
    for row in range(3):
        wanted = after - expected(before) + expected(values[row])
        scored = got["labels"][row] != IGNORED_LABEL
        np.testing.assert_allclose(got["labels"][row][scored], wanted[scored], atol=1e-3)
        real = got["mask"][row].astype(bool)
        ids = got["ids"][row][real]
        np.testing.assert_allclose(got["changes"][row][real], (wanted - values[row])[ids], atol=1e-3)
        assert 1 <= real.sum() <= 3 and not scored[ids].any()


def test_what_a_row_gets_depends_on_the_row_alone(model, dataset):
    collate = make_collator(model, dataset)
    together = collate(dataset[np.arange(40)])
    apart = [collate(dataset[part]) for part in (np.arange(13), np.arange(13, 40))]
    for name in ("labels", "perturbation_ids", "perturbation_values", "perturbation_mask"):
        np.testing.assert_allclose(together[name], np.concatenate([part[name] for part in apart]), atol=1e-4)
    dataset.set_epoch(1)
    assert not torch.equal(collate(dataset[np.arange(40)])["labels"], together["labels"])
    dataset.set_epoch(0)


def test_narrow_widths_take_donors_like_the_cell(model, dataset):
    rows = dataset[np.arange(200)]

    def distance(width):
        transport = TransportedPairs(model.model.linear_response, dataset, PANELS, REVEAL, width=width)
        place, _ = transport._expected(*transport._cells(rows.rows))
        donors = transport._choose(rows, np.arange(200), place)
        return np.median(((place - transport._expected(*transport._cells(donors))[0]) ** 2).sum(1))

    assert distance(1e-3) < 0.5 * distance(1e3)
