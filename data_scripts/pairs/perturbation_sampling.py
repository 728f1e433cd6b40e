"""Which genes of a pair are imposed: drawn among those measured in both cells and differing."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from data_scripts.pairs.pair_options import PerturbationOptions

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # lengths of the rows, ids and values one row after the other


def candidate_changes(
    source: sp.csr_matrix,
    target: sp.csr_matrix,
    panels: np.ndarray,
    source_panel: np.ndarray,
    target_panel: np.ndarray,
) -> sp.csr_matrix:
    """Changes of the genes that may be imposed: measured in both cells and differing.

    Args:
        source, target (`sp.csr_matrix`): Values of the cells, shape `(B, V)`.
        panels (`np.ndarray`): Measured genes, bool of shape `(P, V)`.
        source_panel, target_panel (`np.ndarray`): Panel of each cell, shape `(B,)`.

    Returns:
        `sp.csr_matrix` of target minus source, no stored zeros, shape `(B, V)`.
    """
    changes = (target - source).tocsr()
    wanted = changes.data != 0
    for row in np.flatnonzero(source_panel != target_panel).tolist():  # a gene that one of them expresses
        part = slice(changes.indptr[row], changes.indptr[row + 1])
        genes = changes.indices[part]
        wanted[part] &= panels[source_panel[row]][genes] & panels[target_panel[row]][genes]
    if wanted.all():
        return changes
    indptr = np.concatenate([[0], np.cumsum(wanted)])[changes.indptr]
    return sp.csr_matrix((changes.data[wanted], changes.indices[wanted], indptr), shape=changes.shape)


def sample_from_changes(
    changes: sp.csr_matrix, numbers: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the imposed genes of each row, at a cost that grows with their number, not with that of candidates.

    Args:
        changes (`sp.csr_matrix`): Target minus source at the candidate genes, no stored zeros, shape `(B, V)`.
        numbers (`np.ndarray`): Wished-for number of each row, shape `(B,)`.
        rng (`np.random.Generator`): The only source of randomness.

    Returns:
        Tuple of `lengths` `(B,)`, `ids` and `values` of the imposed genes, ascending within a row.
    """
    available = np.diff(changes.indptr).astype(np.int64)
    numbers = np.minimum(numbers, available)
    width = int(numbers.max(initial=0))
    picks = _distinct_integers(available, width, rng)
    mask = np.arange(width)[None, :] < numbers[:, None]
    picks = np.sort(np.where(mask, picks, np.iinfo(np.int64).max), axis=1)
    entries = (changes.indptr[:-1, None].astype(np.int64) + np.where(mask, picks, 0))[mask]
    return numbers, changes.indices[entries], changes.data[entries]


def find_in_rows(begins: np.ndarray, lists: Lists, rows: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Where genes are among the ids of rows, by bisection.

    Args:
        begins (`np.ndarray`): First entry of each row, shape `(B,)`.
        lists (`tuple`): Lengths, ids and values of the rows, ids ascending in a row.
        rows, genes (`np.ndarray`): What to look for, of equal shape.

    Returns:
        `np.ndarray` of int64, of that shape: the entry, -1 where the row does not have the gene.
    """
    lengths, ids, _ = lists
    if not len(ids):
        return np.full(rows.shape, -1, dtype=np.int64)
    position, end = begins[rows], (begins + lengths)[rows]
    # The last entry below the gene, in steps that halve; a row's first entry has none before it.
    step = 1 << max(int(lengths.max(initial=0)).bit_length() - 1, 0)
    position -= 1
    while step:
        further = position + step
        below = ids.take(further, mode="clip") < genes
        below &= further < end
        position += step * below
        step >>= 1
    position += 1
    found = ids.take(position, mode="clip") == genes
    found &= position < end
    return np.where(found, position, -1)


def sample_by_rejection(
    source: Lists,
    target: Lists,
    candidates: Callable[[np.ndarray, np.ndarray], np.ndarray],
    numbers: np.ndarray,
    rng: np.random.Generator,
    attempts: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Uniform draws of differing genes without looking at the genes that are not drawn.

    Places in the two lists of expressed genes are drawn; a place counts if its gene is a candidate, differs, and, in
    the target's list, is not in the source's too. Every differing gene has one such place, so the first distinct ones
    are uniform without replacement.

    Args:
        source, target (`tuple`): Lengths `(B,)`, ids and values of the expressed genes, ids ascending in a row.
        candidates (`Callable`): From rows and genes of equal shape to whether a gene may be imposed in a row.
        numbers (`np.ndarray`): Wished-for number of each row, shape `(B,)`.
        rng (`np.random.Generator`): The only source of randomness.
        attempts (`int`): Places drawn for each row.

    Returns:
        Tuple of `rows`, `genes` and `changes` of the drawn genes in the order of rows, and whether each row found as
        many as wished, bool of shape `(B,)`; rows that did not have none.
    """
    (n_source, source_ids, source_values), (n_target, target_ids, target_values) = source, target
    n_rows = len(n_source)
    total = (n_source + n_target).astype(np.int64)[:, None]
    places = np.minimum((rng.random((n_rows, attempts)) * total).astype(np.int64), np.maximum(total - 1, 0))
    rows = np.flatnonzero(total)[:, None] + np.zeros((1, attempts), dtype=np.int64)
    places = places[rows[:, 0]].ravel()
    rows, shape = rows.ravel(), rows.shape
    source_begins, target_begins = (np.cumsum(lengths, dtype=np.int64) - lengths for lengths in (n_source, n_target))
    of_source = places < n_source[rows]
    own, other = np.flatnonzero(of_source), np.flatnonzero(~of_source)
    genes = np.empty(rows.shape, dtype=np.int64)
    before, after = np.zeros(rows.shape, dtype=np.float32), np.zeros(rows.shape, dtype=np.float32)
    entries = source_begins[rows[own]] + places[own]
    genes[own], before[own] = source_ids[entries], source_values[entries]
    in_target = find_in_rows(target_begins, target, rows[own], genes[own])
    of_both = np.flatnonzero(in_target >= 0)
    after[own[of_both]] = target_values[in_target[of_both]]
    entries = target_begins[rows[other]] + places[other] - n_source[rows[other]]
    genes[other], after[other] = target_ids[entries], target_values[entries]
    counts = of_source
    counts[other] = find_in_rows(source_begins, source, rows[other], genes[other]) < 0
    counts &= (after != before) & candidates(rows, genes)
    rows, genes, changes, counts = (array.reshape(shape) for array in (rows, genes, after - before, counts))
    # Distinct: no earlier place of the row that counts has the same gene.
    told_apart = np.where(counts, genes, -1 - np.arange(attempts))
    for place in range(1, attempts):
        counts[:, place] &= (told_apart[:, :place] != told_apart[:, place, None]).all(1)
    rank = np.cumsum(counts, axis=1)
    enough = numbers == 0
    enough[rows[:, 0]] = rank[:, -1] >= numbers[rows[:, 0]]
    counts &= (rank <= numbers[rows]) & enough[rows]
    return rows[counts], genes[counts], changes[counts], enough


def draw_imposed(
    source: Lists,
    target: Lists,
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
        source, target (`tuple`): Lengths `(B,)`, ids and values of the expressed genes, ids ascending in a row.
        panels (`np.ndarray`): Measured genes, bool of shape `(P, V)`.
        source_panel, target_panel (`np.ndarray`): Panel of each cell, shape `(B,)`.
        options (`PerturbationOptions`): How many.
        rng (`np.random.Generator`): Source of randomness.
        attempts (`int`): Places tried for each row.
        rng_of_rest (`Callable`, *optional*): From the rows whose candidates are listed to the source of their
            randomness; defaults to `rng`.

    Returns:
        Tuple of `rows`, `ids` and `changes` of the imposed genes, ascending by row and id, and of whether each pair has
        a gene to impose, or needs none, bool of shape `(B,)`.
    """
    n_pairs = len(source[0])
    numbers = rng.integers(options.min_genes, options.max_genes + 1, n_pairs)

    def measured(row: np.ndarray, gene: np.ndarray) -> np.ndarray:
        return panels[source_panel[row], gene] & panels[target_panel[row], gene]

    rows, ids, values, enough = sample_by_rejection(source, target, measured, numbers, rng, attempts)
    left, kept = np.flatnonzero(~enough), np.ones(n_pairs, dtype=bool)
    if len(left):
        cells = []
        for lengths, genes, levels in (source, target):
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            cells.append(sp.csr_matrix((levels, genes, offsets), shape=(n_pairs, panels.shape[1]))[left])
        changes = candidate_changes(*cells, panels, source_panel[left], target_panel[left])
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
