"""Pushes a model folder, a pairs folder or a Space: only the files that belong there, card included."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hub_card.hub_upload import Push, PushReport
from hub_card.model_card import read_json
from hub_card.upload_scan import DATASET_FILES, MODEL_FILES, SPACE_FILES, select_files

SPACES = Path(__file__).parent / "spaces"


def push_model(folder: str | Path, repo_id: str, **options) -> PushReport:
    """Uploads a model folder: weights, travelling code, vocabulary and normalisation, scores, figures and card.

    Optimiser state, checkpoints, logs and anything else outside the allow-list stay where they are.

    Args:
        folder (`str` or `Path`): What training wrote.
        repo_id (`str`): `name` or `namespace/name`.
        **options: `private` (`bool`, `True` by default): visibility of a new repository; `revision` (`str`, `"main"`
            by default): branch, created when absent; `tag` (`str`) for the result; `message` (`str`): title of the
            commit; `create` (`bool`, `True` by default): create the repository when it is absent; `token` (`str`), by
            default that of `hf auth login` or `HF_TOKEN`; `endpoint` (`str`), by default `HF_ENDPOINT`; `attempts`
            (`int`, 6 by default): after dropped connections, 429 and 5xx.

    Returns:
        [`~hub_upload.PushReport`]

    Raises:
        ValueError: If the folder lacks what loading needs; else as [`~hub_upload.Push.run`].
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` {folder} is not a folder; wanted the one that training wrote.")
    files, left_out = select_files(folder, MODEL_FILES)
    check_model(folder, files)
    return Push(files, repo_id, "model", MODEL_FILES, "configuration_gppc.py", left_out, **options).run()


def push_dataset(folder: str | Path, repo_id: str, license: str = "other", **options) -> PushReport:
    """Uploads a pairs folder: Parquet shards, gene and panel tables, manifest with the splits, card.

    Arguments, result and errors as [`push_model`]; `license` is the Hub's identifier of the data's licence.
    """
    from hub_card.dataset_card import stage_dataset  # imports datasets, which only data sets need

    with tempfile.TemporaryDirectory(prefix="gppc-push-") as staging:
        files = stage_dataset(folder, staging, license)
        return Push(files, repo_id, "dataset", DATASET_FILES, "manifest.json", **options).run()


def push_metric(repo_id: str, **options) -> PushReport:
    """Uploads the metric as a Space that `evaluate.load(repo_id)` reads; arguments as [`push_model`].

    `evaluate` looks for a script of the Space's own name, so the script is uploaded under that name.
    """
    name = repo_id.rpartition("/")[2]
    return _push_space("gppc_metrics", ("gppc_metrics", name), repo_id, f"{name}.py", options)


def push_demo(repo_id: str, *, model: str, **options) -> PushReport:
    """Uploads the demo Space, which lets people ask the model repository `model`; arguments as [`push_model`]."""
    return _push_space("gppc_demo", ("USER/MODEL", model), repo_id, "app.py", options)


def _push_space(space: str, change: tuple[str, str], repo_id: str, marker: str, options: Mapping) -> PushReport:
    files, _ = select_files(SPACES / space, SPACE_FILES)
    files = {name.replace(*change): path.read_text().replace(*change).encode() for name, path in files.items()}
    return Push(files, repo_id, "space", SPACE_FILES, marker, **options).run()


def check_model(folder: Path, files: Mapping[str, Path]) -> None:
    """Refuses a folder that could not be loaded by somebody without this package."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "gppc":
        raise ValueError(f"`folder` {folder} holds a `{config.get('model_type')}` model; wanted a gppc model.")
    if "README.md" not in files:
        raise ValueError(
            f"`folder` {folder} holds no `README.md`; render it with `hub_card.model_card.write_model_card(folder)`."
        )
    index = files.get("model.safetensors.index.json")
    weights = {"model.safetensors"} if index is None else set(json.loads(index.read_text())["weight_map"].values())
    if missing := sorted(weights - set(files)):
        raise ValueError(f"`folder` {folder} holds no `{missing[0]}`; save the model with `save_pretrained` first.")
    auto_map = {**config.get("auto_map", {}), **read_json(folder / "preprocessor_config.json").get("auto_map", {})}
    pipelines = config.get("custom_pipelines", {})
    if "perturbation-prediction" not in pipelines:
        raise ValueError(
            f"`folder` {folder} was saved without its pipeline; save with `model.save_pretrained(folder)`."
        )
    if not {"AutoModel", "AutoFeatureExtractor"} <= set(auto_map):
        raise ValueError(
            f"`folder` {folder} was saved without its code (no `auto_map`); save model and feature extractor with the "
            "`gppc` package's classes, which register for it."
        )
    classes = [*filter(None, auto_map.values()), *(task["impl"] for task in pipelines.values())]
    wanted = {name.split("--")[-1].split(".")[0] + ".py" for name in classes}
    if missing := sorted(wanted - set(files)):
        raise ValueError(f"`folder` {folder} lacks `{missing[0]}`, the code that its configuration names; save again.")
