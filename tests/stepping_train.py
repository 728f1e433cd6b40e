"""train.py that tells from outside how far it is: PROGRESS gets the number of batches trained, SEEN the cells of each.

Both are environment variables with a path; SEEN is followed by the rank. Nothing of training itself is changed. FIRST
holds the arguments, in JSON, of a run before, in the same process; how it ended is told on standard error.
"""

import json
import os
import struct
import sys

from tiny_runs import train_module

from data_scripts.batches.stream_pairs import PairStream
from modeling_gppc.training.stream_rows import TableCollator
from modeling_gppc.training.trainer import GppcTrainer

original_step, original_collate = GppcTrainer.training_step, TableCollator.__call__
original_batches = PairStream.__iter__
last_cells: list[int] = []


def read_progress(path) -> int:
    """Batches that the main process has trained on, counted over the whole run; 0 before the first."""
    try:
        return struct.unpack("<q", path.read_bytes())[0]
    except (FileNotFoundError, struct.error):
        return 0


def collate(self, table):
    """Remembers which cells the batch holds; with no workers, it is handed out right after."""
    last_cells[:] = table.column("source_soma_joinid").to_pylist()
    return original_collate(self, table)


def batches(self):
    """Notes the cells of every batch that is handed to training."""
    for batch in original_batches(self):
        with open(f"{os.environ['SEEN']}{self.rank}", "a") as file:
            file.write(json.dumps({"epoch": self.positions[0][0], "cells": last_cells}) + "\n")
        yield batch


def step(self, *args, **kwargs):
    """Notes how many batches there were, before this one is trained on."""
    if self.is_world_process_zero():
        accumulated = self.args.gradient_accumulation_steps
        self.batches = getattr(self, "batches", 0) + 1
        done = self.state.global_step * accumulated + (self.batches - 1) % accumulated + 1
        file = os.open(os.environ["PROGRESS"], os.O_WRONLY | os.O_CREAT)
        os.pwrite(file, struct.pack("<q", done), 0)
        os.close(file)
    return original_step(self, *args, **kwargs)


if __name__ == "__main__":
    if "PROGRESS" in os.environ:
        GppcTrainer.training_step = step
    if "SEEN" in os.environ:
        PairStream.__iter__, TableCollator.__call__ = batches, collate
    if "FIRST" in os.environ:
        # One write: another process may write in between.
        sys.stderr.write(f"ended with {train_module().main(json.loads(os.environ['FIRST']))}\n")
    sys.exit(train_module().main())
