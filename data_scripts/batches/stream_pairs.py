"""Pairs straight from the store while training: read, matched and collated ahead in the background."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data_scripts.files import write_json
from data_scripts.pairs.build_tasks import open_plan
from data_scripts.pairs.pair_plan import PairPlan, digest_of
from data_scripts.pairs.pair_shard import ShardRows, read_shard_values
from data_scripts.pairs.schema import PAIR_SCHEMA, SPLITS
from data_scripts.store.cell_stream import read_ahead

TRAIN = SPLITS.index("train")
PREFETCHED = 4  # batches that each worker keeps ready
EPOCH_STRIDE = 1_000_003  # between the seeds of epochs; epoch 0 draws the rows that a build would write


class _Reader(torch.utils.data.IterableDataset):
    """Batches of the shards that belong to each reader of a process; a worker of a loader is one reader."""

    def __init__(self, stream: "PairStream"):
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[int, tuple[int, int, int], object]]:
        stream, worker = self.stream, torch.utils.data.get_worker_info()
        own = (stream.next_reader + (worker.id if worker else 0)) % stream.n_readers
        plan = open_plan(stream.out, stream.identity)
        first_batch = stream.positions[own][2]
        for epoch, number, rows in read_ahead(self._rounds(own, plan)):
            shuffled = np.random.default_rng([stream.seed, epoch, own, number]).permutation(rows.num_rows)
            n_batches = -(-rows.num_rows // stream.batch_size)
            for batch in range(first_batch, n_batches):
                # Where this reader stands once the batch has been used.
                after = (epoch, number, batch + 1) if batch + 1 < n_batches else (epoch, number + 1, 0)
                begin = batch * stream.batch_size
                table = rows.take(pa.array(shuffled[begin : begin + stream.batch_size]))
                yield own, after, table if stream.transform is None else stream.transform(table)
            first_batch = 0

    def _rounds(self, own: int, plan: PairPlan) -> Iterator[tuple[int, int, pa.Table]]:
        """Epoch, number and rows of every round that a reader still has to read; of each shard it holds what is left
        for later rounds."""
        stream, shards = self.stream, streamed_shards(plan)
        reader, n_readers = stream.rank * stream.n_readers + own, stream.world_size * stream.n_readers
        first_epoch, first_round, _ = stream.positions[own]
        for epoch in itertools.count(first_epoch) if stream.endless else (first_epoch,):
            order = np.random.default_rng([stream.seed, epoch]).permutation(len(shards))
            # One further each epoch: where the shards do not divide evenly, every reader has the longer share in turn.
            mine = shards[order[(reader + epoch) % n_readers :: n_readers]].tolist()
            waiting: dict[int, dict[int, pa.Table]] = {}
            for number in range(first_round, n_rounds(len(mine), stream.pool_shards)):
                for place, shard in enumerate(mine):
                    rounds = rounds_of(place, len(mine), stream.pool_shards)
                    if number in rounds and place not in waiting:
                        waiting[place] = _spread(plan, stream.seed, epoch, shard, rounds, number)
                parts = [tables.pop(number) for tables in waiting.values() if number in tables]
                # Many chunks would have to be searched for every row: one is gathered from directly.
                yield epoch, number, pa.concat_tables(parts).combine_chunks()
            first_round = 0


def _spread(plan: PairPlan, seed: int, epoch: int, shard: int, rounds: range, first: int) -> dict[int, pa.Table]:
    """The rows of a shard, drawn for its rounds, from round `first` on."""
    drawn_anew = dataclasses.replace(plan.options, seed=plan.options.seed + EPOCH_STRIDE * epoch)
    cells = plan.shard_cells(shard)
    values = read_shard_values(plan.matrix, cells, drawn_anew, plan.vocabulary, plan.gene_lengths)
    rows = ShardRows(cells, values, plan.panels, drawn_anew, shard)
    table = pa.Table.from_batches(rows.batches(TRAIN), PAIR_SCHEMA).combine_chunks()
    order = np.random.default_rng([seed, epoch, shard]).permutation(table.num_rows)
    parts = dict(zip(rounds, np.array_split(order, len(rounds))))
    # Copies, so that what was used can be forgotten.
    return {number: table.take(pa.array(part)) for number, part in parts.items() if number >= first}


def n_rounds(n_shards: int, pool_shards: int) -> int:
    """Rounds in which a reader hands out the rows of its shards."""
    return max(1, n_shards - pool_shards + 1) if n_shards else 0


def rounds_of(shard: int, n_shards: int, pool_shards: int) -> range:
    """Rounds that a reader's shard is spread over: round `r` mixes its shards `r` to `r + pool_shards - 1`."""
    last = n_rounds(n_shards, pool_shards) - 1
    return range(max(0, min(shard - pool_shards + 1, last)), min(shard, last) + 1)


def streamed_shards(plan: PairPlan) -> np.ndarray:
    """Shards that hold training cells, int64 of shape `(n_streamed,)`."""
    cells = plan.cells.column("split").to_numpy()
    bounds = plan.content["bounds"]
    held = [index for index in range(plan.n_shards) if (cells[bounds[index] : bounds[index + 1]] == TRAIN).any()]
    return np.array(held, dtype=np.int64)


def _unchanged(item):
    return item


class PairStream(torch.utils.data.IterableDataset):
    """
    Batches of pairs for one process of a training job, in an order that seed, epoch and numbers of readers fix.

    1. Shards are put in random order and shared out to readers (a worker of a rank), so that readers have disjoint
    cells, none twice, none missing. 2. A reader spreads the rows of each shard over the next `pool_shards` rounds, so
    a round mixes that many shards; while one round is used, the shard that the next one needs is read. 3. Rows are
    shuffled within the round and cut into batches. 4. `transform` turns a batch into what the model takes, still in
    the background. Partners are drawn anew in every epoch.

    Iterating yields one epoch from where the state stands, then goes on to the next epoch's beginning; endless, it
    yields one epoch after the other.

    Args:
        out (`str` or `Path`): Folder that [`plan_pairs`] prepared, or that `build_pairs(train_rows=...)` wrote.
        batch_size (`int`, *optional*, defaults to 128): Pairs in a batch; the last one of a round may be smaller.
        pool_shards (`int`, *optional*, defaults to 2): Shards, drawn from the whole store, that a batch draws its rows
            from; the rows of about half of them are in memory.
        seed (`int`, *optional*, defaults to 0): Of the orders of shards and rows.
        num_workers (`int`, *optional*, defaults to 0): Background processes; 0 reads in a thread of this one.
        rank, world_size (`int`, *optional*): This process among those that train.
        transform (`Callable[[pa.Table], Any]`, *optional*): Applied to each batch where it is read; must be picklable
            for `num_workers` above 0.
        endless (`bool`, *optional*, defaults to `False`): Go on with the next epoch for ever. A reader that is through
            with its share of an epoch does not wait for the others, so no rank ends before another.
    """

    def __init__(
        self,
        out: str | Path,
        batch_size: int = 128,
        pool_shards: int = 2,
        seed: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        transform: Callable[[pa.Table], object] | None = None,
        endless: bool = False,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank} with `world_size` {world_size}; wanted 0 to world_size - 1.")
        plan = PairPlan(out)
        if not (plan.work / "genes.npy").is_file():
            raise ValueError(f"`out` {out} has no gene panel yet; prepare it with `plan_pairs`.")
        self.out, self.batch_size, self.pool_shards, self.seed = str(out), batch_size, pool_shards, seed
        self.identity = digest_of(plan.content["identity"])
        self.num_workers, self.rank, self.world_size, self.transform = num_workers, rank, world_size, transform
        self.endless, self.n_readers = endless, max(1, num_workers)
        if endless:
            n_shards = len(streamed_shards(plan))
            if n_shards < world_size * self.n_readers:
                raise ValueError(
                    f"the store makes {n_shards} shard(s) for {world_size * self.n_readers} readers ({world_size} "
                    f"process(es) x {self.n_readers} worker(s)); wanted a shard each: fewer workers, or smaller "
                    "`shard_cells`."
                )
        self._go_to(0)

    @property
    def epoch(self) -> int:
        """Pass over the data that the slowest reader of this process is in."""
        return min(epoch for epoch, _, _ in self.positions)

    def _go_to(self, epoch: int) -> None:
        self.next_reader, self.positions = 0, [(epoch, 0, 0)] * self.n_readers

    def __iter__(self) -> Iterator[object]:
        source = _Reader(self)
        if self.num_workers:
            source = torch.utils.data.DataLoader(
                source,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self.num_workers,
                prefetch_factor=PREFETCHED,
                multiprocessing_context="spawn",  # TileDB's threads do not survive a fork
                generator=torch.Generator(),  # else its seed is drawn from the numbers that dropout goes on with
            )
        for own, position, content in source:
            self.positions[own] = position
            self.next_reader = (own + 1) % self.n_readers
            yield content
        self._go_to(self.epoch + 1)

    def _shape(self) -> dict:
        return {
            "identity": self.identity,
            "batch_size": self.batch_size,
            "pool_shards": self.pool_shards,
            "seed": self.seed,
            "num_workers": self.num_workers,
            "world_size": self.world_size,
        }

    def state_dict(self) -> dict:
        """Where the stream stands after the batches that it handed out, in JSON."""
        positions = [list(position) for position in self.positions]
        return {**self._shape(), "next": self.next_reader, "positions": positions, "rank": self.rank}

    def load_state_dict(self, state: dict) -> None:
        """Goes to where another stream stood; `ValueError` if that had other rows or numbers of readers."""
        for name, value in (*self._shape().items(), ("rank", self.rank)):
            if state.get(name) != value:
                raise ValueError(
                    f"`state` was saved with {name} {state.get(name)!r}; this stream has {value!r}: the order of cells "
                    "would be another."
                )
        self.next_reader, self.positions = state["next"], [tuple(position) for position in state["positions"]]

    def save(self, checkpoint: str | Path) -> None:
        """Writes where the stream stands into a checkpoint, as `pair_stream-RANK.json`."""
        write_json(self.state_dict(), Path(checkpoint) / f"pair_stream-{self.rank}.json")

    def restore(self, checkpoint: str | Path) -> None:
        """Goes to where the stream of a checkpoint stood; call it before training resumes. `ValueError` without such a
        state, or for that of another stream."""
        path = Path(checkpoint) / f"pair_stream-{self.rank}.json"
        if not path.is_file():
            raise ValueError(f"`checkpoint` {checkpoint} has no {path.name}; it was trained from other data.")
        self.load_state_dict(json.loads(path.read_text()))
