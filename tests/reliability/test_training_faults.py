"""Training killed at any moment and started again ends as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import (
    ROOT,
    arguments,
    distance,
    environment,
    last_weights,
    launcher,
    logged,
    train_module,
    write_run_pairs,
)

from modeling_gppc.training import checkpoints
from modeling_gppc.training.checkpoints import LISTING, UNFINISHED, is_whole, last_checkpoint, publish, rotate
from modeling_gppc.training.trainer import GppcTrainer

# Dropout on: the random numbers must go on where they were. 203 rows are 12 steps of 16, so 30 steps are 3 epochs.
RUN = {
    "training__max_steps": 30,
    "training__eval_steps": 4,
    "training__save_steps": 4,
    "training__logging_steps": 1,
    "model__hidden_dropout_prob": 0.2,
}
ACCUMULATED = {**RUN, "training__per_device_train_batch_size": 8, "training__gradient_accumulation_steps": 2}


class Killed(BaseException):
    """Ends a run without any of its handlers, as a kill would."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def uninterrupted(pairs, tmp_path_factory):
    outs = {}
    for name, flags in (("plain", RUN), ("accumulated", ACCUMULATED)):
        outs[name] = tmp_path_factory.mktemp(name) / "run"
        assert train_module().main(arguments(pairs, outs[name], **flags)) == 0
    return outs


def same_end(first: Path, second: Path):
    assert distance(last_weights(first), last_weights(second)) < 1e-6
    for name in ("loss", "eval_mse"):
        assert logged(first, name) == pytest.approx(logged(second, name), abs=1e-6), name
    final = [(out / "model" / "model.safetensors").read_bytes() for out in (first, second)]
    assert len(final[0]) == len(final[1])
    assert json.loads((first / "model" / "results.json").read_text())["splits"].keys()


def kill_at(monkeypatch, owner, name: str, call: int):
    """Ends the run at the given call of a function."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("kind", "owner", "name", "call"),
    [
        ("plain", GppcTrainer, "training_step", 2),  # before any checkpoint
        ("plain", GppcTrainer, "training_step", 11),  # within an epoch
        ("plain", GppcTrainer, "training_step", 13),  # at the beginning of the second epoch, checkpoint at its end
        ("plain", GppcTrainer, "training_step", 30),
        ("accumulated", GppcTrainer, "training_step", 40),  # between the batches of a step
        ("plain", GppcTrainer, "_save_optimizer_and_scheduler", 2),
        ("plain", GppcTrainer, "_save_rng_state", 2),
        ("plain", checkpoints, "make_durable", 12),
        ("plain", checkpoints.os, "rename", 2),
        ("plain", checkpoints.shutil, "rmtree", 6),
        ("plain", GppcTrainer, "train_or_load", 1),
        ("plain", GppcTrainer, "whole_model", 1),  # training is over, nothing is saved yet
    ],
)
def test_a_killed_run_goes_on(pairs, uninterrupted, tmp_path, kind, owner, name, call):
    out, flags = tmp_path / "run", {"plain": RUN, "accumulated": ACCUMULATED}[kind]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, owner, name, call)
        train_module().main(arguments(pairs, out, **flags))
    assert train_module().main([*arguments(pairs, out, **flags), "--resume"]) == 0
    same_end(out, uninterrupted[kind])


def test_a_finished_run_resumed_stays_as_it_is(pairs, uninterrupted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted["plain"], out)
    before = last_weights(out), (out / "model" / "model.safetensors").read_bytes()
    assert train_module().main([*arguments(pairs, out, **RUN), "--resume"]) == 0
    assert distance(before[0], last_weights(out)) == 0
    assert (out / "model" / "model.safetensors").read_bytes() == before[1]


def test_early_stopping_is_the_same_after_a_kill(pairs, tmp_path):
    flags = {**RUN, "training__early_stopping_patience": 1, "training__learning_rate": 0.3}
    assert train_module().main(arguments(pairs, tmp_path / "whole", **flags)) == 0
    stopped = max(logged(tmp_path / "whole", "eval_mse"))
    assert stopped < 30
    for call in (stopped - 1, stopped):
        out = tmp_path / f"killed-{call}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, GppcTrainer, "training_step", call)
            train_module().main(arguments(pairs, out, **flags))
        assert train_module().main([*arguments(pairs, out, **flags), "--resume"]) == 0
        same_end(out, tmp_path / "whole")
    # Killed after it had stopped: no step more.
    assert train_module().main([*arguments(pairs, tmp_path / "whole", **flags), "--resume"]) == 0
    assert max(logged(tmp_path / "whole", "eval_mse")) == stopped


def test_a_real_kill(pairs, uninterrupted, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(pairs, out, **RUN)]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while not list(out.glob("checkpoint-*")) and time.monotonic() < limit:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train_module().main([*arguments(pairs, out, **RUN), "--resume"]) == 0
    same_end(out, uninterrupted["plain"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_killed_at_ten_random_moments(pairs, tmp_path):
    flags = {**ACCUMULATED, "training__per_device_train_batch_size": 4, "training__max_steps": 60}
    whole = tmp_path / "whole"
    assert (
        subprocess.run([*launcher(2), *arguments(pairs, whole, **flags)], env=environment(), cwd=ROOT).returncode == 0
    )
    out, generator, kills = tmp_path / "killed", random.Random(0), 0
    began = time.monotonic()
    subprocess.run([*launcher(2), *arguments(pairs, tmp_path / "timed", **flags)], env=environment(), cwd=ROOT)
    took = time.monotonic() - began
    while kills < 10:
        resume = ["--resume"] if out.exists() else []
        process = subprocess.Popen(
            [*launcher(2), *arguments(pairs, out, **flags), *resume],
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=generator.uniform(0.2, 1.0) * took)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        kills += 1
    last = [*launcher(2), *arguments(pairs, out, **flags), "--resume"]
    assert subprocess.run(last, env=environment(), cwd=ROOT).returncode == 0
    same_end(out, whole)


def write_checkpoint(out: Path, step: int) -> Path:
    written = out / UNFINISHED / f"checkpoint-{step}"
    written.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"):
        (written / name).write_bytes(bytes(step + len(name)))
    return written


@pytest.mark.parametrize("damage", ["truncate", "remove", "no listing", "bad listing", "empty"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, damage, caplog):
    for step in (5, 10):
        publish(write_checkpoint(tmp_path, step), tmp_path)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    newest = tmp_path / "checkpoint-10"
    if damage == "truncate":
        (newest / "optimizer.pt").write_bytes(b"")
    elif damage == "remove":
        (newest / "rng_state.pth").unlink()
    elif damage == "no listing":
        (newest / LISTING).unlink()
    elif damage == "bad listing":
        (newest / LISTING).write_text("[1,")
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert not is_whole(newest)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert "checkpoint-10 is half-written and skipped" in caplog.text
    # Training goes past the damaged one again and replaces it.
    assert is_whole(publish(write_checkpoint(tmp_path, 10), tmp_path))
    assert last_checkpoint(tmp_path) == newest


def test_training_resumes_from_the_one_before_a_damaged_checkpoint(pairs, uninterrupted, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, GppcTrainer, "training_step", 14)
        train_module().main(arguments(pairs, out, **RUN))
    (out / "checkpoint-12" / "optimizer.pt").write_bytes(b"half")
    assert last_checkpoint(out).name != "checkpoint-12"
    assert train_module().main([*arguments(pairs, out, **RUN), "--resume"]) == 0
    same_end(out, uninterrupted["plain"])


@settings(max_examples=30)
@given(
    steps=st.lists(st.booleans(), min_size=1, max_size=6),
    keep=st.integers(1, 3),
    call=st.integers(1, 12),
    name=st.sampled_from(["rename", "rmtree"]),
)
def test_rotation_never_leaves_none(tmp_path_factory, steps, keep, call, name):
    out = tmp_path_factory.mktemp("rotation")
    best, published, killed = None, [], False
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, checkpoints.os if name == "rename" else checkpoints.shutil, name, call)
        try:
            for step, is_best in enumerate(steps, start=1):
                publish(write_checkpoint(out, step), out)
                published.append(step)
                best = step if is_best or best is None else best
                rotate(out, keep, best)
        except Killed:
            killed = True
    left = {step for step, _ in checkpoints.checkpoints(out)}
    if published:
        # A kill between the rename and the deletion leaves more, never fewer.
        assert {published[-1], best} <= left or killed
        assert last_checkpoint(out) == out / f"checkpoint-{max(left)}"
        assert best in left and all(is_whole(path) for _, path in checkpoints.checkpoints(out))
    if not killed:
        assert len(left) <= max(keep, len({published[-1], best}))


def test_temporary_folders_are_not_mistaken_for_checkpoints(tmp_path):
    write_checkpoint(tmp_path, 7)
    (tmp_path / "checkpoint-last").mkdir()
    assert last_checkpoint(tmp_path) is None
    checkpoints.clear_unfinished(tmp_path)
    assert not (tmp_path / UNFINISHED).exists()
