"""Cells in ascending order, in contiguous blocks of all genes, checked and normalised in memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.sparse as sp
import tiledbsoma

from data_scripts.store.query_options import QueryOptions
from modeling_gppc.normalization_gppc import check_raw_counts, normalize_counts

Item = TypeVar("Item")
BLOCK_CELLS = 8_192
TILE_CELLS = 2_048  # extent of Census's tiles along the cells; a tile cut by two blocks is decoded twice


@dataclass
class CellBlock:
    """Expressed genes of consecutive selected cells: position of the first among the cells asked for, `soma_joinid` of
    all, and of each entry its cell within the block, its gene (`soma_joinid`, or vocabulary id where genes were
    chosen) and its stored value, in the order of the store's tiles."""

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
    """Reads one layer for the cells `joinids`, ascending, as contiguous blocks of all genes, which is faster than
    asking for some genes or for scattered cells; the next block is read while the caller works on the last one. A
    store whose cells have other numbers of entries than `n_expressed` says is damaged."""

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
        """Blocks of all genes, or of those of a vocabulary (see [`read_values`]), in order; `ValueError` for one that
        cannot be read or holds other numbers of entries than `n_expressed` says."""
        return read_ahead(self._block(start, stop, vocabulary) for start, stop in self.blocks())

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First cell and end of every block: as many cells as wanted, ending with a tile of the store if one ends."""
        start = 0
        while start < len(self.joinids):
            stop = tile_boundary(self.joinids, start + self.block_cells, start + self.block_cells // 2)
            yield start, stop
            start = stop

    def _block(self, start: int, stop: int, vocabulary: np.ndarray | None) -> CellBlock:
        joinids = self.joinids[start:stop]
        first, last = int(joinids[0]), int(joinids[-1])
        consecutive = last - first + 1 == len(joinids)
        n_found = np.zeros(len(joinids), dtype=np.int64)
        parts = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))]
        try:
            coordinates = (slice(first, last) if consecutive else joinids, slice(None))
            for table in self.matrix.read(coordinates).tables():
                cells, genes, values = (table.column(n).to_numpy() for n in ("soma_dim_0", "soma_dim_1", "soma_data"))
                if not values.all():
                    expressed = values != 0
                    cells, genes, values = cells[expressed], genes[expressed], values[expressed]
                rows = cells - first if consecutive else np.searchsorted(joinids, cells)
                n_found += np.bincount(rows, minlength=len(joinids))
                if vocabulary is not None:
                    ids = vocabulary.take(genes)
                    chosen = np.flatnonzero(ids >= 0)
                    rows, genes, values = rows.take(chosen), ids.take(chosen), values.take(chosen)
                parts.append((rows.astype(np.int32), genes.astype(np.int32), values.astype(np.float32)))
        except (tiledbsoma.SOMAError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            fault = "its tiles are too large" if "memory budget" in reason else "the store is damaged"
            raise ValueError(
                f"layer `{self.options.layer}` cannot be read for cells {first} to {last}: {fault} ({reason})."
            ) from error
        if self.n_expressed is not None:
            expected = self.n_expressed[start:stop]
            for row in np.flatnonzero(n_found != expected)[:1]:
                raise ValueError(
                    f"cell {joinids[row]} has {n_found[row]} expressed genes in layer `{self.options.layer}`; obs.nnz "
                    f"says {expected[row]}: the store is damaged, write it again."
                )
        return CellBlock(start, joinids, *(np.concatenate(arrays) for arrays in zip(*parts)))


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, none of them `None`; a thread makes the next one while the caller works on the last."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def check_values(values: np.ndarray, options: QueryOptions, joinids: np.ndarray) -> None:
    """Raises `ValueError` for values of `raw` that are not counts, and for NaN or infinite values anywhere."""
    where = f"X[{options.layer!r}] of cells {joinids[0]} to {joinids[-1]}"
    if options.layer == "raw":
        check_raw_counts(values, where)
    elif not np.isfinite(values).all():
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
    """Log values of a block's entries, float32. `library_size` holds the counts over all genes of all cells of the
    stream, `gene_lengths` the bases of every gene of the store, for `log_tpm`, which needs a block of all genes."""
    library = library_size[block.start : block.start + block.n_cells].astype(np.float64)
    lengths = None
    if options.layer == "normalized":
        library = np.ones(block.n_cells)
    if options.normalization == "log_tpm":
        lengths = gene_lengths[block.genes]
        rates = block.values.astype(np.float64) / (lengths / 1_000.0)
        library = np.bincount(block.rows, weights=rates, minlength=block.n_cells)
    return normalize_counts(
        block.values,
        library[block.rows],
        normalization=options.normalization,
        target_sum=options.target_sum,
        gene_lengths=lengths,
    )


def read_values(
    stream: CellStream, library_size: np.ndarray, gene_lengths: np.ndarray | None, vocabulary: np.ndarray
) -> sp.csr_matrix:
    """Normalised values of the stream's cells at the genes of the vocabulary, float32 `(n_cells, n_genes)`, sorted,
    without zeros. `vocabulary` holds the id of every gene of the store, ascending as the genes do, -1 where left out;
    see [`normalize_block`]."""
    # Rates are over all genes, so there the choice of genes comes after them.
    all_genes = stream.options.normalization == "log_tpm"
    parts = []
    for block in stream.blocks_ahead(None if all_genes else vocabulary):
        check_values(block.values, stream.options, block.joinids)
        values, rows, genes = (
            normalize_block(block, stream.options, library_size, gene_lengths),
            block.rows,
            block.genes,
        )
        if all_genes:
            ids = vocabulary.take(genes)
            chosen = np.flatnonzero(ids >= 0)
            values, rows, genes = values.take(chosen), rows.take(chosen), ids.take(chosen)
        # The store's tiles lie along the genes in ascending order, so this counting sort by cell leaves them sorted.
        part = sp.coo_matrix((values, (rows, genes)), shape=(block.n_cells, int(vocabulary.max()) + 1)).tocsr()
        part.sort_indices()
        parts.append(part)
    return sp.vstack(parts, format="csr")
