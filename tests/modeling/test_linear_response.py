"""The closed-form linear response by itself: what levels can and cannot say about the state of the target."""

import math

import pytest
import torch

from modeling_gppc import GppcConfig
from modeling_gppc.factors_gppc import MAX_EVIDENCE, GppcFactorDistribution, GppcPerturbation
from modeling_gppc.linear_response_gppc import GppcLinearResponse

RARE = 1e-5


def two_states(scale: float) -> GppcLinearResponse:
    """One factor, two far states that a cell hardly ever changes between, three genes that tell them apart."""
    response = GppcLinearResponse(GppcConfig(vocab_size=3, num_factors=1, num_components=2, pairings=["same_type"]))
    response.loadings.fill_(1.0)
    response.noise.fill_(0.1)
    response.states.component_means.copy_(torch.tensor([[-scale], [scale]]))
    response.states.component_logits.fill_(math.log(0.5))
    response.states.transition_logits.copy_(torch.tensor([[[1 - RARE, RARE], [RARE, 1 - RARE]]]).log())
    return response


def imposed(ids: torch.Tensor, levels: torch.Tensor, pairing_ids: torch.Tensor) -> GppcPerturbation:
    """One row a cell, no padding."""
    return GppcPerturbation(torch.arange(len(ids)), pairing_ids, ids, levels, torch.ones_like(levels), levels)


def posterior(response: GppcLinearResponse, level: float, number: int) -> torch.Tensor:
    """Probability of the second state for a cell of the first one, a few genes imposed."""
    source = response.encode(-3 * torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))
    levels = torch.full((1, number), level)
    target = response.condition(source, imposed(torch.arange(number)[None], levels, torch.zeros(1, dtype=torch.long)))
    return target.log_weights.exp()[0, 1]


@pytest.mark.parametrize("number", [1, 3])
def test_levels_choose_among_states_but_invent_no_transition(number):
    response = two_states(3.0)
    assert posterior(response, 3.0, number) <= RARE * math.exp(MAX_EVIDENCE) * 1.01
    # Where cells do go from one state to the other, the same levels decide.
    response.states.transition_logits.fill_(math.log(0.5))
    assert posterior(response, 3.0, number) > 0.97 and posterior(response, -3.0, number) < 0.03


def random_response(components: int, share: float, seed: int = 0) -> GppcLinearResponse:
    generator = torch.Generator().manual_seed(seed)
    config = GppcConfig(vocab_size=9, num_factors=3, num_components=components, pairings=["same_type", "same_dataset"])
    response = GppcLinearResponse(config)
    for part, names in (
        (response, ("gene_mean", "loadings", "single_root")),
        (response.states, ("component_means", "component_logits", "transition_logits")),
    ):
        for name in names:
            buffer = getattr(part, name)
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    response.noise.copy_(0.5 + torch.rand(9, generator=generator))
    coupling = 0.2 * torch.randn(2, 3, 3, generator=generator)
    response.states.coupling.copy_(coupling)
    response.single.coupling.copy_(0.7 * coupling)
    response.single_share.fill_(share)
    return response


def answer(response: GppcLinearResponse, number: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every gene for five cells of two panels and both pairings."""
    generator = torch.Generator().manual_seed(seed)
    panels = torch.rand(2, 9, generator=generator) < 0.8
    index = torch.tensor([0, 1, 1, 0, 1])
    centred = torch.randn(5, 9, generator=generator) * panels[index]
    source = response.encode(centred, panels, index)
    ids = torch.rand(5, 9, generator=generator).argsort(1)[:, :number]
    levels, pairing_ids = torch.randn(5, number, generator=generator), torch.tensor([0, 1, 0, 1, 1])
    factors = response.condition(source, imposed(ids, levels, pairing_ids)).factors
    return response.expected(factors), response.variance(factors)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_the_single_gaussian_is_a_response_with_one_state(number):
    response, other = random_response(4, share=1.0), random_response(1, share=0.0)
    other.gene_mean.copy_(response.gene_mean)
    other.noise.copy_(response.noise)
    other.loadings.copy_(response.loadings @ response.single_root)
    other.states.component_means.zero_()
    other.states.coupling.copy_(response.single.coupling)
    for got, wanted in zip(answer(response, number), answer(other, number)):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_variances_are_of_loadings_and_noise(rows):
    """For few rows and for many, which are computed in another order."""
    response, generator = random_response(2, share=0.5), torch.Generator().manual_seed(2)
    root = torch.randn(rows, 3, 3, generator=generator)
    factors = GppcFactorDistribution(torch.zeros(rows, 1), torch.zeros(rows, 1, 3), root @ root.mT)
    wanted = response.noise + torch.einsum("vr,brs,vs->bv", response.loadings, factors.covariance, response.loadings)
    torch.testing.assert_close(response.variance(factors), wanted, atol=1e-5, rtol=1e-5)
    query = torch.tensor([4, 4, 0])
    torch.testing.assert_close(response.variance(factors, query), wanted[:, query], atol=1e-5, rtol=1e-5)


def test_the_average_has_the_mean_and_the_spread_of_both():
    states, single, both = (answer(random_response(4, share=share), 2) for share in (0.0, 1.0, 0.25))
    torch.testing.assert_close(both[0], 0.75 * states[0] + 0.25 * single[0], atol=1e-5, rtol=1e-5)
    apart = (states[0] - single[0]).square()
    wanted = 0.75 * states[1] + 0.25 * single[1] + 0.75 * 0.25 * apart
    torch.testing.assert_close(both[1], wanted, atol=1e-5, rtol=1e-4)


def test_little_evidence_counts_in_full():
    response = two_states(0.3)
    response.states.transition_logits.fill_(math.log(0.5))
    before = posterior(response, 0.4, 1)
    response.states.evidence_scale.fill_(0.5)
    odds = [math.log(p / (1 - p)) for p in (before.item(), posterior(response, 0.4, 1).item())]
    assert odds[1] == pytest.approx(odds[0] / 2, rel=1e-3) and odds[0] > 0.05
