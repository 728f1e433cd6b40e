"""Which genes of a pair are revealed: drawn among those measured in both cells and differing."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from data_scripts.pair_options import PerturbationOptions


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


def sample_by_rejection(
    source: Lists,
    target: Lists,
    target_values: np.ndarray,
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
        target_values (`np.ndarray`): The target's values, dense, shape `(B, V)`.
        candidates (`Callable`): From rows and genes of equal shape to whether a gene may be revealed in a row.
        numbers (`np.ndarray`): Wished-for number of each row, shape `(B,)`.
        rng (`np.random.Generator`): The only source of randomness.
        attempts (`int`): Places drawn for each row.

    Returns:
        Tuple of `rows`, `genes` and `changes` of the drawn genes in the order of rows, and whether each row found as
        many as wished, bool of shape `(B,)`; rows that did not have none.
    """
    (n_source, source_ids, source_values), (n_target, target_ids, _) = source, target
    n_rows, n_genes = target_values.shape
    total = (n_source + n_target)[:, None]
    places = np.minimum((rng.random((n_rows, attempts)) * total).astype(np.int64), np.maximum(total - 1, 0))
    rows = np.repeat(np.arange(n_rows), attempts).reshape(n_rows, attempts)
    rows, places = rows[total[:, 0] > 0], places[total[:, 0] > 0]
    of_source = places < n_source[rows]
    begins = [np.concatenate([[0], np.cumsum(lengths)[:-1]])[rows] for lengths in (n_source, n_target)]
    genes = np.empty(rows.shape, dtype=np.int64)
    before = np.zeros(rows.shape, dtype=np.float32)
    own = (begins[0] + places)[of_source]
    genes[of_source], before[of_source] = source_ids[own], source_values[own]
    genes[~of_source] = target_ids[(begins[1] + places - n_source[rows])[~of_source]]
    counts = of_source.copy()
    keys = np.repeat(np.arange(n_rows) * n_genes, n_source) + source_ids
    wanted = (rows * n_genes + genes)[~of_source]
    found = np.searchsorted(keys, wanted)
    counts[~of_source] = np.append(keys, -1)[found] != wanted
    after = target_values[rows, genes]
    counts &= (after != before) & candidates(rows, genes)
    # Distinct: no earlier place of the row that counts has the same gene.
    told_apart = np.where(counts, genes, -1 - np.arange(attempts))
    repeated = np.tril(told_apart[:, :, None] == told_apart[:, None, :], -1).any(2)
    counts &= ~repeated
    rank = np.cumsum(counts, axis=1)
    enough = numbers == 0
    enough[rows[:, 0]] = rank[:, -1] >= numbers[rows[:, 0]]
    counts &= (rank <= numbers[rows]) & enough[rows]
    return rows[counts], genes[counts], (after - before)[counts], enough


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
