"""Streaming training killed for real (-9) at random moments and started again ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from stepping_train import read_progress
from tiny_runs import ROOT, distance, environment, last_weights, launcher, logged, stream_arguments, write_stream_store

from modeling_gppc.training.checkpoints import UNFINISHED

TESTS = Path(__file__).parents[1]
STEPS = 60
# Dropout on, accumulation, background workers: everything that has a state of its own.
FLAGS = {
    "training__max_steps": STEPS,
    "training__eval_steps": 4,
    "training__save_steps": 4,
    "training__logging_steps": 1,
    "training__per_device_train_batch_size": 8,
    "training__gradient_accumulation_steps": 2,
    "training__dataloader_num_workers": 1,
    "model__hidden_dropout_prob": 0.2,
}
BATCHES = STEPS * 2
POLL = 0.003  # seconds between two looks at the run


def command(processes: int) -> list[str]:
    script = str(TESTS / "stepping_train.py")
    return [sys.executable, script] if processes == 1 else [*launcher(processes)[:-1], script]


def start(processes: int, store: Path, out: Path, *more: str) -> psutil.Popen:
    variables = environment() | {"PROGRESS": str(out.parent / "progress")}
    variables["PYTHONPATH"] = os.pathsep.join([str(TESTS), variables["PYTHONPATH"]])
    with open(out.parent / "output.txt", "ab") as log:
        arguments = [*command(processes), *stream_arguments(store, out, **FLAGS), *more]
        return psutil.Popen(arguments, env=variables, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def kill_all(process: psutil.Popen, processes: int, generator: random.Random) -> int:
    """Kills a run; returns how many processes it was made of.

    Of several processes the launcher, the trainers and their workers are killed in random order; of one the trainer
    alone, whose workers have to notice.
    """
    family = [process, *process.children(recursive=True)]
    killed = [process] if processes == 1 else generator.sample(family, len(family))
    for member in killed:
        if member.is_running():
            member.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    return len(family)


def run_to_end(processes: int, store: Path, out: Path, *more: str) -> None:
    process = start(processes, store, out, *more)
    assert process.wait(timeout=600) == 0, (out.parent / "output.txt").read_text()[-3000:]


def moments(n: int, generator: random.Random) -> list[tuple[str, int]]:
    """`n` moments, ascending: before training (the store is being read), in a batch, or while a checkpoint is written."""
    batches = sorted(generator.sample(range(1, BATCHES - 8), n - 1))
    return [("preparing", 0), *((generator.choice(["training", "saving"]), batch) for batch in batches)]


def has_come(kind: str, batch: int, out: Path) -> bool:
    """Whether the moment to kill is there."""
    if kind == "preparing":
        return (out / "pairs" / "work").is_dir()
    if read_progress(out.parent / "progress") < batch:
        return False
    unfinished = out / UNFINISHED
    return kind == "training" or (unfinished.is_dir() and any(unfinished.iterdir()))


def kill_at(kind: str, batch: int, processes: int, store: Path, out: Path, generator: random.Random) -> None:
    (out.parent / "progress").unlink(missing_ok=True)
    process = start(processes, store, out, *(["--resume"] if out.exists() else []))
    while not has_come(kind, batch, out):
        try:
            process.wait(timeout=POLL)
        except psutil.TimeoutExpired:
            continue
        raise AssertionError(f"ended before {kind} {batch}: {(out.parent / 'output.txt').read_text()[-3000:]}")
    assert kill_all(process, processes, generator) >= processes


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "n_kills", "seed"), [(2, 10, 0), (1, 5, 1)])
def test_killed_at_random_moments(tmp_path, processes, n_kills, seed):
    store = write_stream_store(tmp_path)
    whole, out = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    whole.parent.mkdir()
    out.parent.mkdir()
    run_to_end(processes, store, whole)
    generator = random.Random(seed)
    for kind, batch in moments(n_kills, generator):
        kill_at(kind, batch, processes, store, out, generator)
    run_to_end(processes, store, out, "--resume")
    assert distance(last_weights(out), last_weights(whole)) < 1e-6
    assert logged(out, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-6)
    assert logged(out, "eval_mse") == pytest.approx(logged(whole, "eval_mse"), abs=1e-6)
    assert sorted(logged(out, "loss")) == list(range(1, STEPS + 1))
