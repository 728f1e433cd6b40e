"""A saved model in a process that has torch, transformers and what they need, and nothing of this project."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from tiny_model import GENES, tiny_extractor, tiny_model, tiny_pipeline
from transformers import Trainer, TrainingArguments, pipeline

CODE = Path(__file__).resolve().parents[2] / "modeling_gppc"
ROOTS = ("torch", "transformers", "numpy", "huggingface-hub")
ABSENT = ("modeling_gppc", "data_scripts", "hub_card", "gppc", "datasets", "anndata", "pandas", "scipy", "accelerate")
SCRIPT = """
import importlib, json, sys
sys.path.append(sys.argv[1])
present = []
for name in json.loads(sys.argv[3]):
    try:
        importlib.import_module(name)
        present.append(name)
    except ImportError:
        pass
import numpy as np, torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, pipeline
config = AutoConfig.from_pretrained("a/model", trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained("a/model", trust_remote_code=True)
model = AutoModel.from_pretrained("a/model", trust_remote_code=True).eval()
given = np.load(sys.argv[2])
state = extractor(given["counts"], library_size=given["library_size"], measured=given["measured"])
change = extractor.perturbation_features("STAT1=ko+IRF1=x3", given["values"])
with torch.no_grad():
    output = model(**state, **change)
# The same leaf name, the same configuration, other code: each model runs its own.
twin = AutoModel.from_pretrained("b/model", trust_remote_code=True)
# A stranger saves what was loaded.
model.save_pretrained("stranger")
extractor.save_pretrained("stranger")
model.save_pretrained("no extractor")
predict = pipeline("perturbation-prediction", model="stranger", trust_remote_code=True, device="cpu")
answer = predict({"counts": given["counts"], "perturbation": "STAT1=ko+IRF1=x3"})
try:
    pipeline("perturbation-prediction", model="no extractor", trust_remote_code=True)
except ValueError as error:
    refused = str(error)
change = np.stack([cell["change"] for cell in answer])
np.savez("out.npz", logits=output.logits, logvar=output.logvar, change=change)
print(json.dumps({
    "present": present,
    "modules": [type(item).__module__ for item in (config, extractor, model, predict)],
    "names": [type(item).__name__ for item in (config, extractor, model, predict)],
    "layers": [sys.modules[type(item).__module__.replace("modeling", "layers")].FOLDER for item in (model, twin)],
    "refused": refused,
}))
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_distributions(roots):
    """The distributions that `pip install` of the roots would bring, without extras."""
    found, waiting = {}, list(roots)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory):
    """A folder that stands for site-packages and holds only what the roots need."""
    folder = tmp_path_factory.mktemp("site")
    for distribution in needed_distributions(ROOTS).values():
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    return folder


@pytest.fixture(scope="module")
def given():
    """Cells with unmeasured genes, and their log values."""
    rng = np.random.default_rng(0)
    counts, measured = rng.poisson(1.5, size=(4, len(GENES))), rng.random((4, len(GENES))) < 0.8
    library_size = counts.sum(axis=1) + 50.0
    values = np.where(measured, np.log1p(1e4 * counts / library_size[:, None]), 0)
    return {"counts": counts, "measured": measured, "library_size": library_size, "values": values}


@pytest.fixture(scope="module")
def bare_process(bare_environment, given, tmp_path_factory):
    """Folder in which a bare process loaded, predicted and saved, and what it printed."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("a", "b"):
        tiny_model().save_pretrained(folder / name / "model")
        tiny_extractor().save_pretrained(folder / name / "model")
        with (folder / name / "model" / "layers_gppc.py").open("a") as layers:
            layers.write(f'\nFOLDER = "{name}"\n')
    np.savez(folder / "given.npz", **given)
    # -I ignores the environment's paths and the working directory, -S the installed packages.
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, str(bare_environment), "given.npz", json.dumps(ABSENT)]
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
    process = subprocess.run(
        command,
        cwd=folder,
        env={**kept, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, json.loads(process.stdout.splitlines()[-1])


def test_predictions_are_equal_without_the_package(bare_process, given):
    model, extractor = tiny_model(), tiny_extractor()
    state = extractor(given["counts"], library_size=given["library_size"], measured=given["measured"])
    with torch.no_grad():
        wanted = model(**state, **extractor.perturbation_features("STAT1=ko+IRF1=x3", given["values"]))
    folder, said = bare_process
    assert said["present"] == []
    names = ["GppcConfig", "GppcFeatureExtractor", "GppcForPerturbationPrediction", "PerturbationPredictionPipeline"]
    assert said["names"] == names
    assert all(module.startswith("transformers_modules.") for module in said["modules"])
    output = np.load(folder / "out.npz")
    np.testing.assert_allclose(output["logits"], wanted.logits, atol=1e-6, rtol=0)
    np.testing.assert_allclose(output["logvar"], wanted.logvar, atol=1e-6, rtol=0)


def test_folders_of_one_name_do_not_mix(bare_process):
    folder, said = bare_process
    assert (folder / "a/model/configuration_gppc.py").read_text() == (CODE / "configuration_gppc.py").read_text()
    assert said["layers"] == ["a", "b"]


def test_what_a_stranger_saves_predicts(bare_process, given):
    folder = bare_process[0]
    wanted = tiny_pipeline()({"counts": given["counts"], "perturbation": "STAT1=ko+IRF1=x3"})
    change = np.load(folder / "out.npz")["change"]
    np.testing.assert_allclose(change, np.stack([cell["change"] for cell in wanted]), atol=1e-6, rtol=0)
    for path in CODE.glob("*_gppc.py"):
        saved = (folder / "stranger" / path.name).read_text()
        assert saved == (folder / "a/model" / path.name).read_text(), path.name


def test_a_model_saved_without_its_extractor_says_so(bare_process):
    refused = bare_process[1]["refused"]
    assert refused.startswith("`feature_extractor` is missing") and "\n" not in refused
    assert "`Trainer(processing_class=extractor)`" in refused


@pytest.mark.parametrize("save", ["model", "trainer", "pipeline"])
def test_however_it_is_saved_the_pipeline_loads(tmp_path, given, save):
    model, extractor = tiny_model(), tiny_extractor()
    if save == "model":
        model.save_pretrained(tmp_path)
        extractor.save_pretrained(tmp_path)
    elif save == "trainer":
        arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
        Trainer(model, arguments, processing_class=extractor).save_model(str(tmp_path))
    else:
        tiny_pipeline().save_pretrained(tmp_path)
    loaded = pipeline("perturbation-prediction", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(loaded).__module__.startswith("transformers_modules.")
    asked = {"counts": given["counts"], "perturbation": "STAT1=ko"}
    for cell, wanted in zip(loaded(asked), tiny_pipeline()(asked), strict=True):
        np.testing.assert_allclose(cell["change"], wanted["change"], atol=1e-6, rtol=0)


def test_the_folder_holds_the_code_it_needs(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in CODE.glob("*_gppc.py")}
    tiny_extractor().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} < names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_gppc.GppcForPerturbationPrediction"
    assert config["auto_map"]["AutoConfig"] == "configuration_gppc.GppcConfig"
    extractor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert extractor["auto_map"]["AutoFeatureExtractor"] == "feature_extraction_gppc.GppcFeatureExtractor"
    assert "_genes_of" not in extractor
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".pt"))]
