"""The benchmark of the pair build runs, on a store of a few cells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smoke():
    pytest.importorskip("tiledbsoma_ml")  # the peer, of the extra `benchmarks`
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_census_pairs.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
