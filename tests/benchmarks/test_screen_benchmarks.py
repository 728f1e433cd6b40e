"""The tables of screens are made, on cells of seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("screen_tables", "## smoke, fine-tuned_features\n\nsmoke, fine-tuned: 6 perturbations"),
        ("external_interventions", "| smoke | gppc | 6 | 0.9"),
    ],
)
def test_smoke(name, words):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
