"""Files that are written whole or not at all."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Gives the name of a new file beside `path`, which takes its place when the block ends without an error.

    A reader sees the old file, the new one or none, never a part of one. The file gets the permissions of the umask,
    whatever its writer gave it: safetensors leaves files that nobody but their owner can read. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        make_durable(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_arrays(arrays: np.ndarray | dict[str, np.ndarray], path: str | Path) -> None:
    """Writes one array as `.npy` or several as `.npz`, atomically."""
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        if isinstance(arrays, dict):
            np.savez(file, **arrays)
        else:
            np.save(file, arrays)


def write_text(text: str, path: str | Path) -> Path:
    """Writes a text file atomically and returns its path."""
    with write_atomically(path) as temporary:
        temporary.write_text(text)
    return Path(path)


def write_json(content, path: str | Path) -> Path:
    """Writes a JSON file atomically and returns its path."""
    return write_text(json.dumps(content, indent=2) + "\n", path)


def share_weights(folder: str | Path) -> None:
    """Gives the weights in a model folder the permissions of its configuration; safetensors wrote them for their owner."""
    for weights in Path(folder).glob("*.safetensors"):
        weights.chmod((Path(folder) / "config.json").stat().st_mode)


def make_durable(path: Path) -> None:
    """Waits until a file or folder is on disk, so that a rename never outlives what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
