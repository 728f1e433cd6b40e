"""A tiny model with weights that matter, and a complete model folder around it."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from hub_card.model_card import write_model_card
from modeling_gppc import GppcConfig, GppcFeatureExtractor, GppcForPerturbationPrediction
from modeling_gppc.pipeline_gppc import PerturbationPredictionPipeline

GENES = [f"ENSG{index:011d}" for index in range(12)]
SYMBOLS = ["STAT1", "IRF1", "CD3D", "MS4A1", "LYZ", "NKG7", "GNLY", "IL7R", "CD8A", "FCGR3A", "PPBP", "CST3"]
SIZES = {
    "hidden_size": 8,
    "num_latents": 2,
    "readout_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_factors": 3,
    "num_references": 20,
    "encoder_layers": 1,
    "decoder_layers": 1,
}


def tiny_model(seed: int = 0, **options) -> GppcForPerturbationPrediction:
    """A model of 12 genes whose every weight and buffer is random, in evaluation mode."""
    torch.manual_seed(seed)
    config = GppcConfig(vocab_size=len(GENES), **{"pairings": ["same_type", "same_dataset"], **SIZES, **options})
    model = GppcForPerturbationPrediction(config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("familiarity.covariance"):
            tensor.data = 0.2 * torch.eye(len(tensor))
        elif name.endswith(("noise", "width", "drift")):
            tensor.data = torch.rand_like(tensor) + 0.5
        else:
            tensor.data = 0.3 * torch.randn_like(tensor)
    return model


def response_by_hand(
    model: GppcForPerturbationPrediction, changes: Mapping[int, float], held: Mapping[int, float] | None = None
) -> dict[str, np.ndarray]:
    """What imposed changes of log values do to a cell that stays in its state: dense, gene by gene, in float64.

    Args:
        model ([`GppcForPerturbationPrediction`]): Of few genes.
        changes (`Mapping`): Gene -> change.
        held (`Mapping`, *optional*): Gene -> firmness; observed at no change, with its noise divided by that.

    Returns:
        `linear`, the response before it is sized, `change`, `variance` and `direction`, each `(V,)`.
    """
    names = ("loadings", "within_root", "noise", "share", "drift")
    loadings, root, noise, share, drift = (
        getattr(model.model.linear_response, name).double().numpy() for name in names
    )
    within = loadings @ root @ root.T @ loadings.T
    held = {gene: firmness for gene, firmness in (held or {}).items() if gene not in changes}
    at = [*changes, *held]
    error = [*(noise[gene] for gene in changes), *(noise[gene] / firmness for gene, firmness in held.items())]
    observed = np.array([*changes.values(), *[0.0] * len(held)], dtype=float)
    weights = np.linalg.solve(within[np.ix_(at, at)] + np.diag(error), observed)
    linear, deviation = within[:, at] @ weights, np.sqrt(np.diag(within) + noise)
    others = np.setdiff1d(np.arange(len(noise)), [*changes])
    length = np.sqrt((linear[others] ** 2).sum() / (deviation[others] ** 2).sum())
    correlation = linear / (deviation * np.sqrt(max(observed @ weights, 1e-24)))
    change = share * linear / np.sqrt(1 + (length / drift) ** 2)
    output = {
        "linear": linear.copy(),
        "change": change,
        "variance": (drift * deviation) ** 2 + change**2,
        "direction": expit(7.7 * np.abs(correlation) ** 0.85),
    }
    for gene, change in changes.items():
        output["change"][gene], output["variance"][gene], output["direction"][gene] = change, 0, 1
    if not changes:
        output["variance"][:], output["direction"][:] = 0, 0.5
    return output


def tiny_extractor() -> GppcFeatureExtractor:
    """The feature extractor of [`tiny_model`]."""
    return GppcFeatureExtractor(GENES, SYMBOLS, normalization="log1p", target_sum=10_000.0)


def tiny_pipeline(seed: int = 0, **options) -> PerturbationPredictionPipeline:
    """The pipeline of both."""
    return PerturbationPredictionPipeline(
        model=tiny_model(seed, **options), feature_extractor=tiny_extractor(), device="cpu"
    )


def write_model_folder(folder: Path, seed: int = 0) -> Path:
    """What training leaves behind: weights, code, scores, facts and card, and things that must not be uploaded."""
    tiny_pipeline(seed).save_pretrained(folder)
    scores = {"mse": 0.25 + seed, "mse_ci95": [0.2, 0.3], "r2": 0.5, "pearson_delta": 0.75}
    mean = {"mse": 0.5, "mse_ci95": [0.4, 0.6], "r2": 0.0, "pearson_delta": None}
    splits = {"test": {"n_pairs": 10, "n_genes": 12, "methods": {"gppc": scores, "mean": mean}}}
    run = {
        "store": "synthetic",
        "filters": None,
        "cells": 100,
        "genes": 12,
        "seconds": 1.5,
        "flop": 1e9,
        "seed": seed,
        "command": "train.py",
    }
    for name, content in (("results", {"schema_version": 1, "splits": splits}), ("run", run)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_model_card(folder)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "scores.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "checkpoint-5/model.safetensors",
        "logs/events.out",
        "train.log",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not for others")
    return folder
