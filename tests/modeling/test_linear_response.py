"""The closed-form linear response by itself: what levels can and cannot say about the state of the target."""

import math

import pytest
import torch

from modeling_gppc import GppcConfig
from modeling_gppc.linear_response_gppc import MAX_EVIDENCE, GppcLinearResponse

RARE = 1e-5


def two_states(scale: float) -> GppcLinearResponse:
    """One factor, two far states that a cell hardly ever changes between, three genes that tell them apart."""
    response = GppcLinearResponse(GppcConfig(vocab_size=3, num_factors=1, num_components=2, pairings=["same_type"]))
    response.loadings.fill_(1.0)
    response.noise.fill_(0.1)
    response.component_means.copy_(torch.tensor([[-scale], [scale]]))
    response.component_logits.fill_(math.log(0.5))
    response.transition_logits.copy_(torch.tensor([[[1 - RARE, RARE], [RARE, 1 - RARE]]]).log())
    return response


def posterior(response: GppcLinearResponse, level: float, number: int) -> torch.Tensor:
    """Probability of the second state for a cell of the first one, a few genes imposed."""
    state = response.encode(-3 * torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), None)[:4]
    ids = torch.arange(number)[None]
    levels, mask = torch.full((1, number), level), torch.ones(1, number)
    logits, *_ = response.condition(state[0], state[2], state[3], torch.zeros(1, dtype=torch.long), ids, levels, mask)
    return logits.exp()[0, 1]


@pytest.mark.parametrize("number", [1, 3])
def test_levels_choose_among_states_but_invent_no_transition(number):
    response = two_states(3.0)
    assert posterior(response, 3.0, number) <= RARE * math.exp(MAX_EVIDENCE) * 1.01
    # Where cells do go from one state to the other, the same levels decide.
    response.transition_logits.fill_(math.log(0.5))
    assert posterior(response, 3.0, number) > 0.97 and posterior(response, -3.0, number) < 0.03


def random_response(components: int, share: float, seed: int = 0) -> GppcLinearResponse:
    generator = torch.Generator().manual_seed(seed)
    config = GppcConfig(vocab_size=9, num_factors=3, num_components=components, pairings=["same_type", "same_dataset"])
    response = GppcLinearResponse(config)
    for name in ("gene_mean", "loadings", "component_means", "component_logits", "transition_logits", "plain_root"):
        buffer = getattr(response, name)
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    response.noise.copy_(0.5 + torch.rand(9, generator=generator))
    coupling = 0.2 * torch.randn(2, 3, 3, generator=generator)
    response.coupling.copy_(coupling)
    response.plain_coupling.copy_(0.7 * coupling)
    response.plain_share.fill_(share)
    return response


def answer(response: GppcLinearResponse, number: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of every gene for five cells of two panels and both pairings."""
    generator = torch.Generator().manual_seed(seed)
    panels = torch.rand(2, 9, generator=generator) < 0.8
    index = torch.tensor([0, 1, 1, 0, 1])
    centred = torch.randn(5, 9, generator=generator) * panels[index]
    logits, _, residual, covariance, *plain = response.encode(centred, panels, index)
    ids = torch.rand(5, 9, generator=generator).argsort(1)[:, :number]
    levels, mask = torch.randn(5, number, generator=generator), torch.ones(5, number)
    pairing = torch.tensor([0, 1, 0, 1, 1])
    _, mean, spread, *_ = response.condition(logits, residual, covariance, pairing, ids, levels, mask, None, *plain)
    return response.gene_mean + mean @ response.loadings.T, torch.einsum(
        "vr,brs,vs->bv", response.loadings, spread, response.loadings
    )


@pytest.mark.parametrize("number", [0, 1, 4])
def test_the_plain_gaussian_is_a_response_with_one_state(number):
    response, single = random_response(4, share=1.0), random_response(1, share=0.0)
    single.gene_mean.copy_(response.gene_mean)
    single.noise.copy_(response.noise)
    single.loadings.copy_(response.loadings @ response.plain_root)
    single.component_means.zero_()
    single.coupling.copy_(response.plain_coupling)
    for got, wanted in zip(answer(response, number), answer(single, number)):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


def test_the_average_has_the_mean_and_the_spread_of_both():
    states, plain, both = (answer(random_response(4, share=share), 2) for share in (0.0, 1.0, 0.25))
    torch.testing.assert_close(both[0], 0.75 * states[0] + 0.25 * plain[0], atol=1e-5, rtol=1e-5)
    apart = (states[0] - plain[0]).square()
    wanted = 0.75 * states[1] + 0.25 * plain[1] + 0.75 * 0.25 * apart
    torch.testing.assert_close(both[1], wanted, atol=1e-5, rtol=1e-4)


def test_little_evidence_counts_in_full():
    response = two_states(0.3)
    response.transition_logits.fill_(math.log(0.5))
    before = posterior(response, 0.4, 1)
    response.evidence_scale.fill_(0.5)
    odds = [math.log(p / (1 - p)) for p in (before.item(), posterior(response, 0.4, 1).item())]
    assert odds[1] == pytest.approx(odds[0] / 2, rel=1e-3) and odds[0] > 0.05
