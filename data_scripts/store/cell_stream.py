"""Cells in ascending order, in contiguous blocks of all genes, checked and normalised in memory."""

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma

from data_scripts.store.query_options import QueryOptions
from modeling_gppc.normalization_gppc import check_raw_counts, normalize_counts

Item = TypeVar("Item")
BLOCK_CELLS = 2_048
TABLES_AHEAD = 2  # the store's buffers that wait to be chosen from
TILE_CELLS = 2_048  # extent of Census's tiles along the cells; a tile cut by two blocks is decoded twice
CHOSEN_AT_ONCE = 1 << 17  # entries cut to the panel at once: few enough to stay in the processor's cache


@dataclass
class CellBlock:
    """Expressed genes of consecutive selected cells, the first at position `start` among those asked for: `joinids` of
    the cells, and of each entry its cell within the block (`rows`), `soma_joinid` of its gene or the vocabulary id where
    genes were chosen (`genes`), both int32 in the order of the store's tiles, and its float32 value, never zero."""

    start: int
    joinids: np.ndarray
    rows: np.ndarray
    genes: np.ndarray
    values: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.joinids)


class CellStream:
    """Reads one layer for cells in ascending order. Reading contiguous blocks of all genes is faster than asking for
    some genes or for scattered cells; the next block is read while the caller works on the last one. A store whose cells
    have other numbers of entries than `n_expressed` says is damaged."""

    def __init__(
        self,
        matrix: tiledbsoma.SparseNDArray,
        options: QueryOptions,
        joinids: np.ndarray,
        n_expressed: np.ndarray | None = None,
        block_cells: int = BLOCK_CELLS,
    ):
        self.matrix, self.options, self.joinids = matrix, options, np.asarray(joinids, dtype=np.int64)
        self.n_expressed, self.block_cells = n_expressed, block_cells

    def __iter__(self) -> Iterator[CellBlock]:
        return self.blocks_ahead()

    def blocks_ahead(self, vocabulary: np.ndarray | None = None) -> Iterator[CellBlock]:
        """Blocks of all genes, or of those of a vocabulary (see [`read_values`]), in order. Two threads work ahead: one has
        the store decode a buffer while the other chooses from the last and puts blocks together."""
        with closing(read_ahead(self._tables(), TABLES_AHEAD)) as tables:
            yield from read_ahead(self._assemble(tables, vocabulary), 1)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First cell and end of every block: as many cells as wanted, ending with a tile of the store if one ends."""
        start = 0
        while start < len(self.joinids):
            stop = tile_boundary(self.joinids, start + self.block_cells, start + self.block_cells // 2)
            yield start, stop
            start = stop

    def _queries(self) -> Iterator[list[tuple[int, int]]]:
        """Blocks to be asked for at once: those of consecutive cells, else one by one. A query has its cost, and the
        store frees what it decodes into when one ends: a query a block ended processes with a broken heap."""
        together: list[tuple[int, int]] = []
        for start, stop in self.blocks():
            consecutive = _consecutive(self.joinids[start:stop])
            if together and not (consecutive and _consecutive(self.joinids[together[0][0] : stop])):
                yield together
                together = []
            together.append((start, stop))
        if together:
            yield together

    def _tables(self) -> Iterator[tuple[list[tuple[int, int]], pa.Table | None]]:
        """The store's tables of every query with the query's blocks, and `None` where it ends."""
        for blocks in self._queries():
            joinids = self.joinids[blocks[0][0] : blocks[-1][1]]
            first, last = int(joinids[0]), int(joinids[-1])
            try:
                coordinates = slice(first, last) if _consecutive(joinids) else joinids
                for table in self.matrix.read((coordinates, slice(None))).tables():
                    yield blocks, table
            except (tiledbsoma.SOMAError, RuntimeError, OSError) as error:
                reason = " ".join(str(error).split())[:300]
                fault = "its tiles are too large" if "memory budget" in reason else "the store is damaged"
                raise ValueError(
                    f"layer `{self.options.layer}` cannot be read for cells {first} to {last}: {fault} ({reason})."
                ) from error
            yield blocks, None

    def _assemble(self, tables: Iterator[tuple], vocabulary: np.ndarray | None) -> Iterator[CellBlock]:
        """Blocks of the tables' entries, which come in any order. A block is complete when it has as many as obs says, or,
        where that is not known, when its query ends; `ValueError` if the store holds other numbers."""
        parts: dict[int, list] = {}
        n_read: dict[int, int] = {}
        waiting: list[tuple[int, int]] = []
        for blocks, table in tables:
            if not n_read:
                waiting, parts = list(blocks), {start: [] for start, _ in blocks}
                n_read = dict.fromkeys(parts, 0)
            if table is not None:
                # Chosen, made small and copied while in the processor's cache; the store's buffers are free for more.
                columns = [table.column(name).to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")]
                for begin in range(0, table.num_rows, CHOSEN_AT_ONCE):
                    entries = [column[begin : begin + CHOSEN_AT_ONCE] for column in columns]
                    for start, stop, own in self._by_block(blocks, entries):
                        part, n_expressed = _choose(*own, self.joinids[start:stop], vocabulary)
                        if not n_expressed:
                            continue  # zeros that the store holds, maybe of a block that is complete
                        n_read[start] += n_expressed
                        if start not in parts:
                            self._refuse(start, stop)  # it was complete
                        parts[start].append(part)
            while waiting and self._complete(*waiting[0], n_read[waiting[0][0]], table is None):
                start, stop = waiting.pop(0)
                own = parts.pop(start)
                rows, genes, values = (
                    np.concatenate(arrays) for arrays in (zip(*own) if own else [[np.zeros(0, np.int32)]] * 3)
                )
                yield CellBlock(start, self.joinids[start:stop], rows, genes, values.astype(np.float32, copy=False))
            if table is None:
                n_read = {}

    def _complete(self, start: int, stop: int, n_read: int, ended: bool) -> bool:
        """Whether all entries of a block were read."""
        if self.n_expressed is None:
            return ended
        complete = n_read == self.n_expressed[start:stop].sum()
        if ended and not complete:
            self._refuse(start, stop)
        return complete

    def _by_block(self, blocks: list[tuple[int, int]], entries: list[np.ndarray]) -> Iterator[tuple]:
        """First cell, end and entries of each block that a few entries of the store are of; mostly it is one."""
        if not len(entries[0]):
            return
        ends = self.joinids[[stop - 1 for _, stop in blocks]]
        lowest, highest = np.searchsorted(ends, [entries[0].min(), entries[0].max()])
        if lowest == highest:
            yield *blocks[lowest], entries
            return
        owner = np.searchsorted(ends, entries[0])
        for index in range(lowest, highest + 1):
            mine = np.flatnonzero(owner == index)
            if len(mine):
                yield *blocks[index], [column[mine] for column in entries]

    def _refuse(self, start: int, stop: int) -> None:
        """Says which cell of a block has other entries than obs tells."""
        own = CellStream(self.matrix, self.options, self.joinids[start:stop], None, stop - start)
        found = np.concatenate([np.bincount(block.rows, minlength=block.n_cells) for block in own])
        wrong = np.flatnonzero(found != self.n_expressed[start:stop])
        raise ValueError(
            f"cell {self.joinids[start + wrong[0]]} has {found[wrong[0]]} expressed genes in layer "
            f"`{self.options.layer}`; obs.nnz says {self.n_expressed[start + wrong[0]]}: the store is damaged, write it "
            "again."
        )


def _consecutive(joinids: np.ndarray) -> bool:
    """Whether ascending ids have no gap."""
    return int(joinids[-1]) - int(joinids[0]) + 1 == len(joinids)


def _choose(
    cells: np.ndarray, genes: np.ndarray, values: np.ndarray, joinids: np.ndarray, vocabulary: np.ndarray | None
) -> tuple[list[np.ndarray], int]:
    """Rows, genes and values of the expressed entries of a vocabulary (or all), and how many were expressed at all."""
    if not values.all():
        expressed = values != 0
        cells, genes, values = cells[expressed], genes[expressed], values[expressed]
    n_expressed = len(values)
    if vocabulary is not None:
        ids = vocabulary.take(genes)
        chosen = np.flatnonzero(ids >= 0)
        cells, genes, values = cells.take(chosen), ids.take(chosen), values.take(chosen)
    rows = cells - joinids[0] if _consecutive(joinids) else np.searchsorted(joinids, cells)
    kinds = (np.int32, np.int32, np.float32)
    return [array.astype(kind) for array, kind in zip((rows, genes, values), kinds)], n_expressed


def read_ahead(items: Iterator[Item], depth: int = 1) -> Iterator[Item]:
    """The same items, made by a thread up to `depth` ahead; an error there is raised here, and leaving ends both."""
    ahead: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, item) -> bool:
        while not stopped.is_set():
            try:
                ahead.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed to the caller, who raises it
            put("error", error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while True:
            kind, item = ahead.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        stopped.set()
        worker.join()


def check_values(values: np.ndarray, options: QueryOptions, joinids: np.ndarray) -> None:
    """Raises `ValueError` for values of `raw` that are not counts, and for NaN or infinite values anywhere."""
    if not len(values):
        return
    where = f"X[{options.layer!r}] of cells {joinids[0]} to {joinids[-1]}"
    if options.layer == "raw":
        # Not negative, and equal to itself as an integer: counts, told by two quick passes. Else say what is wrong.
        with np.errstate(invalid="ignore"):
            if not values.min() >= 0 or not (values.astype(np.int32) == values).all():
                check_raw_counts(values, where)
    elif not np.isfinite(values.sum(dtype=np.float64)):
        raise ValueError(f"{where} holds NaN or infinite values.")


def tile_boundary(joinids: np.ndarray, wanted: int, least: int) -> int:
    """The last position up to `wanted` that begins a tile of the store, or `wanted` where that is not above `least`."""
    if wanted >= len(joinids):
        return len(joinids)
    boundary = int(np.searchsorted(joinids, joinids[wanted] // TILE_CELLS * TILE_CELLS))
    return boundary if boundary > least else wanted


def normalize_block(
    block: CellBlock, options: QueryOptions, library_size: np.ndarray, gene_lengths: np.ndarray | None
) -> np.ndarray:
    """Log values of a block's entries `(n_entries,)`, normalised over all genes; `library_size` is of its cells, and
    `gene_lengths`, for `log_tpm` only, of every gene of the store."""
    if options.normalization == "none":
        return block.values
    if options.layer == "normalized":
        library_size = np.ones(block.n_cells)
    lengths = None
    if options.normalization == "log_tpm":
        lengths = gene_lengths[block.genes]
        rates = block.values.astype(np.float64) / (lengths / 1_000.0)
        library_size = np.bincount(block.rows, weights=rates, minlength=block.n_cells)
    return normalize_counts(
        block.values,
        np.asarray(library_size, dtype=np.float64)[block.rows],
        normalization=options.normalization,
        target_sum=options.target_sum,
        gene_lengths=lengths,
    )


def read_values(
    stream: CellStream,
    library_size: np.ndarray,
    gene_lengths: np.ndarray | None,
    vocabulary: np.ndarray,
) -> sp.csr_matrix:
    """Normalised values of the stream's cells at the genes of the vocabulary, float32 `(n_cells, n_genes)`, sorted,
    without zeros. `vocabulary` holds the id of every gene of the store, ascending as the genes do, -1 where left out;
    see [`normalize_block`]."""
    n_genes = int(vocabulary.max()) + 1
    lengths, ids, values = [], [], []
    # Rates are over all genes, so there the choice comes after them.
    all_genes = stream.options.normalization == "log_tpm"
    for block in stream.blocks_ahead(None if all_genes else vocabulary):
        check_values(block.values, stream.options, block.joinids)
        entries = (block.values, (block.rows, block.genes))
        if all_genes:
            of_entries = vocabulary.take(block.genes)
            chosen = np.flatnonzero(of_entries >= 0)
            rates = normalize_block(block, stream.options, None, gene_lengths)
            entries = (rates.take(chosen), (block.rows.take(chosen), of_entries.take(chosen)))
        # The store's tiles lie along the genes in ascending order, so this counting sort by cell leaves them sorted.
        part = sp.coo_matrix(entries, shape=(block.n_cells, n_genes)).tocsr()
        part.sort_indices()
        if stream.options.normalization == "log1p":
            library = np.asarray(library_size[block.start : block.start + block.n_cells], dtype=np.float64)
            library = np.ones(block.n_cells) if stream.options.layer == "normalized" else library
            part.data = normalize_counts(
                part.data, np.repeat(library, np.diff(part.indptr)), target_sum=stream.options.target_sum
            )
        lengths.append(np.diff(part.indptr))
        ids.append(part.indices)
        values.append(part.data)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    matrix = sp.csr_matrix((np.concatenate(values), np.concatenate(ids), indptr), shape=(len(indptr) - 1, n_genes))
    matrix.has_sorted_indices = True
    matrix.has_canonical_format = True
    return matrix
