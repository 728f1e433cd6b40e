"""A loopback Hub for each test, and client processes that know nothing else."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub.utils._http
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from tiny_model import write_model_folder
from tiny_pairs import write_pairs_folder

TOKEN = "hf_test_token"


@pytest.fixture
def hub(tmp_path):
    """A running [`HubServer`] with the user `tester` and a second one, `other`."""
    with HubServer(tmp_path / "hub", {TOKEN: ("tester", "write"), "hf_other_token": ("other", "write")}) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Runs Python code in a new process against the loopback Hub; returns what it printed as JSON."""

    def run(code: str, token: str = TOKEN, home: str = "home", **environment):
        keep = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LANG") if key in os.environ}
        environment = {
            **keep,
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            **hub.environment(tmp_path / home, token),
            **environment,
        }
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture
def in_process(monkeypatch):
    """Lets the real client of this process reach the loopback Hub, by plain HTTP and without waiting."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.utils.disable_progress_bars()
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("hub_card.hub_upload.sleep", lambda seconds: None)


@pytest.fixture
def model_folder(tmp_path):
    """A complete model folder, with things in it that must stay."""
    return write_model_folder(tmp_path / "model")


@pytest.fixture
def pairs_folder(tmp_path):
    """A pairs folder in Arrow: two splits, two panels, facts that name a machine."""
    return write_pairs_folder(tmp_path / "pairs")
