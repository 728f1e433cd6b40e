"""A GPPC model and its feature extractor from a folder or from the Hub, with errors that say what is wrong."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from data_scripts.pairs.pair_folder import PairFolder

# From the package, which registers the classes, so that no code from the checkpoint is run.
from modeling_gppc import GppcConfig, GppcFeatureExtractor, GppcForPerturbationPrediction
from modeling_gppc.normalization_gppc import close_matches

# What save_pretrained writes; any one of the weight files will do.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_model(
    name: str | Path, device: str | torch.device | None = None
) -> tuple[GppcForPerturbationPrediction, GppcFeatureExtractor]:
    """Loads a model in evaluation mode, and its feature extractor.

    Args:
        name (`str` or `Path`): A folder written by `save_pretrained` or `train.py`, or the id of a model on the Hub.
        device (`str`, *optional*): Where to; defaults to the first accelerator, else the CPU.

    Raises:
        ValueError: If there is no such folder or repository, or it holds no GPPC model.
    """
    check_model_name(name)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = AutoConfig.from_pretrained(name)
        _check_type(name, config.model_type)
        extractor = AutoFeatureExtractor.from_pretrained(name)
        model, loaded = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"`model` {str(name)!r} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # they would be random numbers
        raise ValueError(
            f"`model` {str(name)!r} lacks {len(missing)} weights (e.g. `{missing[0]}`); it was saved by another version "
            "or not completely: train or fetch it again."
        )
    if extractor.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"`model` {str(name)!r} has {model.config.vocab_size} genes but its feature extractor names "
            f"{extractor.vocab_size}; the folder mixes two models."
        )
    return model.eval().to(device), extractor


def feature_extractor_of(folder: PairFolder) -> GppcFeatureExtractor:
    """The feature extractor that does to cells what was done to those of a folder of pairs."""
    manifest = folder.manifest
    per_length = manifest["normalization"] == "log_tpm"
    return GppcFeatureExtractor(
        gene_ids=folder.gene_ids,
        gene_symbols=folder.gene_symbols,
        normalization=manifest["normalization"],
        target_sum=manifest["target_sum"],
        gene_lengths=folder.genes.column("feature_length").to_pylist() if per_length else None,
        organism=manifest["organism"],
    )


def check_model_name(name: str | Path) -> None:
    """Refuses a folder that is absent or holds no GPPC model; what may be a Hub id passes.

    Raises:
        ValueError: Saying what is missing, with close matches among the folders beside it.
    """
    folder = Path(name)
    if not folder.exists():
        if isinstance(name, str) and _HUB_ID.fullmatch(name) and not folder.parent.is_dir():
            return
        parent = folder.parent
        beside = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        hint = close_matches(folder.name, beside)
        raise ValueError(
            f"`model` {str(name)!r} does not exist; wanted a model folder or the id of a model on the Hub "
            f"(`user/name`){hint if 'did you mean' in hint else '.'}"
        )
    if not folder.is_dir():
        raise ValueError(f"`model` {str(name)!r} is a file; wanted the folder that holds `config.json` and weights.")
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise ValueError(
                f"`model` {str(name)!r} has no `{file}`; wanted a folder that `train.py` or `save_pretrained` wrote."
            )
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`model` {str(name)!r} has a damaged `config.json`: {_first_line(error)}") from error
    _check_type(name, model_type)
    if not any((folder / file).is_file() for file in WEIGHTS):
        raise ValueError(f"`model` {str(name)!r} has no weights (`{WEIGHTS[0]}`); training may not have finished.")


def _check_type(name: str | Path, model_type: str | None) -> None:
    if model_type != GppcConfig.model_type:
        raise ValueError(
            f"`model` {str(name)!r} is of type {model_type!r}; wanted a GPPC model ({GppcConfig.model_type!r})."
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
