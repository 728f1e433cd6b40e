"""PairDataset: batches gathered from Arrow buffers equal the rows as written."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_rows import N_GENES, PAIRINGS, ROWS, pair_table

from data_scripts.batches.pair_dataset import PairDataset, pad, scatter


def as_dicts(lists):
    """Flat arrays back to one mapping a row."""
    lengths, ids, values = lists
    ends = np.cumsum(lengths)
    return [
        dict(zip(ids[end - length : end].tolist(), values[end - length : end].tolist()))
        for length, end in zip(lengths, ends)
    ]


@pytest.mark.parametrize("chunks", [(6,), (2, 3, 1), (1, 1, 1, 1, 1, 1)])
@settings(max_examples=30)
@given(indices=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=12))
def test_rows_in_any_order_and_repeated(chunks, indices):
    dataset = PairDataset(pair_table(chunks=chunks), PAIRINGS)
    batch = dataset.__getitems__(indices)
    assert len(batch) == len(indices)
    assert batch.rows.tolist() == indices
    for place, name in ((0, "source"), (1, "target"), (3, "perturbation")):
        assert as_dicts(batch.lists[name]) == [ROWS[index][place] for index in indices]
    assert batch.panels["source_panel"].tolist() == [ROWS[index][2][0] for index in indices]
    assert batch.panels["target_panel"].tolist() == [ROWS[index][2][1] for index in indices]
    assert batch.pairing_ids.tolist() == [PAIRINGS.index(ROWS[index][4]) for index in indices]


def test_one_row_length_and_epoch():
    dataset = PairDataset(pair_table(), PAIRINGS)
    assert len(dataset) == len(ROWS)
    assert dataset[2].rows.tolist() == [2]
    assert dataset[2].epoch == 0
    dataset.set_epoch(3)
    assert dataset[2].epoch == 3


def test_sliced_tables():
    dataset = PairDataset(pair_table(chunks=(6,)).slice(1, 4), PAIRINGS)
    assert as_dicts(dataset.__getitems__([0, 1, 3]).lists["source"]) == [ROWS[row][0] for row in (1, 2, 4)]


def test_a_file_read_back_gives_the_same(tmp_path):
    table = pair_table()
    with pa.OSFile(str(tmp_path / "shard.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    mapped = pa.ipc.open_stream(pa.memory_map(str(tmp_path / "shard.arrow"))).read_all()
    left, right = (PairDataset(item, PAIRINGS).__getitems__([5, 0, 3]) for item in (table, mapped))
    for name in left.lists:
        assert as_dicts(left.lists[name]) == as_dicts(right.lists[name])


def test_dense_cells():
    dataset = PairDataset(pair_table(), PAIRINGS)
    output = dataset.dense_cells("target", np.array([4, 5]), N_GENES)
    assert output.tolist() == [[3.0, 0.0, 1.0, 0.0, 0.5], [0.0] * 5]
    assert output.dtype == np.float32


def test_an_unknown_pairing_is_refused():
    with pytest.raises(ValueError, match="pairs of pairing 'same_dataset'; wanted same_type"):
        PairDataset(pair_table(), ["same_type"])


def test_scatter_and_pad():
    lengths, ids, values = np.array([2, 0, 1]), np.array([0, 3, 2]), np.array([1.0, 2.0, 3.0])
    assert scatter(lengths, ids, values, 4).tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 3, 0]]
    padded, numbers, mask = pad(lengths, ids, values)
    assert padded.tolist() == [[0, 3], [0, 0], [2, 0]]
    assert numbers.tolist() == [[1, 2], [0, 0], [3, 0]]
    assert mask.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert [array.dtype for array in (padded, numbers, mask)] == [np.int64, np.float32, np.int64]
    assert pad(np.array([0, 0]), np.array([], int), np.array([]))[2].tolist() == [[0], [0]]
