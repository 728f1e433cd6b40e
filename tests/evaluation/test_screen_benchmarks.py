"""The benchmarks of screens run, on cells of seconds."""

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
        ("bench_screens", "gppc: covariance"),
        ("bench_response_size", "gppc, shipped defaults"),
        ("screen_tables", "## smoke, fine-tuned, features: 6 rows"),
    ],
)
def test_smoke(name, words):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
