"""How familiar imposed levels are: by hand, and what follows from it."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from tiny_model import tiny_model

from modeling_gppc.familiarity_gppc import ALWAYS

GENES = 12


@pytest.fixture(params=[1, 3])
def model(request):
    """With one cell state and with several; some places of references are empty."""
    model = tiny_model(2, num_components=request.param)
    response = model.model.linear_response
    response.familiarity.logits.zero_()
    response.familiarity.logits[1, 5:] = -1e4
    response.familiarity.prior_logit.copy_(torch.tensor([0.7, -0.2]))
    response.single_share.fill_(0.4)
    response.single.component_means.zero_()
    return model


def inputs(rows: int, number: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    panels = torch.rand(2, GENES, generator=generator) < 0.8
    return {
        "input_ids": torch.arange(GENES).expand(rows, -1),
        "expression_values": torch.rand(rows, GENES, generator=generator),
        "measured_mask": panels,
        "panel_index": torch.arange(rows) % 2,
        "perturbation_ids": torch.rand(rows, GENES, generator=generator).argsort(1)[:, :number],
        "perturbation_values": torch.randn(rows, number, generator=generator),
        "pairing_ids": torch.arange(rows) // 2 % 2,
    }


def by_hand(model, batch) -> np.ndarray:
    """Kernel density over the references against the one Gaussian, row by row, in float64."""
    get = {name: tensor.double().numpy() for name, tensor in model.model.linear_response.named_buffers()}
    reference = {name.split(".")[1]: array for name, array in get.items() if name.startswith("familiarity.")}
    coupling, loadings = get["single.coupling"], get["loadings"] @ get["single_root"]
    result = []
    for row in range(len(batch["input_ids"])):
        measured = batch["measured_mask"][batch["panel_index"][row]].numpy()
        own = loadings[measured] / get["noise"][measured, None]
        covariance = np.linalg.inv(own.T @ loadings[measured] + np.eye(loadings.shape[1]))
        values = batch["expression_values"][row].double().numpy()
        mean = covariance @ own.T @ (values - get["gene_mean"])[measured]
        pairing = int(batch["pairing_ids"][row])
        apart = reference["source"][pairing] - mean
        # The spread of a difference of two such posteriors, times the width.
        width = 2 * covariance * reference["width"][pairing]
        weight = reference["logits"][pairing] - 0.5 * np.einsum("nr,rs,ns->n", apart, np.linalg.inv(width), apart)
        ids = batch["perturbation_ids"][row].numpy()
        before = values[ids] if measured[ids].all() else None
        if before is None:
            level = (
                get["gene_mean"]
                + get["loadings"]
                @ model.encode(
                    **{
                        name: batch[name]
                        for name in ("input_ids", "expression_values", "measured_mask", "panel_index")
                    }
                )
                .factors.states.mean[row]
                .double()
                .numpy()
            )
            before = np.where(measured[ids], values[ids], level[ids])
        levels = before + batch["perturbation_values"][row].double().numpy() - get["gene_mean"][ids]
        own = get["loadings"][ids]
        spread = own @ reference["covariance"] @ own.T + np.diag(get["noise"][ids])
        density = [multivariate_normal.logpdf(levels, own @ target, spread) for target in reference["target"][pairing]]
        prior = np.eye(len(mean)) - coupling[pairing] @ (np.eye(len(mean)) - covariance) @ coupling[pairing].T
        plain = multivariate_normal.logpdf(
            levels,
            loadings[ids] @ coupling[pairing] @ mean,
            loadings[ids] @ prior @ loadings[ids].T + np.diag(get["noise"][ids]),
        )
        ratio = logsumexp(weight + density) - logsumexp(weight) - plain
        result.append(1 / (1 + np.exp(-ratio - reference["prior_logit"][pairing])))
    return np.array(result)


@pytest.mark.parametrize("number", [1, 4])
@torch.no_grad()
def test_equals_the_densities_by_hand(model, number):
    # A coupling that leaves a proper covariance.
    for mixture in (model.model.linear_response.states, model.model.linear_response.single):
        mixture.coupling.mul_(0.3)
    batch = inputs(8, number)
    found = model(**batch).familiarity.numpy()
    np.testing.assert_allclose(found, by_hand(model, batch), atol=2e-5)
    assert found.std() > 0.02


@torch.no_grad()
def test_unfamiliar_levels_return_to_one_gaussian(model):
    """The prediction lies on the line from one Gaussian to the whole model, as far along it as the levels are familiar."""
    batch = inputs(6, 2)
    source = {name: batch.pop(name) for name in ("input_ids", "expression_values", "measured_mask", "panel_index")}
    encoded = model.encode(**source)
    none, whole = (model.decode(encoded, **batch, familiarity=torch.full((6,), value)) for value in (0.0, 1.0))
    own = model.decode(encoded, **batch)
    torch.testing.assert_close(
        own.logits, torch.lerp(none.logits, whole.logits, own.familiarity[:, None]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(none.logits, none.linear_response)
    assert ((whole.logits - whole.linear_response).abs().amax(1) > 0.01).all()
    share = model.model.linear_response.single_share.clone()
    model.model.linear_response.single_share.fill_(1.0)
    torch.testing.assert_close(none.linear_response, model.decode(encoded, **batch).linear_response)
    model.model.linear_response.single_share.copy_(share)


@torch.no_grad()
def test_what_changes_nothing_is_not_familiar_and_no_level_is_neither(model):
    batch = inputs(4, 2)
    batch["perturbation_values"] = torch.tensor([[0.01, 0.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    familiarity = model(**batch).familiarity
    assert (familiarity[[0, 1, 3]] == 0).all() and familiarity[2] > 0
    # With padding only, nothing was asked: prior odds.
    batch["perturbation_mask"] = torch.zeros(4, 2)
    odds = model.model.linear_response.familiarity.prior_logit[batch["pairing_ids"]]
    torch.testing.assert_close(model(**batch).familiarity, torch.sigmoid(odds))


@torch.no_grad()
def test_padding_changes_nothing(model):
    batch = inputs(5, 3)
    batch["perturbation_mask"] = torch.tensor([[1, 1, 0]] * 5)
    wanted = {**batch, **{name: batch[name][:, :2] for name in batch if name.startswith("perturbation_")}}
    torch.testing.assert_close(model(**batch).familiarity, model(**wanted).familiarity)


@torch.no_grad()
def test_without_references_everything_is_familiar(model):
    batch = inputs(4, 2)
    model.model.linear_response.familiarity.prior_logit.fill_(ALWAYS)
    assert (model(**batch).familiarity == 1).all()
    batch["perturbation_values"].zero_()
    assert (model(**batch).familiarity == 1).all()
    assert (tiny_model(2, num_references=0)(**batch).familiarity == 1).all()


def test_training_does_not_know_of_it(model):
    batch = inputs(4, 2)
    assert (model.eval()(**batch).familiarity < 1).all()
    assert (model.train()(**batch).familiarity == 1).all()
