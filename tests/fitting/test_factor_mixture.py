"""The mixture of cell states in the space of the factors."""

import numpy as np
import pytest

from modeling_gppc.fitting.factor_mixture import fit_factor_mixture, fit_mixture_coupling, fit_within_groups
from modeling_gppc.fitting.factor_model import Cells, FactorModel, fit_factor_model

GENES, RANK = 40, 3


def draw(n: int, seed: int, label: np.ndarray | None = None) -> tuple[Cells, np.ndarray]:
    """Cells of three states with known loadings, means 6 apart in the first factor; a third lack ten genes."""
    truth = np.random.default_rng(0)
    loadings = truth.normal(size=(GENES, RANK))
    means = np.array([[-6.0, 0, 0], [0, 0, 0], [6.0, 0, 0]])
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=n) if label is None else label
    factors = means[label] + rng.normal(size=(n, RANK))
    values = factors @ loadings.T + 0.5 * rng.normal(size=(n, GENES))
    panels = np.ones((2, GENES), dtype=bool)
    panels[1, :10] = False
    panel_index = (np.arange(n) % 3 == 0).astype(int)
    return Cells((values * panels[panel_index]).astype(np.float32), panel_index, panels), label


def test_states_are_found_without_labels():
    cells, label = draw(1500, seed=1)
    model = fit_factor_model(cells, n_factors=RANK, seed=0)
    mixture = fit_factor_mixture(model, cells, n_components=3)
    found = (mixture.log_likelihood(cells) + np.log(mixture.weights)).argmax(1)
    table = np.zeros((3, 3))
    np.add.at(table, (label, found), 1)
    assert table.max(axis=1).sum() / len(cells) > 0.99
    np.testing.assert_allclose(mixture.weights, 1 / 3, atol=0.05)


def test_covariance_of_the_genes_is_kept():
    cells, _ = draw(3000, seed=2)
    model = fit_factor_model(cells, n_factors=RANK, seed=0)
    mixture = fit_factor_mixture(model, cells, n_components=3)
    centre = mixture.weights @ mixture.means
    between = (mixture.weights[:, None] * (mixture.means - centre)).T @ (mixture.means - centre)
    loadings = mixture.model.loadings
    implied = loadings @ (np.eye(RANK) + between) @ loadings.T + np.diag(mixture.model.noise)
    np.testing.assert_allclose(implied, model.covariance, atol=0.05 * np.abs(model.covariance).max())


def test_one_component_is_the_factor_model():
    cells, _ = draw(200, seed=3)
    model = fit_factor_model(cells, n_factors=RANK, seed=0)
    mixture = fit_factor_mixture(model, cells, n_components=1)
    assert mixture.model is model
    np.testing.assert_array_equal(mixture.means, np.zeros((1, RANK)))


@pytest.mark.parametrize("same", [True, False])
def test_transitions_tell_whether_a_pair_shares_its_state(same):
    rng = np.random.default_rng(4)
    label = rng.integers(3, size=1500)
    cells, _ = draw(1500, seed=5, label=label)
    partner_label = label if same else rng.permutation(label)
    partners, _ = draw(1500, seed=6, label=partner_label)
    model = fit_factor_model(cells, n_factors=RANK, seed=0)
    mixture = fit_factor_mixture(model, cells, n_components=3)
    transition, coupling = fit_mixture_coupling(mixture, cells, partners)
    np.testing.assert_allclose(transition.sum(axis=1), 1)
    np.testing.assert_allclose(np.diag(transition), 0.99 if same else 1 / 3, atol=0.07)
    # Within a state the factors of the two cells were drawn independently.
    assert np.abs(coupling).max() < 0.15


def test_more_components_than_cells():
    model = FactorModel(np.zeros(GENES), np.random.default_rng(0).normal(size=(GENES, RANK)), np.ones(GENES))
    cells, _ = draw(4, seed=7)
    mixture = fit_factor_mixture(model, cells, n_components=16)
    assert 1 <= len(mixture.weights) <= 4
    assert np.isfinite(mixture.means).all()


def test_variation_within_groups_is_told_from_that_between_them():
    """Known loadings: within groups factors vary by a covariance that is not that among all cells; panels differ."""
    rng = np.random.default_rng(7)
    loadings, root = rng.normal(size=(GENES, RANK)), np.array([[0.5, 0, 0], [0.3, 1.2, 0], [0, -0.4, 0.2]])
    groups = rng.integers(6, size=4000)
    factors = 2 * rng.normal(size=(6, RANK))[groups] + rng.normal(size=(4000, RANK)) @ root.T
    panels = np.ones((2, GENES), dtype=bool)
    panels[1, :10] = False
    panel_index = np.arange(4000) % 2
    values = (factors @ loadings.T + 0.5 * rng.normal(size=(4000, GENES))) * panels[panel_index]
    cells = Cells(values.astype(np.float32), panel_index, panels)
    model = FactorModel(np.zeros(GENES), loadings, np.full(GENES, 0.25))
    np.testing.assert_allclose(fit_within_groups(model, cells, groups), root @ root.T, atol=0.06)
    assert np.trace(fit_within_groups(model, cells, 0 * groups)) > 3 * np.trace(root @ root.T)
