"""A network that starts with the weights of a trained model whose genes are others."""

import json
from pathlib import Path

import torch

from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction

# What a run may choose itself when it starts from a model: it has no trained weights, or is fitted anew.
OWN_SETTINGS = (
    "vocab_size",
    "pairings",
    "default_pairing",
    "num_factors",
    "num_components",
    "num_references",
    "use_network",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "variance_loss_weight",
)
# Tensors with a row a gene, and with a row a pairing.
GENE_TABLES = ("perturbation_embedding", "gene_vectors", "gene_logvar")
PAIRING_TABLE = "pairing_embedding"
# Closed form of the run's own cells, and what reads its factors.
FITTED_ANEW = ("linear_response", "state_proj", "factor_proj")


def check_start(folder: str) -> None:
    """Raises `ValueError` for a folder that holds no GPPC model, without reading its weights."""
    for name in ("config.json", "preprocessor_config.json"):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"`training.start_from` {folder} holds no model (no {name}); wanted a model folder.")
    kind = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    if kind != GppcConfig.model_type:
        raise ValueError(f"`training.start_from` {folder} holds a {kind!r} model; wanted a gppc model.")


def start_from(
    folder: str, config: GppcConfig, gene_ids: list[str], gene_symbols: list[str]
) -> GppcForPerturbationPrediction:
    """
    A model of the run's genes and pairings with the weights of another.

    Tables with a row a gene or a pairing are copied row by row where the earlier model has it; other rows keep their
    fresh weights. Everything else is copied whole. The linear response is left as it is: it is fitted on the run's cells.

    The folder is one that `train.py` left. Widths and depths of `config` are replaced by the earlier model's.

    Raises:
        ValueError: If the folder holds no model, or one with none of the genes.
    """
    check_start(folder)
    earlier = GppcForPerturbationPrediction.from_pretrained(folder)
    extractor = GppcFeatureExtractor.from_pretrained(folder)
    fields = GppcConfig.__annotations__.keys() - {"model_type"}
    settings = {name: getattr(config if name in OWN_SETTINGS else earlier.config, name) for name in fields}
    model = GppcForPerturbationPrediction(GppcConfig(**settings))
    model.config._attn_implementation = config._attn_implementation
    by_id, by_symbol = extractor.find_genes(gene_ids), extractor.find_genes(gene_symbols)
    genes = [first if first >= 0 else second for first, second in zip(by_id, by_symbol)]
    known = [row for row, gene in enumerate(genes) if gene >= 0]
    if not known:
        raise ValueError(
            f"`training.start_from` {folder} has none of the {len(gene_ids)} genes; use a model of the same species."
        )
    names = earlier.config.pairings
    pairings = [(row, names.index(name)) for row, name in enumerate(config.pairings) if name in names]
    old = earlier.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in old or any(part in name for part in FITTED_ANEW):
                continue
            if any(part in name for part in GENE_TABLES):
                tensor[known] = old[name][[genes[row] for row in known]]
            elif PAIRING_TABLE in name:
                for row, from_row in pairings:
                    tensor[row] = old[name][from_row]
            else:
                tensor.copy_(old[name])
    return model
