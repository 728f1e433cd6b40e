"""Two real processes against one: the same loss, weights and metrics, and launches that fail loudly."""

import json
import subprocess
import sys

import numpy as np
import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.data_loader import BatchSamplerShard
from tiny_runs import (
    ROOT,
    arguments,
    distance,
    environment,
    last_weights,
    launcher,
    logged,
    run,
    train_module,
    write_run_pairs,
)
from torch.utils.data import BatchSampler

from modeling_gppc.training.launch import refuse_single_process
from modeling_gppc.training.trainer import EpochSampler


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def one(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert train_module().main(arguments(pairs, out)) == 0
    return out


def same_run(first, second):
    for name, tolerance in (("loss", 1e-5), ("eval_mse", 1e-6), ("eval_nll", 1e-6), ("eval_linear_mse", 1e-6)):
        assert logged(first, name) == pytest.approx(logged(second, name), abs=tolerance), name
    assert sorted(logged(first, "loss")) == [10, 20, 30, 40, 50]
    assert sorted(logged(first, "eval_mse")) == [20, 40, 50]
    assert distance(last_weights(first), last_weights(second)) < 1e-5


def test_two_processes_equal_one(pairs, one, tmp_path):
    flags = arguments(pairs, tmp_path / "two", training__per_device_train_batch_size=8)
    done = run([*launcher(2), *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "model" / "run.json").read_text())["processes"] == 2
    assert json.loads((one / "model" / "run.json").read_text())["processes"] == 1
    same_run(one, tmp_path / "two")
    assert done.stdout.count("Model folder:") == 1
    results = [json.loads((out / "model" / "results.json").read_text()) for out in (one, tmp_path / "two")]
    mse = [{name: split["methods"]["gppc"]["mse"] for name, split in found["splits"].items()} for found in results]
    assert mse[0] == pytest.approx(mse[1], abs=1e-5)


def test_accumulated_batches_equal_one_batch(pairs, one, tmp_path):
    flags = {"training__per_device_train_batch_size": 8, "training__gradient_accumulation_steps": 2}
    assert train_module().main(arguments(pairs, tmp_path / "run", **flags)) == 0
    same_run(one, tmp_path / "run")


class Rows:
    epoch = 0

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


@pytest.mark.parametrize(("rows", "batch", "processes", "accumulated"), [(203, 8, 2, 1), (17, 2, 2, 2), (64, 4, 3, 1)])
def test_processes_share_the_rows_of_one(rows, batch, processes, accumulated):
    per_step = batch * processes * accumulated
    sampler = EpochSampler(Rows(rows), per_step, seed=3)
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, batch, drop_last=True), processes, index))
        for index in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1  # none waits for a batch that another does not have
    assert len(shards[0]) % accumulated == 0
    seen = [row for shard in shards for part in shard for row in part]
    assert len(seen) == len(set(seen)) == rows // per_step * per_step
    alone = list(BatchSampler(sampler, per_step, drop_last=True))
    for step, wanted in enumerate(alone):
        parts = [shard[step * accumulated : (step + 1) * accumulated] for shard in shards]
        assert sorted(wanted) == sorted(row for shard in parts for part in shard for row in part)


def test_epochs_have_their_own_order():
    rows = Rows(50)
    sampler = EpochSampler(rows, 10, seed=0)
    first, again = list(sampler), list(sampler)
    rows.epoch = 1
    second = list(sampler)
    assert first == again and sorted(first) == sorted(second) == list(range(50)) and first != second
    assert list(EpochSampler(Rows(50), 10, seed=1)) != first
    assert np.mean(np.array(first) == np.array(second)) < 0.3


ACCELERATE_CPU = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({}, None),
        ({"ACCELERATE_USE_CPU": "True"}, None),
        (ACCELERATE_CPU, "--multi_gpu"),
        ({**ACCELERATE_CPU, "WORLD_SIZE": "2", "RANK": "0"}, None),
        ({"MASTER_PORT": "29500"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"}, None),
    ],
)
def test_launches_that_would_be_one_process(variables, refused):
    if refused is None:
        refuse_single_process(variables)
    else:
        with pytest.raises(ValueError, match=refused):
            refuse_single_process(variables)


def test_a_silent_single_process_is_refused(pairs, tmp_path, monkeypatch, capsys):
    """`accelerate launch --cpu` starts one process, here: not even that, but train.py in the environment it would have."""
    flags, started = arguments(pairs, tmp_path / "run"), []
    parsed = launch_command_parser().parse_args(["--cpu", "--num_processes", "2", str(ROOT / "train.py"), *flags])
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda command, env: started.append((command, env)) or FinishedProcess)
        launch_command(parsed)
    ((command, variables),) = started
    assert command == [sys.executable, str(ROOT / "train.py"), *flags]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train_module().main(flags) == 2
    error = "train.py: error: `accelerate launch` was asked for several processes and started one"
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class FinishedProcess:
    returncode = 0

    @staticmethod
    def wait():
        """It has ended."""


def test_environment_is_this_checkout():
    assert environment()["PYTHONPATH"].startswith(str(ROOT))
