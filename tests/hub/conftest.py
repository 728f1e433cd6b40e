"""A loopback Hub for each test, and client processes that know nothing else."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import HubServer

TOKEN = "hf_test_token"


@pytest.fixture
def hub(tmp_path):
    """A running [`HubServer`] with the user `tester` and a second one, `other`."""
    with HubServer(tmp_path / "hub", {TOKEN: ("tester", "write"), "hf_other_token": ("other", "write")}) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Runs Python code in a new process against the loopback Hub; returns what it printed as JSON."""

    def run(code: str, token: str = TOKEN, home: str = "home", cwd=None, isolated: bool = False, **environment):
        keep = {key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "LANG") if key in os.environ}
        environment = {
            **keep,
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            **hub.environment(tmp_path / home, token),
            **environment,
        }
        command = [sys.executable, *(["-P"] if isolated else []), "-c", code]
        result = subprocess.run(
            command, env=environment, cwd=cwd or tmp_path, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run
