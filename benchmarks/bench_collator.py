"""Arrow to batches of tensors: rows per second against `with_format("torch")`, and how random the batches are.

gppc make-synthetic STORE --form count --n_cells 100000 --n_genes 20000
python benchmarks/bench_collator.py --store STORE
python benchmarks/bench_collator.py --store STORE --genes 0 --cells 4096    # all genes
python benchmarks/bench_collator.py --store STORE --genes 0 --cells 4096 --queries 2000
python benchmarks/bench_collator.py --store STORE --randomness --shard-cells 2048 --cells 100000 --genes 200
python benchmarks/bench_collator.py --smoke
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data_scripts.batches.data_collator import PairCollator, draw_queries
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.batches.stream_pairs import PairStream, StreamOptions
from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs, plan_pairs
from data_scripts.pairs.pair_options import PairOptions, PerturbationOptions

BATCH = 128


def options_for(store, n_cells: int, n_genes: int, shard_cells: int) -> PairOptions:
    mapping = {
        "query": {"uri": str(store), "obs_filter": f"soma_joinid < {n_cells}"},
        "panel": {"n_genes": n_genes} if n_genes else {"rule": "all"},
        "splits": {"rules": []},
        "shard_cells": shard_cells,
    }
    return from_mapping(PairOptions, mapping)


def torch_format_batch(rows: dict, panels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a collator makes of rows that came as Python lists of tensors: the same tensors, without redrawing."""
    n_rows, n_genes = len(rows["source_gene_ids"]), panels.shape[1]
    batch = {
        "input_ids": pad_sequence(rows["source_gene_ids"], batch_first=True),
        "expression_values": pad_sequence(rows["source_values"], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows["source_gene_ids"]], batch_first=True),
        "perturbation_ids": pad_sequence(rows["perturbation_gene_ids"], batch_first=True),
        "perturbation_values": pad_sequence(rows["perturbation_values"], batch_first=True),
        "measured_mask": panels[rows["source_panel"]],
    }
    labels = torch.zeros(n_rows, n_genes)
    for row, (ids, values, revealed) in enumerate(
        zip(rows["target_gene_ids"], rows["target_values"], rows["perturbation_gene_ids"])
    ):
        labels[row, ids] = values
        labels[row, revealed] = -100.0
    labels[~panels[rows["target_panel"]]] = -100.0
    batch["labels"] = labels
    return batch


def torch_format_redrawn(rows: dict, panels: torch.Tensor, options: PerturbationOptions) -> dict[str, torch.Tensor]:
    """The same with the revealed genes drawn anew, row by row."""
    revealed = []
    for row in range(len(rows["source_gene_ids"])):
        change = torch.zeros(panels.shape[1])
        change[rows["target_gene_ids"][row]] += rows["target_values"][row]
        change[rows["source_gene_ids"][row]] -= rows["source_values"][row]
        both = panels[rows["source_panel"][row]] & panels[rows["target_panel"][row]]
        candidates = torch.nonzero((change != 0) & both).flatten()
        number = int(torch.randint(options.min_genes, options.max_genes + 1, ()))
        genes = candidates[torch.randperm(len(candidates))[:number]].sort().values
        revealed.append((genes, change[genes]))
    genes, changes = zip(*revealed)
    return torch_format_batch(
        rows | {"perturbation_gene_ids": list(genes), "perturbation_values": list(changes)}, panels
    )


def rate(batches, n_rows: int) -> float:
    began = time.perf_counter()
    for _ in batches:
        pass
    return n_rows / (time.perf_counter() - began)


def entropy(labels: np.ndarray) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def randomness(batches: list[np.ndarray], everything: np.ndarray, rng: np.random.Generator) -> float:
    """Mean entropy of a label within batches, over that of batches drawn from everything."""
    perfect = np.mean([entropy(rng.choice(everything, len(batch), replace=False)) for batch in batches])
    return float(np.mean([entropy(batch) for batch in batches]) / max(perfect, 1e-12))


def compare(store: Path, n_cells: int, n_genes: int, n_batches: int, rounds: int, shard_cells: int) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=store.parent) as folder:
        pairs = build_pairs(options_for(store, n_cells, n_genes, shard_cells), Path(folder) / "out", progress=False)
        table = pairs.split("train")
        order = rng.permutation(table.num_rows)[: n_batches * BATCH]
        order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        ours, panels = PairDataset(table, pairs.pairings), torch.from_numpy(pairs.panels)
        names = [name for name in table.column_names if "gene_ids" in name or "values" in name or "panel" in name]
        theirs = pairs.dataset("train").select_columns(names).with_format("torch")
        redraw = from_mapping(PairOptions, pairs.manifest["options"]).perturbation
        n_queries = max(1, len(pairs.gene_ids) // 8)
        collators = {
            "PairDataset, genes as stored": PairCollator(pairs.panels),
            "PairDataset, genes redrawn": PairCollator(pairs.panels, redraw=redraw),
            f"PairDataset, redrawn, {n_queries:,} genes queried": PairCollator(
                pairs.panels, redraw=redraw, n_query_genes=n_queries
            ),
        }
        ways = {
            'with_format("torch"), genes as stored': lambda: (
                torch_format_batch(theirs[rows], panels) for rows in order
            ),
            'with_format("torch"), genes redrawn': lambda: (
                torch_format_redrawn(theirs[rows], panels, redraw) for rows in order
            ),
            **{
                name: lambda collator=collator: (collator(ours.__getitems__(rows)) for rows in order)
                for name, collator in collators.items()
            },
        }
        rates = dict.fromkeys(ways, 0.0)
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name] = max(rates[name], rate(way(), order.size))
        plain, redrawn = list(rates.values())[:2]
        print(
            f"{table.num_rows:,} pairs, {len(pairs.gene_ids):,} genes, {table.nbytes / table.num_rows:,.0f} bytes a pair, "
            f"batches of {BATCH}, shuffled; times the two ways of `with_format`"
        )
        for name, value in rates.items():
            print(f"  {name:<46}{value:>10,.0f} rows/s{value / plain:>7.1f}{value / redrawn:>7.1f}", flush=True)


def compare_queries(store: Path, n_cells: int, n_genes: int, n_queries: int, shard_cells: int) -> None:
    """A training step that predicts all genes or some, and how much the loss of some varies about that of all."""
    from modeling_gppc import GppcConfig, GppcForPerturbationPrediction

    with tempfile.TemporaryDirectory(dir=store.parent) as folder:
        pairs = build_pairs(options_for(store, n_cells, n_genes, shard_cells), Path(folder) / "out", progress=False)
        rows, n_genes = PairDataset(pairs.split("train"), pairs.pairings), len(pairs.gene_ids)
        n_queries = min(n_queries, n_genes - 1)
        config = GppcConfig(vocab_size=n_genes, pairings=pairs.pairings, default_pairing=pairs.pairings[0])
        print(f"{n_genes:,} genes, batches of {BATCH}")
        for asked in (None, n_queries):
            model = GppcForPerturbationPrediction(config).train()
            collator, seconds = PairCollator(pairs.panels, n_query_genes=asked), []
            for first in range(0, min(len(rows), 6 * BATCH), BATCH):
                batch = collator(rows.__getitems__(np.arange(first, min(first + BATCH, len(rows)))))
                began = time.process_time()  # other work on the machine does not count
                model(**batch).loss.backward()
                seconds.append(time.process_time() - began)
            print(f"  step with {asked or n_genes:>7,} genes queried{1e3 * min(seconds):>8.0f} ms", flush=True)
        batch = rows.__getitems__(np.arange(min(BATCH, len(rows))))
        labels = PairCollator(pairs.panels)(batch)["labels"].numpy()
        scored, mean = labels != -100.0, pairs.genes.column("mean").to_numpy()
        errors = np.where(scored, (labels - mean) ** 2, 0).sum(0)
        expressed = (np.where(scored, labels, 0) > 0).mean(0)
        uniform, weighted = [], []
        for seed in range(300):
            rng = np.random.default_rng(seed)
            genes = rng.choice(n_genes, n_queries, replace=False)
            uniform.append(errors[genes].sum() / scored[:, genes].sum())
            genes, chance = draw_queries(expressed, n_queries, rng)
            weighted.append((errors[genes] / chance).sum() / scored.sum())
        full = errors.sum() / scored.sum()
        for name, losses in (("uniform", uniform), ("by expressing targets, weighted", weighted)):
            print(
                f"  loss over all genes 1; genes drawn {name}: {np.mean(losses) / full:.4f} +- {np.std(losses) / full:.4f}"
            )


def measure_randomness(store: Path, n_cells: int, n_genes: int, shard_cells: int, pools: list[int]) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=store.parent) as folder:
        options = options_for(store, n_cells, n_genes, shard_cells)
        pairs = build_pairs(options, Path(folder) / "out", progress=False)
        table = pairs.split("train")
        contexts = np.array(
            [f"{a}|{b}" for a, b in zip(table.column("dataset_id").to_pylist(), table.column("cell_type").to_pylist())]
        )
        cells = table.column("source_soma_joinid").to_numpy()
        lookup = dict(zip(cells.tolist(), contexts.tolist()))
        plan = plan_pairs(options, Path(folder) / "plan", progress=False)
        print(
            f"shards of {shard_cells:,} cells; entropy of a batch over a perfect shuffle's: contexts, blocks of 2,048 cells"
        )
        order = rng.permutation(table.num_rows)
        order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        whole = [(contexts[rows], cells[rows] // 2048) for rows in order]
        report("folder, shuffled rows", whole, contexts, cells, rng)
        for pool in pools or sorted({1, 2, max(1, plan.n_shards // 2), plan.n_shards}):
            stream = PairStream(plan.out, StreamOptions(batch_size=BATCH, pool_shards=pool))
            seen = [batch.column("source_soma_joinid").to_numpy() for batch in stream]
            parts = [(np.array([lookup[cell] for cell in ids.tolist()]), ids // 2048) for ids in seen if len(ids) > 1]
            held = max(0.5 * pool, 1.0) * shard_cells
            report(
                f"stream, {pool} of {plan.n_shards} shards, some {held:,.0f} rows held", parts, contexts, cells, rng
            )


def report(name, parts, contexts, cells, rng) -> None:
    of_contexts = randomness([part[0] for part in parts], contexts, rng)
    of_blocks = randomness([part[1] for part in parts], cells // 2048, rng)
    print(f"  {name:<56}{of_contexts:>8.3f}{of_blocks:>8.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--cells", type=int, default=32_768)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-cells", type=int, default=4_096)
    parser.add_argument("--randomness", action="store_true", help="entropy of batches instead of speed")
    parser.add_argument("--queries", type=int, help="a training step with so many genes queried instead")
    parser.add_argument("--pools", type=int, nargs="+", default=[], help="shards mixed by the streams")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.smoke:
        from data_scripts.synthetic.network import SyntheticConfig
        from data_scripts.synthetic.network_store import write_synthetic

        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            write_synthetic(store, SyntheticConfig(form="count", n_cells=600, n_genes=60), progress=False)
            compare(store, 600, 40, 4, 1, 150)
            measure_randomness(store, 600, 40, 150, [])
            compare_queries(store, 600, 40, 10, 150)
    elif arguments.store is None:
        parser.error("give --store STORE (see above) or --smoke")
    elif arguments.queries is not None:
        compare_queries(arguments.store, arguments.cells, arguments.genes, arguments.queries, arguments.shard_cells)
    elif arguments.randomness:
        measure_randomness(arguments.store, arguments.cells, arguments.genes, arguments.shard_cells, arguments.pools)
    else:
        compare(
            arguments.store,
            arguments.cells,
            arguments.genes,
            arguments.batches,
            arguments.rounds,
            arguments.shard_cells,
        )


if __name__ == "__main__":
    main()
