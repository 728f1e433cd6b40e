"""Census to pairs: cells per second, memory and bytes, against the loader of the origin and against merely reading.

    gppc make-synthetic STORE --form count --n_cells 100000 --n_genes 20000
    python benchmarks/bench_census_pairs.py --store STORE
    python benchmarks/bench_census_pairs.py --smoke        # a tiny store, to see that the benchmark runs

Every way runs in a process of its own, so that peak memory is its own; ways alternate over the rounds and the best
round of each counts, since other work on the machine only ever slows a round down.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ORGANISM = "homo_sapiens"
# Draining has large buffers: as fast as those of 1 GB that are the default, in a third of the memory.
DRAIN_CONFIG = {"soma.init_buffer_bytes": 128 * 1024**2}


def options_for(store: str, genes_file: str | None, out_format: str, shard_cells: int, pairs_per_cell: int):
    from data_scripts.options import from_mapping
    from data_scripts.pairs.pair_options import PairOptions

    panel = {"rule": "all"} if genes_file is None else {"rule": "file", "file": genes_file}
    mapping = {"query": {"uri": store}, "panel": panel, "file_format": out_format, "shard_cells": shard_cells}
    mapping["matching"] = {"pairs_per_cell": pairs_per_cell}
    return from_mapping(PairOptions, mapping)


def drain(store: str, n_cells: int, as_built: bool = False, **_) -> dict:
    """Merely reads `X("raw").tables()`, all genes; with the build's settings if wanted."""
    import cellxgene_census
    import tiledbsoma

    from data_scripts.store.census_query import TILEDB_CONFIG
    from data_scripts.store.freed_memory import keep_freed_memory

    if as_built:
        keep_freed_memory()
    with cellxgene_census.open_soma(uri=store, tiledb_config=TILEDB_CONFIG if as_built else DRAIN_CONFIG) as census:
        experiment = census["census_data"][ORGANISM]
        clock = Clock()
        rows = 0
        with experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery(coords=(slice(0, n_cells - 1),))) as query:
            for table in query.X("raw").tables():
                rows += table.num_rows
    return {"cells": n_cells, **clock.read(), "entries": rows}


def ours(
    store: str,
    n_cells: int,
    genes_file: str | None,
    num_proc: int,
    file_format: str,
    shard_cells: int,
    pairs_per_cell: int,
    out: str | None,
    **_,
) -> dict:
    """`build_pairs` at a given panel: read, checked, normalised, matched, sampled, written."""
    import dataclasses

    import cellxgene_census  # noqa: F401  imported before the clock starts, as in the other ways

    from data_scripts.pairs.census_pairs import build_pairs

    options = options_for(store, genes_file, file_format, shard_cells, pairs_per_cell)
    query = dataclasses.replace(options.query, obs_filter=f"soma_joinid < {n_cells}")
    options = dataclasses.replace(options, query=query)
    with tempfile.TemporaryDirectory(dir=out or Path(store).parent) as folder:
        clock = Clock()
        pairs = build_pairs(options, Path(folder) / "out", num_proc=num_proc, progress=False)
        measured = clock.read()
        shards = [shard for entry in pairs.manifest["splits"].values() for shard in entry["shards"]]
        n_pairs = sum(shard["n_rows"] for shard in shards)
        return {
            "cells": n_cells,
            **measured,
            "pairs": n_pairs,
            "bytes_per_pair": sum(shard["n_bytes"] for shard in shards) / n_pairs,
            "dense_bytes_per_pair": 2 * 4 * len(pairs.gene_ids),
        }


def origin(store: str, n_cells: int, genes_file: str | None, **_) -> dict:
    """The origin's way: shuffled batches of 128, dense log values, consecutive cells paired, rows kept in memory."""
    import cellxgene_census
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset

    rng = np.random.default_rng(0)
    with cellxgene_census.open_soma(uri=store) as census:
        experiment = census["census_data"][ORGANISM]
        var = experiment.ms["RNA"].var.read(column_names=["soma_joinid", "feature_id"]).concat().to_pandas()
        wanted = set(Path(genes_file).read_text().split()) if genes_file else set(var["feature_id"])
        columns = np.flatnonzero(var["feature_id"].isin(wanted))
        clock = Clock()
        n_seen = n_pairs = 0
        with experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery(coords=(slice(0, n_cells - 1),))) as query:
            loader = ExperimentDataset(
                query, layer_name="raw", obs_column_names=["soma_joinid", "dataset_id"], batch_size=128, shuffle=True
            )
            for counts, _obs in loader:
                values = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1))[:, columns]
                source, target = values[0 : len(values) - 1 : 2], values[1::2]
                for before, after in zip(source, target):
                    differing = np.flatnonzero(before != after)
                    if len(differing):
                        gene = rng.choice(differing)
                        _row = (before, after, gene, after[gene] - before[gene])
                        n_pairs += 1
                n_seen += len(values)
        return {"cells": n_seen, **clock.read(), "pairs": n_pairs}


class Clock:
    """Wall and CPU seconds (all threads and ended children) since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), self.cpu_seconds()

    @staticmethod
    def cpu_seconds() -> float:
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu": self.cpu_seconds() - self.cpu}


WAYS = {"drain": drain, "ours": ours, "origin": origin}


def measure(way: str, **settings) -> dict:
    """Runs one way in a process of its own; adds its peak memory."""
    command = [sys.executable, __file__, "--way", way, "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{way} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def panel_file(store: str, n_genes: int) -> str:
    """The genes with most expressing cells, one a line."""
    import cellxgene_census

    with cellxgene_census.open_soma(uri=store) as census:
        var = census["census_data"][ORGANISM].ms["RNA"].var.read().concat().to_pandas()
    path = Path(store).parent / f"panel-{n_genes}.txt"
    chosen = var.sort_values("nnz", ascending=False, kind="stable")["feature_id"].iloc[:n_genes]
    path.write_text("\n".join(chosen) + "\n")
    return str(path)


def show(label: str, result: dict) -> None:
    rate = result["cells"] / result["seconds"]
    extra = f", {result['bytes_per_pair']:,.0f} bytes a pair" if "bytes_per_pair" in result else ""
    print(
        f"{label:<42}{rate:>9,.0f} cells/s{result['cells'] / result['cpu']:>9,.0f} /CPU-s{result['seconds']:>7.1f} s {result['peak_mb']:>7,.0f} MB peak{extra}",
        flush=True,
    )


def best(rounds: list[dict]) -> dict:
    fastest = min(rounds, key=lambda result: result["seconds"])
    return fastest | {"cpu": min(r["cpu"] for r in rounds), "peak_mb": max(r["peak_mb"] for r in rounds)}


def run_all(arguments: argparse.Namespace) -> None:
    store, n_cells = str(arguments.store), arguments.cells
    genes = panel_file(store, arguments.genes)
    common = {"store": store, "genes_file": genes, "file_format": "arrow", "shard_cells": arguments.shard_cells}
    common |= {"out": arguments.out, "pairs_per_cell": arguments.pairs_per_cell}
    ways = {
        "drain X('raw').tables()": ("drain", {"n_cells": n_cells}),
        "drain, with the build's settings": ("drain", {"n_cells": n_cells, "as_built": True}),
        **{
            f"ours, {arguments.genes} genes, num_proc {number}": ("ours", {"n_cells": n_cells, "num_proc": number})
            for number in arguments.num_proc
        },
        "origin's way": ("origin", {"n_cells": min(n_cells, arguments.origin_cells)}),
    }
    results: dict[str, list[dict]] = {label: [] for label in ways}
    for _ in range(arguments.rounds):
        for label, (way, settings) in ways.items():
            results[label].append(measure(way, **common | settings))
    print(f"store of {n_cells:,} cells, best of {arguments.rounds} rounds")
    for label, rounds in results.items():
        show(label, best(rounds))
    reading, reading_as_built, *own, old = [best(rounds) for rounds in results.values()]
    for unit, key in (("wall time", "seconds"), ("CPU time", "cpu")):
        rates = [max(result["cells"] / result[key] for result in own)]
        rates += [result["cells"] / result[key] for result in (old, reading, reading_as_built)]
        print(
            f"by {unit}: ours / origin's way {rates[0] / rates[1]:.1f} (wanted >= 5), "
            f"ours / draining {rates[0] / rates[2]:.2f} (wanted >= 0.60, goal 0.90), "
            f"ours / draining with the build's settings {rates[0] / rates[3]:.2f}"
        )
    print("\nmemory and time by number of cells")
    times = []
    for part in [int(n_cells * share) for share in arguments.shares]:
        rounds = [measure("ours", **common, n_cells=part, num_proc=1) for _ in range(arguments.rounds)]
        times.append((part, best(rounds)["cpu"]))
        show(f"ours, {part:,} cells", best(rounds))
    sizes, seconds = np.log(np.array(times)).T
    print(f"exponent of CPU time over cells: {np.polyfit(sizes, seconds, 1)[0]:.3f}  (wanted <= 1.05)")
    print("\nall genes")
    part = min(n_cells, arguments.wide_cells)
    for file_format in ("arrow", "parquet"):
        wide = common | {"genes_file": None, "file_format": file_format, "shard_cells": min(part, 4096)}
        result = measure("ours", **wide, n_cells=part, num_proc=1)
        show(f"ours, all genes, {file_format}", result)
        print(
            f"    {result['bytes_per_pair'] / result['dense_bytes_per_pair']:.4f} of dense float32 (wanted <= 0.125)"
        )


def smoke() -> None:
    from data_scripts.synthetic.network import SyntheticConfig
    from data_scripts.synthetic.network_store import write_synthetic

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        write_synthetic(store, SyntheticConfig(form="count", n_cells=600, n_genes=120), progress=False)
        arguments = argparse.Namespace(
            store=store,
            cells=600,
            genes=50,
            rounds=1,
            origin_cells=600,
            shares=(0.5, 1.0),
            wide_cells=600,
            shard_cells=300,
            pairs_per_cell=2,
            num_proc=[1],
            out=None,
        )
        run_all(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument(
        "--out", help="folder to write to, e.g. /dev/shm to leave the disk out; default beside the store"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--origin-cells", type=int, default=100_000)
    parser.add_argument("--wide-cells", type=int, default=20_000)
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1])
    parser.add_argument("--shard-cells", type=int, default=16_384)
    parser.add_argument("--pairs-per-cell", type=int, default=2, help="the origin's way makes half a pair a cell")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0625, 0.25, 0.5, 1.0])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        result = WAYS[arguments.way](**json.loads(arguments.settings))
        own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        processes = json.loads(arguments.settings).get("num_proc", 1)
        result["peak_mb"] = (own + (children * processes if processes > 1 else 0)) / 1024
        print(json.dumps(result))
    elif arguments.smoke:
        smoke()
    elif arguments.store is not None:
        run_all(arguments)
    else:
        parser.error("give --store STORE (see above) or --smoke")


if __name__ == "__main__":
    main()
