"""`data.stream`: training straight from a store, in one process: what is written, what is learned, going on after a kill."""

import itertools
import json

import numpy as np
import pytest
import torch
from tiny_runs import arguments, distance, last_weights, logged, stream_arguments, train_module, write_stream_store

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.options import from_mapping
from data_scripts.pairs.pair_folder import PairFolder
from gppc.run_options import RunOptions
from modeling_gppc.training.stream_rows import TableCollator, open_stream, sample_rows
from modeling_gppc.training.trainer import GppcTrainer

SHORT = {"training__max_steps": 30, "training__eval_steps": 4, "training__save_steps": 4, "training__logging_steps": 1}
RUN = {**SHORT, "training__gradient_accumulation_steps": 2, "model__hidden_dropout_prob": 0.2}


class Killed(BaseException):
    """Ends a run without any of its handlers, as a kill would."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_stream_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def streamed(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed") / "run"
    assert train_module().main(stream_arguments(store, out, **RUN)) == 0
    return out


@pytest.fixture(scope="module")
def stored(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "run"
    assert train_module().main(stream_arguments(store, out, data__stream="false", **RUN)) == 0
    return out


def test_a_batch_of_a_stream_is_a_batch_of_a_folder(stored):
    folder = PairFolder(stored / "pairs")
    table = folder.split("train").slice(5, 20)
    collator = PairCollator(folder.panels)
    wanted = collator(PairDataset(folder.split("train"), folder.pairings).__getitems__(range(5, 25)))
    found = TableCollator(collator, folder.pairings)(table)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)


def test_query_genes_differ_from_batch_to_batch_and_are_repeatable(stored):
    folder = PairFolder(stored / "pairs")
    collate = TableCollator(PairCollator(folder.panels, seed=3, n_query_genes=8), folder.pairings)
    tables = [folder.split("train").slice(start, 10) for start in (0, 10, 20)]
    queries = [collate(table)["query_ids"].tolist() for table in tables]
    assert queries == [collate(table)["query_ids"].tolist() for table in tables]
    assert len({tuple(genes) for genes in queries}) == 3


def test_a_streaming_run_leaves_what_any_run_leaves(streamed, stored):
    files = [{str(path.relative_to(out)) for path in (out / "model").rglob("*")} for out in (streamed, stored)]
    assert files[0] == files[1]
    facts = [json.loads((out / "model" / "run.json").read_text()) for out in (streamed, stored)]
    for name in ("cells", "genes", "store", "parameters", "steps", "processes"):
        assert facts[0][name] == facts[1][name], name
    assert facts[0]["pairs"] == "drawn anew in every epoch, straight from the store" and facts[1]["pairs"] > 0
    assert "straight from the store" in (streamed / "model" / "README.md").read_text()
    # What is scored is the same: validation and test pairs are those that a build writes.
    results = [json.loads((out / "model" / "results.json").read_text())["splits"] for out in (streamed, stored)]
    for split, content in results[0].items():
        assert content["n_pairs"] == results[1][split]["n_pairs"]
        assert content["methods"]["mean"]["mse"] == pytest.approx(
            results[1][split]["methods"]["mean"]["mse"], abs=1e-9
        )


def test_the_closed_form_start_is_that_of_the_stored_rows(streamed, stored):
    # The sample holds every row of so small a store.
    linear = [logged(out, "eval_linear_mse") for out in (streamed, stored)]
    assert linear[0] == pytest.approx(linear[1], abs=1e-7)
    # Cells without structure: there is nothing to learn, but every evaluation sees another network.
    errors = list(logged(streamed, "eval_mse").values())
    assert len(set(errors)) == len(errors) > 5


def test_epochs_and_waiting_are_logged(streamed):
    epochs = logged(streamed, "epoch")
    # 30 steps of 2 batches are more than two epochs of some 20 batches.
    assert epochs[1] == 0 and epochs[30] in (2, 3) and sorted(epochs.values()) == list(epochs.values())
    assert all(0 <= share < 1 for share in logged(streamed, "data_wait_share").values())


def test_a_large_store_leaves_a_sample(store, tmp_path):
    small = {"training__linear_start_cells": 40}
    out = tmp_path / "run"
    assert train_module().main(stream_arguments(store, out, **SHORT, **small)) == 0
    folder = PairFolder(out / "pairs")
    assert 80 <= folder.split("train").num_rows <= 80 + 12  # 2 pairings x 40, rounded up in each shard
    assert (
        folder.manifest["report"]["splits"]["train"]["cells"]
        == json.loads((out / "model" / "run.json").read_text())["cells"]
    )
    with pytest.raises(ValueError, match="train_rows"):
        from data_scripts.pairs.census_pairs import build_pairs

        build_pairs(from_mapping(RunOptions, options_of(out)).pairs, folder.path, progress=False)


def options_of(out) -> dict:
    options = json.loads((out / "options.json").read_text())
    options.pop("processes")
    return options


def test_ranks_of_a_run_share_out_the_cells(streamed):
    options = from_mapping(RunOptions, options_of(streamed))
    folder = PairFolder(streamed / "pairs")
    wanted = folder.split("train").num_rows
    for world_size in (1, 2, 3):
        rows = 0
        for rank in range(world_size):
            stream = open_stream(folder, options.training, 2, rank=rank, world_size=world_size)
            batches = iter(stream)
            while True:  # one epoch of this rank's
                state = stream.state_dict()
                batch = next(batches)
                if stream.epoch > 0:
                    break
                rows += len(batch["input_ids"])
            stream.load_state_dict(state)
            torch.testing.assert_close(next(iter(stream))["labels"], batch["labels"], atol=0, rtol=0)
        assert rows == wanted
    with pytest.raises(ValueError, match=r"makes 12 shard\(s\) for 13 readers \(13 process\(es\) x 1 worker\(s\)\)"):
        open_stream(folder, options.training, 2, rank=0, world_size=13)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("training_step", 3),  # before any checkpoint
        ("training_step", 23),  # within an epoch, between the batches of a step
        ("training_step", 44),
        ("_save_rng_state", 3),
        ("whole_model", 1),  # training is over
    ],
)
def test_a_killed_run_goes_on(store, streamed, tmp_path, name, call):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        original, calls = getattr(GppcTrainer, name), itertools.count(1)

        def counted(*args, **kwargs):
            if next(calls) == call:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(GppcTrainer, name, counted)
        train_module().main(stream_arguments(store, out, **RUN))
    assert train_module().main([*stream_arguments(store, out, **RUN), "--resume"]) == 0
    assert distance(last_weights(out), last_weights(streamed)) < 1e-6
    assert logged(out, "loss") == pytest.approx(logged(streamed, "loss"), abs=1e-6)


def test_a_checkpoint_holds_the_place_in_the_stream(streamed):
    newest = max(streamed.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    state = json.loads((newest / "pair_stream-0.json").read_text())
    listed = json.loads((newest / "checkpoint.json").read_text())
    assert "pair_stream-0.json" in listed and state["positions"][0][0] in (2, 3)


def test_workers_give_the_same_pairs_and_the_same_model(store, tmp_path):
    """A worker process and a thread of this process read one after the other what the same reader would."""
    outs = [tmp_path / str(workers) for workers in (0, 1)]
    flags = {**RUN, "training__max_steps": 8, "training__eval_steps": 8, "training__save_steps": 8}
    for workers, out in enumerate(outs):
        run = stream_arguments(store, out, training__dataloader_num_workers=workers, **flags)
        assert train_module().main(run) == 0
    assert distance(last_weights(outs[0]), last_weights(outs[1])) < 1e-6


def test_other_numbers_of_workers_are_refused(store, streamed, capsys):
    run = stream_arguments(store, streamed, **RUN, training__dataloader_num_workers=1)
    assert train_module().main([*run, "--resume"]) == 2
    assert "`training.dataloader_num_workers` is 0 there and 1 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pairs": "folder"}, "`data.stream` is true with `data.pairs` 'folder', whose rows are finished"),
        ({"screen": "screen.h5ad"}, "`data.stream` is true with `data.screen`"),
        ({"example": "pbmc68k_reduced", "stream_pool_shards": 0}, "`data.stream_pool_shards` is 0"),
        ({"example": "pbmc68k_reduced", "num_proc": 0}, "`data.num_proc` is 0"),
    ],
)
def test_combinations_that_make_no_sense(data, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(RunOptions, {"data": {"stream": True, **data}})


def test_a_stream_always_redraws():
    mapping = {"data": {"stream": True, "example": "pbmc68k_reduced"}, "training": {"redraw_perturbations": False}}
    with pytest.raises(ValueError, match=r"`training\.redraw_perturbations` is false with `data.stream`"):
        from_mapping(RunOptions, mapping)


def test_size_of_the_sample():
    mapping = {"data": {"example": "pbmc68k_reduced"}, "training": {"linear_start_cells": 500}}
    options = from_mapping(RunOptions, mapping)
    assert sample_rows(options.pairs, options.training) == 2 * 500


def test_pairs_of_a_folder_still_train(stored, tmp_path):
    out = tmp_path / "run"
    assert train_module().main(arguments(stored / "pairs", out, **SHORT)) == 0
    assert np.isfinite(list(logged(out, "loss").values())).all()
