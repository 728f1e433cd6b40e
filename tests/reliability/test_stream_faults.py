"""Streaming training killed at random moments sees the rows of an uninterrupted one, in the same order."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import plan_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.synthetic.network import SyntheticConfig
from data_scripts.synthetic.network_store import write_synthetic

ROOT = Path(__file__).parents[2]
N_BATCHES = 70  # of 400 cells in batches of 16: several epochs


def start(plan, saved) -> subprocess.Popen:
    arguments = [
        sys.executable,
        str(Path(__file__).with_name("kill_stream.py")),
        str(plan),
        str(saved),
        str(N_BATCHES),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_five_kills(tmp_path):
    store = tmp_path / "store"
    write_synthetic(store, SyntheticConfig(form="count", n_cells=400, n_genes=60), progress=False)
    mapping = {"query": {"uri": str(store)}, "shard_cells": 40, "splits": {"rules": []}}
    plan = plan_pairs(from_mapping(PairOptions, mapping), tmp_path / "plan", progress=False).out
    began = time.perf_counter()
    whole = start(plan, tmp_path / "whole.json")
    whole.stdout.readline()
    began = time.perf_counter()
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.perf_counter() - began
    rng = random.Random(0)
    kills = 0
    while kills < 5:
        process = start(plan, tmp_path / "killed.json")
        process.stdout.readline()
        time.sleep(rng.uniform(0, seconds / 3))
        process.kill()
        kills += process.wait() == -9
        if process.returncode == 0:  # it had ended: begin again
            (tmp_path / "killed.json").unlink()
    process = start(plan, tmp_path / "killed.json")
    assert process.wait() == 0, process.stderr.read()
    results = [json.loads((tmp_path / name).read_text()) for name in ("whole.json", "killed.json")]
    assert results[0]["done"] == results[1]["done"] == N_BATCHES
    assert results[0]["learned"] == results[1]["learned"]
