"""Census to pairs: cells per second, memory and bytes, against the loader of the origin and against merely reading.

    gppc make-synthetic STORE --form count --n_cells 100000 --n_genes 20000
    python benchmarks/bench_census_pairs.py --store STORE
    python benchmarks/bench_census_pairs.py --smoke

Every way runs in a process of its own, so that peak memory is its own; ways alternate over the rounds and the best
round of each counts, since other work on the machine only ever slows a round down.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cellxgene_census
import numpy as np
import tiledbsoma
from bench_tools import exponent, in_child, parser_of

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.synthetic.network import SyntheticConfig
from data_scripts.synthetic.network_store import write_synthetic

ORGANISM = "homo_sapiens"
# As fast as buffers of 1 GB, which are the default, in a third of the memory.
DRAIN_CONFIG = {"soma.init_buffer_bytes": 128 * 1024**2}


def clock() -> Callable[[], dict[str, float]]:
    """A function that returns wall and CPU seconds (all threads) from now on."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def cells_query(census, n_cells: int):
    """The first cells of a store, all genes."""
    first = tiledbsoma.AxisQuery(coords=(slice(0, n_cells - 1),))
    return census["census_data"][ORGANISM].axis_query("RNA", obs_query=first)


def drain(store: str, n_cells: int, **_) -> dict:
    """Merely reads `X("raw").tables()`, all genes."""
    with cellxgene_census.open_soma(uri=store, tiledb_config=DRAIN_CONFIG) as census:
        read = clock()
        with cells_query(census, n_cells) as query:
            for _table in query.X("raw").tables():
                pass
        return {"cells": n_cells, **read()}


def ours(store: str, n_cells: int, **options) -> dict:
    """`build_pairs` at a given panel: read, checked, normalised, matched, sampled, written."""
    query = {"uri": store, "obs_filter": f"soma_joinid < {n_cells}"}
    options = from_mapping(PairOptions, {"query": query, "splits": {"rules": []}, **options})
    with tempfile.TemporaryDirectory(dir=Path(store).parent) as folder:
        read = clock()
        pairs = build_pairs(options, Path(folder) / "out", progress=False)
        measured = read()
        shards = [shard for entry in pairs.manifest["splits"].values() for shard in entry["shards"]]
        per_pair = sum(shard["n_bytes"] for shard in shards) / sum(shard["n_rows"] for shard in shards)
        of_dense = per_pair / (2 * 4 * len(pairs.gene_ids))
        return {"cells": n_cells, **measured, "bytes_per_pair": per_pair, "of_dense": of_dense}


def origin(store: str, n_cells: int, panel: dict, **_) -> dict:
    """The origin's way: shuffled batches of 128, dense log values, consecutive cells paired, rows kept in memory."""
    from tiledbsoma_ml import ExperimentDataset

    rng = np.random.default_rng(0)
    with cellxgene_census.open_soma(uri=store) as census:
        var = census["census_data"][ORGANISM].ms["RNA"].var.read(column_names=["feature_id"]).concat().to_pandas()
        columns = np.flatnonzero(var["feature_id"].isin(Path(panel["file"]).read_text().split()))
        read, n_seen = clock(), 0
        with cells_query(census, n_cells) as query:
            for counts, _obs in ExperimentDataset(
                query, layer_name="raw", obs_column_names=["soma_joinid", "dataset_id"], batch_size=128, shuffle=True
            ):
                values = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))[:, columns]
                for before, after in zip(values[0 : len(values) - 1 : 2], values[1::2]):
                    differing = np.flatnonzero(before != after)
                    if len(differing):
                        gene = rng.choice(differing)
                        _row = (before, after, gene, after[gene] - before[gene])
                n_seen += len(values)
        return {"cells": n_seen, **read()}


def panel_file(store: str, n_genes: int) -> dict:
    """A file of the genes with most expressing cells, one a line."""
    with cellxgene_census.open_soma(uri=store) as census:
        var = census["census_data"][ORGANISM].ms["RNA"].var.read().concat().to_pandas()
    path = Path(store).parent / f"panel-{n_genes}.txt"
    chosen = var.sort_values("nnz", ascending=False, kind="stable")["feature_id"].iloc[:n_genes]
    path.write_text("\n".join(chosen) + "\n")
    return {"file": str(path)}


def best(rounds: list[dict], label: str) -> dict:
    """The fastest round, with the least CPU time and the most memory of all; printed."""
    result = min(rounds, key=lambda result: result["seconds"])
    result |= {"cpu": min(r["cpu"] for r in rounds), "peak_rss_gb": max(r["peak_rss_gb"] for r in rounds)}
    wall, cpu = result["cells"] / result["seconds"], result["cells"] / result["cpu"]
    size = f", {result['bytes_per_pair']:,.0f} bytes a pair" if "bytes_per_pair" in result else ""
    print(
        f"{label:<42}{wall:>9,.0f} cells/s{cpu:>9,.0f} /CPU-s {result['peak_rss_gb']:>6.2f} GB peak{size}", flush=True
    )
    return result


def run_all(store: str, arguments: argparse.Namespace) -> None:
    """Prints every way, then growth with cells and the size of all genes."""
    panel = in_child(panel_file, store=store, n_genes=arguments.genes)["file"]
    common = {"store": store, "n_cells": arguments.cells, "panel": {"rule": "file", "file": panel}}
    common |= {"file_format": "arrow", "shard_cells": arguments.shard_cells}
    common |= {"matching": {"pairs_per_cell": arguments.pairs_per_cell}}
    ways = {
        "drain X('raw').tables()": drain,
        f"ours, {arguments.genes} genes": ours,
        "origin's way": origin,
    }
    results: dict[str, list[dict]] = {label: [] for label in ways}
    for _ in range(arguments.rounds):
        for label, way in ways.items():
            results[label].append(in_child(way, **common))
    found = [best(rounds, label) for label, rounds in results.items()]
    for unit, key in (("wall time", "seconds"), ("CPU time", "cpu")):
        reading, own, old = (result["cells"] / result[key] for result in found)
        print(
            f"by {unit}: ours / origin's way {own / old:.1f} (wanted >= 5), ours / draining {own / reading:.2f} "
            "(wanted >= 0.60)"
        )
    parts = [int(arguments.cells * share) for share in (1 / 16, 1 / 4, 1 / 2, 1)]
    times = []
    for part in parts:
        rounds = [in_child(ours, **common | {"n_cells": part}) for _ in range(arguments.rounds)]
        times.append(best(rounds, f"ours, {part:,} cells")["cpu"])
    print(f"exponent of CPU time over cells: {exponent(parts, times):.3f}  (wanted <= 1.05)")
    wide = {"n_cells": min(arguments.cells, 20_000), "panel": {"rule": "all"}}
    found = best([in_child(ours, **common | wide | {"file_format": "parquet"})], "all genes, parquet")
    print(f"    {found['of_dense']:.4f} of dense float32 (wanted <= 0.125)")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-cells", type=int, default=16_384)
    parser.add_argument("--pairs-per-cell", type=int, default=2, help="the origin's way makes half a pair a cell")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.cells, arguments.genes, arguments.rounds, arguments.shard_cells = 600, 50, 1, 300
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            write_synthetic(store, SyntheticConfig(form="count", n_cells=600, n_genes=120), progress=False)
            run_all(str(store), arguments)
    elif arguments.store is not None:
        run_all(str(arguments.store), arguments)
    else:
        parser.error("give --store STORE (see above) or --smoke")


if __name__ == "__main__":
    main()
