"""The factor model against brute force, scikit-learn and the truth."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis

from modeling_gppc.fitting.factor_model import (
    Cells,
    FactorModel,
    factor_posterior_mean,
    fit_factor_model,
    fit_pair_coupling,
    posterior_by_panel,
    predict_factor_model,
)


def make_truth(n_genes=20, rank=3, seed=0):
    generator = np.random.default_rng(seed)
    return FactorModel(
        mean=generator.normal(size=n_genes),
        loadings=generator.normal(size=(n_genes, rank)),
        noise=generator.uniform(0.3, 1.5, n_genes),
    )


def draw_pairs(truth, coupling, n, seed=1):
    generator = np.random.default_rng(seed)
    rank = truth.loadings.shape[1]
    root = np.linalg.cholesky(np.eye(rank) - coupling @ coupling.T)
    z_source = generator.normal(size=(n, rank))
    z_target = z_source @ coupling.T + generator.normal(size=(n, rank)) @ root.T
    noise = generator.normal(size=(2, n, len(truth.mean))) * np.sqrt(truth.noise)
    return [truth.mean + z @ truth.loadings.T + e for z, e in zip((z_source, z_target), noise)]


def make_coupling(rank=3, seed=2):
    left, _, right = np.linalg.svd(np.random.default_rng(seed).normal(size=(rank, rank)))
    return (left * np.linspace(0.9, 0.3, rank)) @ right


def complete(values):
    """Cells that measure all genes."""
    return Cells(values, np.zeros(len(values), int), np.ones((1, values.shape[1]), bool))


def log_likelihood(model, cells):
    """Mean log density of the measured values of a cell, from the dense covariance."""
    total = 0.0
    for panel, _, rows in cells.by_panel():
        measured = cells.panels[panel]
        total += (
            multivariate_normal(model.mean[measured], model.covariance[np.ix_(measured, measured)]).logpdf(rows).sum()
        )
    return total / len(cells)


def assert_every_pass_raises_the_likelihood(cells, last):
    found = [log_likelihood(fit_factor_model(cells, 3, n), cells) for n in (*range(1, 6), 10, 20, last)]
    assert np.all(np.diff(found) > -1e-9)


def test_equals_scikit_learn_on_complete_data():
    truth = make_truth()
    values, _ = draw_pairs(truth, make_coupling(), 2_000)
    model = fit_factor_model(complete(values), 3, n_iterations=100)
    peer = FactorAnalysis(3, tol=1e-8, max_iter=5_000, svd_method="lapack").fit(values)
    assert np.allclose(model.covariance, peer.get_covariance(), atol=1e-4)
    assert log_likelihood(model, complete(values)) == pytest.approx(peer.score(values), abs=1e-6)
    assert_every_pass_raises_the_likelihood(complete(values), 100)


def test_canonical_form():
    truth = make_truth()
    values, _ = draw_pairs(truth, make_coupling(), 500)
    model = fit_factor_model(complete(values), 3, n_iterations=5)
    information = model.loadings.T @ (model.loadings / model.noise[:, None])
    diagonal = np.diag(information)
    assert np.allclose(information, np.diag(diagonal), atol=1e-8 * diagonal.max())
    assert np.all(np.diff(diagonal) < 0)
    assert np.all(model.loadings[np.abs(model.loadings).argmax(0), np.arange(3)] > 0)


def test_missing_genes_are_missing_not_zero(monkeypatch):
    truth = make_truth()
    values, _ = draw_pairs(truth, make_coupling(), 6_000)
    panels = np.ones((3, 20), dtype=bool)
    panels[1, :8] = False
    panels[2, 12:] = False
    panels[:, 5] = False  # measured nowhere
    panel_index = np.arange(6_000) % 3
    cells = Cells(np.where(panels[panel_index], values, np.nan), panel_index, panels)
    model = fit_factor_model(cells, 3, n_iterations=60)
    assert_every_pass_raises_the_likelihood(cells, 60)
    seen = np.arange(20) != 5
    error = np.abs(model.covariance - truth.covariance)[np.ix_(seen, seen)]
    assert error.max() < 0.5 and error.mean() < 0.1
    assert np.all(model.loadings[5] == 0) and model.noise[5] == 1
    monkeypatch.setattr("modeling_gppc.fitting.factor_model.BLOCK_SIZE", 999)
    in_blocks = fit_factor_model(cells, 3, n_iterations=60)
    assert np.allclose(in_blocks.covariance, model.covariance, atol=1e-3)


def test_coupling_is_free_of_attenuation():
    # Few noisy genes: posterior means are shrunk by about a third, the estimated coupling is not.
    truth = make_truth(n_genes=8)
    truth.noise *= 4
    coupling = make_coupling()
    panels = np.ones((2, 8), dtype=bool)
    panels[1, 6:] = False
    index = np.arange(40_000) % 2
    source, target = draw_pairs(truth, coupling, 40_000)
    source, target = Cells(source, index, panels), Cells(target, 1 - index, panels)
    found = fit_pair_coupling(truth, source, target)
    assert np.abs(found - coupling).max() < 0.06
    means = [factor_posterior_mean(truth, cells) for cells in (source, target)]
    assert np.linalg.norm(means[1].T @ means[0] / len(source)) < 0.75 * np.linalg.norm(coupling)
    assert np.linalg.svd(found, compute_uv=False).max() <= 1


@pytest.mark.parametrize("n_imposed", [0, 1, 4])
def test_prediction_is_the_dense_conditional_gaussian(n_imposed):
    truth, coupling = make_truth(), make_coupling()
    source, target = draw_pairs(truth, coupling, 6)
    panels = np.ones((2, 20), dtype=bool)
    panels[1, 3:9] = False
    panel_index = np.array([0, 1, 0, 1, 0, 1])
    generator = np.random.default_rng(3)
    ids = np.stack([generator.choice(20, n_imposed, replace=False) for _ in range(6)]).reshape(6, n_imposed)
    mask = np.ones(ids.shape, dtype=bool)
    if n_imposed > 1:
        mask[::2, -1] = False
    imposed = np.take_along_axis(target, ids, axis=1)
    cells = Cells(np.where(panels[panel_index], source, np.nan), panel_index, panels)
    mean, variance = predict_factor_model(truth, coupling, cells, ids, np.where(mask, imposed, 1e9), mask)
    loadings = truth.loadings
    joint = np.block(
        [
            [truth.covariance, loadings @ coupling.T @ loadings.T],
            [loadings @ coupling @ loadings.T, truth.covariance],
        ]
    )
    joint_mean = np.concatenate([truth.mean, truth.mean])
    for row in range(6):
        known = np.concatenate([np.flatnonzero(panels[panel_index[row]]), 20 + ids[row][mask[row]]])
        seen = np.concatenate([source[row], target[row]])[known]
        # Brute force predicts a fresh measurement's shared part: the imposed gene's own noise belongs to it alone.
        cross = joint[20:, known].copy()
        for position, gene in enumerate(known):
            if gene >= 20:
                cross[gene - 20, position] -= truth.noise[gene - 20]
        solved = np.linalg.solve(joint[np.ix_(known, known)], np.column_stack([seen - joint_mean[known], cross.T]))
        assert np.allclose(mean[row], joint_mean[20:] + cross @ solved[:, 0], atol=1e-9)
        expected = np.diag(joint)[20:] - np.einsum("vk,kv->v", cross, solved[:, 1:])
        assert np.allclose(variance[row], expected, atol=1e-9)


def test_posterior_of_no_genes_is_the_prior():
    covariance, information = posterior_by_panel(make_truth(), np.zeros((1, 20), dtype=bool))
    assert np.array_equal(covariance[0], np.eye(3)) and not information.any()


def test_what_cannot_be_fitted_is_named():
    with pytest.raises(ValueError, match="`n_factors` is 5"):
        fit_factor_model(complete(np.zeros((4, 5))), 5)
    with pytest.raises(ValueError, match="holds 1 cells"):
        fit_factor_model(complete(np.zeros((1, 5))), 2)
