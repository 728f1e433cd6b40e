"""The screen response by hand: linear response, size, relatives, own responses, members, and what respond adds."""

import numpy as np
import pytest
import torch
from tiny_model import response_by_hand

from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.screen_response_gppc import COMMON, CORRELATION, MEMBERS, OWN, RELATIVES

V, R, T = 8, 2, 3


@pytest.fixture
def model():
    """Three perturbations seen: gene 0, gene 9 (not measured) and genes 1 and 9 together; gene 8 was never perturbed."""
    torch.manual_seed(0)
    config = GppcConfig.from_size(
        "tiny",
        vocab_size=V,
        num_factors=R,
        num_components=1,
        num_references=0,
        use_network=False,
        use_screen_response=True,
        num_perturbations=T,
        num_members=2,
        num_targets=3,
    )
    model = GppcForPerturbationPrediction(config).eval()
    linear, part = model.model.linear_response, model.screen_response
    linear.loadings.copy_(torch.randn(V, R))
    linear.noise.copy_(torch.rand(V) + 0.5)
    linear.gene_mean.copy_(torch.rand(V) + 1)
    part.mean.copy_(torch.randn(V))
    part.votes.copy_(torch.randn(T, V))
    part.own.copy_(torch.randn(T, V))
    part.likeness[8] = torch.tensor([0.5, 0.0, 0.25])
    part.seen_targets.copy_(torch.tensor([[0, -1], [9, -1], [1, 9]]))
    part.weight.fill_(0.3)
    part.scale.fill_(0.8)
    part.variance.copy_(torch.rand(V))
    part.between.copy_(torch.rand(V))
    part.within.copy_(torch.rand(V))
    part.own_between.copy_(torch.tensor([1.5, 2.0, 1.25]))
    part.own_within.copy_(torch.tensor([0.1, 0.2, 0.3]))
    part.counted[:2] = False
    return model


def ask(model, genes, changes=None):
    ids = torch.tensor([genes])
    values = torch.tensor([changes if changes is not None else [0.0] * len(genes)], dtype=torch.float32)
    return model.respond(perturbation_ids=ids, perturbation_values=values)


@pytest.mark.parametrize("held", [(), (1,), (1, 4)])
def test_the_linear_response_is_gaussian_conditioning(model, held):
    """On the imposed change, and on held targets at no change; a target is not held while it is changed."""
    firmness = dict.fromkeys([*held, 3], 0.5)
    model.screen_response.held[[*firmness]] = 0.5
    asked = torch.tensor([[3]]), torch.tensor([[-0.7]]), torch.ones(1, 1)
    found, _, _ = model.model.linear_response.within_state(*asked, model.screen_response.held)
    assert found[0].numpy() == pytest.approx(response_by_hand(model, {3: -0.7}, firmness)["linear"], abs=1e-6)


def test_a_gene_with_relatives(model):
    part = model.screen_response
    out = ask(model, [8])
    shared = part.mean + torch.tensor([0.5, 0.0, 0.25]) @ part.votes
    assert torch.allclose(out.change[0], 0.8 * shared, atol=1e-6) and out.source.tolist() == [RELATIVES]
    assert torch.equal(out.variance[0], part.variance)
    assert torch.allclose(out.direction, torch.special.ndtr(out.change.abs() / out.variance.sqrt()))


def test_a_measured_gene_adds_the_direction_of_its_correlates(model):
    part = model.screen_response
    out = ask(model, [4], [-2.0])
    own = response_by_hand(model, {4: -2.0})["linear"]
    counted = part.counted.numpy()
    mean = part.mean.numpy()
    wanted = 0.8 * (mean + 0.3 * np.linalg.norm(mean[counted]) * own / np.linalg.norm(own[counted]))
    wanted[4] = -2.0
    assert out.change[0].numpy() == pytest.approx(wanted, abs=1e-5) and out.source.tolist() == [COMMON]
    assert out.variance[0, 4] == 0 and (out.variance[0, :4] > 0).all()


def test_what_was_seen_answers_for_itself(model):
    part = model.screen_response
    out = ask(model, [9])
    assert torch.equal(out.change[0], part.own[1]) and out.source.tolist() == [OWN]
    assert torch.allclose(out.variance[0], part.between * 2.0 + part.within * 0.2)
    # The order of the members of a combination says nothing; what is imposed is imposed.
    for genes, changes in (([1, 9], [-1.0, 0.0]), ([9, 1], [0.0, -1.0])):
        out = ask(model, genes, changes)
        assert (
            torch.equal(out.change[0, 2:], part.own[2, 2:]) and out.change[0, 1] == -1 and out.source.tolist() == [OWN]
        )


def test_members_seen_alone_add_up(model):
    part = model.screen_response
    out = ask(model, [0, 9], [-1.0, 0.0])
    assert torch.allclose(out.change[0, 1:], (part.own[0] + part.own[1])[1:]) and out.source.tolist() == [MEMBERS]
    # One that was not is expected to do what is predicted for the whole.
    whole = 0.8 * (part.mean + torch.tensor([0.5, 0.0, 0.25]) @ part.votes)
    assert torch.allclose(ask(model, [8, 9]).change[0], whole + part.own[1], atol=1e-6)


def test_nothing_perturbed_changes_nothing(model):
    out = model.respond(
        perturbation_ids=torch.zeros(1, 1, dtype=torch.long),
        perturbation_values=torch.zeros(1, 1),
        perturbation_mask=torch.zeros(1, 1),
    )
    assert not out.change.any() and not out.variance.any() and (out.direction == 0.5).all()


def test_without_perturbations_controls_answer(model):
    config = model.config.to_dict() | {"num_perturbations": 0}
    alone = GppcForPerturbationPrediction(GppcConfig(**config)).eval()
    alone.model.load_state_dict(model.model.state_dict())
    alone.screen_response.held[[1, 3]] = 0.5
    response = alone.model.linear_response
    for drift, change in ((1e6, -0.7), (0.2, -700.0)):
        response.drift.fill_(drift)
        wanted = response_by_hand(alone, {3: change}, {1: 0.5})
        out = ask(alone, [3], [change])
        for name in ("change", "variance", "direction"):
            assert out[name][0].numpy() == pytest.approx(wanted[name], rel=1e-4, abs=1e-5)
        assert out.source.tolist() == [CORRELATION]
    # However large the change, no more than the share of what populations drift.
    _, _, deviation = response.within_state(torch.tensor([[3]]), torch.ones(1, 1), torch.ones(1, 1))
    limit = 0.2 / 3 * np.linalg.norm(np.delete(deviation.numpy(), 3))
    assert np.linalg.norm(np.delete(out.change[0].numpy(), 3)) == pytest.approx(limit, rel=1e-3)


def test_chunks_padding_and_queries_change_nothing(model, monkeypatch):
    ids = torch.tensor([[0, 9], [8, 0], [4, 0], [9, 0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0]])
    values = torch.tensor([[-1.0, 5.0], [3.0, 9.0], [-2.0, 9.0], [0.0, 9.0]])
    whole = model.respond(perturbation_ids=ids, perturbation_values=values, perturbation_mask=mask)
    monkeypatch.setattr("modeling_gppc.response_gppc.CHUNK", 1)
    query = torch.tensor([5, 2])
    part = model.respond(perturbation_ids=ids, perturbation_values=values, perturbation_mask=mask, query_ids=query)
    assert torch.allclose(part.change, whole.change[:, query]) and torch.equal(part.source, whole.source)
    assert torch.allclose(whole.change[2], ask(model, [4], [-2.0]).change[0])


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = GppcForPerturbationPrediction.from_pretrained(tmp_path)
    for genes, changes in (([0, 9], [-1.0, 0.0]), ([8], [0.0]), ([4], [-2.0])):
        assert torch.equal(ask(again, genes, changes).change, ask(model, genes, changes).change)
