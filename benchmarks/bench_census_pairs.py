"""Census to pairs: cells per second, memory and bytes, against the loader of the origin and against merely reading.

    gppc make-synthetic STORE --form count --n_cells 100000 --n_genes 20000
    python benchmarks/bench_census_pairs.py --store STORE
    python benchmarks/bench_census_pairs.py --smoke

Every way runs in a process of its own, so that peak memory is its own; the best of its rounds counts, since other work
on the machine only ever slows a round down.
"""

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


def clock() -> tuple[float, float]:
    """Wall and CPU seconds (all threads) of this process."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    """Seconds since another look at the clock."""
    wall, cpu = clock()
    return {"seconds": wall - start[0], "cpu": cpu - start[1]}


def cells_query(census, n_cells: int):
    """The first cells of a store, all genes."""
    first = tiledbsoma.AxisQuery(coords=(slice(0, n_cells - 1),))
    return census["census_data"][ORGANISM].axis_query("RNA", obs_query=first)


def drain(store: str, n_cells: int, **_) -> dict:
    """Merely reads `X("raw").tables()`, all genes."""
    with cellxgene_census.open_soma(uri=store, tiledb_config=DRAIN_CONFIG) as census:
        start = clock()
        with cells_query(census, n_cells) as query:
            for _table in query.X("raw").tables():
                pass
        return {"cells": n_cells, **since(start)}


def ours(store: str, n_cells: int, **options) -> dict:
    """`build_pairs` at a given panel: read, checked, normalised, matched, sampled, written."""
    query = {"uri": store, "obs_filter": f"soma_joinid < {n_cells}"}
    options = from_mapping(PairOptions, {"query": query, "splits": {"rules": []}, **options})
    with tempfile.TemporaryDirectory(dir=Path(store).parent) as folder:
        start = clock()
        pairs = build_pairs(options, Path(folder) / "out", progress=False)
        measured = since(start)
        shards = [shard for entry in pairs.manifest["splits"].values() for shard in entry["shards"]]
        per_pair = sum(shard["n_bytes"] for shard in shards) / sum(shard["n_rows"] for shard in shards)
        return {"cells": n_cells, **measured, "bytes_per_pair": per_pair}


def origin(store: str, n_cells: int, panel: dict, **_) -> dict:
    """The origin's way: shuffled batches of 128, dense log values, consecutive cells paired, rows kept in memory."""
    from tiledbsoma_ml import ExperimentDataset

    rng = np.random.default_rng(0)
    with cellxgene_census.open_soma(uri=store) as census:
        var = census["census_data"][ORGANISM].ms["RNA"].var.read(column_names=["feature_id"]).concat().to_pandas()
        columns = np.flatnonzero(var["feature_id"].isin(Path(panel["file"]).read_text().split()))
        start, n_seen = clock(), 0
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
        return {"cells": n_seen, **since(start)}


def panel_file(store: str, n_genes: int) -> dict:
    """A file of the genes with most expressing cells, one a line."""
    with cellxgene_census.open_soma(uri=store) as census:
        var = census["census_data"][ORGANISM].ms["RNA"].var.read().concat().to_pandas()
    path = Path(store).parent / f"panel-{n_genes}.txt"
    chosen = var.sort_values("nnz", ascending=False, kind="stable")["feature_id"].iloc[:n_genes]
    path.write_text("\n".join(chosen) + "\n")
    return {"file": str(path)}


def best(label: str, way: Callable, rounds: int, **arguments) -> dict:
    """The fastest of some rounds, with the least CPU time and the most memory of all; printed."""
    found = [in_child(way, **arguments) for _ in range(rounds)]
    result = min(found, key=lambda result: result["seconds"])
    result |= {"cpu": min(r["cpu"] for r in found), "peak_rss_gb": max(r["peak_rss_gb"] for r in found)}
    wall, cpu = result["cells"] / result["seconds"], result["cells"] / result["cpu"]
    size = f", {result['bytes_per_pair']:,.0f} bytes a pair" if "bytes_per_pair" in result else ""
    print(
        f"{label:<42}{wall:>9,.0f} cells/s{cpu:>9,.0f} /CPU-s {result['peak_rss_gb']:>6.2f} GB peak{size}", flush=True
    )
    return result


def run_all(store: str, n_cells: int, n_genes: int, shard_cells: int, pairs_per_cell: int, rounds: int) -> None:
    """Prints every way, then growth with cells and the size of all genes."""
    panel = {"rule": "file", "file": in_child(panel_file, store=store, n_genes=n_genes)["file"]}
    common = {"store": store, "panel": panel, "file_format": "arrow", "shard_cells": shard_cells}
    common |= {"matching": {"pairs_per_cell": pairs_per_cell}}
    best("drain X('raw').tables()", drain, rounds, n_cells=n_cells, **common)
    best("origin's way", origin, rounds, n_cells=n_cells, **common)
    parts = [n_cells // share for share in (16, 4, 2, 1)]
    times = [best(f"ours, {part:,} cells", ours, rounds, n_cells=part, **common)["cpu"] for part in parts]
    print(f"exponent of CPU time over cells: {exponent(parts, times):.3f}")
    wide = common | {"panel": {"rule": "all"}, "file_format": "parquet"}
    best("all genes, parquet", ours, 1, n_cells=min(n_cells, 20_000), **wide)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--store", help="of 100,000 cells, see above")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs-per-cell", type=int, default=2, help="the origin's way makes half a pair a cell")
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            write_synthetic(store, SyntheticConfig(form="count", n_cells=600, n_genes=120), progress=False)
            run_all(str(store), 600, 50, 300, arguments.pairs_per_cell, 1)
    elif arguments.store is not None:
        run_all(arguments.store, 100_000, 2_000, 16_384, arguments.pairs_per_cell, arguments.rounds)
    else:
        parser.error("give --store STORE (see above) or --smoke")


if __name__ == "__main__":
    main()
