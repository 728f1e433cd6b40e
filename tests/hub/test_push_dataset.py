"""The data-set repository: Parquet of the same rows, a card that counts them, a pairs folder again."""

import json

import pyarrow.parquet as pq
import pytest
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard
from tiny_pairs import write_pairs_folder

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.schema import PAIR_SCHEMA
from hub_card.dataset_card import stage_dataset
from hub_card.push import push_dataset

TOKEN = "hf_test_token"
EXPECTED = {
    "README.md",
    "manifest.json",
    "genes.parquet",
    "panels.parquet",
    "train/shard-00000.parquet",
    "test/shard-00000.parquet",
}


@pytest.fixture
def push(hub, in_process):
    """Pushes pairs to the loopback Hub without waiting."""

    def run(folder, **options):
        return push_dataset(folder, "tester/pairs", token=TOKEN, endpoint=hub.url, **options)

    return run


def download(hub, folder):
    for name, content in hub.files("dataset", "tester/pairs").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return PairFolder(folder)


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_what_arrives_is_the_same_pairs_folder(hub, push, tmp_path, file_format):
    local = PairFolder(write_pairs_folder(tmp_path / "local", file_format))
    report = push(local.path)
    assert set(report.uploaded) == EXPECTED
    assert hub.repository("dataset", "tester/pairs").private
    remote = download(hub, tmp_path / "remote")
    remote.verify()
    assert remote.splits == local.splits == ["train", "test"]
    for split in local.splits:
        assert remote.split(split).equals(local.split(split))
    assert remote.genes.equals(local.genes)
    assert (remote.panels == local.panels).all()
    assert remote.manifest["options"]["query"] == {"uri": "cells.soma", "obs_filter": "tissue == 'blood'"}
    assert remote.manifest["report"] == local.manifest["report"]
    assert (remote.manifest["digest"] == local.manifest["digest"]) is (file_format == "parquet")


def test_repeating_commits_nothing_and_interruptions_do_not_double(hub, push, pairs_folder):
    for pattern in ("PUT /lfs/", "POST /api/datasets/.*/commit", "POST /.*/objects/batch"):
        hub.fail(pattern, drop="middle")
        hub.fail(pattern, status=429)
        hub.fail(pattern, status=500)
    hub.fail("POST /api/datasets/.*/commit", drop="after")
    first = push(pairs_folder)
    again = push(pairs_folder)
    assert first.commit == again.commit
    assert again.uploaded == []
    assert hub.history("dataset", "tester/pairs") == ["initial commit", "Upload with gppc push"]
    assert set(hub.files("dataset", "tester/pairs")) == EXPECTED | {".gitattributes"}


def test_shards_that_are_gone_are_removed(hub, push, pairs_folder, tmp_path):
    push(pairs_folder)
    hub.commit("dataset", "tester/pairs", {"train/shard-00001.parquet": b"PAR1 of an older build"})
    report = push(pairs_folder)
    assert report.deleted == ["train/shard-00001.parquet"]
    assert set(hub.files("dataset", "tester/pairs")) == EXPECTED | {".gitattributes"}


def test_the_card_counts_what_is_there(pairs_folder, tmp_path):
    files = stage_dataset(pairs_folder, tmp_path / "staging", license="cc-by-4.0")
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.data.size_categories == ["n<1K"]
    infos = DatasetInfosDict.from_dataset_card_data(card.data)
    assert set(infos) == {"default", "genes", "panels"}
    rows = {name: {split: info.num_examples for split, info in part.splits.items()} for name, part in infos.items()}
    assert rows == {"default": {"train": 7, "test": 3}, "genes": {"train": 12}, "panels": {"train": 2}}
    for split in ("train", "test"):
        table = pq.read_table(files[f"{split}/shard-00000.parquet"])
        assert infos["default"].splits[split].num_bytes == table.nbytes
        assert table.schema.remove_metadata() == PAIR_SCHEMA
    sizes = [files[f"{split}/shard-00000.parquet"].stat().st_size for split in ("train", "test")]
    assert infos["default"].download_size == sum(sizes)
    assert infos["default"].features.arrow_schema.remove_metadata() == PAIR_SCHEMA
    assert {entry["config_name"] for entry in card.data.configs} == set(infos)
    for fact in (
        "| train | 7 | 1 |",
        "| test | 3 | 1 |",
        "| genes | 12 |",
        '"no_context": 3',
        "| cells from | cells.soma |",
        "`tissue == 'blood'`",
    ):
        assert fact in card.text
    assert "/somewhere" not in str(card) and "$" not in card.text


def test_what_is_no_pairs_folder_is_refused(hub, push, pairs_folder, tmp_path):
    with pytest.raises(ValueError, match="is not a pairs folder"):
        push(tmp_path)
    shard = pairs_folder / "train" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        push(pairs_folder)
    assert hub.requests == []


def test_a_data_set_of_something_else_is_not_written_over(hub, push, pairs_folder):
    hub.create("dataset", "tester/pairs", private=True)
    hub.commit("dataset", "tester/pairs", {"data.csv": b"1,2", "manifest.json": json.dumps({}).encode()})
    with pytest.raises(ValueError, match=r"holds other content .*`data.csv`"):
        push(pairs_folder)
