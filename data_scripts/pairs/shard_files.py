"""Files of rows: written atomically, read memory-mapped; what is packed is unpacked once, into a cache."""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from huggingface_hub.constants import HF_HOME

from data_scripts.files import write_atomically

DECODED_ROWS = 1_024  # decoded at once


def write_table_atomically(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: str | Path) -> dict:
    """Writes record batches to one `.arrow` (IPC stream) or `.parquet` (zstd) file, atomically; gives its `n_rows`,
    `n_bytes` and `digest`, which is equal for equal rows in equal batches."""
    path = Path(path)
    n_rows = 0
    with write_atomically(path) as temporary:
        with pa.OSFile(str(temporary), "w") as sink, shard_writer(sink, schema, path.suffix) as writer:
            for batch in batches:
                writer.write_batch(batch)
                n_rows += batch.num_rows
        return {"n_rows": n_rows, "n_bytes": temporary.stat().st_size, "digest": file_digest(temporary)}


def shard_writer(
    sink: pa.NativeFile, schema: pa.Schema, suffix: str
) -> pq.ParquetWriter | pa.ipc.RecordBatchStreamWriter:
    """What encodes record batches as `.parquet` (zstd) or `.arrow` (IPC stream)."""
    if suffix == ".parquet":
        lists = {field.name: field for field in schema if pa.types.is_list(field.type)}
        ids = [name for name, field in lists.items() if pa.types.is_integer(field.type.value_type)]
        return pq.ParquetWriter(
            sink,
            schema,
            compression="zstd",
            compression_level=1,
            # Ascending ids are small steps; values repeat within a cell, which zstd finds faster than a dictionary.
            column_encoding={f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ids},
            use_dictionary=[field.name for field in schema if field.name not in lists],
        )
    return pa.ipc.new_stream(sink, schema)


def file_digest(path: str | Path) -> str:
    """Digest (xxh3, 16 bytes, hexadecimal) of a file's bytes: tells damage apart, at the speed of memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def read_table(path: str | Path) -> pa.Table:
    """Opens a shard: `.arrow` memory-mapped without a copy, `.parquet` decoded; `ValueError` if damaged."""
    with _naming(path):
        if Path(path).suffix == ".parquet":
            return pq.read_table(path)
        return pa.ipc.open_stream(pa.memory_map(str(path), "r")).read_all()


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Raises `ValueError` that names the file for what goes wrong while it is read."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`{path}` is damaged ({reason}); delete it and run `gppc build-pairs` again.") from error


def decoded_folder() -> Path:
    """Where decoded shards are kept: `gppc/shards` in the cache of Hugging Face (`HF_HOME`); may be deleted any time."""
    return Path(HF_HOME) / "gppc" / "shards"


def read_decoded(path: str | Path, digest: str) -> pa.Table:
    """Opens a parquet shard memory-mapped: decoded, a few rows at a time, by whoever comes first, into a file named by
    its digest. Files other than `.parquet` are opened as they are."""
    path = Path(path)
    if path.suffix != ".parquet":
        return read_table(path)
    decoded = decoded_folder() / f"{digest}.arrow"
    if not decoded.is_file():
        decoded.parent.mkdir(parents=True, exist_ok=True)
        with open(decoded.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not decoded.is_file():
                with _naming(path):
                    shard = pq.ParquetFile(path)
                    write_table_atomically(shard.iter_batches(DECODED_ROWS), shard.schema_arrow, decoded)
    return read_table(decoded)
