"""Arrow to batches of tensors: rows per second against `with_format("torch")`, and how random the batches are.

gppc make-synthetic STORE --form count --n_cells 100000 --n_genes 20000
python benchmarks/bench_collator.py --store STORE
python benchmarks/bench_collator.py --store STORE --genes 0 --cells 4096    # all genes
python benchmarks/bench_collator.py --store STORE --randomness --shard-cells 2048 --cells 100000 --genes 200
python benchmarks/bench_collator.py --smoke
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_tools import pair_options, parser_of, smoke_store
from torch.nn.utils.rnn import pad_sequence

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.batches.stream_pairs import PairStream, StreamOptions
from data_scripts.pairs.census_pairs import build_pairs, plan_pairs
from data_scripts.pairs.pair_options import PairOptions

BATCH = 128


def torch_format_batch(rows: dict, panels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a collator makes of rows that came as Python lists of tensors: the same tensors, imposed genes as stored."""
    labels = torch.zeros(len(rows["source_gene_ids"]), panels.shape[1])
    for row, (ids, values, imposed) in enumerate(
        zip(rows["target_gene_ids"], rows["target_values"], rows["perturbation_gene_ids"])
    ):
        labels[row, ids] = values
        labels[row, imposed] = -100.0
    labels[~panels[rows["target_panel"]]] = -100.0
    return {
        "input_ids": pad_sequence(rows["source_gene_ids"], batch_first=True),
        "expression_values": pad_sequence(rows["source_values"], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows["source_gene_ids"]], batch_first=True),
        "perturbation_ids": pad_sequence(rows["perturbation_gene_ids"], batch_first=True),
        "perturbation_values": pad_sequence(rows["perturbation_values"], batch_first=True),
        "measured_mask": panels[rows["source_panel"]],
        "labels": labels,
    }


def compare(options: PairOptions, scratch: Path, n_batches: int, rounds: int) -> None:
    """Prints rows a second of every way to batches, the best of the rounds."""
    pairs = build_pairs(options, scratch / "out", progress=False)
    table = pairs.split("train")
    order = np.random.default_rng(0).permutation(table.num_rows)[: n_batches * BATCH]
    order = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    ours, panels = PairDataset(table, pairs.pairings), torch.from_numpy(pairs.panels)
    names = [name for name in table.column_names if "gene_ids" in name or "values" in name or "panel" in name]
    theirs = pairs.dataset("train").select_columns(names).with_format("torch")
    stored, redrawn = PairCollator(pairs.panels), PairCollator(pairs.panels, redraw=options.perturbation)
    ways = {
        'with_format("torch"), genes as stored': lambda rows: torch_format_batch(theirs[rows], panels),
        "PairDataset, genes as stored": lambda rows: stored(ours.__getitems__(rows)),
        "PairDataset, genes redrawn": lambda rows: redrawn(ours.__getitems__(rows)),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            for rows in order:
                way(rows)
            best[name] = max(best[name], order.size / (time.perf_counter() - began))
    size = table.nbytes / table.num_rows
    print(f"{table.num_rows:,} pairs, {len(pairs.gene_ids):,} genes, {size:,.0f} bytes a pair, batches of {BATCH}")
    for name, value in best.items():
        print(f"  {name:<46}{value:>10,.0f} rows/s{value / next(iter(best.values())):>7.1f} x", flush=True)


def entropy(batches: list[np.ndarray], block: int) -> float:
    """Mean entropy of the blocks of consecutive cells within batches."""
    shares = [np.unique(batch // block, return_counts=True)[1] / len(batch) for batch in batches]
    return float(np.mean([-(share * np.log(share)).sum() for share in shares]))


def measure_randomness(options: PairOptions, scratch: Path, pools: list[int]) -> None:
    """Prints how near a perfect shuffle the batches of streams are."""
    plan = plan_pairs(options, scratch / "plan", progress=False)
    print(f"entropy of a batch over a perfect shuffle's: blocks of {options.shard_cells:,} cells")
    for pool in pools or sorted({1, 2, max(1, plan.n_shards // 2), plan.n_shards}):
        stream = PairStream(plan.out, StreamOptions(batch_size=BATCH, pool_shards=pool))
        batches = [batch.column("source_soma_joinid").to_numpy() for batch in stream]
        cells = np.random.default_rng(0).permutation(np.concatenate(batches))
        perfect = entropy(np.array_split(cells, len(batches)), options.shard_cells)
        found = entropy(batches, options.shard_cells) / perfect
        print(f"  stream, {pool} of {plan.n_shards} shards: {found:.3f}", flush=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--cells", type=int, default=32_768)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-cells", type=int, default=4_096)
    parser.add_argument("--randomness", action="store_true", help="entropy of batches instead of speed")
    parser.add_argument("--pools", type=int, nargs="+", default=[], help="shards mixed by the streams")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.store is None and not arguments.smoke:
        parser.error("give --store STORE (see above) or --smoke")
    with tempfile.TemporaryDirectory(dir=None if arguments.smoke else arguments.store.parent) as folder:
        store, scratch = arguments.store, Path(folder)
        if arguments.smoke:
            arguments.cells, arguments.genes, arguments.batches, arguments.rounds = 600, 40, 4, 1
            store, arguments.shard_cells = smoke_store(folder, n_cells=600, n_genes=60), 150
        panel = {"n_genes": arguments.genes} if arguments.genes else {"rule": "all"}
        query = {"obs_filter": f"soma_joinid < {arguments.cells}"}
        options = pair_options(store, query=query, panel=panel, shard_cells=arguments.shard_cells)
        if arguments.smoke or not arguments.randomness:
            compare(options, scratch, arguments.batches, arguments.rounds)
        if arguments.smoke or arguments.randomness:
            measure_randomness(options, scratch, arguments.pools)


if __name__ == "__main__":
    main()
