"""Which genes of a pair are imposed: drawn among those measured in both cells and differing."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from data_scripts.pairs.pair_options import PerturbationOptions


def candidate_changes(
    source: sp.csr_matrix,
    target: sp.csr_matrix,
    panels: np.ndarray,
    source_panel: np.ndarray,
    target_panel: np.ndarray,
) -> sp.csr_matrix:
    """Target minus source at the genes that are measured in both cells and differ, no stored zeros, shape `(B, V)`.

    Arguments are those of [`draw_imposed`].
    """
    changes = (target - source).tocsr()
    rows = np.repeat(np.arange(len(source_panel)), np.diff(changes.indptr))
    measured = panels[source_panel[rows], changes.indices] & panels[target_panel[rows], changes.indices]
    changes.data[~measured] = 0
    changes.eliminate_zeros()
    return changes


def sample_from_changes(
    changes: sp.csr_matrix, numbers: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws so many genes of each row of [`candidate_changes`], at a cost that grows with their number only.

    Returns `lengths` `(B,)`, `ids` and `values` of the imposed genes, ascending within a row.
    """
    available = np.diff(changes.indptr).astype(np.int64)
    numbers = np.minimum(numbers, available)
    width = int(numbers.max(initial=0))
    picks = _distinct_integers(available, width, rng)
    mask = np.arange(width)[None, :] < numbers[:, None]
    picks = np.sort(np.where(mask, picks, np.iinfo(np.int64).max), axis=1)
    entries = (changes.indptr[:-1, None].astype(np.int64) + np.where(mask, picks, 0))[mask]
    return numbers, changes.indices[entries], changes.data[entries]


def values_at(cells: sp.csr_matrix, rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """`cells[rows, genes]`, which scipy looks up entry after entry, by bisection."""
    n_rows, n_genes = cells.shape
    if not cells.nnz:
        return np.zeros(len(rows), cells.dtype)
    # Genes ascend in a row, so that these ascend throughout.
    places = np.repeat(np.arange(n_rows) * n_genes, np.diff(cells.indptr)) + cells.indices
    wanted = rows * n_genes + genes
    entries = np.minimum(np.searchsorted(places, wanted), cells.nnz - 1)
    return np.where(places[entries] == wanted, cells.data[entries], 0)


def sample_by_rejection(
    source: sp.csr_matrix,
    target: sp.csr_matrix,
    is_measured: Callable[[np.ndarray, np.ndarray], np.ndarray],
    numbers: np.ndarray,
    rng: np.random.Generator,
    attempts: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Uniform draws of differing genes without looking at the genes that are not drawn.

    Places in the two lists of expressed genes are drawn; a place counts if its gene is measured in both cells,
    differs, and, in the target's list, is not in the source's too. Every differing gene has one such place, so the
    first distinct ones are uniform without replacement. Returns `rows`, `genes` and `changes` of the drawn genes in
    the order of rows, and whether each row found as many as wished, `(B,)`; rows that did not have none.
    """
    n_source = np.diff(source.indptr)
    total = (n_source + np.diff(target.indptr)).astype(np.int64)[:, None]
    places = np.minimum((rng.random((len(total), attempts)) * total).astype(np.int64), np.maximum(total - 1, 0))
    enough, filled = numbers == 0, np.flatnonzero(total)
    if not len(filled):
        return filled, filled, np.zeros(0, np.float32), enough
    rows, places = np.repeat(filled, attempts), places[filled].ravel()
    of_source = places < n_source[rows]
    begins = np.where(of_source, source.indptr[rows], source.nnz + target.indptr[rows] - n_source[rows])
    genes = np.concatenate([source.indices, target.indices])[begins + places]
    before, after = (values_at(cells, rows, genes) for cells in (source, target))
    counts = (of_source | (before == 0)) & (after != before) & is_measured(rows, genes)
    shape = (len(filled), attempts)
    rows, genes, changes, counts = (array.reshape(shape) for array in (rows, genes, after - before, counts))
    # Distinct: no earlier place of the row that counts has the same gene.
    told_apart = np.where(counts, genes, -1 - np.arange(attempts))
    for place in range(1, attempts):
        counts[:, place] &= (told_apart[:, :place] != told_apart[:, place, None]).all(1)
    rank = np.cumsum(counts, axis=1)
    enough[filled] = rank[:, -1] >= numbers[filled]
    counts &= (rank <= numbers[rows]) & enough[rows]
    return rows[counts], genes[counts], changes[counts], enough


def draw_imposed(
    source: sp.csr_matrix,
    target: sp.csr_matrix,
    panels: np.ndarray,
    source_panel: np.ndarray,
    target_panel: np.ndarray,
    options: PerturbationOptions,
    rng: np.random.Generator,
    attempts: int,
    rng_of_rest: Callable[[np.ndarray], np.random.Generator] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the imposed genes of pairs of cells: places are tried, and where too few fit all candidates are listed.

    Args:
        source, target (`sp.csr_matrix`): Values of the cells, sorted indices, no stored zeros, shape `(B, V)`.
        panels (`np.ndarray`): Measured genes, bool `(P, V)`; `source_panel` and `target_panel` are its rows.
        attempts (`int`): Places tried for each row.
        rng_of_rest (`Callable`, *optional*): From the rows whose candidates are listed to the source of their
            randomness; defaults to `rng`.

    Returns:
        Tuple of `rows`, `ids` and `changes` of the imposed genes, ascending by row and id, and of whether each pair has
        a gene to impose, or needs none, bool of shape `(B,)`.
    """
    n_pairs = source.shape[0]
    numbers = rng.integers(options.min_genes, options.max_genes + 1, n_pairs)

    def is_measured(row: np.ndarray, gene: np.ndarray) -> np.ndarray:
        return panels[source_panel[row], gene] & panels[target_panel[row], gene]

    rows, ids, values, enough = sample_by_rejection(source, target, is_measured, numbers, rng, attempts)
    left, kept = np.flatnonzero(~enough), np.ones(n_pairs, dtype=bool)
    if len(left):
        changes = candidate_changes(source[left], target[left], panels, source_panel[left], target_panel[left])
        kept[left] = np.diff(changes.indptr) >= min(1, options.min_genes)
        rest = sample_from_changes(changes, numbers[left], rng if rng_of_rest is None else rng_of_rest(left))
        rows = np.concatenate([rows, np.repeat(left, rest[0])])
        ids, values = np.concatenate([ids, rest[1]]), np.concatenate([values, rest[2]])
    order = np.lexsort((ids, rows))
    return rows[order], ids[order], values[order], kept


def _distinct_integers(available: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `width` distinct integers below `available` in each row, uniform over ordered choices, `(B, width)`."""
    picks = np.zeros((len(available), width), dtype=np.int64)
    for column in range(width):
        left = np.maximum(available - column, 1)
        pick = np.minimum((rng.random(len(available)) * left).astype(np.int64), left - 1)
        # The pick counts only integers not taken yet: step over each taken one, in ascending order.
        for taken in np.sort(picks[:, :column], axis=1).T:
            pick += pick >= taken
        picks[:, column] = pick
    return picks
