"""Streaming: every row once, disjoint over ranks and workers, resumable anywhere."""

import itertools
import json
import multiprocessing
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from pair_store import make_store

from data_scripts.batches.stream_pairs import PairStream, n_rounds, rounds_of, streamed_shards
from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs, plan_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_plan import PairPlan


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


SMALL = {"batch_size": 7, "pool_shards": 2}


def flat(batches) -> list:
    return [row for batch in batches for row in batch]


def test_first_epoch_has_the_rows_of_a_build(plan, built):
    rows = flat(PairStream(plan, **SMALL, transform=keys))
    assert Counter(rows) == Counter(keys(built.split("train")))
    assert rows != keys(built.split("train"))


def test_epochs_differ_and_repeat(plan):
    stream = PairStream(plan, **SMALL, transform=keys)
    first, second = flat(stream), flat(stream)
    assert stream.epoch == 2
    assert {row[0] for row in first} == {row[0] for row in second} and Counter(first) != Counter(second)
    again = PairStream(plan, **SMALL, transform=keys)
    again.load_state_dict({**again.state_dict(), "positions": [[1, 0, 0]]})
    assert flat(again) == second


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_the_rows_out(plan, built, world_size):
    parts = [
        flat(PairStream(plan, **SMALL, rank=rank, world_size=world_size, transform=keys)) for rank in range(world_size)
    ]
    assert Counter(row for part in parts for row in part) == Counter(keys(built.split("train")))
    cells = [{row[0] for row in part} for part in parts]
    assert sum(map(len, cells)) == len(set().union(*cells))


def test_resumes_at_any_batch(plan):
    whole = list(PairStream(plan, **SMALL, transform=keys))
    for stop in range(0, len(whole) + 1):
        stream = PairStream(plan, **SMALL, transform=keys)
        batches = iter(stream)
        head = [next(batches) for _ in range(stop)]
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PairStream(plan, **SMALL, transform=keys)
        resumed.load_state_dict(state)
        assert head + list(resumed) == whole


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers forked from a process that has imported what they need; each would take seconds to import it anew.

    Spawned ones, as a run has them, are in tests/training/test_streaming_run.py.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_scripts.batches.stream_pairs", __name__])
    loader = torch.utils.data.DataLoader
    monkeypatch.setattr(
        torch.utils.data,
        "DataLoader",
        lambda *args, **kwargs: loader(*args, **kwargs | {"multiprocessing_context": context}),
    )


def test_worker_processes(plan, built, forked_workers):
    stream = PairStream(plan, **SMALL, num_workers=2, transform=keys)
    before = torch.get_rng_state()
    batches = iter(stream)
    head = [next(batches) for _ in range(5)]
    state = stream.state_dict()
    whole = head + list(batches)
    assert torch.equal(torch.get_rng_state(), before)  # the model's numbers go on as without workers
    assert Counter(flat(whole)) == Counter(keys(built.split("train")))
    resumed = PairStream(plan, **SMALL, num_workers=2, transform=keys)
    resumed.load_state_dict(state)
    assert head + list(resumed) == whole


ENDLESS = {"endless": True, "transform": keys}


def epochs_of(stream, n_epochs: int) -> list[list]:
    """Rows of the first epochs of an endless stream with one reader."""
    epochs = [[] for _ in range(n_epochs)]
    for rows in stream:
        epoch = stream.positions[0][0]
        if epoch >= n_epochs:
            return epochs
        epochs[epoch] += rows
    raise AssertionError("an endless stream ended")


@pytest.mark.parametrize("world_size", [1, 3])
def test_endless_streams_go_on_and_share_every_epoch_out(plan, built, world_size):
    ranks = [
        epochs_of(PairStream(plan, **SMALL, rank=rank, world_size=world_size, **ENDLESS), 3)
        for rank in range(world_size)
    ]
    epochs = [Counter(row for rank in ranks for row in rank[epoch]) for epoch in range(3)]
    assert epochs[0] == Counter(keys(built.split("train")))
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in range(3):
        cells = [row[0] for rank in ranks for row in rank[epoch]]
        assert len(cells) == len(set(cells)) and set(cells) == {row[0] for row in epochs[0]}


def test_the_longer_share_goes_round(plan):
    streams = [PairStream(plan, **SMALL, rank=rank, world_size=3, **ENDLESS) for rank in range(3)]
    shares = [[len(rows) for rows in epochs_of(stream, 3)] for stream in streams]
    # 8 shards for 3 ranks: one of them has two instead of three, another one in each epoch.
    shortest = [min(range(3), key=lambda rank, epoch=epoch: shares[rank][epoch]) for epoch in range(3)]
    assert sorted(shortest) == [0, 1, 2]


def test_endless_streams_resume_at_any_batch(plan):
    whole = list(itertools.islice(PairStream(plan, **SMALL, **ENDLESS), 45))
    for stop in range(0, 45, 2):
        stream = PairStream(plan, **SMALL, **ENDLESS)
        head = list(itertools.islice(stream, stop))
        resumed = PairStream(plan, **SMALL, **ENDLESS)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert head + list(itertools.islice(resumed, 45 - stop)) == whole


def test_endless_workers_resume_across_epochs(plan, forked_workers):
    options = {"batch_size": 7, "pool_shards": 1}
    stream = PairStream(plan, **options, num_workers=2, **ENDLESS)
    batches = iter(stream)
    head = list(itertools.islice(batches, 31))
    state = stream.state_dict()
    assert state["positions"][0][0] > 0  # in another epoch
    tail = list(itertools.islice(batches, 14))
    resumed = PairStream(plan, **options, num_workers=2, **ENDLESS)
    resumed.load_state_dict(state)
    assert list(itertools.islice(resumed, 14)) == tail
    again = PairStream(plan, **options, num_workers=2, **ENDLESS)
    assert list(itertools.islice(again, 31)) == head


def test_too_few_shards_for_the_readers(plan):
    with pytest.raises(ValueError, match=r"8 shard\(s\) for 10 readers"):
        PairStream(plan, **SMALL, num_workers=5, world_size=2, endless=True)


@pytest.mark.parametrize(("n_shards", "pool"), [(1, 1), (1, 3), (3, 3), (8, 1), (8, 3), (5, 7), (40, 12)])
def test_every_shard_has_its_rounds(n_shards, pool):
    n = n_rounds(n_shards, pool)
    mixed = [[shard for shard in range(n_shards) if number in rounds_of(shard, n_shards, pool)] for number in range(n)]
    assert all(len(rounds_of(shard, n_shards, pool)) for shard in range(n_shards))
    if n_shards < pool:
        assert mixed == [list(range(n_shards))]
    else:
        assert mixed == [list(range(number, number + pool)) for number in range(n)]


def test_a_batch_mixes_the_shards_of_its_pool(plan, built):
    options = {"batch_size": 10**6, "pool_shards": 4}
    batches = list(PairStream(plan, **options, transform=keys))
    assert Counter(flat(batches)) == Counter(keys(built.split("train")))
    bounds = PairPlan(plan).content["bounds"]
    for rows in batches:  # whole rounds
        shards = np.searchsorted(bounds, [row[0] for row in rows], side="right")
        assert len(set(shards.tolist())) == 4


def test_shards_without_the_split_are_not_read(tmp_path):
    """A store whose first data set is all for testing: its shards are no pools of the training stream."""
    store = make_store(tmp_path / "store")
    rules = [{"where": {"dataset_id": "A"}, "split": "test"}]
    mapping = {"query": {"uri": str(store)}, "shard_cells": 10, "splits": {"rules": rules}}
    plan = plan_pairs(from_mapping(PairOptions, mapping), tmp_path / "plan", progress=False)
    shards = streamed_shards(plan)
    assert 0 < len(shards) < plan.n_shards
    read = {row[0] for row in flat(PairStream(plan.out, **SMALL, transform=keys))}
    split = dict(zip(plan.cells.column("soma_joinid").to_pylist(), plan.cells.column("split").to_pylist()))
    assert read and all(split[cell] == 0 for cell in read)


def test_a_store_truncated_meanwhile_ends_the_stream(tmp_path):
    """With an error, not with fewer rows."""
    store = make_store(tmp_path / "store")
    mapping = {"query": {"uri": str(store)}, "shard_cells": 15, "splits": {"rules": []}}
    plan = plan_pairs(from_mapping(PairOptions, mapping), tmp_path / "plan", progress=False)
    fragments = sorted(store.rglob("raw/__fragments/*"))
    for path in fragments[len(fragments) // 2 :]:
        shutil.rmtree(path)
    for path in sorted(store.rglob("raw/__commits/*"))[len(fragments) // 2 :]:
        path.unlink()
    with pytest.raises(ValueError, match="the store is damaged"):
        list(PairStream(plan.out, **SMALL))


def test_a_sample_is_written_and_the_rest_streamed(options, built, tmp_path):
    folder = build_pairs(options, tmp_path / "sampled", progress=False, train_rows=20)
    rows = keys(folder.split("train"))
    assert 20 <= len(rows) <= 20 + 8  # rounded up in each of 8 shards
    assert set(rows) < set(keys(built.split("train"))) and len(set(rows)) == len(rows)
    assert folder.split("test").equals(built.split("test"))
    assert folder.genes.equals(built.genes) and (folder.panels == built.panels).all()
    report = folder.manifest["report"]["splits"]
    assert report["train"] == {"cells": built.manifest["report"]["splits"]["train"]["cells"]}
    assert report["test"] == built.manifest["report"]["splits"]["test"]
    assert Counter(flat(PairStream(folder.path, **SMALL, transform=keys))) == Counter(keys(built.split("train")))
    # The same again is opened, another one refused.
    assert build_pairs(options, folder.path, progress=False, train_rows=20).manifest == folder.manifest
    with pytest.raises(ValueError, match="train_rows was 20, is None"):
        build_pairs(options, folder.path, progress=False)
    everything = build_pairs(options, tmp_path / "all", progress=False, train_rows=10_000)
    assert everything.split("train").equals(built.split("train"))


def test_refusals(plan, built, options, tmp_path):
    stream = PairStream(plan, **SMALL)
    with pytest.raises(ValueError, match="saved with num_workers 0; this stream has 2"):
        PairStream(plan, **SMALL, num_workers=2).load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=r"has no pair_stream-0\.json"):
        stream.restore(tmp_path)
    with pytest.raises(ValueError, match="`rank` is 2"):
        PairStream(plan, **SMALL, rank=2, world_size=2)
    with pytest.raises(ValueError, match="holds the finished rows"):
        plan_pairs(options, built.path, progress=False)
