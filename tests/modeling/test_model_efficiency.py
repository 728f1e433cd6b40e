"""What keeps the model cheap: nothing of the vocabulary's width a row, whole graphs, half precision, named sizes."""

from dataclasses import is_dataclass

import pytest
import torch
from test_modeling_gppc import random_inputs, random_model
from tiny_model import SIZES
from torch.utils._python_dispatch import TorchDispatchMode

from gppc.run_options import parse_options
from modeling_gppc.configuration_gppc import SIZES as NAMED_SIZES
from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction

OUTPUTS = ("logits", "logvar", "linear_response")
WIDE = 4_000


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                # Views and expanded tensors hold no memory of their own.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1))
        return result


def tensors_of(part) -> list[torch.Tensor]:
    """Every tensor of an output and of what it holds."""
    if isinstance(part, torch.Tensor):
        return [part]
    values = part.values() if isinstance(part, dict) else vars(part).values() if is_dataclass(part) else []
    return [tensor for value in values for tensor in tensors_of(value)]


@pytest.fixture(scope="module")
def wide_model():
    torch.manual_seed(0)
    return GppcForPerturbationPrediction(GppcConfig(vocab_size=WIDE, **SIZES)).eval()


@torch.no_grad()
def test_a_screen_needs_no_memory_of_the_vocabularys_width_a_row(wide_model):
    ids = torch.randint(WIDE, (512, 1), generator=torch.Generator().manual_seed(0))
    encoded = wide_model.encode(torch.arange(20)[None], torch.ones(1, 20), measured_mask=torch.ones(1, WIDE).bool())
    with Largest() as largest:
        wide_model.decode(encoded, ids, torch.ones(512, 1), query_ids=torch.arange(10))
    # Parameters and what the one state says of every gene are as wide as that; 512 rows of it would be 2 million.
    assert largest.elements < 0.1 * len(ids) * WIDE


@torch.no_grad()
def test_nothing_is_as_large_as_rows_times_genes_times_factors(wide_model):
    rows = 64
    encoded = wide_model.encode(torch.arange(20)[None], torch.ones(1, 20), measured_mask=torch.ones(1, WIDE).bool())
    with Largest() as largest:
        wide_model.decode(encoded, torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1))
    assert largest.elements < rows * WIDE * 2


@pytest.mark.parametrize("queries", [None, [3, 3, 1]])
@torch.no_grad()
def test_rows_that_share_a_state_equal_rows_with_their_own(queries):
    """One state under both pairings, few rows and many: every way that the linear response is computed."""
    model = random_model(num_factors=4)
    inputs = random_inputs(3, batch=40)
    names = ("input_ids", "expression_values", "attention_mask", "measured_mask")
    states = {name: inputs.pop(name)[:3] for name in names}
    index = torch.arange(40) % 3
    query_ids = None if queries is None else torch.tensor(queries)
    together = model.decode(model.encode(**states), **inputs, state_index=index, query_ids=query_ids)
    apart = model(**{name: tensor[index] for name, tensor in states.items()}, **inputs, query_ids=query_ids)
    for name in OUTPUTS:
        torch.testing.assert_close(together[name], apart[name], atol=1e-5, rtol=1e-5)
    for row in range(40):
        alone = model(
            **{name: tensor[index[[row]]] for name, tensor in states.items()},
            **{name: tensor[[row]] for name, tensor in inputs.items()},
            query_ids=query_ids,
        )
        for name in OUTPUTS:
            torch.testing.assert_close(together[name][[row]], alone[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_linear_response": False}, {"use_network": False}])
@torch.no_grad()
def test_an_answer_changes_nothing_of_the_model_or_of_the_encoded_state(options):
    model, inputs = random_model(**options), random_inputs(3, batch=1)
    names = ("input_ids", "expression_values", "attention_mask", "measured_mask")
    encoded = model.encode(**{name: inputs.pop(name) for name in names})
    held = [*model.state_dict().values(), *tensors_of(encoded)]
    before = [tensor.clone() for tensor in held]
    first, second = model.decode(encoded, **inputs), model.decode(encoded, **inputs)
    assert all(torch.equal(now, then) for now, then in zip(held, before))
    for name in OUTPUTS:
        assert torch.equal(first[name], second[name])


def test_padding_multiplies_no_gradient():
    """Rows without a perturbation among rows with some: padding writes predictions back, gradients flow once."""
    gradients = []
    for width in (0, 4):
        model = random_model(hidden_dropout_prob=0.0).train()
        inputs = random_inputs(3, batch=2)
        for name in ("perturbation_ids", "perturbation_values", "perturbation_mask"):
            inputs[name] = torch.zeros(2, width, dtype=inputs[name].dtype)
        model(**inputs, labels=torch.ones(2, 12)).loss.backward()
        gradients.append(model.readout.gene_vectors.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_it_compiles_without_graph_breaks(implementation, training):
    model = random_model(hidden_dropout_prob=0.0).train(training)
    model.set_attn_implementation(implementation)
    inputs = {**random_inputs(4), "labels": torch.ones(3, 12)}
    torch._dynamo.reset()
    # No compiler of C++ is needed: graphs are traced whole, forward and backward, and run as they are.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if training else "eager")
    expected, found = model(**inputs), compiled(**inputs)
    for name in ("loss", *OUTPUTS):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    if training:
        gradients = []
        for output in (expected, found):
            model.zero_grad()
            output.loss.backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_screens_compile_without_graph_breaks():
    model = random_model()
    inputs = random_inputs(5, batch=4)
    names = ("input_ids", "expression_values", "attention_mask", "measured_mask")
    encoded = model.encode(**{name: inputs.pop(name)[:1] for name in names})
    torch._dynamo.reset()
    compiled = torch.compile(model.decode, fullgraph=True, backend="eager")
    with torch.no_grad():
        for name in OUTPUTS:
            torch.testing.assert_close(compiled(encoded, **inputs)[name], model.decode(encoded, **inputs)[name])


def test_attention_that_would_end_the_process_is_refused():
    with pytest.raises(ValueError, match=r"(?i)flex.attention"):
        random_model().set_attn_implementation("flex_attention")


def test_bf16_autocast_is_close_and_the_linear_response_is_untouched():
    model = random_model().train()
    inputs = {**random_inputs(6), "labels": torch.ones(3, 12)}
    exact = model.eval()(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**inputs)
    half.loss.backward()
    assert torch.equal(half.linear_response, exact.linear_response)
    assert not torch.equal(half.logits, exact.logits)
    # bf16 has 8 bits: a part in 256.
    torch.testing.assert_close(half.logits, exact.logits, atol=0.05, rtol=0.02)
    torch.testing.assert_close(half.logvar, exact.logvar, atol=0.05, rtol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_named_sizes_are_in_order_and_can_be_changed():
    counts = []
    for size in NAMED_SIZES:
        with torch.device("meta"):
            counts.append(GppcForPerturbationPrediction(GppcConfig.from_size(size, vocab_size=100)).num_parameters())
    assert counts == sorted(counts) and list(NAMED_SIZES) == ["tiny", "small", "base", "large"]
    config = GppcConfig.from_size("tiny", vocab_size=7, hidden_size=24, pairings=["a"])
    assert (config.vocab_size, config.hidden_size, config.pairings) == (7, 24, ["a"])
    with pytest.raises(ValueError, match="`size` is 'big'; wanted one of tiny, small, base, large"):
        GppcConfig.from_size("big")


def test_a_run_can_name_a_size_and_change_it(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("data: {pairs: p}\nmodel: {size: tiny, num_latents: 3}\n")
    config = parse_options(str(own), []).model_config(5, ["same_type"])
    assert (config.hidden_size, config.num_latents) == (NAMED_SIZES["tiny"]["hidden_size"], 3)
    with pytest.raises(ValueError, match="`size` is 'tinny'"):
        parse_options(str(own), ["--model.size", "tinny"])


@torch.no_grad()
def test_means_without_variances_are_the_same_means():
    model = random_model(num_factors=4)
    inputs = random_inputs(3, batch=5)
    state = {name: inputs.pop(name) for name in ("input_ids", "expression_values", "attention_mask", "measured_mask")}
    encoded = model.encode(**state)
    for query_ids in (None, torch.tensor([3, 1])):
        both = model.decode(encoded, **inputs, query_ids=query_ids)
        means = model.decode(encoded, **inputs, query_ids=query_ids, with_variance=False)
        assert means.logvar is None and both.logvar is not None
        for name in ("logits", "linear_response", "familiarity"):
            torch.testing.assert_close(means[name], both[name], atol=1e-6, rtol=1e-6)
