"""Partner matching: cells paired, shared and differing genes by policy, against the origin's consecutive pairing.

gppc make-census STORE FILE.h5ad ...
python benchmarks/bench_matching.py --store STORE
python benchmarks/bench_matching.py --smoke
"""

import tempfile
from pathlib import Path

import numpy as np
from bench_tools import pair_options, parser_of, smoke_store

from data_scripts.pairs.census_pairs import build_pairs, plan_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_shard import read_shard_values
from modeling_gppc.evaluation.pair_arrays import PairArrays

PAIRINGS = {"same_type": ["dataset_id", "cell_type"], "same_dataset": ["dataset_id", "donor_id"]}


def options_for(store: Path, n_genes: int, pairing: str, shard_cells: int = 16_384, **matching) -> PairOptions:
    """Options of pairs of one pairing."""
    matching |= {"pairings": {pairing: {"keys": PAIRINGS[pairing]}}}
    return pair_options(store, panel={"n_genes": n_genes}, matching=matching, shard_cells=shard_cells)


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
                options = options_for(store, n_genes, pairing, policy=policy, pseudobulk=pseudobulk)
                folder_of_pairs = build_pairs(options, Path(folder) / "out", progress=False)
                report = folder_of_pairs.manifest["report"]["splits"]["train"]
                panels = folder_of_pairs.panels
                pairs = PairArrays.from_table(folder_of_pairs.split("train"), panels, panels.shape[1])
            name = policy if pseudobulk == 1 else f"{policy}, means of {pseudobulk}"
            found = quality(pairs.source, pairs.target, pairs.source_measured & pairs.target_measured)
            print(f"{pairing:<14}{name:<22}{report['cells_paired'] / report['cells']:>13.1%}{found}", flush=True)
    print(f"{'any two':<14}{'consecutive (origin)':<22}{1:>13.1%}{consecutive(store, n_genes)}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--genes", type=int, default=1_000)
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(smoke_store(folder, n_cells=300, n_genes=60), 40, averaged=2)
    elif arguments.store is not None:
        run(arguments.store, arguments.genes)
    else:
        parser.error("give --store STORE (see above) or --smoke")


if __name__ == "__main__":
    main()
