"""GppcForPerturbationPrediction: the invariants of its inputs, the exact linear response, loss and loading."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from tiny_model import GENES, SIZES, tiny_model

from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.factors_gppc import MAX_EVIDENCE
from modeling_gppc.familiarity_gppc import ALWAYS
from modeling_gppc.fitting.factor_model import Cells, FactorModel, predict_factor_model
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.outputs_gppc import GppcOutput

V = len(GENES)
seeds = st.integers(0, 2**31 - 1)
PROPERTY = settings(max_examples=25)


def random_model(seed=0, **options):
    """Non-zero weights everywhere and a linear response that is a proper distribution."""
    model = tiny_model(seed, **{"num_components": 3, **options})
    generator = torch.Generator().manual_seed(seed + 1)
    response = model.model.linear_response
    response.gene_mean.copy_(torch.rand(V, generator=generator))
    response.loadings.copy_(0.7 * torch.randn(response.loadings.shape, generator=generator))
    response.noise.copy_(0.3 + 1.2 * torch.rand(V, generator=generator))
    states, single = response.states, response.single
    left, _, right = torch.linalg.svd(torch.randn(states.coupling.shape, generator=generator))
    states.coupling.copy_((left * torch.linspace(0.95, 0.2, left.shape[-1])) @ right)
    for name in ("component_means", "component_logits", "transition_logits"):
        buffer = getattr(states, name)
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    states.evidence_scale.copy_(0.3 + 0.7 * torch.rand(states.evidence_scale.shape, generator=generator))
    response.single_root.copy_(0.6 * torch.randn(response.single_root.shape, generator=generator))
    single.component_means.zero_()
    single.coupling.copy_(0.9 * states.coupling)
    response.single_share.fill_(0.4)
    return model


MODEL = random_model()
OUTPUTS = ("logits", "logvar", "linear_response")
STATE = ("input_ids", "expression_values", "attention_mask", "measured_mask", "panel_index")


def random_inputs(seed, batch=3, tokens=6, perturbations=3):
    """Padded cells: `tokens` expressed genes at most, about a quarter of the genes unmeasured."""
    rng = np.random.default_rng(seed)
    measured = rng.random((batch, V)) < 0.75
    measured[:, 0] = True
    ids, values, mask = np.zeros((batch, tokens), int), np.zeros((batch, tokens)), np.zeros((batch, tokens), int)
    for row in range(batch):
        n = rng.integers(0, min(tokens, measured[row].sum()) + 1)
        ids[row, :n] = rng.permutation(np.flatnonzero(measured[row]))[:n]
        values[row, :n], mask[row, :n] = rng.uniform(0.2, 3.0, n), 1
    order = np.argsort(rng.random((batch, V)), axis=1)[:, :perturbations]
    revealed = np.arange(perturbations)[None] < rng.integers(0, perturbations + 1, batch)[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "expression_values": torch.from_numpy(values).float(),
        "attention_mask": torch.from_numpy(mask),
        "measured_mask": torch.from_numpy(measured),
        "perturbation_ids": torch.from_numpy(np.where(revealed, order, 0)),
        "perturbation_values": torch.from_numpy(np.where(revealed, rng.normal(size=order.shape), 0)).float(),
        "perturbation_mask": torch.from_numpy(revealed.astype(int)),
        "pairing_ids": torch.from_numpy(rng.integers(0, 2, batch)),
    }


@torch.no_grad()
def run(inputs, model=MODEL, **more):
    return model(**inputs, **more)


@torch.no_grad()
def rounding(inputs, model=MODEL):
    """What float32 may cost a prediction: ten roundings of its largest number, times the condition of the matrices that
    are solved with, the posterior covariance of the factors and the covariance of the imposed levels."""
    encoded = model.encode(**{name: inputs[name] for name in STATE if name in inputs})
    asked = {name: tensor for name, tensor in inputs.items() if name not in STATE}
    perturbation, response = model.model.perturbation(encoded, **asked), model.model.linear_response
    design = response.loadings[perturbation.ids] * perturbation.mask[:, :, None]
    noise = torch.where(perturbation.mask.bool(), response.noise[perturbation.ids], 1.0)
    matrices = encoded.factors.states.covariance, design @ design.mT + torch.diag_embed(noise)
    condition = sum(float(torch.linalg.cond(matrix).max()) for matrix in matrices)
    numbers = encoded.state_values, perturbation.levels, model.decode(encoded, **asked).logits
    size = max(float(tensor.abs().max()) for tensor in numbers)
    return 10 * torch.finfo(torch.float32).eps * size * condition


def assert_close(left, right, atol, columns=slice(None)):
    for name in OUTPUTS:
        torch.testing.assert_close(
            left[name], right[name][:, columns], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_bits(left, right):
    for name in ("logits", "logvar", "linear_response", "encoder_last_hidden_state", "decoder_last_hidden_state"):
        assert torch.equal(left[name], right[name]), name
    assert torch.isfinite(left.logits).all()


def column_rows(array, order):
    """Reorders columns, row by row."""
    return array.gather(1, order)


# --- Invariant 1: unmeasured genes and padding may hold anything -----------------------------------------------------


def with_garbage(inputs, garbage):
    """Adds tokens, real ones and not padding, of genes that the mask calls unmeasured."""
    extra = [torch.nonzero(~row)[:2, 0] for row in inputs["measured_mask"]]
    shape = (len(extra), max(map(len, extra)))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, genes in enumerate(extra):
        ids[row, : len(genes)], mask[row, : len(genes)] = genes, 1
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], ids], dim=1),
        "expression_values": torch.cat([inputs["expression_values"], torch.full(shape, garbage)], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], mask], dim=1),
    }


@PROPERTY
@given(seeds, st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, -7.0]))
def test_garbage_in_unmeasured_genes_changes_no_bit(seed, garbage):
    inputs = random_inputs(seed)
    assert_same_bits(run(inputs), run(with_garbage(inputs, garbage)))


@PROPERTY
@given(seeds, st.sampled_from([float("nan"), float("inf"), 1e30]), st.integers(0, V - 1))
def test_garbage_in_padding_changes_no_bit(seed, garbage, gene):
    inputs = random_inputs(seed)
    spoilt = dict(inputs)
    for ids, values, mask in (
        ("input_ids", "expression_values", "attention_mask"),
        ("perturbation_ids", "perturbation_values", "perturbation_mask"),
    ):
        padding = inputs[mask] == 0
        spoilt[ids] = inputs[ids].masked_fill(padding, gene)
        spoilt[values] = inputs[values].masked_fill(padding, garbage)
    assert_same_bits(run(inputs), run(spoilt))


def test_a_measured_zero_is_not_an_unmeasured_gene():
    inputs = random_inputs(0)
    gene = int(torch.nonzero(~inputs["measured_mask"][0])[0, 0])
    known = inputs["measured_mask"].clone()
    known[0, gene] = True
    change = (run(inputs).logits - run({**inputs, "measured_mask": known}).logits).abs()
    assert change[0].max() > 1e-4
    assert change[1:].max() == 0


def test_gradients_survive_garbage():
    inputs = random_inputs(1)
    model = random_model()
    padding = inputs["attention_mask"] == 0
    inputs["expression_values"] = inputs["expression_values"].masked_fill(padding, float("nan"))
    padding = inputs["perturbation_mask"] == 0
    inputs["perturbation_values"] = inputs["perturbation_values"].masked_fill(padding, float("nan"))
    model(**inputs, labels=torch.zeros(3, V)).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


# --- Invariants 2 to 4: order, padding, batch, queries ---------------------------------------------------------------


@PROPERTY
@given(seeds, seeds)
def test_the_order_of_tokens_perturbations_and_queries_does_not_matter(seed, other):
    inputs = random_inputs(seed)
    generator = torch.Generator().manual_seed(other)
    shuffled = dict(inputs)
    for names in (
        ("input_ids", "expression_values", "attention_mask"),
        ("perturbation_ids", "perturbation_values", "perturbation_mask"),
    ):
        order = torch.rand(inputs[names[0]].shape, generator=generator).argsort(dim=1)
        shuffled.update({name: column_rows(inputs[name], order) for name in names})
    assert_close(run(shuffled), run(inputs), rounding(inputs))
    queries = torch.randperm(V, generator=generator)
    assert_close(run(inputs, query_ids=queries), run(inputs), rounding(inputs), queries)


@PROPERTY
@given(seeds, st.integers(0, 4), st.integers(0, 4))
def test_padding_does_not_matter(seed, tokens, perturbations):
    inputs = random_inputs(seed)
    padded = dict(inputs)
    for width, names in (
        (tokens, ("input_ids", "expression_values", "attention_mask")),
        (perturbations, ("perturbation_ids", "perturbation_values", "perturbation_mask")),
    ):
        padded.update({name: torch.nn.functional.pad(inputs[name], (0, width)) for name in names})
    assert_close(run(inputs), run(padded), rounding(inputs))


@PROPERTY
@given(seeds)
def test_batch_mates_do_not_matter(seed):
    inputs = random_inputs(seed, batch=5)
    whole = run(inputs)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3]
    part = run({name: tensor[order] for name, tensor in inputs.items()})
    assert_close(part, {name: whole[name][order] for name in OUTPUTS}, rounding(inputs))


@PROPERTY
@given(seeds, st.lists(st.integers(0, V - 1), min_size=1, max_size=V))
def test_a_gene_does_not_depend_on_the_other_queries(seed, genes):
    inputs = random_inputs(seed)
    assert_close(run(inputs, query_ids=torch.tensor(genes)), run(inputs), rounding(inputs), genes)


@PROPERTY
@given(seeds)
def test_panels_say_what_masks_say(seed):
    inputs = random_inputs(seed, batch=2)
    masks = inputs.pop("measured_mask")
    inputs = {name: tensor[[0, 1, 0, 1, 1]] for name, tensor in inputs.items()}
    index = torch.tensor([0, 1, 0, 1, 1])
    by_mask = {**inputs, "measured_mask": masks[index]}
    assert_close(run(inputs, measured_mask=masks, panel_index=index), run(by_mask), rounding(by_mask))


def test_without_a_mask_the_tokens_are_what_is_measured():
    inputs = random_inputs(3)
    measured = torch.zeros(3, V, dtype=torch.bool)
    for row in range(3):
        measured[row, inputs["input_ids"][row][inputs["attention_mask"][row].bool()]] = True
    del inputs["measured_mask"]
    assert_close(run({**inputs, "measured_mask": measured}), run(inputs), rounding(inputs))


# --- Invariant 6, imposed genes, encode and decode -------------------------------------------------------------------


def test_an_empty_perturbation_is_allowed():
    inputs = random_inputs(4)
    state = {name: tensor for name, tensor in inputs.items() if not name.startswith("perturbation")}
    padded = {**inputs, "perturbation_mask": torch.zeros(3, 3, dtype=torch.long)}
    empty = {name: inputs[f"perturbation_{name}"][:, :0] for name in ("ids", "values", "mask")}
    absent = run(state)
    assert torch.isfinite(absent.logits).all()
    assert_close(absent, run(padded), rounding(inputs))
    empty = {f"perturbation_{name}": tensor for name, tensor in empty.items()}
    assert_close(absent, run({**state, **empty}), rounding(inputs))


@PROPERTY
@given(seeds)
def test_imposed_genes_read_their_level(seed):
    inputs = random_inputs(seed)
    values = torch.zeros(3, V)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        values[row, inputs["input_ids"][row][real]] = inputs["expression_values"][row][real]
    # The level before is the cell's own where measured and what its other genes suggest where not.
    response = MODEL.model.linear_response
    factors = MODEL.encode(
        **{name: inputs[name] for name in ("input_ids", "expression_values", "attention_mask", "measured_mask")}
    ).factors.states.mean
    values = torch.where(inputs["measured_mask"], values, response.gene_mean + factors @ response.loadings.T)
    output = run(inputs)
    for row, column in torch.nonzero(inputs["perturbation_mask"]).tolist():
        gene = inputs["perturbation_ids"][row, column]
        wanted = float(values[row, gene] + inputs["perturbation_values"][row, column])
        for predicted in (output.logits, output.linear_response):
            assert float(predicted[row, gene]) == pytest.approx(wanted, abs=rounding(inputs))


@PROPERTY
@given(seeds)
def test_one_state_and_many_perturbations(seed):
    inputs = random_inputs(seed, batch=4)
    state = {name: inputs.pop(name)[[0, 0, 0, 0]] for name in STATE if name in inputs}
    atol = rounding({**state, **inputs})
    with torch.no_grad():
        encoded = MODEL.encode(**{name: tensor[:1] for name, tensor in state.items()})
        together = MODEL.decode(encoded, **inputs)
        assert_close(MODEL.decode(encoded, **inputs, query_ids=torch.tensor([5, 2])), together, atol, [5, 2])
        for row in range(4):
            alone = MODEL.decode(encoded, **{name: tensor[row : row + 1] for name, tensor in inputs.items()})
            assert_close(alone, {name: together[name][row : row + 1] for name in OUTPUTS}, atol)


def test_encode_and_decode_are_forward():
    inputs = random_inputs(5)
    state = {name: inputs[name] for name in STATE if name in inputs}
    with torch.no_grad():
        encoded = MODEL.encode(**state)
        perturbations = {name: tensor for name, tensor in inputs.items() if name not in state}
        assert_same_bits(run(inputs), MODEL.decode(encoded, **perturbations))
        index = torch.tensor([2, 0, 2])
        chosen = MODEL.decode(encoded, **perturbations, state_index=index)
    assert_close(run({**inputs, **{name: state[name][index] for name in state}}), chosen, rounding(inputs))


def test_the_base_model_gives_the_same_latents():
    inputs = random_inputs(6)
    with torch.no_grad():
        output = MODEL.model(**inputs)
    assert torch.equal(output.last_hidden_state, run(inputs).decoder_last_hidden_state)
    assert output.factors.factors.covariance.shape == (3, 3, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"perturbation_values": None}, "`perturbation_values` has shape None; wanted \\(3, 3\\)"),
        ({"perturbation_values": torch.zeros(3, 2)}, "`perturbation_values` has shape \\(3, 2\\)"),
        ({"perturbation_ids": torch.zeros(2, 3, dtype=torch.long)}, "wanted \\(2, 3\\)|2 rows for 3"),
    ],
)
def test_shapes_that_disagree_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        run({**random_inputs(7), **changed})


def test_states_and_perturbations_that_disagree_are_refused():
    inputs = random_inputs(7)
    names = ("input_ids", "expression_values", "attention_mask", "measured_mask")
    encoded = MODEL.encode(**{name: inputs[name] for name in names})
    with pytest.raises(ValueError, match="2 rows for 3 encoded states"):
        MODEL.decode(encoded, torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1))


# --- Invariant 8 and training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_eager_equals_sdpa(seed):
    eager, sdpa = random_model(), random_model()
    eager.set_attn_implementation("eager")
    sdpa.set_attn_implementation("sdpa")
    assert (eager.config._attn_implementation, sdpa.config._attn_implementation) == ("eager", "sdpa")
    inputs = random_inputs(seed)
    assert_close(run(inputs, eager), run(inputs, sdpa), rounding(inputs))


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=torch.ones(3, V)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    options = {"hidden_dropout_prob": 0.0, "encoder_layers": 2, "decoder_layers": 2}
    model, inputs = random_model(**options).train(), random_inputs(8)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert all(block.gradient_checkpointing for block in [*model.model.encoder.layers, *model.model.decoder.layers])
    checkpointed = gradients(model, inputs)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-7, rtol=1e-5)
    assert len(model(**inputs, output_hidden_states=True).decoder_hidden_states) == 3


def test_dropout_acts_in_training_only():
    model, inputs = random_model(hidden_dropout_prob=0.5), random_inputs(9)
    assert torch.equal(run(inputs, model).logits, run(inputs, model).logits)
    model.train()
    assert not torch.equal(run(inputs, model).logits, run(inputs, model).logits)


def test_the_loss_by_hand():
    inputs, rng = random_inputs(10), np.random.default_rng(0)
    labels = torch.from_numpy(rng.normal(size=(3, V))).float()
    labels[torch.from_numpy(rng.random((3, V)) < 0.4)] = -100.0
    output = run(inputs, labels=labels)
    squared, likelihood, count = 0.0, 0.0, 0
    for row in range(3):
        for gene in range(V):
            if float(labels[row, gene]) == -100.0:
                continue
            error = float(output.logits[row, gene]) - float(labels[row, gene])
            logvar = float(output.logvar[row, gene])
            squared += error**2
            likelihood += 0.5 * (logvar + error**2 / np.exp(logvar))
            count += 1
    assert count < 3 * V
    assert float(output.loss) == pytest.approx((squared + 0.1 * likelihood) / count, rel=1e-5)
    plain = random_model(variance_loss_weight=0.0)
    assert float(run(inputs, plain, labels=labels).loss) == pytest.approx(squared / count, rel=1e-5)


def test_the_loss_of_nothing_is_zero():
    output = run(random_inputs(10), labels=torch.full((3, V), -100.0))
    assert float(output.loss) == 0.0


def test_the_mean_is_not_moved_by_the_likelihood():
    inputs, labels = random_inputs(11), torch.ones(3, V)
    grads = []
    for weight in (0.0, 10.0):
        model = random_model(variance_loss_weight=weight)
        model(**inputs, labels=labels).loss.backward()
        grads.append((model.readout.gene_vectors.grad.clone(), model.readout.gene_vectors_logvar.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-7, rtol=1e-5)
    assert grads[0][1] is None or grads[0][1].abs().max() == 0
    assert grads[1][1].abs().max() > 0


def test_a_fresh_model_predicts_the_linear_response():
    torch.manual_seed(0)
    config = GppcConfig(vocab_size=V, pairings=["same_type", "same_dataset"], num_components=3, **SIZES)
    fresh = GppcForPerturbationPrediction(config).eval()
    fresh.model.linear_response.load_state_dict(random_model().model.linear_response.state_dict())
    output = run(random_inputs(12), fresh)
    assert torch.equal(output.logits, output.linear_response)
    assert not torch.equal(output.logits, run(random_inputs(12)).logits)


# --- The linear response is exact ------------------------------------------------------------------------------------


GAUSSIAN = random_model(num_components=1, use_network=False)
GAUSSIAN.model.linear_response.single_share.zero_()
GAUSSIAN.model.linear_response.familiarity.prior_logit.fill_(ALWAYS)


def numpy_response(model, pairing):
    """The parameters of a single component in the words of `fitting/factor_model.py`."""
    response = {name: buffer.double().numpy() for name, buffer in model.model.linear_response.named_buffers()}
    centre = response["states.component_means"][0]
    factors = FactorModel(
        response["gene_mean"] + response["loadings"] @ centre, response["loadings"], response["noise"]
    )
    return factors, response["states.coupling"][pairing]


def dense_source(inputs):
    values = np.zeros((len(inputs["input_ids"]), V))
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        values[row, inputs["input_ids"][row][mask]] = inputs["expression_values"][row][mask]
    return values


def measured_perturbations(inputs):
    """The same inputs with only measured genes perturbed, and the levels that are imposed."""
    values, measured = dense_source(inputs), inputs["measured_mask"].numpy()
    ids, mask = inputs["perturbation_ids"].numpy(), inputs["perturbation_mask"].numpy()
    mask = mask * np.take_along_axis(measured, ids, axis=1)
    levels = np.take_along_axis(values, ids, axis=1) + inputs["perturbation_values"].numpy()
    return {**inputs, "perturbation_mask": torch.from_numpy(mask)}, values, levels


def not_imposed(inputs):
    keep = np.ones((len(inputs["input_ids"]), V), dtype=bool)
    for row, column in torch.nonzero(inputs["perturbation_mask"]).tolist():
        keep[row, inputs["perturbation_ids"][row, column]] = False
    return keep


@PROPERTY
@given(seeds, st.integers(0, 1))
def test_linear_response_equals_the_numpy_reference(seed, pairing):
    inputs, values, levels = measured_perturbations(random_inputs(seed, batch=4))
    inputs["pairing_ids"] = torch.full((4,), pairing)
    output = run(inputs, GAUSSIAN)
    mean, variance = predict_factor_model(
        *numpy_response(GAUSSIAN, pairing),
        Cells(values, np.arange(4), inputs["measured_mask"].numpy()),
        inputs["perturbation_ids"].numpy(),
        levels,
        inputs["perturbation_mask"].numpy(),
    )
    keep, atol = not_imposed(inputs), rounding(inputs, GAUSSIAN)
    np.testing.assert_allclose(output.linear_response.numpy()[keep], mean[keep], atol=atol)
    np.testing.assert_allclose(output.logits.numpy()[keep], mean[keep], atol=atol)
    np.testing.assert_allclose(output.logvar.exp().numpy()[keep], variance[keep], atol=atol)


@PROPERTY
@given(seeds, st.integers(0, 1))
def test_linear_response_equals_the_dense_conditional_gaussian(seed, pairing):
    inputs, values, levels = measured_perturbations(random_inputs(seed, batch=1))
    inputs["pairing_ids"] = torch.tensor([pairing])
    factors, coupling = numpy_response(GAUSSIAN, pairing)
    # Joint distribution of (source, target), written out over all genes.
    loadings, noise = factors.loadings, np.diag(factors.noise)
    cross = loadings @ coupling @ loadings.T
    joint = np.block([[loadings @ loadings.T + noise, cross.T], [cross, loadings @ loadings.T + noise]])
    mean = np.concatenate([factors.mean, factors.mean])
    mask = inputs["perturbation_mask"][0].bool().numpy()
    revealed = inputs["perturbation_ids"][0].numpy()[mask]
    source = np.flatnonzero(inputs["measured_mask"][0].numpy())
    seen = np.concatenate([source, V + revealed])
    known = np.concatenate([values[0, source], levels[0, mask]])
    wanted = np.setdiff1d(np.arange(V), revealed)
    gain = np.linalg.solve(joint[np.ix_(seen, seen)], joint[np.ix_(seen, V + wanted)]).T
    expected = mean[V + wanted] + gain @ (known - mean[seen])
    covariance = joint[np.ix_(V + wanted, V + wanted)] - gain @ joint[np.ix_(seen, V + wanted)]
    output, atol = run(inputs, GAUSSIAN), rounding(inputs, GAUSSIAN)
    np.testing.assert_allclose(output.logits.numpy()[0, wanted], expected, atol=atol)
    np.testing.assert_allclose(output.logvar.exp().numpy()[0, wanted], np.diag(covariance), atol=atol)


@PROPERTY
@given(seeds, st.integers(0, 1))
def test_cell_states_are_weighed_by_bayes_rule(seed, pairing):
    """Without coupling within states, the answer is a mixture of dense Gaussians, written out over all genes.

    What levels say of one state against another is bounded.
    """
    inputs, values, levels = measured_perturbations(random_inputs(seed, batch=1))
    inputs["pairing_ids"] = torch.tensor([pairing])
    model = random_model(use_network=False)
    response = model.model.linear_response
    response.states.coupling.zero_()
    response.states.evidence_scale.fill_(1.0)
    response.single_share.zero_()
    response.familiarity.prior_logit.fill_(ALWAYS)
    p = {name.removeprefix("states."): buffer.double().numpy() for name, buffer in response.named_buffers()}
    covariance = p["loadings"] @ p["loadings"].T + np.diag(p["noise"])
    means = p["gene_mean"] + p["component_means"] @ p["loadings"].T
    mask = inputs["perturbation_mask"][0].bool().numpy()
    revealed, wanted = inputs["perturbation_ids"][0].numpy()[mask], np.arange(V)
    wanted = np.setdiff1d(wanted, revealed)
    source = np.flatnonzero(inputs["measured_mask"][0].numpy())

    def likelihood(genes, seen):
        return np.array(
            [multivariate_normal(mean[genes], covariance[np.ix_(genes, genes)]).pdf(seen) for mean in means]
        )

    prior = np.exp(p["component_logits"]) * likelihood(source, values[0, source])
    transition = np.exp(p["transition_logits"][pairing])
    weights = prior @ (transition / transition.sum(axis=1, keepdims=True))
    expected = means[:, wanted]
    within = covariance[np.ix_(wanted, wanted)]
    if len(revealed):
        evidence = likelihood(revealed, levels[0, mask])
        weights = weights * np.maximum(evidence / evidence.max(), np.exp(-MAX_EVIDENCE))
        gain = covariance[np.ix_(wanted, revealed)] @ np.linalg.inv(covariance[np.ix_(revealed, revealed)])
        expected = expected + (levels[0, mask] - means[:, revealed]) @ gain.T
        within = within - gain @ covariance[np.ix_(revealed, wanted)]
    weights = weights / weights.sum()
    mean = weights @ expected
    variance = np.diag(within) + weights @ (expected - mean) ** 2
    output = run(inputs, model)
    # Rounding of log weights moves the mean between those of the states, and the variance between their squares.
    atol, apart = rounding(inputs, model), np.ptp(expected, axis=0).max(initial=1.0)
    np.testing.assert_allclose(output.logits.numpy()[0, wanted], mean, atol=atol * apart)
    np.testing.assert_allclose(output.logvar.exp().numpy()[0, wanted], variance, atol=atol * apart**2)


def test_without_the_linear_response_the_start_is_the_mean():
    model = random_model(use_linear_response=False, use_network=False)
    inputs = random_inputs(13)
    output = run({**inputs, "perturbation_mask": torch.zeros(3, 3, dtype=torch.long)}, model)
    torch.testing.assert_close(output.logits, model.model.linear_response.gene_mean.expand(3, -1))


# --- Precision -------------------------------------------------------------------------------------------------------


def test_half_precision_keeps_the_linear_response_whole():
    model, inputs = random_model(), random_inputs(14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(inputs, model)
    whole = run(inputs, model)
    torch.testing.assert_close(low.linear_response, whole.linear_response, atol=rounding(inputs), rtol=0)
    torch.testing.assert_close(low.logits.float(), whole.logits, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_leave_the_linear_response_in_single_precision(dtype, tmp_path):
    inputs, whole = random_inputs(14), run(random_inputs(14))
    MODEL.save_pretrained(tmp_path)
    for model in (
        random_model().to(dtype),
        GppcForPerturbationPrediction.from_pretrained(tmp_path, dtype=dtype).eval(),
    ):
        assert model.readout.proj.weight.dtype == dtype
        assert {buffer.dtype for buffer in model.model.linear_response.buffers()} == {torch.float32}
        output = run(inputs, model)
        torch.testing.assert_close(
            output.linear_response.float(), whole.linear_response, atol=rounding(inputs), rtol=0
        )
        torch.testing.assert_close(output.logits.float(), whole.logits, atol=0.1, rtol=0.05)


# --- Conventions of transformers -------------------------------------------------------------------------------------


def test_tuples_are_the_values_of_the_output():
    inputs = random_inputs(15)
    whole = run(inputs, labels=torch.zeros(3, V))
    parts = run(inputs, labels=torch.zeros(3, V), return_dict=False)
    assert isinstance(parts, tuple) and len(parts) == len(whole.to_tuple())
    assert all(torch.equal(part, wanted) for part, wanted in zip(parts, whole.to_tuple()))
    assert isinstance(MODEL.model(**inputs, return_dict=False), tuple)
    model = random_model(return_dict=False)
    assert isinstance(run(inputs, model), tuple) and run(inputs, model, return_dict=True).logits.shape == (3, V)


def test_hidden_states_are_those_before_and_after_every_block():
    model, inputs = random_model(encoder_layers=2, decoder_layers=3), random_inputs(16)
    output = run(inputs, model, output_hidden_states=True)
    # 2 latents; in the decoder one token of the linear response and one each of 3 imposed genes, too.
    assert [tensor.shape for tensor in output.encoder_hidden_states] == [(3, 2, 8)] * 3
    assert [tensor.shape for tensor in output.decoder_hidden_states] == [(3, 6, 8)] * 4
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    normed = model.model.decoder.norm(output.decoder_hidden_states[-1][:, :3])
    assert torch.equal(normed, output.decoder_last_hidden_state)
    assert output.decoder_attentions is None and run(inputs, model).encoder_hidden_states is None
    assert_same_bits(output, run(inputs, model))


def test_attentions_are_distributions_and_padding_gets_nothing():
    model, inputs = random_model(encoder_layers=2, decoder_layers=3), random_inputs(17)
    model.set_attn_implementation("eager")
    output = run(inputs, model, output_attentions=True)
    assert [tensor.shape for tensor in output.encoder_attentions] == [(3, 2, 2, 2)] * 2
    assert [tensor.shape for tensor in output.decoder_attentions] == [(3, 2, 6, 6)] * 3
    padding = inputs["perturbation_mask"] == 0
    assert padding.any()
    for weights in output.decoder_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 6))
        assert (weights[:, :, :, 3:] * padding[:, None, None]).max() == 0
    # Encoded cells keep their own rows, however many perturbations act on them.
    state = {name: inputs.pop(name)[:1] for name in STATE if name in inputs}
    shared = model.decode(model.encode(**state, output_attentions=True), **inputs, output_attentions=True)
    assert shared.encoder_attentions[0].shape == (1, 2, 2, 2) and shared.decoder_attentions[0].shape == (3, 2, 6, 6)


def test_the_configuration_asks_for_them_too():
    model = random_model(output_hidden_states=True, attn_implementation="eager", output_attentions=True)
    output = run(random_inputs(18), model)
    assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 2
    assert len(output.encoder_attentions) == len(output.decoder_attentions) == 1


def test_what_evaluation_ignores_is_what_outputs_hold():
    fields = {field.name for field in dataclasses.fields(GppcOutput)}
    assert set(GppcConfig.keys_to_ignore_at_inference) == fields - {"loss", "logits", "logvar"}


def test_the_loss_is_divided_by_the_items_of_all_batches():
    inputs, labels = random_inputs(19), torch.ones(3, V)
    own = run(inputs, labels=labels).loss
    for count in (6 * V, torch.tensor(6 * V)):
        torch.testing.assert_close(run(inputs, labels=labels, num_items_in_batch=count).loss, own / 2)
