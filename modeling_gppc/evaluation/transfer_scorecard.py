"""From the folders that `gppc evaluate` wrote to `transfer.json`, the scorecard on real screens that a model card shows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

TRANSFER_FILE = "transfer.json"
TRANSFER_METRICS = (
    "pearson_delta",
    "direction_accuracy",
    "normalised_squared_error",
    "matched_minus_shuffled",
    "coverage90",
)
EVALUATION_FILE = "evaluation.json"


def weights_digest(folder: str | Path) -> str:
    """Digest of a model folder's weights: says which model was scored without saying where it lies."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        raise ValueError(f"`folder` {folder} holds no model.safetensors; wanted a model folder.")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def transfer_scorecard(model: str | Path, evaluations: Iterable[str | Path]) -> dict:
    """What the card of a model says about real screens.

    Args:
        model (`str` or `Path`): The model folder.
        evaluations (`Iterable`): Folders that `gppc evaluate --model MODEL --out DIR` wrote for this model.

    Returns:
        `{"schema_version": 1, "screens": [...]}`; of every screen `screen`, `mode`, `n_perturbations`, `n_genes`,
        `subject` (the method that is the model), `split_half_pearson` (what a replicate would score) and `methods`:
        name -> the [`TRANSFER_METRICS`] that were computed with their intervals, and `reads_perturbed_cells`.

    Raises:
        ValueError: If a folder holds no evaluation, one of another model, or the same one twice.
    """
    weights = weights_digest(model)
    screens = []
    for folder in evaluations:
        path = Path(folder) / EVALUATION_FILE
        try:
            summary = json.loads(path.read_text())
            scored = list(summary["weights"])
            entry = {
                "screen": summary["screen"],
                "mode": summary["mode"],
                "n_perturbations": summary["n_perturbations"],
                "n_genes": summary["n_scored_genes"],
                "subject": summary["subject"],
                "split_half_pearson": summary["ceiling"]["split_half_pearson"],
                "methods": {name: _scores(scores) for name, scores in summary["methods"].items()},
            }
        except FileNotFoundError:
            raise ValueError(
                f"`evaluation` {folder} holds no {EVALUATION_FILE}; wanted what `gppc evaluate --out` wrote."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`evaluation` {path} is not what `gppc evaluate` writes ({error!r}); run it again."
            ) from None
        if scored != [weights]:
            what = "no model folder" if not scored else f"another model ({scored[0][:8]}, not {weights[:8]})"
            raise ValueError(
                f"`evaluation` {folder} scored {what}; wanted `gppc evaluate --model {Path(model).name} --mode "
                "zero-shot` with this model."
            )
        screens.append(entry)
    for (name, mode), times in Counter((entry["screen"], entry["mode"]) for entry in screens).items():
        if times > 1:
            raise ValueError(f"`evaluation`: screen {name!r} ({mode}) is given twice; leave one out.")
    return {"schema_version": 1, "screens": screens}


def _scores(scores: dict) -> dict:
    kept = {name: scores[name] for name in TRANSFER_METRICS if scores.get(name) is not None}
    kept |= {f"{name}_ci95": scores[f"{name}_ci95"] for name in kept if scores.get(f"{name}_ci95")}
    return {**kept, "reads_perturbed_cells": bool(scores["reads_perturbed_cells"])}
