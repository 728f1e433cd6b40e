"""Speed of training on a pairs folder: cells/s, share of time spent waiting for data, two processes against one.

    python benchmarks/bench_training.py --pairs runs/pbmc/pairs --config pbmc --workers 0 1
    python benchmarks/bench_training.py --pairs runs/pbmc/pairs --config pbmc --workers 1 --processes 1 2
    python benchmarks/bench_training.py --stream cells.soma --config pbmc --steps 400 --workers 0 1
    python benchmarks/bench_training.py --smoke        # tiny synthetic pairs, to see that the benchmark runs

Each line is a run of its own process(es), one thread each; two processes share the batch of one. The first log entries
are left out: they hold the start of the workers. With `--stream` training reads from the store, whose shards are made
small (2,048 cells), so that there are several; take enough steps for several pools of two shards.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

KEYS = ("cells_per_second", "tokens_per_second", "data_wait_share", "tflop_per_second", "peak_memory_gb")


def train(arguments: argparse.Namespace) -> None:
    """One run without evaluation in the measured steps; the main process writes the medians to `--out`."""
    from data_scripts.batches.data_collator import PairCollator
    from data_scripts.batches.pair_dataset import PairDataset
    from data_scripts.pairs.pair_folder import PairFolder
    from gppc.run_options import parse_options
    from modeling_gppc import GppcForPerturbationPrediction
    from modeling_gppc.training.launch import leave, main_first, start_processes
    from modeling_gppc.training.stream_rows import open_stream
    from modeling_gppc.training.trainer import make_trainer

    state = start_processes(arguments.cpu)
    with tempfile.TemporaryDirectory() as out:
        flags = {
            **source_flags(arguments),
            "training.max_steps": arguments.steps,
            "training.logging_steps": max(arguments.steps // 6, 1),
            "training.eval_steps": arguments.steps,
            "training.save_steps": arguments.steps,
            "training.max_validation_pairs": 256,
            "training.dataloader_num_workers": arguments.workers[0],
            "training.use_cpu": str(arguments.cpu).lower(),
        }
        options = parse_options(
            arguments.config, [part for flag in flags.items() for part in (f"--{flag[0]}", str(flag[1]))]
        )
        options.training.per_device_train_batch_size //= state.num_processes
        if arguments.pairs:
            folder = PairFolder(arguments.pairs)
        else:
            folder = main_first(state, lambda: options.prepare_pairs(progress=False))
        rows = PairDataset(folder.split("train"), folder.pairings)
        if arguments.stream:
            rows = open_stream(
                folder,
                options.training,
                options.data.stream_pool_shards,
                options.seed,
                state.process_index,
                state.num_processes,
            )
        trainer = make_trainer(
            GppcForPerturbationPrediction(options.model_config(folder.genes.num_rows, folder.pairings)),
            options.training,
            out,
            options.seed,
            rows,
            PairDataset(folder.split("validation"), folder.pairings),
            PairCollator(folder.panels, options.pairs.perturbation, seed=options.seed),
            PairCollator(folder.panels),
        )
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "cells_per_second" in entry][2:]
        if state.is_main_process:
            medians = {key: statistics.median(entry[key] for entry in entries) for key in KEYS}
            Path(arguments.out).write_text(json.dumps({"processes": state.num_processes, **medians}))
    state.wait_for_everyone()
    leave(0, state.num_processes)


def source_flags(arguments: argparse.Namespace) -> dict[str, str]:
    """Options that say where the pairs come from."""
    if arguments.pairs:
        return {"data.pairs": arguments.pairs}
    # One folder for all lines: what is not streamed is written once, before the first.
    folder = str(Path(arguments.out).parent / "streamed")
    shards = {"pairs.shard_cells": 2048, "pairs.query.uri": arguments.stream}
    return {"output_dir": folder, "data.stream": "true", **shards}


def launch(arguments: argparse.Namespace, workers: int, processes: int, out: Path) -> dict:
    """Runs `train` in so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    source = ["--pairs", arguments.pairs] if arguments.pairs else ["--stream", arguments.stream]
    script = [__file__, "--one", *source, "--config", arguments.config, "--out", str(out)]
    settings = ["--steps", str(arguments.steps), "--workers", str(workers), *(["--cpu"] if arguments.cpu else [])]
    command = [sys.executable, *(world if processes > 1 else []), *script, *settings]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    return json.loads(out.read_text())


def smoke_inputs(folder: Path) -> tuple[str, str]:
    """Tiny synthetic pairs and a configuration for them; returns both paths."""
    from gppc.run_options import parse_options

    cells = "{form: linear, n_genes: 30, n_regulators: 4, n_cells: 600, n_donors: 20, n_datasets: 2, n_cell_types: 4}"
    options = parse_options("linear", ["--data.synthetic", cells, "--output_dir", str(folder / "run")])
    pairs = options.prepare_pairs(progress=False)
    config = folder / "smoke.yaml"
    config.write_text("model: {hidden_size: 16, num_attention_heads: 2, num_factors: 4, num_components: 2}\n")
    return str(pairs.path), str(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", help="pairs folder")
    source.add_argument("--stream", metavar="URI", help="store to stream from")
    source.add_argument("--smoke", action="store_true", help="tiny synthetic pairs, few steps")
    parser.add_argument("--config", default="default", help="YAML file or the name of a shipped one")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="collating processes of a process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="training processes")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where a GPU is")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        train(arguments)
        return
    print(f"{'processes':>9} {'workers':>7} {'cells/s':>9} {'tokens/s':>11} {'data wait':>9} {'TFLOP/s':>8} {'GB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            arguments.pairs, arguments.config = smoke_inputs(Path(folder))
            arguments.steps, arguments.workers, arguments.cpu = 12, [0], True
        for processes in arguments.processes:
            for workers in arguments.workers:
                found = launch(arguments, workers, processes, Path(folder) / "out.json")
                print(
                    f"{processes:>9} {workers:>7} {found['cells_per_second']:>9,.0f} {found['tokens_per_second']:>11,.0f} "
                    f"{found['data_wait_share']:>9.1%} {found['tflop_per_second']:>8.4f} {found['peak_memory_gb']:>6.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
