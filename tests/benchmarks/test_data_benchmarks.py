"""The data benchmarks run, on a store of a few cells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench_census_pairs", "bench_collator"])
def test_smoke(name):
    if name == "bench_census_pairs":
        pytest.importorskip("tiledbsoma_ml")  # the peer, of the extra `benchmarks`
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
