"""Partner matching: cells paired, shared and differing genes by policy, against the origin's consecutive pairing.

gppc make-census STORE FILE.h5ad ...
python benchmarks/bench_matching.py --store STORE
python benchmarks/bench_matching.py --smoke
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_shard import CellTable, ShardRows, read_shard_values
from data_scripts.pairs.schema import CONTEXT_COLUMNS

POLICIES = ("random", "nearest", "farthest")
PAIRINGS = {"same_type": ["dataset_id", "cell_type"], "same_dataset": ["dataset_id", "donor_id"]}


def options_for(store, n_genes, pairing, policy, pseudobulk=1) -> PairOptions:
    mapping = {
        "query": {"uri": str(store)},
        "panel": {"n_genes": n_genes},
        "matching": {"pairings": {pairing: {"keys": PAIRINGS[pairing]}}, "policy": policy, "pseudobulk": pseudobulk},
        "splits": {"rules": []},
    }
    return from_mapping(PairOptions, mapping)


def describe(rows, panels: np.ndarray) -> tuple[float, float, float]:
    """Mean shared genes, mean differing genes and r2 of the target by the source, over the pairs of a table."""
    n_genes = panels.shape[1]
    sides = []
    for side in ("source", "target"):
        lists = rows.column(f"{side}_gene_ids").combine_chunks()
        lengths = lists.value_lengths().to_numpy()
        dense = np.zeros((rows.num_rows, n_genes), dtype=np.float32)
        values = rows.column(f"{side}_values").combine_chunks().flatten().to_numpy()
        dense[np.repeat(np.arange(rows.num_rows), lengths), lists.flatten().to_numpy()] = values
        sides.append(dense)
    both = panels[rows.column("source_panel").to_numpy()] & panels[rows.column("target_panel").to_numpy()]
    return quality(*sides, both)


def quality(source, target, both) -> tuple[float, float, float]:
    differing = ((source != target) & both).sum(1).mean()
    errors, spread = ((source - target) ** 2)[both].mean(), target[both].var()
    return both.sum(1).mean(), differing, 1 - errors / spread


def origin(store, n_genes) -> tuple[float, float, float]:
    """Consecutive cells of a shuffled pass, any two."""
    with tempfile.TemporaryDirectory() as folder:
        import data_scripts.pairs.census_pairs as module

        options = options_for(store, n_genes, "same_dataset", "random")
        plan = module.plan_pairs(
            dataclasses.replace(options, shard_cells=10**9), Path(folder) / "plan", progress=False
        )
        cells = plan.shard_cells(0)
        values = read_shard_values(plan.matrix, cells, plan.options, plan.vocabulary, None).toarray()
        order = np.random.default_rng(0).permutation(len(cells))
        order = order[: len(order) // 2 * 2]
        source, target = order[0::2], order[1::2]
        both = plan.panels[cells.panel[source]] & plan.panels[cells.panel[target]]
        return quality(values[source], values[target], both)


def run(store: Path, n_genes: int, averaged: int = 10) -> None:
    print(f"{'pairing':<14}{'policy':<22}{'cells paired':>13}{'shared':>9}{'differing':>11}{'r2 of no change':>17}")
    for pairing in PAIRINGS:
        for policy, pseudobulk in [*((policy, 1) for policy in POLICIES), ("random", averaged)]:
            with tempfile.TemporaryDirectory() as folder:
                options = options_for(store, n_genes, pairing, policy, pseudobulk)
                pairs: PairFolder = build_pairs(options, Path(folder) / "out", progress=False)
                report = pairs.manifest["report"]["splits"]["train"]
                shared, differing, r2 = describe(pairs.split("train"), pairs.panels)
            share = report["cells_paired"] / report["cells"]
            name = policy if pseudobulk == 1 else f"{policy}, means of {pseudobulk}"
            print(f"{pairing:<14}{name:<22}{share:>13.1%}{shared:>9.1f}{differing:>11.1f}{r2:>17.3f}", flush=True)
    shared, differing, r2 = origin(store, n_genes)
    print(f"{'any two':<14}{'consecutive (origin)':<22}{1:>13.1%}{shared:>9.1f}{differing:>11.1f}{r2:>17.3f}")


def seconds_of(n_cells: int, n_contexts: int, n_datasets: int, n_genes: int = 400, rounds: int = 3) -> float:
    """Matching, sampling and making rows of one shard, the best of some rounds, in CPU seconds."""
    rng = np.random.default_rng(0)
    values = sp.random(n_cells, n_genes, density=0.2, format="csr", dtype=np.float32, random_state=0)
    dataset = np.sort(rng.integers(0, n_datasets, n_cells))
    columns = {
        "soma_joinid": np.arange(n_cells),
        "split": np.zeros(n_cells, dtype=np.int8),
        "panel": dataset,
        "library": np.ones(n_cells),
        "nnz": np.diff(values.indptr),
        "group_0": rng.integers(0, n_contexts, n_cells),
        "group_1": dataset,
    }
    labels = pa.array(["label"] * n_cells).dictionary_encode()
    table = pa.table(columns | dict.fromkeys(CONTEXT_COLUMNS, labels))
    panels = rng.random((n_datasets, n_genes)) < 0.9
    everything = [np.ones(n_genes, dtype=bool)] * 3
    best = np.inf
    for _ in range(rounds):
        began = time.process_time()  # other work on the machine does not count
        for _batch in ShardRows(CellTable(table, 2), values, panels, PairOptions(), 0, everything).batches(0):
            pass
        best = min(best, time.process_time() - began)
    return best


def cost(n_cells: int = 65_536) -> None:
    steps = {
        "cells": [(n_cells // factor, 64, 16) for factor in (16, 4, 1)],
        "contexts": [(n_cells // 4, number, 16) for number in (64, 256, 1024)],
        "data sets": [(n_cells // 4, 64, number) for number in (4, 16, 64)],
    }
    for place, (name, settings) in enumerate(steps.items()):
        sizes = [setting[place] for setting in settings]
        seconds = [seconds_of(*setting) for setting in settings]
        per_cell = [second / setting[0] for second, setting in zip(seconds, settings)]
        times = seconds if name == "cells" else per_cell
        exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
        told = ", ".join(f"{size:,}: {1e6 * each:.1f} us a cell" for size, each in zip(sizes, per_cell))
        kind = "time" if name == "cells" else "time a cell"
        print(f"{name:<10} {told}; exponent of {kind} {exponent:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--genes", type=int, default=1_000)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost:
        cost()
    elif arguments.smoke:
        cost(2_048)
        from data_scripts.synthetic.network import SyntheticConfig
        from data_scripts.synthetic.network_store import write_synthetic

        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            write_synthetic(store, SyntheticConfig(form="count", n_cells=300, n_genes=60), progress=False)
            run(store, 40, averaged=2)
    elif arguments.store is not None:
        run(arguments.store, arguments.genes)
    else:
        parser.error("give --store STORE (see above) or --smoke")


if __name__ == "__main__":
    main()
