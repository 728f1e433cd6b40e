"""Speed of `train.py`: cells/s, share of time spent waiting for data, two processes against one.

    python benchmarks/bench_training.py --pairs runs/pbmc/pairs --config pbmc --workers 0 1
    python benchmarks/bench_training.py --pairs runs/pbmc/pairs --config pbmc --workers 1 --processes 1 2
    python benchmarks/bench_training.py --stream cells.soma --config pbmc --steps 400 --workers 0 1

Each line is a run of its own, one thread a process; two processes share the batch of one. The figures are medians of the
run's own log, whose first entries are left out: they hold the start of the workers. With `--stream` training reads from
the store, whose shards are made small (2,048 cells), so that there are several; take enough steps for several pools of two
shards.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gppc.run_options import parse_options

KEYS = ("cells_per_second", "tokens_per_second", "data_wait_share", "tflop_per_second", "peak_memory_gb")


def flags_of(arguments: argparse.Namespace) -> dict[str, object]:
    """Options of all runs: where the pairs come from, and a single evaluation, at the end."""
    every = {f"training.{name}_steps": arguments.steps for name in ("max", "eval", "save")}
    every |= {"training.logging_steps": max(arguments.steps // 6, 1), "training.use_cpu": str(arguments.cpu).lower()}
    every["training.max_validation_pairs"] = 256
    if arguments.pairs:
        return every | {"data.pairs": arguments.pairs}
    return every | {"data.stream": "true", "pairs.shard_cells": 2048, "pairs.query.uri": arguments.stream}


def run(config: str, flags: dict[str, object], processes: int) -> dict:
    """One run of `train.py` on one thread a process, with little evaluation; medians of its log.

    Raises:
        RuntimeError: With the end of what it said, if it failed.
    """
    with tempfile.TemporaryDirectory() as out:
        flags = {"output_dir": out, "evaluation.max_pairs": 16, "evaluation.floors": "[mean]", **flags}
        words = ["--config", config, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
        world = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(world if processes > 1 else []), "train.py", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`train.py` failed: {done.stderr[-2000:]}")
        log = json.loads((Path(out) / "model" / "training_log.json").read_text())
    entries = [entry for entry in log if "cells_per_second" in entry][2:]
    return {key: statistics.median(entry[key] for entry in entries) for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", help="pairs folder")
    source.add_argument("--stream", metavar="URI", help="store to stream from")
    parser.add_argument("--config", default="default", help="YAML file or the name of a shipped one")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="collating processes of a process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="training processes")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where a GPU is")
    arguments = parser.parse_args()
    flags = flags_of(arguments)
    batch = parse_options(arguments.config, []).training.per_device_train_batch_size
    print(f"{'processes':>9} {'workers':>7} {'cells/s':>9} {'tokens/s':>11} {'data wait':>9} {'TFLOP/s':>8} {'GB':>6}")
    for processes in arguments.processes:
        for workers in arguments.workers:
            own = {"dataloader_num_workers": workers, "per_device_train_batch_size": batch // processes}
            found = run(arguments.config, flags | {f"training.{name}": own[name] for name in own}, processes)
            print(
                f"{processes:>9} {workers:>7} {found['cells_per_second']:>9,.0f} {found['tokens_per_second']:>11,.0f} "
                f"{found['data_wait_share']:>9.1%} {found['tflop_per_second']:>8.4f} {found['peak_memory_gb']:>6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
