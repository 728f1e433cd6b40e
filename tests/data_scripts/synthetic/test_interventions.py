"""Responses to true interventions on a known network: what correlation gives, and where it cannot tell."""

import functools

import numpy as np
import pytest
from known_network import confounded_pairs

from data_scripts.synthetic.interventions import regulators_screen, true_means
from modeling_gppc.evaluation.metrics import pearson_delta
from modeling_gppc.evaluation.screen_baselines import ScreenContext, covariance
from modeling_gppc.evaluation.screen_model import ScreenModel
from modeling_gppc.fitting.fit_screen import fit_screen
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions

known_screen = functools.cache(regulators_screen)


def unsized(screen, hold_targets=0.1):
    """A model of the controls that follows the change whatever its size: here the truth says that responses do."""
    model, extractor = fit_screen(screen, [], ScreenFitOptions(n_factors=10, hold_targets=hold_targets))
    model.screen_response.share.fill_(1.0)
    model.screen_response.reach.fill_(1e6)
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
