"""Packed shards are unpacked once, whole or not at all, a few rows at a time, and mapped."""

import concurrent.futures
import os

import numpy as np
import pyarrow as pa
import pytest
from pair_writer import write_pair_folder

from data_scripts.pairs import pair_folder, shard_files
from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA
from data_scripts.pairs.shard_files import (
    decoded_folder,
    file_digest,
    read_decoded,
    write_table_atomically,
)

N_ROWS, N_GENES = 16_000, 400


def make_rows(n: int = N_ROWS) -> pa.Table:
    """Rows of up to a few hundred expressed genes."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, N_GENES // 2, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = []
    for field in PAIR_SCHEMA:
        if pa.types.is_list(field.type):
            flat = rng.integers(0, N_GENES, offsets[-1])
            values = (
                pa.array(flat).cast(field.type.value_type) if "ids" in field.name else pa.array(flat / 7, pa.float32())
            )
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), values))
        else:
            columns.append(pa.array(np.arange(n) % 2).cast(field.type))
    return pa.table(columns, schema=PAIR_SCHEMA)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "HF_HOME", str(tmp_path / "home"))
    return decoded_folder()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "shard.parquet"
    write_table_atomically(make_rows().to_batches(max_chunksize=512), PAIR_SCHEMA, path)
    return path


def test_decoded_rows_are_the_rows(cache, packed):
    rows = read_decoded(packed, file_digest(packed))
    assert rows.equals(make_rows())
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [f"{file_digest(packed)}.arrow"]


def test_decoding_takes_little_memory_and_reading_none(cache, packed):
    original = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(original)
    pa.set_memory_pool(pool)
    try:
        rows = read_decoded(packed, file_digest(packed))
        assert pool.max_memory() < rows.nbytes / 3 and pool.bytes_allocated() < rows.nbytes / 100
    finally:
        pa.set_memory_pool(original)


def test_decoded_once_by_any_number_of_readers(cache, packed, monkeypatch):
    written = []

    def counted(batches, schema, path):
        written.append(path)
        return write_table_atomically(batches, schema, path)

    monkeypatch.setattr(shard_files, "write_table_atomically", counted)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda _: read_decoded(packed, "abc"), range(4)))
    assert len(written) == 1 and all(table.equals(tables[0]) for table in tables)


def test_an_interrupted_decode_leaves_nothing_that_is_read(cache, packed, monkeypatch):
    def interrupted(batches, schema, path):
        def some():
            yield next(iter(batches))
            raise KeyboardInterrupt

        return write_table_atomically(some(), schema, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_files, "write_table_atomically", interrupted)
        read_decoded(packed, "abc")
    assert not list(cache.glob("*.arrow")) and not list(cache.glob(".*.tmp"))
    assert read_decoded(packed, "abc").num_rows == N_ROWS


def test_a_damaged_shard(cache, tmp_path):
    damaged = tmp_path / "shard.parquet"
    damaged.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="is damaged"):
        read_decoded(damaged, "abc")


def test_large_splits_of_a_folder_are_mapped(cache, tmp_path, monkeypatch):
    genes = pa.table(
        {field.name: pa.array(np.arange(N_GENES)).cast(field.type) for field in GENE_SCHEMA}, schema=GENE_SCHEMA
    )
    folder = write_pair_folder(
        tmp_path / "pairs",
        {"train": make_rows()},
        genes,
        np.ones((1, N_GENES), bool),
        pairings=["p"],
        file_format="parquet",
    )
    assert folder.split("train").equals(make_rows()) and not cache.exists()  # few: simply decoded
    monkeypatch.setattr(pair_folder, "DECODED_IN_MEMORY", 0)
    before = pa.total_allocated_bytes()
    rows = folder.split("train")
    assert rows.equals(make_rows())
    assert pa.total_allocated_bytes() - before < rows.nbytes / 100
    decoded = next(cache.glob("*.arrow"))
    when = os.stat(decoded).st_mtime_ns
    assert folder.split("train").equals(rows) and os.stat(decoded).st_mtime_ns == when


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_what_was_written_is_told_as_it_is_read(tmp_path, ending):
    table = pa.table({"ids": [[1, 2], [], [3]], "name": ["a", "b", "c"]})
    path = tmp_path / f"rows.{ending}"
    summary = write_table_atomically(table.to_batches() * 3, table.schema, path)
    assert summary == {"n_rows": 9, "n_bytes": path.stat().st_size, "digest": file_digest(path)}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
