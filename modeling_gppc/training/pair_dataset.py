"""Pair rows in Arrow as a torch data set that hands out whole batches."""

import dataclasses

import numpy as np
import pyarrow as pa
import torch

LISTS = (
    ("source_gene_ids", "source_values"),
    ("target_gene_ids", "target_values"),
    ("perturbation_gene_ids", "perturbation_values"),
)
SCALARS = ("source_panel", "target_panel")


@dataclasses.dataclass
class PairRows:
    """
    Some pair rows, as flat arrays.

    Args:
        rows (`np.ndarray`): Positions in the data set, shape `(B,)`.
        epoch (`int`): Pass over the data.
        lists (`dict`): `source`, `target`, `perturbation` -> (lengths `(B,)`, ids `(sum,)`, values `(sum,)`).
        panels (`dict`): `source_panel`, `target_panel` -> `(B,)`.
        pairing_ids (`np.ndarray`): Index of the pairing, shape `(B,)`.
    """

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
        # Views into the buffers of every chunk: offsets, ids, values.
        self._chunks = {
            ids.split("_")[0]: [
                (first.offsets.to_numpy(), first.values.to_numpy(), second.values.to_numpy())
                for first, second in zip(table.column(ids).chunks, table.column(values).chunks)
            ]
            for ids, values in LISTS
        }
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
            lists={name: self._gather(chunks, rows) for name, chunks in self._chunks.items()},
            panels={name: values[rows] for name, values in self._scalars.items()},
            pairing_ids=self.pairing_ids[rows],
        )

    def _gather(self, chunks: list, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chunk_of_row = np.searchsorted(self._starts, rows, side="right") - 1
        local = rows - self._starts[chunk_of_row]
        if len(rows) and (chunk_of_row == chunk_of_row[0]).all():
            offsets, ids, values = chunks[chunk_of_row[0]]
            begins = offsets[local].astype(np.int64)
            lengths = offsets[local + 1] - begins
            # Flat position of every value: its row's beginning plus its place within the row.
            ends = np.cumsum(lengths)
            flat = np.arange(ends[-1]) + np.repeat(begins - (ends - lengths), lengths)
            return lengths, ids[flat], values[flat]
        # Rows from anywhere: one slice of a buffer each, at a cost that does not grow with the number of chunks.
        spans = [
            (chunks[chunk][0][row], chunks[chunk][0][row + 1], chunk)
            for chunk, row in zip(chunk_of_row.tolist(), local.tolist())
        ]
        lengths = np.array([end - begin for begin, end, _ in spans], dtype=np.int64)
        ids = [chunks[chunk][1][begin:end] for begin, end, chunk in spans]
        values = [chunks[chunk][2][begin:end] for begin, end, chunk in spans]
        return (
            lengths,
            np.concatenate(ids) if ids else np.empty(0, np.int32),
            np.concatenate(values) if values else np.empty(0, np.float32),
        )

    def dense_cells(self, which: str, rows: np.ndarray, n_genes: int) -> np.ndarray:
        """Values of the `source` or `target` cells of some rows over the vocabulary, float32 of shape `(B, V)`."""
        lengths, ids, values = self._gather(self._chunks[which], np.asarray(rows, dtype=np.int64))
        return scatter(lengths, ids, values, n_genes)


def scatter(lengths: np.ndarray, ids: np.ndarray, values: np.ndarray, n_genes: int) -> np.ndarray:
    """Flat lists as a dense array of shape `(B, n_genes)`, zero where nothing stands."""
    dense = np.zeros((len(lengths), n_genes), dtype=np.float32)
    dense[np.repeat(np.arange(len(lengths)), lengths), ids] = values
    return dense


def pad(lengths: np.ndarray, ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat lists as padded arrays: ids int64, values float32, mask int64, each `(B, longest)`, at least one wide."""
    width = max(int(lengths.max(initial=0)), 1)
    mask = np.arange(width)[None, :] < lengths[:, None]
    padded_ids = np.zeros(mask.shape, dtype=np.int64)
    padded_values = np.zeros(mask.shape, dtype=np.float32)
    padded_ids[mask] = ids
    padded_values[mask] = values
    return padded_ids, padded_values, mask.astype(np.int64)
