"""The best predictors against brute force: simulation, large-sample regression; true responses against sampling."""

import numpy as np
import pytest
from known_responses import ExpectedLogValue, make_screen, true_means

from data_scripts.synthetic.best_predictor import PAIRINGS, optimum
from data_scripts.synthetic.network import SyntheticConfig, make_network, matrix_root
from data_scripts.synthetic.network_cells import sample_counts

# Two data sets, four types, and donors that matter.
LINEAR = SyntheticConfig(
    n_genes=8, n_regulators=2, n_cell_types=4, n_donors=4, n_datasets=2, donor_scale=0.8, dataset_scale=0.4, seed=2
)
COUNT = SyntheticConfig(
    form="count", n_genes=40, n_regulators=4, n_cell_types=5, n_donors=20, n_datasets=1, library_mean=300, seed=1
)


def draw_states(network, rng, n, pairing, same_donor_share, dataset=None):
    """States of pairs by following the definition, one label after the other."""
    datasets = rng.integers(0, network.config.n_datasets, n) if dataset is None else np.full(n, dataset)
    types = rng.integers(0, network.config.n_cell_types, (2, n))
    if pairing == "same_type":
        types[1] = types[0]
    donors = rng.standard_normal((2, n, len(network.regulators))) @ matrix_root(network.donor_cov).T
    shared = rng.random(n) < (same_donor_share if pairing == "same_type" else 1.0)
    donors[1, shared] = donors[0, shared]
    own = rng.standard_normal(donors.shape) @ np.linalg.cholesky(network.within_cov).T
    return network.dataset_effects[datasets] + network.type_effects[types] + donors + own


def draw_linear_pairs(network, rng, n, pairing, same_donor_share=0.5, dataset=None):
    states = draw_states(network, rng, n, pairing, same_donor_share, dataset)
    noise = rng.standard_normal((2, n, network.config.n_genes)) * network.noise
    return tuple(network.eta(states[side]) + noise[side] for side in (0, 1))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("revealed_genes", [[], [3], [1, 6]])
def test_optimum_equals_brute_force_simulation(pairing, revealed_genes):
    """Weights simulated states by the likelihood of what was seen: no algebra shared with the closed form."""
    network = make_network(LINEAR)
    rng = np.random.default_rng(0)
    share = 0.5
    source, target = draw_linear_pairs(network, rng, 4, pairing, share)
    revealed = np.full(source.shape, np.nan)
    revealed[:, revealed_genes] = target[:, revealed_genes]
    states = draw_states(network, rng, 400_000, pairing, share)
    means = [network.eta(states[side]) for side in (0, 1)]
    mean, variances = optimum(network, source, None, revealed, pairing, same_donor_share=share)
    for row in range(4):
        log_weight = -0.5 * (((source[row] - means[0]) / network.noise) ** 2).sum(axis=1)
        log_weight -= 0.5 * (((target[row] - means[1]) / network.noise)[:, revealed_genes] ** 2).sum(axis=1)
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        expected = weight @ means[1]
        variance = weight @ (means[1] - expected) ** 2 + network.noise**2
        hidden = np.isnan(revealed[row])
        error = np.sqrt(variance.max() * (weight**2).sum())
        np.testing.assert_allclose(mean[row, hidden], expected[hidden], atol=5 * error)
        np.testing.assert_allclose(variances[row, hidden], variance[hidden], rtol=8 * error)
        np.testing.assert_array_equal(mean[row, ~hidden], revealed[row, ~hidden])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_optimum_is_the_regression_line_where_everything_is_gaussian(pairing):
    config = SyntheticConfig(n_genes=12, n_regulators=3, n_cell_types=1, n_donors=4, n_datasets=1, measured_share=1.0)
    network = make_network(config)
    rng = np.random.default_rng(1)
    source, target = draw_linear_pairs(network, rng, 200_000, pairing, same_donor_share=1.0)
    design = np.column_stack([np.ones(len(source)), source, target[:, :2]])
    coefficients = np.linalg.lstsq(design, target[:, 2:], rcond=None)[0]
    revealed = np.full((50, 12), np.nan)
    revealed[:, :2] = target[:50, :2]
    predicted = optimum(network, source[:50], None, revealed, pairing, same_donor_share=1.0)[0][:, 2:]
    np.testing.assert_allclose(predicted, design[:50] @ coefficients, atol=0.05)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_no_predictor_beats_the_optimum_and_its_variance_is_its_error(pairing):
    network = make_network(SyntheticConfig(n_genes=30, n_regulators=4, n_cell_types=6, n_donors=8, n_datasets=2))
    rng = np.random.default_rng(2)
    share = network.config.n_datasets / network.config.n_donors
    fit = draw_linear_pairs(network, rng, 20_000, pairing, share, dataset=0)
    source, target = draw_linear_pairs(network, rng, 3_000, pairing, share, dataset=0)
    genes = np.flatnonzero(network.measured[0])
    hidden = genes[2:]
    revealed = np.full(source.shape, np.nan)
    revealed[:, genes[:2]] = target[:, genes[:2]]
    measured = np.tile(network.measured[0], (len(source), 1))
    best, variances = optimum(network, np.where(measured, source, 99.0), measured, revealed, pairing)
    design = [np.column_stack([np.ones(len(a)), a[:, genes], b[:, genes[:2]]]) for a, b in (fit, (source, target))]
    linear = design[1] @ np.linalg.lstsq(design[0], fit[1][:, hidden], rcond=None)[0]
    error = (target - best)[:, hidden] ** 2
    mean_error = (target - fit[1].mean(axis=0))[:, hidden] ** 2
    assert error.mean() < ((target[:, hidden] - linear) ** 2).mean() < mean_error.mean()
    assert error.mean() / variances[:, hidden].mean() == pytest.approx(1.0, abs=0.05)
    assert 1 - error.mean() / mean_error.mean() > 0.1


def test_optimum_reads_only_measured_genes_and_takes_them_in_any_order():
    network = make_network(LINEAR)
    rng = np.random.default_rng(3)
    source, target = draw_linear_pairs(network, rng, 6, "same_type", dataset=1)
    measured = np.tile(network.measured[1], (6, 1))
    revealed = np.full(source.shape, np.nan)
    revealed[:, network.regulators[0]] = target[:, network.regulators[0]]
    pairing = ["same_type", "same_dataset"] * 3
    expected, _ = optimum(network, source, measured, revealed, pairing)
    garbage = np.where(measured, source, np.nan)
    order = rng.permutation(8)
    ids = [network.gene_ids[gene] for gene in order]
    again = optimum(network, garbage[:, order], measured[:, order], revealed[:, order], pairing, gene_ids=ids)[0]
    np.testing.assert_allclose(again, expected[:, order], atol=1e-9)
    one = optimum(network, source[1:2], measured[1:2], revealed[1:2], "same_dataset")[0]
    np.testing.assert_allclose(one[0], expected[1], atol=1e-9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pairing": "same_typ"}, r"`pairing` is \['same_typ'\]; wanted 3 of same_type, same_dataset"),
        ({"source_measured": np.zeros((3, 8), bool)}, r"`source_measured` of pair 0 fits none of the 2 data sets"),
        ({"gene_ids": ["RGE1"]}, r"gene `RGE1` is not in the network"),
    ],
)
def test_bad_questions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimum(make_network(LINEAR), np.zeros((3, 8)), **arguments)


def test_there_is_none_for_counts():
    with pytest.raises(ValueError, match="known for the form `linear` only"):
        optimum(make_network(COUNT), np.zeros((1, 40)))


# ------------------------------------------------------------------------------------------------ count form
@pytest.mark.parametrize("dispersion", [0.0, 0.3])
def test_expected_log_value_equals_the_average_of_samples(dispersion):
    network = make_network(SyntheticConfig(form="count", n_genes=10, n_regulators=2, dispersion=dispersion))
    expectation = ExpectedLogValue(network, np.array([500.0, 2_000.0]))
    rng = np.random.default_rng(0)
    log_means = np.log([0.02, 0.7, 6.0, 40.0, 900.0])
    counts = sample_counts(rng, np.tile(log_means, (60_000, 1)), dispersion, network.config.dropout).toarray()
    for index, library in enumerate((500.0, 2_000.0)):
        values = np.log1p(1e4 * counts / library)
        expected = expectation(log_means, np.array(index))
        np.testing.assert_allclose(expected, values.mean(axis=0), atol=5 * values.std(axis=0).max() / 60_000**0.5)


# ------------------------------------------------------------------------------------------------ interventions
@pytest.mark.parametrize("config", [LINEAR, COUNT], ids=["linear", "count"])
@pytest.mark.parametrize("change", ["ko", ("factor", 3.0), 4.0])
def test_true_means_equal_those_of_cells(config, change):
    network = make_network(config)
    measured = network.measured[0]
    screen = make_screen(network, {"first": {"REG1": change}}, n_control=6_000, n_cells=6_000)
    values = screen.X.toarray()
    if config.form == "count":
        values = np.log1p(1e4 * values / np.maximum(values.sum(axis=1, keepdims=True), 1))
    control = screen.obs["is_control"].to_numpy()
    observed = values[~control].mean(axis=0) - values[control].mean(axis=0)
    error = np.sqrt((values[~control].var(axis=0) + values[control].var(axis=0)) / 6_000)
    means = true_means(network, {"REG1": change})
    response = means[1] - means[0]
    # The count form's log values are averaged at the nominal library; the drawn one differs by its own noise.
    slack = 0.0 if config.form == "linear" else 0.08
    assert (np.abs(response[measured] - observed) < 5 * error + slack).all()
    assert np.abs(response).max() > 0.3


def test_linear_response_is_the_total_effect_along_all_paths():
    network = make_network(SyntheticConfig(n_genes=20, n_regulators=5, coupling=1.0, seed=4))
    gene = network.regulators[0]
    control, perturbed = true_means(network, {"REG1": 6.0})
    total = np.linalg.inv(np.eye(5) - network.coupling)[:, 0]  # of the first regulator on every regulator
    np.testing.assert_allclose(perturbed - control, network.weights @ total * (6.0 - control[gene]), atol=1e-4)
