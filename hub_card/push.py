"""Pushes a model folder, a pairs folder or a Space: only the files that belong there, card included."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hub_card.hub_upload import PushReport, Retries, Upload, push
from hub_card.model_card import PLACEHOLDER, read_json
from hub_card.upload_scan import DATASET_FILES, MODEL_FILES, SPACE_FILES, select_files

SPACES = Path(__file__).parent / "spaces"
METRIC_SCRIPT = "gppc_metrics.py"


def push_model(folder: str | Path, repo_id: str, **options) -> PushReport:
    """Uploads a model folder: weights, travelling code, vocabulary and normalisation, scores, figures and card.

    Optimiser state, checkpoints, logs and anything else outside the allow-list stay where they are.

    Args:
        folder (`str` or `Path`): What training wrote.
        repo_id (`str`): `name` or `namespace/name`.
        **options: See [`push_folder`].

    Returns:
        [`~hub_upload.PushReport`]

    Raises:
        ValueError: If the folder lacks what loading needs; else as [`~hub_upload.push`].
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` {folder} is not a folder; wanted the one that training wrote.")
    files, left_out = select_files(folder, MODEL_FILES)
    check_model(folder, files)
    upload = {"kind": "model", "patterns": MODEL_FILES, "marker": "configuration_gppc.py", "left_out": tuple(left_out)}
    return push_folder(files, repo_id, upload, **options)


def push_dataset(folder: str | Path, repo_id: str, *, license: str = "other", **options) -> PushReport:
    """Uploads a pairs folder: Parquet shards, gene and panel tables, manifest with the splits, card.

    Arguments, result and errors as [`push_model`]; `license` is the Hub's identifier of the data's licence.
    """
    from hub_card.dataset_card import stage_dataset  # imports datasets, which only data sets need

    with tempfile.TemporaryDirectory(prefix="gppc-push-") as staging:
        files = stage_dataset(folder, staging, license)
        upload = {"kind": "dataset", "patterns": DATASET_FILES, "marker": "manifest.json"}
        return push_folder(files, repo_id, upload, **options)


def push_metric(repo_id: str, **options) -> PushReport:
    """Uploads the metric as a Space that `evaluate.load(repo_id)` reads; arguments as [`push_model`].

    `evaluate` looks for a script of the Space's own name, so the script is uploaded under that name.
    """
    script = f"{repo_id.rsplit('/', 1)[-1]}.py"
    files, _ = select_files(SPACES / "gppc_metrics", SPACE_FILES)
    files = {script if name == METRIC_SCRIPT else name: path for name, path in files.items()}
    if script != METRIC_SCRIPT:
        module = script.removesuffix(".py")
        app = files["app.py"].read_text().replace(METRIC_SCRIPT.removesuffix(".py"), module)
        files["app.py"] = app.encode()
    upload = {"kind": "space", "patterns": SPACE_FILES, "marker": script, "space_sdk": "gradio"}
    return push_folder(files, repo_id, upload, **options)


def push_demo(repo_id: str, *, model: str, **options) -> PushReport:
    """Uploads the demo Space, which lets people ask the model repository `model`; arguments as [`push_model`]."""
    files, _ = select_files(SPACES / "gppc_demo", SPACE_FILES)
    files = {name: path.read_text().replace("USER/MODEL", model).encode() for name, path in files.items()}
    upload = {"kind": "space", "patterns": SPACE_FILES, "marker": "app.py", "space_sdk": "gradio"}
    return push_folder(files, repo_id, upload, **options)


def push_folder(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    upload: Mapping,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    retries: Retries | None = None,
    **options,
) -> PushReport:
    """Uploads files whose card names the repository.

    Args:
        files (`Mapping[str, Path | bytes]`): Path in the repository -> file or content, `README.md` among them.
        repo_id (`str`): `name` or `namespace/name`.
        upload (`Mapping`): What kind of repository it is: fields of [`~hub_upload.Upload`].
        token, endpoint, retries: See [`~hub_upload.push`].
        **options: `private`, `revision`, `tag`, `create` and `message` of [`~hub_upload.Upload`].
    """
    card = files["README.md"]
    text = card.decode() if isinstance(card, bytes) else card.read_text()
    files = {**files, "README.md": text.replace(PLACEHOLDER, repo_id).encode()}
    whole = Upload(files=files, repo_id=repo_id, **upload, **options)
    return push(whole, token=token, endpoint=endpoint, retries=retries)


def check_model(folder: Path, files: Mapping[str, Path]) -> None:
    """Refuses a folder that could not be loaded by somebody without this package."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != "gppc":
        raise ValueError(f"`folder` {folder} holds a `{config.get('model_type')}` model; wanted a gppc model.")
    for name, remedy in (
        ("README.md", "render it with `hub_card.model_card.write_model_card(folder)`"),
        ("preprocessor_config.json", "save the feature extractor beside the model"),
    ):
        if name not in files:
            raise ValueError(f"`folder` {folder} holds no `{name}`; {remedy}.")
    weights = {"model.safetensors"}
    if "model.safetensors.index.json" in files:
        weights = set(json.loads(files["model.safetensors.index.json"].read_text())["weight_map"].values())
    if missing := sorted(weights - set(files)):
        raise ValueError(f"`folder` {folder} holds no `{missing[0]}`; save the model with `save_pretrained` first.")
    preprocessor = read_json(folder / "preprocessor_config.json")
    auto_map = {**config.get("auto_map", {}), **preprocessor.get("auto_map", {})}
    wanted = {entry.split("--")[-1].split(".")[0] + ".py" for entry in auto_map.values() if isinstance(entry, str)}
    if "perturbation-prediction" not in config.get("custom_pipelines", {}):
        raise ValueError(
            f"`folder` {folder} was saved without its pipeline; save with `model.save_pretrained(folder)`."
        )
    for task in config["custom_pipelines"].values():
        wanted.add(task["impl"].split("--")[-1].split(".")[0] + ".py")
    if not any("AutoModel" in key for key in auto_map) or "AutoFeatureExtractor" not in auto_map:
        raise ValueError(
            f"`folder` {folder} was saved without its code (no `auto_map`); save model and feature extractor with the "
            "`gppc` package's classes, which register for it."
        )
    if missing := sorted(wanted - set(files)):
        raise ValueError(f"`folder` {folder} lacks `{missing[0]}`, the code that its configuration names; save again.")
