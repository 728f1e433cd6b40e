"""Cells read in blocks: the values of the store, normalised over all genes, and nothing that is not a count."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.store.cell_stream import TILE_CELLS, CellStream, read_values, tile_boundary
from data_scripts.store.query_options import QueryOptions
from modeling_gppc.normalization_gppc import normalize_counts


class FakeMatrix:
    """Answers reads of a dense array as a store does: coordinates of stored entries, in the order of its tiles."""

    def __init__(self, dense: np.ndarray, tile: int = 3, shuffled: int | None = None):
        self.dense, self.tile, self.shuffled = dense, tile, shuffled

    def read(self, coordinates):
        cells = coordinates[0]
        wanted = np.arange(cells.start, cells.stop + 1) if isinstance(cells, slice) else np.asarray(cells)
        rows, genes = np.nonzero(self.dense[wanted])
        order = np.lexsort((genes, wanted[rows], genes // self.tile, wanted[rows] // self.tile))
        if self.shuffled is not None:
            order = np.random.default_rng(self.shuffled).permutation(order)
        rows, genes = wanted[rows][order], genes[order]
        columns = {"soma_dim_0": rows, "soma_dim_1": genes, "soma_data": self.dense[rows, genes].astype(np.float32)}
        self.answer = pa.table(columns)
        return self

    def tables(self):
        half = self.answer.num_rows // 2
        return iter([self.answer.slice(0, half), self.answer.slice(half)])


OPTIONS = QueryOptions()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.booleans())
def test_values_are_the_stores(seed, n_cells, n_genes, block_cells, scattered):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.choice([0.5, 40.0], n_genes), (n_cells, n_genes)).astype(np.float64)
    joinids = np.flatnonzero(rng.random(n_cells) < 0.6) if scattered else np.arange(n_cells)
    joinids = joinids if len(joinids) else np.array([0])
    vocabulary = np.full(n_genes, -1, dtype=np.int32)
    chosen = np.sort(rng.permutation(n_genes)[: rng.integers(1, n_genes + 1)])
    vocabulary[chosen] = np.arange(len(chosen))
    library = dense.sum(1)[joinids] + 5
    lengths = rng.uniform(200, 5000, n_genes)
    matrix = FakeMatrix(dense, shuffled=seed if seed % 3 == 0 else None)
    stream = CellStream(matrix, OPTIONS, joinids, (dense[joinids] > 0).sum(1), block_cells)
    found = read_values(stream, library, None, vocabulary)
    assert found.has_sorted_indices and (found.data != 0).all()
    expected = normalize_counts(dense[joinids], library[:, None])
    np.testing.assert_array_equal(found.toarray(), expected[:, chosen])
    tpm = QueryOptions(normalization="log_tpm", target_sum=1e6)
    found = read_values(CellStream(FakeMatrix(dense), tpm, joinids, None, block_cells), library, lengths, vocabulary)
    rates = (dense[joinids] / (lengths / 1000)).sum(1, keepdims=True)
    expected = normalize_counts(
        dense[joinids], rates, normalization="log_tpm", target_sum=1e6, gene_lengths=lengths[None, :]
    )
    # Library sizes are summed in another order, in double precision; then both are rounded to single.
    np.testing.assert_allclose(found.toarray(), expected[:, chosen], rtol=np.finfo(np.float32).eps)


def test_log_values_are_used_as_they_are():
    dense = np.array([[0.5, -1.25, 0], [0, 0, 2.0]])
    options = QueryOptions(layer="log_values", normalization="none")
    stream = CellStream(FakeMatrix(dense), options, np.arange(2))
    values = read_values(stream, np.zeros(2), None, np.arange(3, dtype=np.int32))
    np.testing.assert_array_equal(values.toarray(), dense.astype(np.float32))
    assert values.nnz == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (0.5, "non-integer values"),
        (-1.0, "negative values"),
        (np.nan, "NaN or infinite values"),
        (np.inf, "NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("normalization", ["log1p", "log_tpm"])
def test_values_that_are_no_counts(bad, message, normalization):
    dense = np.ones((6, 4))
    dense[4, 2] = bad
    options = QueryOptions(normalization=normalization)
    stream = CellStream(FakeMatrix(dense), options, np.arange(6), block_cells=3)
    with pytest.raises(ValueError, match=rf"X\['raw'\] of cells 3 to 5` holds {message}"):
        read_values(stream, np.ones(6), np.full(4, 1000.0), np.arange(4, dtype=np.int32))


@pytest.mark.parametrize(("promised", "block_cells"), [(2, 4), (2, 2), (0, 1), (0, 4)])
def test_other_entries_than_promised(promised, block_cells):
    stream = CellStream(FakeMatrix(np.eye(4)), OPTIONS, np.arange(4), np.array([1, 1, promised, 1]), block_cells)
    message = rf"cell 2 has 1 expressed genes .* obs\.nnz says {promised}: the store is damaged"
    with pytest.raises(ValueError, match=message):
        list(stream)


def test_stored_zeros_after_a_complete_block_are_nothing():
    class WithZeros(FakeMatrix):
        def tables(self):
            yield from super().tables()
            cells = np.arange(4)
            yield pa.table({"soma_dim_0": cells, "soma_dim_1": cells[::-1], "soma_data": np.zeros(4, np.float32)})

    blocks = list(CellStream(WithZeros(np.eye(4)), OPTIONS, np.arange(4), np.ones(4, dtype=int), block_cells=2))
    assert [block.genes.tolist() for block in blocks] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("checksum\nmismatch", r"the store is damaged \(checksum mismatch\)"),
        ("increase memory budget (8)", r"its tiles are too large \(increase memory budget"),
    ],
)
def test_an_error_while_reading_ahead_reaches_the_caller(told, message):
    class Broken(FakeMatrix):
        def tables(self):
            yield next(super().tables())
            raise RuntimeError(told)

    stream = CellStream(Broken(np.eye(6)), OPTIONS, np.arange(6), block_cells=2)
    with pytest.raises(ValueError, match=f"cells 0 to 5: {message}"):
        list(stream)


def test_cells_in_a_row_are_one_query():
    asked = []

    class Counted(FakeMatrix):
        def read(self, coordinates):
            asked.append(coordinates[0])
            return super().read(coordinates)

    joinids = np.array([0, 1, 2, 3, 4, 5, 8, 9, 12, 14])
    blocks = list(CellStream(Counted(np.eye(16)), OPTIONS, joinids, block_cells=2))
    assert [block.joinids.tolist() for block in blocks] == joinids.reshape(-1, 2).tolist()
    assert asked[:2] == [slice(0, 5), slice(8, 9)] and asked[2].tolist() == [12, 14]


def test_blocks_end_with_tiles():
    joinids = np.arange(1000, 3 * TILE_CELLS)
    stream = CellStream(None, OPTIONS, joinids, block_cells=TILE_CELLS)
    assert [int(joinids[start]) for start, _ in stream.blocks()] == [1000, TILE_CELLS, 2 * TILE_CELLS]
    assert tile_boundary(np.arange(10), 5, 2) == 5  # no tile begins near
    sparse = np.arange(0, 100 * TILE_CELLS, 50)
    assert sum(stop - start for start, stop in CellStream(None, OPTIONS, sparse).blocks()) == len(sparse)
