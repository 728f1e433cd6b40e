"""Saves where a stream of pairs stands in a checkpoint, and goes back there."""

import json
from pathlib import Path

from data_scripts.files import write_json

# Streams are instances of data_scripts.batches.stream_pairs.PairStream, which is not imported: it brings the SOMA libraries.


def stream_file(rank: int) -> str:
    """Name of the state of one process's stream in a checkpoint."""
    return f"pair_stream-{rank}.json"


def save_stream(stream, checkpoint: str | Path) -> None:
    """Writes where the stream stands into a checkpoint."""
    write_json(stream.state_dict(), Path(checkpoint) / stream_file(stream.rank))


def restore_stream(stream, checkpoint: str | Path) -> None:
    """Goes to where the stream of a checkpoint stood; call it before training resumes.

    Raises:
        ValueError: If the checkpoint holds no such state, or that of another stream.
    """
    path = Path(checkpoint) / stream_file(stream.rank)
    if not path.is_file():
        raise ValueError(f"`checkpoint` {checkpoint} has no {path.name}; it was trained from other data.")
    stream.load_state_dict(json.loads(path.read_text()))
