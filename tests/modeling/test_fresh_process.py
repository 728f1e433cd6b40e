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
from tiny_model import GENES, tiny_extractor, tiny_model

ROOTS = ("torch", "transformers", "numpy", "huggingface-hub")
ABSENT = ("modeling_gppc", "data_scripts", "hub_card", "gppc", "datasets", "anndata", "pandas", "scipy", "accelerate")
SCRIPT = """
import importlib, json, sys
sys.path.append(sys.argv[1])
present = []
for name in json.loads(sys.argv[4]):
    try:
        importlib.import_module(name)
        present.append(name)
    except ImportError:
        pass
import numpy as np, torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
folder = sys.argv[2]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
given = np.load(sys.argv[3])
state = extractor(given["counts"], library_size=given["library_size"], measured=given["measured"])
change = extractor.perturbation_features("STAT1=ko+IRF1=x3", given["values"])
with torch.no_grad():
    output = model(**state, **change)
np.savez(sys.argv[5], logits=output.logits, logvar=output.logvar)
print(json.dumps({
    "present": present,
    "modules": [type(item).__module__ for item in (config, extractor, model)],
    "names": [type(item).__name__ for item in (config, extractor, model)],
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


def test_predictions_are_equal_without_the_package(bare_environment, tmp_path):
    model, extractor = tiny_model(), tiny_extractor()
    model.save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    counts, measured = rng.poisson(1.5, size=(4, len(GENES))), rng.random((4, len(GENES))) < 0.8
    library_size = counts.sum(axis=1) + 50.0
    values = np.where(measured, np.log1p(1e4 * counts / library_size[:, None]), 0)
    np.savez(tmp_path / "given.npz", counts=counts, measured=measured, library_size=library_size, values=values)
    state = extractor(counts, library_size=library_size, measured=measured)
    with torch.no_grad():
        wanted = model(**state, **extractor.perturbation_features("STAT1=ko+IRF1=x3", values))
    # -I ignores the environment's paths and the working directory, -S the installed packages.
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, bare_environment, tmp_path / "model", tmp_path / "given.npz"]
    command += [json.dumps(ABSENT), tmp_path / "out.npz"]
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if name in os.environ}
    process = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env={**kept, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["present"] == []
    assert said["names"] == ["GppcConfig", "GppcFeatureExtractor", "GppcForPerturbationPrediction"]
    assert all(module.startswith("transformers_modules.") for module in said["modules"])
    output = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(output["logits"], wanted.logits, atol=1e-6, rtol=0)
    np.testing.assert_allclose(output["logvar"], wanted.logvar, atol=1e-6, rtol=0)


def test_the_folder_holds_the_code_it_needs(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_extractor().save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} < names
    assert {"configuration_gppc.py", "modeling_gppc.py", "feature_extraction_gppc.py"} < names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_gppc.GppcForPerturbationPrediction"
    assert config["auto_map"]["AutoConfig"] == "configuration_gppc.GppcConfig"
    extractor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert extractor["auto_map"]["AutoFeatureExtractor"] == "feature_extraction_gppc.GppcFeatureExtractor"
    assert "_lookup" not in extractor
    assert not [name for name in names if name.endswith((".bin", ".pkl", ".pt"))]
