"""What training costs: cells, tokens and floating-point operations a second, time spent waiting for data, memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode


class Throughput:
    """
    Counts between two log entries; evaluation and checkpoints are not in the time.

    `start` when a step begins, `timed` around the loader, `fetched` when the step's batches are there, `stop` when it
    is done. Under a GPU the counts stay on it until they are read.
    """

    def __init__(self):
        # Matrix-product operations of a training step, forward and backward, for one pair; 0 until `measure` ran.
        self.flop_per_cell = 0.0
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.cells = 0
        self.tokens: torch.Tensor | int = 0
        self.waited = self.elapsed = 0.0
        self._began: float | None = None

    def start(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; what is spent waiting for them, and for nothing else, is counted."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - asked
            yield batch

    def fetched(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Batches have come."""
        for batch in batches:
            self.cells += batch["input_ids"].shape[0]
            self.tokens = self.tokens + batch["attention_mask"].sum()

    def stop(self) -> None:
        """The step is done."""
        if self._began is not None:
            self.elapsed += time.perf_counter() - self._began
            self._began = None

    @contextmanager
    def measure(self, cells: int) -> Iterator[None]:
        """Counts the operations of the training step inside, which handles so many pairs."""
        counter = FlopCounterMode(display=False)
        with counter:
            yield
        self.flop_per_cell = counter.get_total_flops() / max(cells, 1)

    def totals(self) -> torch.Tensor:
        """Cells, tokens, seconds, seconds waited, operations and peak memory of this process, float64 `(6,)`."""
        memory, flop = peak_memory_gb(), self.flop_per_cell * self.cells
        found = [self.cells, float(self.tokens), self.elapsed, self.waited, flop, memory]
        return torch.tensor(found, dtype=torch.float64)


def peak_memory_gb() -> float:
    """Most memory this process held, in 10^9 bytes: of the GPU where one is in use, of the process otherwise."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def summarize(totals: torch.Tensor) -> dict[str, float]:
    """Log entries of all processes together, from the [`Throughput.totals`] of each, `(n_processes, 6)`.

    A token is an expressed gene of a source cell; the share of waiting is the mean over processes, memory the largest.
    """
    cells, tokens, seconds, waited, flop, memory = totals.double().unbind(1)
    longest = float(seconds.max().clamp(min=1e-9))
    return {
        "cells_per_second": round(float(cells.sum()) / longest, 1),
        "tokens_per_second": round(float(tokens.sum()) / longest, 1),
        "data_wait_share": round(float((waited / seconds.clamp(min=1e-9)).mean()), 4),
        "tflop_per_second": round(float(flop.sum()) / longest / 1e12, 6),
        "peak_memory_gb": round(float(memory.max()), 3),
    }
