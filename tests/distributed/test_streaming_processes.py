"""Two real processes that stream: disjoint cells, none twice, none missing; the sharded model sees the same."""

import json
from collections import Counter
from pathlib import Path

import pytest
from fsdp2_launch import __file__ as fsdp2_launch
from tiny_runs import (
    distance,
    free_port,
    last_weights,
    launcher,
    logged,
    run,
    stream_arguments,
    train_module,
    write_stream_store,
)

from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc.training.arguments import CONFIGS

TESTS = str(Path(__file__).parents[1])
FLAGS = {
    "training__max_steps": 24,
    "training__eval_steps": 8,
    "training__save_steps": 8,
    "training__logging_steps": 1,
    "training__per_device_train_batch_size": 8,
    "training__gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_stream_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def two(store, tmp_path_factory):
    """A run of two processes that noted the cells of every batch, after they were given a store that does not exist."""
    out = tmp_path_factory.mktemp("two") / "run"
    bad = stream_arguments(out.parent / "no-store", out.parent / "bad")
    settings = [
        "--config_file",
        str(CONFIGS / "accelerate" / "cpu_2proc.yaml"),
        "--main_process_port",
        str(free_port()),
    ]
    launch = [*launcher(2)[:4], *settings, str(Path(TESTS) / "stepping_train.py")]
    variables = {"SEEN": str(out.parent / "seen-"), "FIRST": json.dumps(bad)}
    done = run([*launch, *stream_arguments(store, out, **FLAGS)], path=TESTS, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    (out.parent / "stderr").write_text(done.stderr)
    return out


def test_bad_input_ends_both_processes_with_one_line(two):
    errors = (two.parent / "stderr").read_text().splitlines()
    assert sorted(line for line in errors if line.startswith("ended with")) == ["ended with 2"] * 2
    (line,) = [line for line in errors if line.startswith("train.py: error:")]
    assert "no-store does not exist" in line


def test_ranks_see_every_cell_once(store, two):
    """24 steps of 2 x 2 x 8 pairs are three epochs."""
    seen = [[json.loads(line) for line in (two.parent / f"seen-{rank}").read_text().splitlines()] for rank in range(2)]
    assert [len(batches) for batches in seen] == [48, 48]  # no batch came from the other process
    training = set(PairFolder(two / "pairs").split("train").column("source_soma_joinid").to_pylist())
    for epoch in range(2):  # the third is not complete
        ranks = [
            Counter(cell for batch in batches if batch["epoch"] == epoch for cell in batch["cells"])
            for batches in seen
        ]
        assert all(ranks) and not ranks[0].keys() & ranks[1].keys()
        together = ranks[0] + ranks[1]
        assert set(together) == training and set(together.values()) == {1}
    orders = [[batch["cells"] for batch in seen[0] if batch["epoch"] == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_what_two_processes_leave(two):
    facts = json.loads((two / "model" / "run.json").read_text())
    assert facts["processes"] == 2 and facts["steps"] == 24
    assert all((two / "checkpoint-24" / f"pair_stream-{rank}.json").is_file() for rank in range(2))
    assert len(logged(two, "loss")) == 24


def test_other_numbers_of_processes_are_refused(store, two, capsys):
    """One process would read other cells in another order."""
    assert train_module().main([*stream_arguments(store, two, **FLAGS), "--resume"]) == 2
    assert "`processes` is 2 there and 1 here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sharded_model_streams_and_resumes_alike(store, two, tmp_path):
    out = tmp_path / "run"
    settings = ["--config_file", str(CONFIGS / "accelerate" / "fsdp2.yaml"), "--num_processes", "2"]
    launch = [*launcher(2)[:4], *settings, "--main_process_port", str(free_port()), fsdp2_launch]
    first = {**FLAGS, "training__max_steps": 24}
    for resume in ([], ["--resume"]):
        done = run([*launch, *stream_arguments(store, out, **first), *resume], path=TESTS)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (out / "checkpoint-24" / "pytorch_model_fsdp.bin").is_file()  # it was sharded
        assert logged(out, "loss") == pytest.approx(logged(two, "loss"), abs=1e-5)
        assert distance(last_weights(out), last_weights(two)) < 1e-5
        for name in ("checkpoint-24", "model"):
            (out / name).rename(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")  # something is left to do
