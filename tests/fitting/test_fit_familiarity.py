"""References of a closed-form start, and how near they have to be."""

import numpy as np
import pytest
import torch
from gaussian_pairs import GENES, PAIRINGS, pair_table, started

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from modeling_gppc.fitting.fit_familiarity import COMPANY, REFERENCE_WIDTHS, choose_width

PANELS = np.ones((1, GENES), dtype=bool)
STATES = np.array([[3.0, 0, 0], [-3.0, 0, 0]])


@pytest.fixture(scope="module")
def tables():
    return pair_table(1_500, 2, STATES), pair_table(400, 3, STATES)


@pytest.fixture(scope="module", params=[1, 3])
def model(request, tables):
    return started(*tables, request.param)


def test_references_are_pairs_as_the_single_gaussian_sees_them(model, tables):
    response = model.model.linear_response
    reference, root = response.familiarity, response.single_root.double().numpy()
    loadings = response.loadings.double().numpy() @ root
    weighted = loadings / response.noise.double().numpy()[:, None]
    covariance = np.linalg.inv(weighted.T @ loadings + np.eye(3))
    np.testing.assert_allclose(reference.covariance, root @ covariance @ root.T, atol=1e-4)
    dataset = PairDataset(tables[0], PAIRINGS)
    for pairing in (0, 1):
        rows = np.flatnonzero(dataset.pairing_ids == pairing)
        both = [
            (dataset.dense_cells(side, rows, GENES) - response.gene_mean.numpy()) @ weighted @ covariance
            for side in ("source", "target")
        ]
        kept = reference.logits[pairing].numpy() == 0
        assert kept.sum() == min(len(rows), model.config.num_references) > 700
        found = np.concatenate([reference.source[pairing], reference.target[pairing]], 1)[kept]
        wanted = np.concatenate([both[0], both[1] @ root.T], axis=1)
        # Each is one of the pairs, source and target together, and none twice.
        distance = ((found[:, None] - wanted[None]) ** 2).sum(-1)
        assert distance.min(axis=1).max() < 1e-3
        assert len(np.unique(distance.argmin(axis=1))) == kept.sum()


def test_the_least_width_with_company_is_taken(model, tables):
    reference, validation = model.model.linear_response.familiarity, PairDataset(tables[1], PAIRINGS)
    rows = np.arange(len(validation))

    def company(width: float) -> np.ndarray:
        reference.width.fill_(width)
        batch = PairCollator(PANELS)(validation[rows])
        names = ("input_ids", "expression_values", "attention_mask", "measured_mask", "panel_index")
        weights = model.encode(**{name: batch[name] for name in names}).factors.reference_weights.exp().numpy()
        return np.median(1 / (weights**2).sum(-1).reshape(-1, len(PAIRINGS)), axis=0)

    wanted = []
    for pairing in (0, 1):
        enough = [width for width in REFERENCE_WIDTHS if company(width)[pairing] >= COMPANY]
        wanted.append(enough[0] if enough else REFERENCE_WIDTHS[-1])
    choose_width(model, validation, PANELS, rows)
    assert reference.width.tolist() == wanted


@torch.no_grad()
def test_levels_of_another_state_are_unfamiliar_to_cells_that_stay_in_theirs(tables):
    """Partners of one type share their state: a gene that tells the states apart cannot take the other's level."""
    model = started(*tables, 3).eval()
    validation = PairDataset(tables[1], PAIRINGS)
    rows = np.flatnonzero(validation.pairing_ids == 0)
    gene = int(model.model.linear_response.loadings.abs().sum(1).argmax())
    source, target = (validation.dense_cells(side, rows, GENES) for side in ("source", "target"))

    def familiarity(level: np.ndarray) -> np.ndarray:
        return model(
            input_ids=torch.arange(GENES).expand(len(rows), -1),
            expression_values=torch.from_numpy(source),
            measured_mask=torch.ones(1, GENES, dtype=torch.bool),
            panel_index=torch.zeros(len(rows), dtype=torch.long),
            perturbation_ids=torch.full((len(rows), 1), gene),
            perturbation_values=torch.from_numpy((level - source[:, gene])[:, None]),
            pairing_ids=torch.zeros(len(rows), dtype=torch.long),
        ).familiarity.numpy()

    own = familiarity(target[:, gene])
    middle = target[:, gene].mean()
    other = familiarity(2 * middle - target[:, gene])
    assert np.median(own) > 0.7 and np.median(other) < 0.4 * np.median(own)
