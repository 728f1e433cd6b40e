"""Partner matching: cells paired, shared and differing genes by policy, against the origin's consecutive pairing.

gppc make-census STORE FILE.h5ad ...
python benchmarks/bench_matching.py --store STORE
python benchmarks/bench_matching.py --cost          # how the time of matching grows; needs no store
python benchmarks/bench_matching.py --smoke
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from bench_tools import exponent, pair_options, parser_of, smoke_store

from data_scripts.pairs.census_pairs import build_pairs, plan_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_shard import CellTable, ShardRows, read_shard_values
from data_scripts.pairs.schema import CONTEXT_COLUMNS
from modeling_gppc.evaluation.pair_arrays import PairArrays

PAIRINGS = {"same_type": ["dataset_id", "cell_type"], "same_dataset": ["dataset_id", "donor_id"]}


def options_for(store: Path, n_genes: int, pairing: str, policy: str = "random", pseudobulk: int = 1, **more):
    matching = {"pairings": {pairing: {"keys": PAIRINGS[pairing]}}, "policy": policy, "pseudobulk": pseudobulk}
    return pair_options(store, panel={"n_genes": n_genes}, matching=matching, **more)


def quality(source: np.ndarray, target: np.ndarray, both: np.ndarray) -> str:
    """Mean shared genes, mean differing genes and r2 of the target by the source, as cells of the table."""
    differing = ((source != target) & both).sum(1).mean()
    errors, spread = ((source - target) ** 2)[both].mean(), target[both].var()
    return f"{both.sum(1).mean():>9.1f}{differing:>11.1f}{1 - errors / spread:>17.3f}"


def consecutive(store: Path, n_genes: int) -> str:
    """The origin's pairs: consecutive cells of a shuffled pass, any two."""
    with tempfile.TemporaryDirectory() as folder:
        options = options_for(store, n_genes, "same_dataset", shard_cells=10**9)
        plan = plan_pairs(options, Path(folder) / "plan", progress=False)
        cells = plan.shard_cells(0)
        values = read_shard_values(plan.matrix, cells, plan.options, plan.vocabulary, None).toarray()
        order = np.random.default_rng(0).permutation(len(cells))[: len(cells) // 2 * 2]
        source, target = order[0::2], order[1::2]
        both = plan.panels[cells.panel[source]] & plan.panels[cells.panel[target]]
        return quality(values[source], values[target], both)


def run(store: Path, n_genes: int, averaged: int = 10) -> None:
    """Prints the table of policies."""
    print(f"{'pairing':<14}{'policy':<22}{'cells paired':>13}{'shared':>9}{'differing':>11}{'r2 of no change':>17}")
    for pairing in PAIRINGS:
        for policy, pseudobulk in (("random", 1), ("nearest", 1), ("farthest", 1), ("random", averaged)):
            with tempfile.TemporaryDirectory() as folder:
                options = options_for(store, n_genes, pairing, policy, pseudobulk)
                folder_of_pairs = build_pairs(options, Path(folder) / "out", progress=False)
                report = folder_of_pairs.manifest["report"]["splits"]["train"]
                panels = folder_of_pairs.panels
                pairs = PairArrays.from_table(folder_of_pairs.split("train"), panels, panels.shape[1])
            name = policy if pseudobulk == 1 else f"{policy}, means of {pseudobulk}"
            found = quality(pairs.source, pairs.target, pairs.source_measured & pairs.target_measured)
            print(f"{pairing:<14}{name:<22}{report['cells_paired'] / report['cells']:>13.1%}{found}", flush=True)
    print(f"{'any two':<14}{'consecutive (origin)':<22}{1:>13.1%}{consecutive(store, n_genes)}")


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
    times = []
    for _ in range(rounds):
        began = time.process_time()  # other work on the machine does not count
        for _batch in ShardRows(CellTable(table, 2), values, panels, PairOptions(), 0).batches(0):
            pass
        times.append(time.process_time() - began)
    return min(times)


def cost(n_cells: int = 65_536) -> None:
    """Prints how the time grows with cells, and the time a cell with contexts and data sets."""
    steps = {
        "cells": [(n_cells // factor, 64, 16) for factor in (16, 4, 1)],
        "contexts": [(n_cells // 4, number, 16) for number in (64, 256, 1024)],
        "data sets": [(n_cells // 4, 64, number) for number in (4, 16, 64)],
    }
    for place, (name, settings) in enumerate(steps.items()):
        sizes = [setting[place] for setting in settings]
        seconds = [seconds_of(*setting) for setting in settings]
        per_cell = [second / setting[0] for second, setting in zip(seconds, settings)]
        found = exponent(sizes, seconds if name == "cells" else per_cell)
        times = ", ".join(f"{size:,}: {1e6 * each:.1f} us a cell" for size, each in zip(sizes, per_cell))
        print(
            f"{name:<10} {times}; exponent of {'time' if name == 'cells' else 'time a cell'} {found:.3f}", flush=True
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--genes", type=int, default=1_000)
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        cost(2_048)
        with tempfile.TemporaryDirectory() as folder:
            run(smoke_store(folder, n_cells=300, n_genes=60), 40, averaged=2)
    elif arguments.cost:
        cost()
    elif arguments.store is not None:
        run(arguments.store, arguments.genes)
    else:
        parser.error("give --store STORE (see above), --cost or --smoke")


if __name__ == "__main__":
    main()
