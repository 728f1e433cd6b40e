"""The model's benchmarks run, on a few genes, and print their figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def smoke(name: str) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_training_steps():
    text = smoke("bench_model_training")
    assert "| `tiny` |" in text and "time a cell ~ genes^" in text


@pytest.mark.slow
def test_screen_prediction():
    text = smoke("bench_screen_prediction")
    assert float(re.search(r"encoded once is ([\d.,]+) x", text)[1].replace(",", "")) > 1
    assert float(re.search(r"largest difference from one by one (\S+);", text)[1]) < 1e-5
