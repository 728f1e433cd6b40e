"""The model's benchmarks run, on a few genes, and write their figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = {
    "bench_screen_prediction": ("ratio_one_by_one", "largest_difference", "peak_rss_gb"),
    "bench_model_training": ("exponent", "options", "runs", "sizes", "matmul_per_second"),
    "out_of_distribution": ("summary", "cases"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_smoke(name, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())
    assert set(FIGURES[name]) <= set(figures)
    if name == "bench_screen_prediction":
        assert figures["largest_difference"] < 1e-5 and figures["ratio_one_by_one"] > 1
    if name == "bench_model_training":
        assert all("error" not in run for run in figures["runs"])
