"""Which genes of a pair are revealed: drawn among those measured in both cells and differing."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from data_scripts.pairs.pair_options import PerturbationOptions


def draw_numbers(n: int, options: PerturbationOptions, rng: np.random.Generator) -> np.ndarray:
    """Wished-for number of revealed genes of each pair, int64 of shape `(n,)`."""
    low, high = options.min_genes, options.max_genes
    if options.distribution == "fixed":
        return np.full(n, high, dtype=np.int64)
    if options.distribution == "uniform":
        return rng.integers(low, high + 1, size=n)
    return np.minimum(low + rng.geometric(1.0 / (options.mean_genes - low + 1.0), size=n) - 1, high)


def candidate_changes(
    source: sp.csr_matrix,
    target: sp.csr_matrix,
    panels: np.ndarray,
    source_panel: np.ndarray,
    target_panel: np.ndarray,
    allowed: np.ndarray | None = None,
) -> sp.csr_matrix:
    """Changes of the genes that may be revealed: measured in both cells, differing, allowed.

    Args:
        source, target (`sp.csr_matrix`): Values of the cells, shape `(B, V)`.
        panels (`np.ndarray`): Measured genes, bool of shape `(P, V)`.
        source_panel, target_panel (`np.ndarray`): Panel of each cell, shape `(B,)`.
        allowed (`np.ndarray`, *optional*): Genes that may be revealed, bool of shape `(V,)`.

    Returns:
        `sp.csr_matrix` of target minus source, no stored zeros, shape `(B, V)`.
    """
    changes = (target - source).tocsr()
    wanted = changes.data != 0
    if allowed is not None and not allowed.all():
        wanted &= allowed[changes.indices]
    for row in np.flatnonzero(source_panel != target_panel).tolist():  # a gene that one of them expresses
        part = slice(changes.indptr[row], changes.indptr[row + 1])
        genes = changes.indices[part]
        wanted[part] &= panels[source_panel[row]][genes] & panels[target_panel[row]][genes]
    if wanted.all():
        return changes
    indptr = np.concatenate([[0], np.cumsum(wanted)])[changes.indptr]
    return sp.csr_matrix((changes.data[wanted], changes.indices[wanted], indptr), shape=changes.shape)


def sample_from_changes(
    changes: sp.csr_matrix,
    rng: np.random.Generator,
    options: PerturbationOptions,
    clocks: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the revealed genes of each row, at a cost that grows with their number, not with that of candidates.

    Args:
        changes (`sp.csr_matrix`): Target minus source at the candidate genes, no stored zeros, shape `(B, V)`.
        rng (`np.random.Generator`): The only source of randomness.
        options (`PerturbationOptions`): How many and which.
        clocks (`np.ndarray`, *optional*): For `weighting="change"`, an exponential number of mean 1 for every stored
            change, where these are not to come from `rng`.
        numbers (`np.ndarray`, *optional*): Wished-for number of each row, where these were drawn already.

    Returns:
        Tuple of `offsets` (int32, `(B + 1,)`), `ids` (int32) and `values` (float32) of the revealed genes, ascending
        within a row.
    """
    available = np.diff(changes.indptr).astype(np.int64)
    numbers = np.minimum(draw_numbers(len(available), options, rng) if numbers is None else numbers, available)
    width = int(numbers.max(initial=0))
    if options.weighting == "uniform":
        picks = _distinct_integers(available, width, rng)
    else:
        picks = _weighted(changes, width, rng.standard_exponential(changes.nnz) if clocks is None else clocks)
    mask = np.arange(width)[None, :] < numbers[:, None]
    picks = np.sort(np.where(mask, picks, np.iinfo(np.int64).max), axis=1)
    entries = (changes.indptr[:-1, None].astype(np.int64) + np.where(mask, picks, 0))[mask]
    offsets = np.concatenate([[0], np.cumsum(numbers)]).astype(np.int32)
    return offsets, changes.indices[entries].astype(np.int32), changes.data[entries].astype(np.float32)


Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # lengths of the rows, ids and values one row after the other


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
        candidates (`Callable`): From rows and genes of equal shape to whether a gene may be revealed in a row.
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


def reveal(
    source: sp.csr_matrix,
    target: sp.csr_matrix,
    panels: np.ndarray,
    source_panel: np.ndarray,
    target_panel: np.ndarray,
    allowed: np.ndarray,
    rng: np.random.Generator,
    options: PerturbationOptions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the revealed genes of pairs of cells; arguments as in [`candidate_changes`].

    Returns:
        Tuple of the pairs that have a gene to reveal (or need none), bool of shape `(B,)`, and of those `offsets`
        (int32), `ids` (int32) and `values` (float32) of the revealed genes, ascending within a pair.
    """
    n_pairs = source.shape[0]
    numbers = draw_numbers(n_pairs, options, rng)
    drawn: list[tuple[np.ndarray, ...]] = []
    left = np.arange(n_pairs)
    if options.weighting == "uniform":
        *found, enough = sample_by_rejection(
            *((np.diff(cells.indptr), cells.indices, cells.data) for cells in (source, target)),
            lambda row, gene: panels[source_panel[row], gene] & panels[target_panel[row], gene] & allowed[gene],
            numbers,
            rng,
            2 * options.max_genes,
        )
        drawn.append(tuple(found))
        left = np.flatnonzero(~enough)
    kept = np.ones(n_pairs, dtype=bool)
    if len(left):
        changes = candidate_changes(
            source[left], target[left], panels, source_panel[left], target_panel[left], allowed
        )
        kept[left] = np.diff(changes.indptr) >= min(1, options.min_genes)
        offsets, ids, values = sample_from_changes(changes, rng, options, numbers=numbers[left])
        drawn.append((np.repeat(left, np.diff(offsets)), ids, values))
    rows, ids, values = (np.concatenate(parts) for parts in zip(*drawn))
    order = np.lexsort((ids, rows))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_pairs)[kept])]).astype(np.int32)
    return kept, offsets, ids[order].astype(np.int32), values[order].astype(np.float32)


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


def _weighted(changes: sp.csr_matrix, width: int, clocks: np.ndarray) -> np.ndarray:
    """Positions within each row of the `width` first arrivals of clocks with rates |change|, `(B, width)`."""
    n = changes.shape[0]
    keys = clocks / np.abs(changes.data)
    picks = np.zeros((n, width), dtype=np.int64)
    rows = np.flatnonzero(np.diff(changes.indptr))
    starts = changes.indptr[rows].astype(np.int64)
    lengths = np.diff(changes.indptr)[rows]
    for column in range(width if len(rows) else 0):
        smallest = np.repeat(np.minimum.reduceat(keys, starts), lengths)
        hits = np.flatnonzero(keys == smallest)
        owner = np.searchsorted(starts, hits, side="right") - 1
        _, first = np.unique(owner, return_index=True)
        picks[rows, column] = hits[first] - starts
        keys[hits[first]] = np.inf
    return picks
