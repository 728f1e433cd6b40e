"""The closed-form start, on pairs whose statistics are known."""

import numpy as np
import pytest
import torch
from gaussian_pairs import PAIRINGS, RANK, errors, optimum_error, pair_table, started

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.fitting.fit_linear_response import keep_network_if_it_pays


def test_start_is_the_optimum_of_gaussian_pairs_and_needs_no_cell_states():
    test = pair_table(600, seed=12)
    model = started(pair_table(6000, seed=10), pair_table(1000, seed=11), components=6)
    reached, best = errors(model, test), optimum_error(test)
    for name in PAIRINGS:
        assert reached[name] < 1.03 * best[name]
    # One state is enough for Gaussian cells, and validation says so.
    assert torch.isclose(model.model.linear_response.states.component_logits.exp().max(), torch.tensor(1.0))


def test_cell_states_are_kept_where_they_pay():
    states = np.random.default_rng(2).normal(size=(4, RANK)) * 5
    tables = [pair_table(n, seed=seed, states=states) for n, seed in ((4000, 20), (800, 21), (600, 22))]
    mixture = errors(started(*tables[:2], components=6), tables[2])
    single = errors(started(*tables[:2], components=1), tables[2])
    assert mixture["same_dataset"] < 0.9 * single["same_dataset"]
    assert mixture["same_type"] < single["same_type"]


@pytest.mark.parametrize("best, kept", [(0.9, True), (1.1, False), (1.0, False)])
def test_network_that_does_not_pay_is_switched_off(best, kept):
    config = GppcConfig(vocab_size=4, hidden_size=8, num_attention_heads=2)
    model = GppcForPerturbationPrediction(config)
    history = [
        {"eval_mse": 1.5, "eval_linear_mse": 1.0},
        {"eval_mse": best, "eval_linear_mse": 1.0},
        {"loss": 0.1},
    ]
    assert keep_network_if_it_pays(model, history) is kept
    assert model.config.use_network is kept
