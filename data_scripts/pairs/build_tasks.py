"""The two tasks of a build, each one shard's, run here, in processes or on a cluster with the same result."""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from data_scripts.files import write_arrays, write_json
from data_scripts.pairs.gene_selection import PanelPart, count_genes
from data_scripts.pairs.pair_folder import write_table_atomically
from data_scripts.pairs.pair_plan import PairPlan, digest_of, file_format
from data_scripts.pairs.pair_shard import ShardRows, gene_moments, read_shard_values
from data_scripts.pairs.schema import PAIR_SCHEMA, SPLITS
from data_scripts.store.cell_stream import CellStream

THREADS = 2  # shards at a time in one process


_opening = threading.Lock()
_plan_of = functools.lru_cache(maxsize=2)(lambda out, identity: PairPlan(out))


def open_plan(out: str, identity: str) -> PairPlan:
    """The plan in `out`, opened once a process; `identity` tells builds in one folder apart."""
    with _opening:  # or each of the first threads would open its own, and they would not take turns in reading
        plan = _plan_of(out, identity)
        _ = plan.experiment  # opened now, so that the threads share one store
        return plan


def count_part(out: str, identity: str, index: int) -> None:
    """Writes the panel statistics of a shard's training cells to `work/panel-*.npz`."""
    plan = open_plan(out, identity)
    cells = plan.shard_cells(index)
    training = cells.split == 0
    # Cells for other splits are not even read.
    stream = CellStream(plan.matrix, plan.options.query, cells.joinids[training])
    part = count_genes(
        stream,
        cells.dataset[training],
        cells.library[training],
        plan.gene_lengths,
        plan.measured.shape[1],
        moments=plan.options.panel.rule == "variable",
    )
    write_arrays(vars(part), plan.work / f"panel-{index:05d}.npz")


def load_part(plan: PairPlan, index: int) -> PanelPart:
    """What [`count_part`] wrote."""
    with np.load(plan.work / f"panel-{index:05d}.npz") as part:
        return PanelPart(**part)


def build_shard(out: str, identity: str, index: int) -> None:
    """Writes the pair rows of a shard, its gene statistics and, last, its report `work/shard-*.json`."""
    plan = open_plan(out, identity)
    cells = plan.shard_cells(index)
    with plan.reading:  # while another thread matches and writes what it has read
        values = read_shard_values(plan.matrix, cells, plan.options, plan.vocabulary, plan.gene_lengths)
    rows = ShardRows(cells, values, plan.panels, plan.options, index)
    files = {}
    train_rows = plan.content["identity"].get("train_rows")
    for split in np.unique(cells.split):
        name = f"{SPLITS[split]}/shard-{index:05d}.{file_format(plan.options, len(plan.genes))}"
        batches = rows.batches(split)
        if split == 0 and train_rows is not None:
            share = train_rows * np.count_nonzero(cells.split == 0)
            batches = first_rows(batches, int(-(-share // plan.training_cells.sum())))
        summary = write_table_atomically(batches, PAIR_SCHEMA, plan.out / name)
        if summary["n_rows"]:
            files[SPLITS[split]] = {"file": name, **summary}
        else:
            (plan.out / name).unlink()
    if train_rows is not None:
        rows.report.pop(SPLITS[0], None)  # not all were counted
    write_arrays(gene_moments(values, cells.split == 0), plan.work / f"shard-{index:05d}.npz")
    write_json({"files": files, "report": rows.report}, plan.work / f"shard-{index:05d}.json")


def first_rows(batches: Iterator[pa.RecordBatch], n: int) -> Iterator[pa.RecordBatch]:
    """The first `n` rows; no more batches are made than they need. Rows of a shard are in random order."""
    while n > 0 and (batch := next(batches, None)) is not None:
        yield batch.slice(0, n)
        n -= batch.num_rows


def shard_done(plan: PairPlan, index: int) -> bool:
    """Whether a shard was written completely; its files are still as long as they were."""
    report = plan.work / f"shard-{index:05d}.json"
    if not report.is_file():
        return False
    files = json.loads(report.read_text())["files"].values()
    paths = [(plan.out / entry["file"], entry["n_bytes"]) for entry in files]
    return all(path.is_file() and path.stat().st_size == n_bytes for path, n_bytes in paths)


def _end_with_parent(parent: int) -> None:
    """Starts a thread that ends this worker when its parent is gone: a killed build leaves nobody behind."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_tasks(
    task: Callable[[str, str, int], None],
    plan: PairPlan,
    indices: list[int],
    num_proc: int,
    progress: bool,
    description: str,
    dask: str | None = None,
) -> None:
    """Runs one task for every shard in `indices`, in `num_proc` processes or on the scheduler at the address `dask`.

    Stops at the first error.
    """
    identity = digest_of(plan.content["identity"])
    out, bounds = str(plan.out), plan.content["bounds"]
    done_cells = bounds[-1] - sum(bounds[index + 1] - bounds[index] for index in indices)
    run = _run_here if dask is None else _run_on_dask
    with tqdm(total=bounds[-1], initial=done_cells, desc=description, unit="cell", disable=not progress) as bar:
        for index in run(task, out, identity, indices, num_proc if dask is None else dask):
            bar.update(bounds[index + 1] - bounds[index])


def _run_here(task: Callable, out: str, identity: str, indices: list[int], num_proc: int) -> Iterator[int]:
    """Yields the shards as processes, or threads of this one, finish them."""
    if num_proc == 1 or len(indices) < 2:
        # Two shards at a time: while one is matched and written the next is read.
        executor = concurrent.futures.ThreadPoolExecutor(THREADS)
    else:
        executor = concurrent.futures.ProcessPoolExecutor(
            min(num_proc, len(indices)),
            mp_context=multiprocessing.get_context("spawn"),  # TileDB's threads do not survive a fork
            initializer=_end_with_parent,
            initargs=(os.getpid(),),
        )
    with executor as pool:
        futures = {pool.submit(task, out, identity, index): index for index in indices}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _run_on_dask(task: Callable, out: str, identity: str, indices: list[int], address: str) -> Iterator[int]:
    """Yields the shards as the cluster finishes them; those of a lost worker are run again by another."""
    try:
        from dask.distributed import Client, as_completed
    except ImportError as error:
        raise ValueError("`dask` needs the package `distributed`: pip install 'gppc[dask]'.") from error
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise ValueError(f"`dask` {address} is no scheduler that answers ({' '.join(str(error).split())}).") from error
    with client:
        # Tasks write files and return nothing: a task that ran twice has written the same bytes twice.
        futures = {client.submit(task, out, identity, index, pure=False, retries=2): index for index in indices}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
