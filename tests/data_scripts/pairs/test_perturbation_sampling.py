"""Perturbation sampling: only differing genes measured in both, in the wished-for numbers and odds."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.pairs.pair_options import PerturbationOptions
from data_scripts.pairs.perturbation_sampling import (
    candidate_changes,
    draw_numbers,
    find_in_rows,
    reveal,
    sample_from_changes,
)

OPTIONS = [
    PerturbationOptions(),
    PerturbationOptions(distribution="fixed", max_genes=3),
    PerturbationOptions(distribution="geometric", min_genes=0, max_genes=4),
    PerturbationOptions(weighting="change", max_genes=2),
]


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.sampled_from(OPTIONS), st.integers(1, 12), st.booleans())
def test_properties(seed, options, n_genes, restrict):
    rng = np.random.default_rng(seed)
    source, target = rng.poisson(0.7, (2, 20, n_genes)).astype(np.float32)
    measured = rng.random((20, n_genes)) < 0.8
    allowed = rng.random(n_genes) < 0.7 if restrict else None
    candidate = (source != target) & measured & (True if allowed is None else allowed)
    changes = sp.csr_matrix(np.where(candidate, target - source, 0).astype(np.float32))
    offsets, genes, deltas = sample_from_changes(changes, rng, options)
    assert len(offsets) == 21 and offsets[-1] == len(genes) == len(deltas)
    for row in range(20):
        own = genes[offsets[row] : offsets[row + 1]]
        assert (np.diff(own) > 0).all() and candidate[row, own].all()
        np.testing.assert_array_equal(deltas[offsets[row] : offsets[row + 1]], (target - source)[row, own])
        assert len(own) >= min(options.min_genes, candidate[row].sum())


def pairs_of_panels(rng: np.random.Generator, n_genes: int) -> tuple[np.ndarray, ...]:
    """Three panels, and 20 pairs of cells of any of them: panels, panel of each cell, values of sources and targets."""
    panels = rng.random((3, n_genes)) < 0.7
    panel = rng.integers(0, 3, (2, 20))
    source, target = rng.poisson(0.7, (2, 20, n_genes)).astype(np.float32)
    source[~panels[panel[0]]] = 0
    target[~panels[panel[1]]] = 0
    return panels, panel, source, target


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_candidates_are_measured_in_both_and_differ(seed, n_genes, restrict):
    rng = np.random.default_rng(seed)
    panels, panel, source, target = pairs_of_panels(rng, n_genes)
    allowed = rng.random(n_genes) < 0.7 if restrict else None
    both = panels[panel[0]] & panels[panel[1]] & (True if allowed is None else allowed)
    found = candidate_changes(sp.csr_matrix(source), sp.csr_matrix(target), panels, *panel, allowed)
    np.testing.assert_array_equal(found.toarray(), np.where(both, target - source, 0))
    assert (found.data != 0).all()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 1))
def test_genes_are_found_in_rows(seed, n_genes, share):
    rng = np.random.default_rng(seed)
    dense = rng.random((7, n_genes)) < share
    rows = sp.csr_matrix(dense)
    lists = (np.diff(rows.indptr), rows.indices, rows.data)
    where, genes = (array.ravel() for array in np.indices(dense.shape))
    found = find_in_rows(rows.indptr[:-1].astype(np.int64), lists, where, genes)
    np.testing.assert_array_equal(found >= 0, dense.ravel())
    np.testing.assert_array_equal(rows.indices[found[found >= 0]], genes[found >= 0])
    assert (np.diff(found[found >= 0]) == 1).all()


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.sampled_from(OPTIONS), st.integers(1, 12), st.booleans())
def test_revealed_genes_are_candidates(seed, options, n_genes, restrict):
    rng = np.random.default_rng(seed)
    panels, panel, source, target = pairs_of_panels(rng, n_genes)
    allowed = rng.random(n_genes) < 0.7 if restrict else np.ones(n_genes, dtype=bool)
    cells = (sp.csr_matrix(source), sp.csr_matrix(target))
    candidates = candidate_changes(*cells, panels, *panel, allowed).toarray()
    kept, offsets, genes, changes = reveal(*cells, panels, *panel, allowed, rng, options)
    np.testing.assert_array_equal(kept, (candidates != 0).any(1) | (options.min_genes == 0))
    assert len(offsets) == kept.sum() + 1 and offsets[-1] == len(genes) == len(changes)
    for place, row in enumerate(np.flatnonzero(kept)):
        own = slice(offsets[place], offsets[place + 1])
        assert (np.diff(genes[own]) > 0).all()
        np.testing.assert_array_equal(changes[own], candidates[row, genes[own]])
        assert (changes[own] != 0).all()
        available = np.count_nonzero(candidates[row])
        assert min(options.min_genes, available) <= len(changes[own]) <= min(options.max_genes, available)


@pytest.mark.parametrize("n_genes", [8, 60])
def test_revealed_genes_are_uniform(n_genes):
    # Half of the genes differ; of 8 so few that many rows are drawn from the list of all.
    rng, n = np.random.default_rng(0), 20_000
    source, target = np.zeros((2, n_genes), dtype=np.float32)
    source[::4], target[2::4], source[1::2] = 2, 3, 1
    target[1::2] = 1
    cells = (sp.csr_matrix(np.tile(row, (n, 1))) for row in (source, target))
    zeros, ones = np.zeros(n, dtype=np.int64), np.ones((1, n_genes), dtype=bool)
    options = PerturbationOptions(distribution="fixed", max_genes=3)
    _, _, genes, _ = reveal(*cells, ones, zeros, zeros, ones[0], rng, options)
    shares = np.bincount(genes, minlength=n_genes) / n
    assert (shares[1::2] == 0).all()
    np.testing.assert_allclose(shares[::2], 3 / (n_genes // 2), atol=0.015)


def frequencies(options, change):
    """Share of draws in which each gene is revealed."""
    n, rng = 20_000, np.random.default_rng(0)
    _, genes, _ = sample_from_changes(
        sp.csr_matrix(np.tile(np.asarray(change, dtype=np.float32), (n, 1))), rng, options
    )
    return np.bincount(genes, minlength=len(change)) / n


def test_uniform_odds():
    share = frequencies(PerturbationOptions(distribution="fixed", max_genes=2), [1, 0, -5, 0.1, 2])
    np.testing.assert_allclose(share, [0.5, 0, 0.5, 0.5, 0.5], atol=0.02)


def test_odds_by_change():
    options = PerturbationOptions(distribution="fixed", max_genes=1, weighting="change")
    np.testing.assert_allclose(frequencies(options, [1, 0, -3, 4]), [1 / 8, 0, 3 / 8, 4 / 8], atol=0.02)
    # Two successive draws without replacement from rates 1 : 3, 4: inclusion of the first gene is
    # 1/8 + 3/8 x 1/5 + 4/8 x 1/4.
    options = PerturbationOptions(distribution="fixed", max_genes=2, weighting="change")
    first = frequencies(options, [1, 0, -3, 4])[0]
    np.testing.assert_allclose(first, 1 / 8 + 3 / 8 / 5 + 4 / 8 / 4, atol=0.02)


@pytest.mark.parametrize(
    ("options", "mean", "bounds"),
    [
        (PerturbationOptions(), 3.0, (1, 5)),
        (PerturbationOptions(min_genes=0, max_genes=2), 1.0, (0, 2)),
        (PerturbationOptions(distribution="fixed", max_genes=7), 7.0, (7, 7)),
        (PerturbationOptions(distribution="geometric", max_genes=50), 2.0, (1, 50)),
        (PerturbationOptions(distribution="geometric", min_genes=0, max_genes=60, mean_genes=3.0), 3.0, (0, 60)),
    ],
)
def test_numbers(options, mean, bounds):
    numbers = draw_numbers(20_000, options, np.random.default_rng(0))
    assert numbers.mean() == pytest.approx(mean, rel=0.03)
    assert numbers.min() >= bounds[0] and numbers.max() <= bounds[1]


@pytest.mark.parametrize(
    "bad", [{"min_genes": -1}, {"min_genes": 4, "max_genes": 3}, {"distribution": "geometric", "mean_genes": 1.0}]
)
def test_malformed(bad):
    with pytest.raises(ValueError, match="`"):
        PerturbationOptions(**bad)
