"""Streaming: every row once, disjoint over ranks and workers, resumable anywhere."""

import json
from collections import Counter

import pyarrow as pa
import pytest
from pair_store import make_store

from data_scripts.census_pairs import build_pairs, plan_pairs
from data_scripts.options import from_mapping
from data_scripts.pair_options import PairOptions
from data_scripts.stream_pairs import PairStream, StreamOptions


def keys(table: pa.Table) -> list:
    """What tells a row apart (used as the transform, also in worker processes)."""
    rows = table.select(["source_soma_joinid", "target_soma_joinid", "perturbation_values"]).to_pylist()
    return [(row["source_soma_joinid"], row["target_soma_joinid"], tuple(row["perturbation_values"])) for row in rows]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("stream") / "store")
    rules = [{"by": "cell", "fractions": {"test": 0.2}}]
    mapping = {"query": {"uri": str(store)}, "shard_cells": 15, "splits": {"rules": rules}}
    return from_mapping(PairOptions, mapping)


@pytest.fixture(scope="module")
def plan(options, tmp_path_factory):
    return plan_pairs(options, tmp_path_factory.mktemp("stream") / "plan", progress=False).out


@pytest.fixture(scope="module")
def built(options, tmp_path_factory):
    return build_pairs(options, tmp_path_factory.mktemp("stream") / "built", progress=False)


SMALL = StreamOptions(batch_size=7, pool_shards=2)


def flat(batches) -> list:
    return [row for batch in batches for row in batch]


def test_first_epoch_has_the_rows_of_a_build(plan, built):
    for split in ("train", "test"):
        stream = PairStream(plan, StreamOptions(split=split, batch_size=7), transform=keys)
        rows = flat(stream)
        assert Counter(rows) == Counter(keys(built.split(split)))
        assert rows != keys(built.split(split))


def test_epochs_differ_and_repeat(plan):
    stream = PairStream(plan, SMALL, transform=keys)
    first, second = flat(stream), flat(stream)
    assert stream.epoch == 2
    assert {row[0] for row in first} == {row[0] for row in second} and Counter(first) != Counter(second)
    again = PairStream(plan, SMALL, transform=keys)
    again.go_to_epoch(1)
    assert flat(again) == second


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_the_rows_out(plan, built, world_size):
    parts = [
        flat(PairStream(plan, SMALL, rank=rank, world_size=world_size, transform=keys)) for rank in range(world_size)
    ]
    assert Counter(row for part in parts for row in part) == Counter(keys(built.split("train")))
    cells = [{row[0] for row in part} for part in parts]
    assert sum(map(len, cells)) == len(set().union(*cells))


def test_resumes_at_any_batch(plan):
    whole = list(PairStream(plan, SMALL, transform=keys))
    for stop in range(0, len(whole) + 1):
        stream = PairStream(plan, SMALL, transform=keys)
        batches = iter(stream)
        head = [next(batches) for _ in range(stop)]
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PairStream(plan, SMALL, transform=keys)
        resumed.load_state_dict(state)
        assert head + list(resumed) == whole
        if stop >= 2:  # a caller that fetched two batches ahead of what it used
            resumed.load_state_dict(stream.state_dict(stop - 2))
            assert head[: stop - 2] + list(resumed) == whole


def test_worker_processes(plan, built):
    stream = PairStream(plan, SMALL, num_workers=2, transform=keys)
    whole = list(stream)
    assert Counter(flat(whole)) == Counter(keys(built.split("train")))
    half = PairStream(plan, SMALL, num_workers=2, transform=keys)
    batches = iter(half)
    head = [next(batches) for _ in range(5)]
    resumed = PairStream(plan, SMALL, num_workers=2, transform=keys)
    resumed.load_state_dict(half.state_dict())
    assert head + list(resumed) == whole


def test_refusals(plan, built, options, tmp_path):
    stream = PairStream(plan, SMALL)
    with pytest.raises(ValueError, match="saved with num_workers 0; this stream has 2"):
        PairStream(plan, SMALL, num_workers=2).load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match="`n_batches` is 9; known are 0 to 0"):
        stream.state_dict(9)
    with pytest.raises(ValueError, match="`rank` is 2"):
        PairStream(plan, SMALL, rank=2, world_size=2)
    with pytest.raises(ValueError, match="`split` is 'trian'"):
        StreamOptions(split="trian")
    with pytest.raises(ValueError, match="holds the finished rows"):
        plan_pairs(options, built.path, progress=False)
