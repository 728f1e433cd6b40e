"""GppcConfig: defaults, checks, saving."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_model import SIZES, tiny_model
from transformers import AutoConfig

from modeling_gppc import GppcConfig, GppcForPerturbationPrediction


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 30}, r"`hidden_size` is 30; wanted a multiple of `num_attention_heads` \(4\)"),
        ({"vocab_size": 0}, "`vocab_size` is 0; wanted at least 1"),
        ({"num_latents": 0}, "`num_latents` is 0"),
        ({"num_factors": 0}, "`num_factors` is 0"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"pairings": "same_type+"}, "pairings"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        GppcConfig(**options)


@pytest.mark.parametrize(
    ("options", "pairings", "default"),
    [
        ({}, ["same_type"], "same_type"),
        ({"pairings": []}, ["same_type"], "same_type"),
        ({"pairings": ["same_dataset", "same_type"]}, ["same_dataset", "same_type"], "same_type"),
        ({"pairings": ["same_dataset"]}, ["same_dataset"], "same_dataset"),
        ({"pairings": ["a", "b"], "default_pairing": "b"}, ["a", "b"], "b"),
    ],
)
def test_pairings(options, pairings, default):
    config = GppcConfig(**options)
    assert (config.pairings, config.default_pairing) == (pairings, default)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    config = GppcConfig(vocab_size=12, pairings=["a", "b"], default_pairing="b", **SIZES)
    config.save_pretrained(tmp_path)
    for loaded in (GppcConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GppcConfig
        # `_name_or_path` and the version of transformers are facts of the saving, not of the model.
        assert loaded.to_diff_dict().items() >= {"vocab_size": 12, "pairings": ["a", "b"]}.items()
        assert {name: getattr(loaded, name) for name in SIZES} == SIZES
        assert loaded.default_pairing == "b"


def test_sizes_reach_the_model():
    model = tiny_model()
    assert isinstance(model, GppcForPerturbationPrediction)
    assert model.model.embeddings.perturbation_embedding.weight.shape == (12, 8)
    assert model.model.encoder.latents.shape == (2, 8)
    assert model.model.linear_response.loadings.shape == (12, 3)
    assert model.readout.gene_vectors.shape == (12, 8)
    assert model.get_input_embeddings() is model.model.embeddings.perturbation_embedding
