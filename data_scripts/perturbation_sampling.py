"""Which genes of a pair are revealed: drawn among those measured in both cells and differing."""

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


def sample_perturbations(
    source_values: np.ndarray,
    target_values: np.ndarray,
    both_measured: np.ndarray,
    rng: np.random.Generator,
    options: PerturbationOptions,
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the revealed genes of a batch, for redrawing them every epoch.

    Args:
        source_values (`np.ndarray`): Normalised values of the source cells, shape `(B, V)`.
        target_values (`np.ndarray`): Of the target cells, shape `(B, V)`.
        both_measured (`np.ndarray`): Genes measured in both, bool of shape `(B, V)` or `(V,)`.
        rng (`np.random.Generator`): The only source of randomness.
        options (`PerturbationOptions`): How many and which.
        allowed (`np.ndarray`, *optional*): Genes that may be revealed, bool of shape `(V,)`.

    Returns:
        Tuple of `ids` (int64), `values` (float32; target minus source) and `mask` (int64; 1 = a revealed gene), each
        `(B, K)` with `K = options.max_genes`; ids ascend within a row and are 0 where the mask is.
    """
    change = np.subtract(target_values, source_values, dtype=np.float32)
    candidate = (change != 0) & both_measured
    if allowed is not None:
        candidate &= allowed
    n, width = change.shape[0], min(options.max_genes, change.shape[1])
    numbers = np.minimum(draw_numbers(n, options, rng), candidate.sum(1))
    if options.weighting == "change":
        # The first arrivals of exponential clocks: successive draws in proportion to the rates, without replacement.
        with np.errstate(divide="ignore", invalid="ignore"):
            keys = rng.standard_exponential(change.shape, dtype=np.float32) / np.abs(change)
    else:
        keys = rng.random(change.shape, dtype=np.float32)
    keys[~candidate] = np.inf
    ids = np.zeros((n, options.max_genes), dtype=np.int64)
    if width < change.shape[1]:
        first = np.argpartition(keys, width, axis=1)[:, :width]
        first = np.take_along_axis(first, np.argsort(np.take_along_axis(keys, first, 1), axis=1, kind="stable"), 1)
    else:
        first = np.argsort(keys, axis=1, kind="stable")
    ids[:, :width] = first
    mask = np.arange(options.max_genes)[None, :] < numbers[:, None]
    return _finish(ids, mask, lambda rows, genes: change[rows, genes], change.shape[1])


def _finish(ids, mask, look_up, n_genes):
    """Sorts the revealed genes of each row, pads with zeros and looks their changes up."""
    ids = np.sort(np.where(mask, ids, n_genes), axis=1)
    ids = np.where(mask, ids, 0)
    values = np.zeros(ids.shape, dtype=np.float32)
    rows, columns = np.nonzero(mask)
    values[rows, columns] = look_up(rows, ids[rows, columns])
    return ids, values, mask.astype(np.int64)


def sample_from_changes(
    changes: sp.csr_matrix, rng: np.random.Generator, options: PerturbationOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same draw from sparse rows, at a cost that grows with the number of revealed genes, not of candidates.

    Args:
        changes (`sp.csr_matrix`): Target minus source at the candidate genes, no stored zeros, shape `(B, V)`.
        rng (`np.random.Generator`): The only source of randomness.
        options (`PerturbationOptions`): How many and which.

    Returns:
        Tuple of `offsets` (int32, `(B + 1,)`), `ids` (int32) and `values` (float32) of the revealed genes, ascending
        within a row.
    """
    available = np.diff(changes.indptr).astype(np.int64)
    numbers = np.minimum(draw_numbers(len(available), options, rng), available)
    width = int(numbers.max(initial=0))
    if options.weighting == "uniform":
        picks = _distinct_integers(available, width, rng)
    else:
        picks = _weighted(changes, width, rng)
    mask = np.arange(width)[None, :] < numbers[:, None]
    picks = np.sort(np.where(mask, picks, np.iinfo(np.int64).max), axis=1)
    entries = (changes.indptr[:-1, None].astype(np.int64) + np.where(mask, picks, 0))[mask]
    offsets = np.concatenate([[0], np.cumsum(numbers)]).astype(np.int32)
    return offsets, changes.indices[entries].astype(np.int32), changes.data[entries].astype(np.float32)


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


def _weighted(changes: sp.csr_matrix, width: int, rng: np.random.Generator) -> np.ndarray:
    """Positions within each row of the `width` first arrivals of clocks with rates |change|, `(B, width)`."""
    n = changes.shape[0]
    keys = rng.standard_exponential(changes.nnz) / np.abs(changes.data)
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
