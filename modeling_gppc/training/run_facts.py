"""What a finished model says of the run that made it: for its card, and for those who ask what it has seen."""

import shlex
import sys
import time
from pathlib import Path

import pyarrow.compute as pc

from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc.training.arguments import DataOptions
from modeling_gppc.training.trainer import GppcTrainer


def run_facts(trainer: GppcTrainer, folder: PairFolder, data: DataOptions) -> dict:
    """The content of `run.json`: of the run as far as it has come, its pairs and where its cells come from."""
    manifest = folder.manifest
    query = manifest.get("options", {}).get("query", {})
    source = data.example or query.get("census_version") or query.get("uri")
    cells = manifest.get("report", {}).get("splits", {}).get("train", {}).get("cells")
    return {
        "store": Path(source or folder.path).name,
        "filters": query.get("obs_filter"),
        "cells": cells or len(folder.split("train").column("source_soma_joinid").unique()),
        "genes": folder.genes.num_rows,
        "seconds": round(time.monotonic() - trainer.began, 1),
        "flop": float(trainer.state.total_flos) or None,
        "seed": trainer.args.seed,
        "command": command(),
        "pairs": (
            "drawn anew in every epoch, straight from the store"
            if data.stream
            else manifest["splits"]["train"]["n_pairs"]
        ),
        "pairings": ", ".join(folder.pairings),
        "split_by": manifest.get("split_by"),
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "digest": manifest.get("digest"),
        # What leak guards ask for: the data sets that this model has seen.
        "datasets": sorted(pc.unique(folder.split("train").column("dataset_id")).drop_null().to_pylist()),
    }


def command() -> str:
    """The command that started this process."""
    return shlex.join(["accelerate", "launch", "train.py", *sys.argv[1:]])
