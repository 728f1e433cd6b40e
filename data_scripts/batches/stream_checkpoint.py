"""Saves where a stream of pairs stands in every Trainer checkpoint, and goes back there."""

import json
from pathlib import Path

from transformers import TrainerCallback

from data_scripts.files import write_json

# Streams are instances of data_scripts.batches.stream_pairs.PairStream, which is not imported: it brings the SOMA libraries.


def stream_file(rank: int) -> str:
    """Name of the state of one process's stream in a checkpoint."""
    return f"pair_stream-{rank}.json"


def save_stream(stream, checkpoint: str | Path, n_batches: int | None = None) -> None:
    """Writes where the stream stands, or stood after `n_batches` of its batches, into a checkpoint."""
    write_json(stream.state_dict(n_batches), Path(checkpoint) / stream_file(stream.rank))


def restore_stream(stream, checkpoint: str | Path) -> None:
    """Goes to where the stream of a checkpoint stood; call it before training resumes.

    Raises:
        ValueError: If the checkpoint holds no such state, or that of another stream.
    """
    path = Path(checkpoint) / stream_file(stream.rank)
    if not path.is_file():
        raise ValueError(f"`checkpoint` {checkpoint} has no {path.name}; it was trained from other data.")
    stream.load_state_dict(json.loads(path.read_text()))


class StreamCheckpoint(TrainerCallback):
    """
    Writes `pair_stream-RANK.json` into each checkpoint of a `transformers.Trainer`; pass `ignore_data_skip=True` to the
    training arguments, since the stream itself continues where it stood, and call [`restore_stream`] before resuming.
    `GppcTrainer` does both by itself.

    Trainer fetches a batch ahead of the step it saves, so what is saved is the state after the batches that the steps
    have used, not after those that were handed out. Where gradients are accumulated the stream is to be endless: the
    end of an epoch could cut a step short.

    Args:
        stream (`PairStream`): The training data.
    """

    def __init__(self, stream):
        self.stream = stream
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Notes the step at which this process began."""
        self._first_step = state.global_step

    def on_save(self, args, state, control, **kwargs):
        """Adds the state to the checkpoint that was just written."""
        used = (state.global_step - self._first_step) * args.gradient_accumulation_steps
        save_stream(self.stream, Path(args.output_dir) / f"checkpoint-{state.global_step}", used)
