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
    state = response.encode(-3 * torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), None)
    ids = torch.arange(number)[None]
    levels, mask = torch.full((1, number), level), torch.ones(1, number)
    logits, _, _ = response.condition(
        state[0], state[2], state[3], torch.zeros(1, dtype=torch.long), ids, levels, mask
    )
    return logits.exp()[0, 1]


@pytest.mark.parametrize("number", [1, 3])
def test_levels_choose_among_states_but_invent_no_transition(number):
    response = two_states(3.0)
    assert posterior(response, 3.0, number) <= RARE * math.exp(MAX_EVIDENCE) * 1.01
    # Where cells do go from one state to the other, the same levels decide.
    response.transition_logits.fill_(math.log(0.5))
    assert posterior(response, 3.0, number) > 0.97 and posterior(response, -3.0, number) < 0.03


def test_little_evidence_counts_in_full():
    response = two_states(0.3)
    response.transition_logits.fill_(math.log(0.5))
    before = posterior(response, 0.4, 1)
    response.evidence_scale.fill_(0.5)
    odds = [math.log(p / (1 - p)) for p in (before.item(), posterior(response, 0.4, 1).item())]
    assert odds[1] == pytest.approx(odds[0] / 2, rel=1e-3) and odds[0] > 0.05
