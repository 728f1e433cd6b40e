"""The tables of screens are made, on cells of seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smoke():
    command = [sys.executable, str(ROOT / "benchmarks" / "screen_tables.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "## smoke, fine-tuned_features\n\nsmoke, fine-tuned: 6 perturbations" in done.stdout
