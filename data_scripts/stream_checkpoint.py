"""Saves where a stream of pairs stands in every Trainer checkpoint, and goes back there."""

import json
from pathlib import Path

from transformers import TrainerCallback

from data_scripts.pair_folder import write_bytes_atomically
from data_scripts.stream_pairs import PairStream


class StreamCheckpoint(TrainerCallback):
    """
    Writes `pair_stream-RANK.json` into each checkpoint; pass `ignore_data_skip=True` to the training arguments, since
    the stream itself continues where it stood.

    Trainer fetches a batch ahead of the step it saves, so what is saved is the state after the batches that the steps
    have used, not after those that were handed out.

    Args:
        stream (`PairStream`): The training data.
    """

    def __init__(self, stream: PairStream):
        self.stream = stream
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Notes the step at which this process began."""
        self._first_step = state.global_step

    def on_save(self, args, state, control, **kwargs):
        """Adds the state to the checkpoint that was just written."""
        used = (state.global_step - self._first_step) * args.gradient_accumulation_steps
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_bytes_atomically(json.dumps(self.stream.state_dict(used)).encode(), folder / self.file_name())

    def file_name(self) -> str:
        """Name of the state of this rank."""
        return f"pair_stream-{self.stream.rank}.json"

    def restore(self, checkpoint: str | Path) -> None:
        """Goes to where the stream of a checkpoint stood; call it before training resumes.

        Raises:
            ValueError: If the checkpoint holds no such state, or that of another stream.
        """
        path = Path(checkpoint) / self.file_name()
        if not path.is_file():
            raise ValueError(f"`checkpoint` {checkpoint} has no {path.name}; it was trained from other data.")
        self.stream.load_state_dict(json.loads(path.read_text()))
