"""Pairs folder: what is written is what is read, and nothing damaged is opened."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pair_writer import write_pair_folder

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA


def make_rows(n: int) -> pa.Table:
    """Rows with `i % 3` expressed genes and constant context."""
    columns = {}
    for field in PAIR_SCHEMA:
        if pa.types.is_list(field.type):
            columns[field.name] = [list(range(i % 3)) for i in range(n)]
        elif field.type == pa.string():
            columns[field.name] = ["a"] * n
        elif field.type == pa.bool_():
            columns[field.name] = [False] * n
        else:
            columns[field.name] = list(range(n))
    return pa.table(columns, schema=PAIR_SCHEMA)


def make_genes(n: int) -> pa.Table:
    columns = {field.name: [f"G{i}" for i in range(n)] for field in list(GENE_SCHEMA)[:2]}
    return pa.table(columns | {field.name: list(range(n)) for field in list(GENE_SCHEMA)[2:]}, GENE_SCHEMA)


PANELS = np.array([[True, True, True], [True, False, True]])


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_round_trip(tmp_path, file_format):
    rows = make_rows(7)
    folder = write_pair_folder(
        tmp_path, {"train": rows, "test": rows[:2]}, make_genes(3), PANELS, pairings=["p"], file_format=file_format
    )
    assert folder.splits == ["train", "test"]
    assert folder.split("train").equals(rows)
    assert folder.gene_ids == ["G0", "G1", "G2"]
    np.testing.assert_array_equal(folder.panels, PANELS)
    assert folder.manifest["target_sum"] == 10_000.0 and folder.pairings == ["p"]
    folder.verify()


def test_arrow_shards_are_mapped_not_copied(tmp_path):
    folder = write_pair_folder(tmp_path, {"train": make_rows(5000)}, make_genes(3), PANELS, pairings=["p"])
    before = pa.total_allocated_bytes()
    rows = folder.split("train")
    assert pa.total_allocated_bytes() - before < rows.nbytes / 100


def test_equal_rows_give_an_equal_digest(tmp_path):
    digests = [
        write_pair_folder(tmp_path / name, {"train": make_rows(n)}, make_genes(3), PANELS, pairings=[]).manifest[
            "digest"
        ]
        for name, n in (("a", 9), ("b", 9), ("c", 8))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="not a pairs folder"):
        PairFolder(tmp_path)
    folder = write_pair_folder(tmp_path, {"train": make_rows(4)}, make_genes(3), PANELS, pairings=[])
    with pytest.raises(ValueError, match=r"`split` 'trian' is not in .* did you mean `train`"):
        folder.split("trian")
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"schema_version": "9.0.0"}))
    with pytest.raises(ValueError, match=r"pair schema 9\.0\.0"):
        PairFolder(tmp_path)
    manifest.write_text(json.dumps(content))
    shard = tmp_path / "train" / "shard-00000.arrow"
    original = shard.read_bytes()
    shard.write_bytes(original[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        PairFolder(tmp_path)
    shard.write_bytes(bytes([original[-20] ^ 1]).join([original[:-20], original[-19:]]))
    with pytest.raises(ValueError, match="another digest"):
        PairFolder(tmp_path).verify()
