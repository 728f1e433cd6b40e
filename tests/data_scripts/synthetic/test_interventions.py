"""Responses to true interventions on a known network: what correlation gives, and where it cannot tell."""

import functools

import numpy as np
import pytest
from known_network import confounded_pairs
from known_responses import make_screen, true_means

from data_scripts.cells.screens import Screen, ScreenOptions, read_screen
from data_scripts.synthetic.network import GeneNetwork, make_network
from data_scripts.synthetic.network_config import SyntheticConfig
from modeling_gppc.evaluation.metrics import pearson_delta
from modeling_gppc.evaluation.screen_baselines import ScreenContext, covariance
from modeling_gppc.evaluation.screen_model import ScreenModel
from modeling_gppc.fitting.fit_screen import fit_screen
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions


@functools.cache
def known_screen(
    form: str, seed: int, n_control: int = 1_500, n_cells: int = 30
) -> tuple[GeneNetwork, Screen, np.ndarray, np.ndarray]:
    """Cells of a network of 100 genes, six of them regulators, each knocked out (count form) or lowered by 1.5 log units.

    Args:
        form (`str`): `"linear"` or `"count"`.
        seed (`int`): Of the network and the cells.
        n_control, n_cells (`int`, *optional*, defaults to 1,500 and 30): Control cells, and cells a perturbation.

    Returns:
        The network, the screen, the true mean responses in log value `(P, V)`, perturbations in the order of their
        labels, and the genes that are scored, bool of shape `(V,)`.
    """
    config = SyntheticConfig(
        form=form,
        n_genes=100,
        n_regulators=6,
        n_datasets=1,
        n_donors=10,
        measured_share=1.0,
        regulator_measured_share=1.0,
        library_mean=3_000.0,
        seed=seed,
    )
    network = make_network(config)
    changes = {}
    for index in network.regulators:
        name = network.gene_symbols[index]
        changes[name] = {name: "ko" if form == "count" else float(network.base[index] - 1.5)}
    options = ScreenOptions(
        value_kind="counts" if form == "count" else "log",
        batch_column="assay",
        cell_line_column="assay",
        symbol_column="feature_name",
    )
    screen = read_screen(make_screen(network, changes, n_control=n_control, n_cells=n_cells), options)
    means = [true_means(network, changes[label], n_states=1_000) for label in sorted(screen.perturbations)]
    columns = network.gene_index(screen.gene_ids)
    truth = np.stack([perturbed - control for control, perturbed in means])[:, columns]
    mask = np.ones(len(columns), dtype=bool)
    mask[screen.panel_targets] = False
    return network, screen, truth, mask


def unsized(screen, hold_targets=0.1):
    """A model of the controls that follows the change whatever its size: here the truth says that responses do."""
    model, extractor = fit_screen(screen, [], ScreenFitOptions(n_factors=10, hold_targets=hold_targets))
    model.model.linear_response.share.fill_(1.0)
    model.model.linear_response.drift.fill_(1e6)
    return ScreenModel(model, extractor)


def score(form: str, seed: int, **options) -> tuple[float, float]:
    """Mean pearson_delta of the covariance rule and of the model in context."""
    _, screen, truth, mask = known_screen(form, seed)
    context = ScreenContext.build(screen, [], sorted(screen.perturbations))
    predictions = (covariance(context), unsized(screen, **options).predict(context))
    rule, model = (float(pearson_delta(one.delta, truth, mask).mean()) for one in predictions)
    return rule, model


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_network_gives_what_covariance_gives(seed):
    rule, model = score("linear", seed, hold_targets=0.0)
    assert model == pytest.approx(rule, abs=0.03)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nonlinear_network_is_predicted_better_than_by_covariance(seed):
    rule, firm = score("count", seed, hold_targets=5.0)
    assert firm > rule + 0.03
    _, default = score("count", seed)
    assert default > rule


def test_holding_regulators_takes_confounding_away():
    """Regulators share programs; conditioning on all of them leaves what each does."""
    rule, model = score("linear", 0, hold_targets=5.0)
    assert model > rule + 0.1


def test_a_common_cause_passes_for_an_effect():
    """The named limit: two targets of one regulator correlate, neither acts on the other, and a response is predicted."""
    network, screen, *_ = known_screen("linear", 0)
    position = {gene: index for index, gene in enumerate(screen.gene_ids)}
    model = unsized(screen)
    pairs = confounded_pairs(network, 10)
    assert len(pairs) == 10
    for first, second, correlation in pairs:
        level = float(network.base[network.gene_index([first])[0]] - 1.5)
        control, perturbed = true_means(network, {first: level})
        truth = perturbed - control
        assert truth[network.gene_index([first])[0]] == pytest.approx(-1.5, abs=0.5)
        assert truth[network.gene_index([second])[0]] == pytest.approx(0, abs=1e-9)
        features = model.extractor.perturbation_features(f"{first}=delta:-1.5", model.model.levels())
        predicted = float(model.model.respond(**features).change[0, position[second]])
        assert abs(predicted) > 0.2 and np.sign(predicted) == -np.sign(correlation)
