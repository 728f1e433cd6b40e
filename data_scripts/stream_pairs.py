"""Pairs straight from the store while training: read, matched and collated ahead in the background."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from data_scripts.build_tasks import open_plan
from data_scripts.pair_plan import PairPlan, digest_of
from data_scripts.pair_shard import ShardRows, read_shard_values
from data_scripts.schema import PAIR_SCHEMA, SPLITS

REMEMBERED = 256  # batches back for which the state is still known
EPOCH_STRIDE = 1_000_003  # between the seeds of epochs; epoch 0 draws the rows that a build would write


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """
    How a stream is cut up.

    Args:
        split (`str`, *optional*, defaults to `"train"`): Whose pairs.
        batch_size (`int`, *optional*, defaults to 128): Pairs in a batch; the last one of a pool may be smaller.
        pool_shards (`int`, *optional*, defaults to 2): Shards, drawn from the whole store, whose rows are shuffled
            together: the buffer.
        seed (`int`, *optional*, defaults to 0): Of the orders of shards and rows.
    """

    split: str = "train"
    batch_size: int = 128
    pool_shards: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"`split` is {self.split!r}; wanted one of {', '.join(SPLITS)}.")
        for name in ("batch_size", "pool_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted at least 1.")


class _Reader(torch.utils.data.IterableDataset):
    """Batches of the pools that belong to each of `n_readers` readers; a worker of a loader is one reader."""

    def __init__(self, out, identity, options, epoch, first_reader, n_readers, rotation, positions, transform):
        self.out, self.identity, self.options, self.epoch = out, identity, options, epoch
        self.first_reader, self.n_readers, self.rotation = first_reader, n_readers, rotation
        self.positions, self.transform = positions, transform

    def __iter__(self) -> Iterator[tuple[int, int, int, object]]:
        worker = torch.utils.data.get_worker_info()
        own = (self.rotation + (worker.id if worker else 0)) % len(self.positions)
        plan = open_plan(self.out, self.identity)
        order = np.random.default_rng([self.options.seed, self.epoch]).permutation(plan.n_shards)
        pools = [order[at : at + self.options.pool_shards] for at in range(0, len(order), self.options.pool_shards)]
        first_pool, first_batch = self.positions[own]
        mine = list(range(self.first_reader + own, len(pools), self.n_readers))
        todo = mine[first_pool:]
        with concurrent.futures.ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._rows, plan, pools[todo[0]]) if todo else None
            for place, pool in enumerate(todo):
                rows = coming.result()
                if place + 1 < len(todo):
                    coming = ahead.submit(self._rows, plan, pools[todo[place + 1]])
                shuffled = np.random.default_rng([self.options.seed, self.epoch, pool]).permutation(rows.num_rows)
                size = self.options.batch_size
                n_batches = -(-rows.num_rows // size)
                for batch in range(first_batch, n_batches):
                    # Where this reader stands once the batch has been used.
                    after = (first_pool + place, batch + 1) if batch + 1 < n_batches else (first_pool + place + 1, 0)
                    table = rows.take(pa.array(shuffled[batch * size : (batch + 1) * size]))
                    yield own, *after, table if self.transform is None else self.transform(table)
                first_batch = 0

    def _rows(self, plan: PairPlan, shards: np.ndarray) -> pa.Table:
        options = dataclasses.replace(plan.options, seed=plan.options.seed + EPOCH_STRIDE * self.epoch)
        batches = []
        for shard in shards.tolist():
            cells = plan.shard_cells(shard)
            values = read_shard_values(plan.matrix, cells, options, plan.vocabulary, plan.gene_lengths)
            rows = ShardRows(cells, values, plan.panels, options, shard, plan.revealable)
            batches += rows.batches(SPLITS.index(self.options.split))
        # Few chunks would have to be searched for every row: one is gathered from directly.
        return pa.Table.from_batches(batches, PAIR_SCHEMA).combine_chunks()


def _unchanged(item):
    return item


class PairStream(torch.utils.data.IterableDataset):
    """
    Batches of pairs for one process of a training job, in an order that seed, epoch and numbers of readers fix.

    1. Shards are put in random order and grouped into pools; each pool belongs to one reader (a worker of a rank), so
       readers have disjoint cells, none twice, none missing. 2. A reader builds the rows of its next pool while the
       last one is used. 3. Rows are shuffled within the pool and cut into batches. 4. `transform` turns a batch into
       what the model takes, still in the background. Partners are drawn anew in every epoch.

    Args:
        out (`str` or `Path`): Folder that [`plan_pairs`] prepared.
        options (`StreamOptions`, *optional*): How the stream is cut up.
        num_workers (`int`, *optional*, defaults to 0): Background processes; 0 reads in a thread of this one.
        rank, world_size (`int`, *optional*): This process among those that train.
        transform (`Callable[[pa.Table], Any]`, *optional*): Applied to each batch where it is read; must be picklable
            for `num_workers` above 0.

    Iterating yields one epoch from where the state stands, then goes on to the next epoch's beginning.
    """

    def __init__(
        self,
        out: str | Path,
        options: StreamOptions | None = None,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        transform: Callable[[pa.Table], object] | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank} with `world_size` {world_size}; wanted 0 to world_size - 1.")
        plan = PairPlan(out)
        if not (plan.work / "genes.npy").is_file():
            raise ValueError(f"`out` {out} has no gene panel yet; prepare it with `plan_pairs`.")
        self.out, self.options = str(out), options or StreamOptions()
        self.identity = digest_of(plan.content["identity"])
        self.num_workers, self.rank, self.world_size, self.transform = num_workers, rank, world_size, transform
        self.epoch, self._next = 0, 0
        self._positions = [(0, 0)] * max(1, num_workers)
        self._n_batches = 0
        self._history: collections.deque = collections.deque(maxlen=REMEMBERED)
        self._remember()

    def go_to_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless the stream already stands in it."""
        if epoch != self.epoch:
            self.epoch, self._next, self._positions = epoch, 0, [(0, 0)] * len(self._positions)
            self._remember()

    def __iter__(self) -> Iterator[object]:
        n = len(self._positions)
        reader = _Reader(
            self.out,
            self.identity,
            self.options,
            self.epoch,
            self.rank * n,
            self.world_size * n,
            self._next,
            list(self._positions),
            self.transform,
        )
        if self.num_workers:
            source = torch.utils.data.DataLoader(
                reader,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self.num_workers,
                prefetch_factor=4,
                multiprocessing_context="spawn",  # TileDB's threads do not survive a fork
            )
        else:
            source = reader
        for own, pool, batch, content in source:
            self._positions[own] = (pool, batch)
            self._next = (own + 1) % n
            self._n_batches += 1
            self._remember()
            yield content
        self.epoch, self._next, self._positions = self.epoch + 1, 0, [(0, 0)] * n
        self._remember()

    def _remember(self) -> None:
        state = {"epoch": self.epoch, "next": self._next, "positions": [list(place) for place in self._positions]}
        self._history.append((self._n_batches, state))

    def _shape(self) -> dict:
        return {
            "identity": self.identity,
            "options": dataclasses.asdict(self.options),
            "num_workers": self.num_workers,
            "world_size": self.world_size,
        }

    def state_dict(self, n_batches: int | None = None) -> dict:
        """Where the stream stands, in JSON.

        Args:
            n_batches (`int`, *optional*): After so many batches of this object's life, for callers that fetch ahead of
                what they use; defaults to all that were handed out.

        Raises:
            ValueError: If that is further back than is remembered.
        """
        wanted = self._n_batches if n_batches is None else n_batches
        states = [state for count, state in self._history if count == wanted]
        if not states:
            raise ValueError(
                f"`n_batches` is {n_batches}; known are {self._history[0][0]} to {self._n_batches}, the last batches."
            )
        return {**self._shape(), **states[-1], "rank": self.rank}

    def load_state_dict(self, state: dict) -> None:
        """Goes to where another stream stood.

        Raises:
            ValueError: If that stream had other rows or other numbers of readers.
        """
        for name, value in (*self._shape().items(), ("rank", self.rank)):
            if state.get(name) != value:
                raise ValueError(
                    f"`state` was saved with {name} {state.get(name)!r}; this stream has {value!r}: the order of cells "
                    "would be another."
                )
        self.epoch, self._next = state["epoch"], state["next"]
        self._positions = [tuple(place) for place in state["positions"]]
        self._n_batches = 0
        self._history.clear()
        self._remember()
