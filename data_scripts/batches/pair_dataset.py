"""Pair rows in Arrow as a torch data set that hands out whole batches."""

import dataclasses

import numpy as np
import pyarrow as pa
import torch

LISTS = ("source", "target", "perturbation")
SCALARS = ("source_panel", "target_panel")


@dataclasses.dataclass
class PairRows:
    """Some pair rows as flat arrays: their positions in the data set, `lists` (`source`, `target`, `perturbation` ->
    lengths `(B,)`, ids and values `(sum,)`), `panels` (`source_panel`, `target_panel`) and ids of pairings."""

    rows: np.ndarray
    epoch: int
    lists: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    panels: dict[str, np.ndarray]
    pairing_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class PairDataset(torch.utils.data.Dataset):
    """
    Rows of a pairs table; a batch is gathered from the Arrow buffers without a Python object per row or value.

    Args:
        table (`pa.Table`): Rows in `PAIR_SCHEMA`, memory-mapped or not.
        pairings (`list[str]`): Names of the pairings, in the order of the model's ids.
    """

    def __init__(self, table: pa.Table, pairings: list[str]):
        self.table = table
        self.epoch = 0
        self._scalars = {name: table.column(name).to_numpy() for name in SCALARS}
        codes = table.column("pairing").combine_chunks().dictionary_encode()
        names = codes.dictionary.to_pylist()
        unknown = sorted(set(names) - set(pairings))
        if unknown:
            raise ValueError(f"`table` holds pairs of pairing {unknown[0]!r}; wanted {', '.join(pairings)}.")
        lookup = np.array([pairings.index(name) for name in names], dtype=np.int64)
        self.pairing_ids = lookup[codes.indices.to_numpy()]
        # Views into the buffers of every chunk, and where each row lies in them.
        self._chunks, self._begins, self._ends = {}, {}, {}
        for name in LISTS:
            chunks = list(zip(table.column(f"{name}_gene_ids").chunks, table.column(f"{name}_values").chunks))
            offsets = [first.offsets.to_numpy() for first, _ in chunks]
            self._chunks[name] = [(first.values.to_numpy(), second.values.to_numpy()) for first, second in chunks]
            self._begins[name] = np.concatenate([np.empty(0, np.int32), *(offset[:-1] for offset in offsets)])
            self._ends[name] = np.concatenate([np.empty(0, np.int32), *(offset[1:] for offset in offsets)])
        lengths = [len(chunk) for chunk in table.column("source_gene_ids").chunks]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return self.table.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Tells the pass over the data; redrawn perturbations depend on it."""
        self.epoch = epoch

    def __getitem__(self, index) -> PairRows:
        return self.__getitems__(np.atleast_1d(index))

    def __getitems__(self, indices) -> PairRows:
        rows = np.asarray(indices, dtype=np.int64)
        return PairRows(
            rows=rows,
            epoch=self.epoch,
            lists={name: self._gather(name, rows) for name in self._chunks},
            panels={name: values[rows] for name, values in self._scalars.items()},
            pairing_ids=self.pairing_ids[rows],
        )

    def _gather(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # One slice of a buffer a row, at a cost that does not grow with the number of chunks.
        chunks = self._chunks[name]
        begins, ends = self._begins[name][rows], self._ends[name][rows]
        places = (np.searchsorted(self._starts, rows, side="right") - 1).tolist()
        spans = list(zip(places, begins.tolist(), ends.tolist()))
        ids = [chunks[chunk][0][begin:end] for chunk, begin, end in spans]
        values = [chunks[chunk][1][begin:end] for chunk, begin, end in spans]
        return (
            (ends - begins).astype(np.int64),
            np.concatenate(ids) if ids else np.empty(0, np.int32),
            np.concatenate(values) if values else np.empty(0, np.float32),
        )

    def dense_cells(self, which: str, rows: np.ndarray, n_genes: int) -> np.ndarray:
        """Values of the `source` or `target` cells of some rows over the vocabulary, float32 of shape `(B, V)`."""
        lengths, ids, values = self._gather(which, np.asarray(rows, dtype=np.int64))
        return scatter(lengths, ids, values, n_genes)


def scatter(lengths: np.ndarray, ids: np.ndarray, values: np.ndarray, n_genes: int) -> np.ndarray:
    """Flat lists as a dense array of shape `(B, n_genes)`, zero where nothing stands."""
    dense = np.zeros((len(lengths), n_genes), dtype=np.float32)
    dense[np.repeat(np.arange(len(lengths)), lengths), ids] = values
    return dense


def pad(
    lengths: np.ndarray, ids: np.ndarray, values: np.ndarray, width: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat lists as padded arrays: ids int64, values float32, mask int64, each `(B, width)`; by default the longest
    list's length, at least 1."""
    width = max(int(lengths.max(initial=0)), 1) if width is None else width
    padded_ids = np.zeros((len(lengths), width), dtype=np.int64)
    padded_values = np.zeros((len(lengths), width), dtype=np.float32)
    mask = np.zeros((len(lengths), width), dtype=np.int64)
    end = 0
    for row, length in enumerate(lengths.tolist()):  # copies of rows are faster than a mask over all places
        begin, end = end, end + length
        padded_ids[row, :length] = ids[begin:end]
        padded_values[row, :length] = values[begin:end]
        mask[row, :length] = 1
    return padded_ids, padded_values, mask
