"""Training runs of seconds: a pairs folder of random rows, options, and train.py in this process or in others."""

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from pair_writer import write_pair_folder
from safetensors.torch import load_file
from tiny_pairs import tiny_genes, tiny_rows

ROOT = Path(__file__).resolve().parents[1]
N_GENES = 12
# 203 rows do not fill whole batches, 45 not whole evaluation batches, of one process or two.
ROWS = {"train": 203, "validation": 45, "test": 21}
FLAGS = {
    "model.num_factors": 3,
    "model.num_components": 2,
    "model.num_latents": 2,
    "model.hidden_size": 8,
    "model.intermediate_size": 16,
    "model.readout_size": 8,
    "model.num_attention_heads": 2,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "model.hidden_dropout_prob": 0.0,
    "training.max_steps": 50,
    "training.warmup_steps": 5,
    "training.eval_steps": 20,
    "training.save_steps": 20,
    "training.logging_steps": 10,
    "training.per_device_train_batch_size": 16,
    "training.per_device_eval_batch_size": 8,
    "training.linear_start_iterations": 2,
    "training.use_cpu": "true",
    "training.dataloader_num_workers": 0,
    "evaluation.n_resamples": 10,
    "evaluation.floors": "[mean]",
}
CONFIG = "seed: 0\n"
PORTS = itertools.count()


def write_run_pairs(folder: Path, rows: dict[str, int] | None = None) -> Path:
    """A pairs folder of 12 genes in 2 panels with random rows in all three splits."""
    panels = np.ones((2, N_GENES), dtype=bool)
    panels[1, ::3] = False
    tables = {}
    for seed, (name, n_rows) in enumerate((rows or ROWS).items()):
        tables[name] = _measured_only(tiny_rows(n_rows, N_GENES, seed), panels, first_cell=100_000 * seed)
    write_pair_folder(folder, tables, tiny_genes(N_GENES), panels, pairings=["same_type"])
    return folder


def _measured_only(table: pa.Table, panels: np.ndarray, first_cell: int) -> pa.Table:
    """Leaves out values of genes that a cell did not measure; reveals one gene that both did; numbers the cells."""
    rows = table.to_pylist()
    for index, row in enumerate(rows):
        cell = first_cell + index
        row.update(source_soma_joinid=cell, target_soma_joinid=cell + len(rows), dataset_id="tiny")
        for side in ("source", "target"):
            measured = panels[row[f"{side}_panel"]]
            pairs = zip(row[f"{side}_gene_ids"], row[f"{side}_values"])
            kept = [(gene, abs(value) + 0.1) for gene, value in pairs if measured[gene]]
            row[f"{side}_gene_ids"] = [gene for gene, _ in kept]
            row[f"{side}_values"] = [value for _, value in kept]
        gene = 1 + index % 2
        levels = [dict(zip(row[f"{side}_gene_ids"], row[f"{side}_values"])).get(gene, 0.0) for side in SIDES]
        row["perturbation_gene_ids"], row["perturbation_values"] = [gene], [levels[1] - levels[0]]
    return pa.Table.from_pylist(rows, table.schema)


SIDES = ("source", "target")


def arguments(pairs: Path, out: Path, **flags) -> list[str]:
    """Arguments of train.py; `training__max_steps=5` stands for `--training.max_steps 5`."""
    config = pairs / "config.yaml"
    config.write_text(CONFIG)
    merged = {**FLAGS, "data.pairs": str(pairs), **{name.replace("__", "."): value for name, value in flags.items()}}
    listed = [part for name, value in merged.items() for part in (f"--{name}", str(value))]
    return ["--config", str(config), "--output_dir", str(out), *listed]


def write_stream_store(folder: Path) -> Path:
    """A store of 300 cells x 30 genes in 3 cell types, to be streamed from."""
    from data_scripts.synthetic.network import SyntheticConfig
    from data_scripts.synthetic.network_store import write_synthetic

    config = SyntheticConfig(form="count", n_cells=300, n_genes=30, n_cell_types=3, library_mean=300.0)
    write_synthetic(folder / "cells", config, progress=False)
    return folder / "cells"


def stream_arguments(store: Path, out: Path, **flags) -> list[str]:
    """Arguments of train.py for a run that streams: 12 shards, about 225 training pairs an epoch."""
    pairs = {
        "pairs.query.uri": str(store),
        "pairs.panel.rule": "all",
        "pairs.shard_cells": 25,
        "pairs.splits.rules": "[{by: cell, fractions: {test: 0.1, validation: 0.15}}]",
        "data.stream": "true",
    }
    config = out.parent / "stream.yaml"
    config.write_text(CONFIG)
    merged = {**FLAGS, **pairs, **{name.replace("__", "."): value for name, value in flags.items()}}
    listed = [part for name, value in merged.items() for part in (f"--{name}", str(value))]
    return ["--config", str(config), "--output_dir", str(out), *listed]


def train_module():
    """train.py as a module, from the checkout; its figures are empty files, for drawing takes longer than training."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main = module.main

    def without_figures(argv: list[str] | None = None) -> int:
        with mock.patch.object(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b"\x89PNG")):
            return main(argv)

    module.main = without_figures
    return module


def environment() -> dict[str, str]:
    """Environment of a process: this checkout, one thread, no network."""
    found = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([found] if found else [])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port that is free, below those that the system gives to connections: none of these takes it meanwhile."""
    while True:
        port = 10_000 + (101 * os.getpid() + next(PORTS)) % 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launcher(processes: int = 2) -> list[str]:
    """The documented launch of several processes on a CPU, with a port of its own."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    world = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    return [*accelerate, *world, "--main_process_port", str(free_port()), str(ROOT / "train.py")]


def run(command: list[str], timeout: float = 240, path: str | None = None, **more: str) -> subprocess.CompletedProcess:
    """Runs a command to its end, with both outputs as text; `path` goes before the modules that it finds, `more` are
    further environment variables."""
    variables = {**environment(), **more}
    if path is not None:
        variables["PYTHONPATH"] = os.pathsep.join([path, variables["PYTHONPATH"]])
    return subprocess.run(
        command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return load_file(newest / "model.safetensors")


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference between two sets of weights."""
    if first.keys() != second.keys():
        raise ValueError(f"weights have other names: {sorted(first.keys() ^ second.keys())}")
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def logged(out: Path, name: str) -> dict[int, float]:
    """Step -> value of a log entry of a finished run."""
    log = json.loads((out / "model" / "training_log.json").read_text())
    return {entry["step"]: entry[name] for entry in log if name in entry}
