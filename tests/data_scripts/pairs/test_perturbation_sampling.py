"""Perturbation sampling: only differing genes measured in both, in the wished-for numbers and odds."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.pairs.pair_options import PerturbationOptions
from data_scripts.pairs.perturbation_sampling import (
    candidate_changes,
    draw_imposed,
    sample_from_changes,
)

OPTIONS = [
    PerturbationOptions(),
    PerturbationOptions(min_genes=3, max_genes=3),
    PerturbationOptions(min_genes=0, max_genes=4),
]


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_properties(seed, n_genes):
    rng = np.random.default_rng(seed)
    source, target = rng.poisson(0.7, (2, 20, n_genes)).astype(np.float32)
    candidate = (source != target) & (rng.random((20, n_genes)) < 0.8)
    changes = sp.csr_matrix(np.where(candidate, target - source, 0).astype(np.float32))
    numbers = rng.integers(0, 6, 20)
    lengths, genes, deltas = sample_from_changes(changes, numbers, rng)
    np.testing.assert_array_equal(lengths, np.minimum(numbers, candidate.sum(1)))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    assert offsets[-1] == len(genes) == len(deltas)
    for row in range(20):
        own = genes[offsets[row] : offsets[row + 1]]
        assert (np.diff(own) > 0).all() and candidate[row, own].all()
        np.testing.assert_array_equal(deltas[offsets[row] : offsets[row + 1]], (target - source)[row, own])


def pairs_of_panels(rng: np.random.Generator, n_genes: int) -> tuple[np.ndarray, ...]:
    """Three panels, and 20 pairs of cells of any of them: panels, panel of each cell, values of sources and targets."""
    panels = rng.random((3, n_genes)) < 0.7
    panel = rng.integers(0, 3, (2, 20))
    source, target = rng.poisson(0.7, (2, 20, n_genes)).astype(np.float32)
    source[~panels[panel[0]]] = 0
    target[~panels[panel[1]]] = 0
    return panels, panel, source, target


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_candidates_are_measured_in_both_and_differ(seed, n_genes):
    panels, panel, source, target = pairs_of_panels(np.random.default_rng(seed), n_genes)
    found = candidate_changes(sp.csr_matrix(source), sp.csr_matrix(target), panels, *panel)
    np.testing.assert_array_equal(found.toarray(), np.where(panels[panel[0]] & panels[panel[1]], target - source, 0))
    assert (found.data != 0).all()


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.sampled_from(OPTIONS), st.integers(1, 12))
def test_imposed_genes_are_candidates(seed, options, n_genes):
    rng = np.random.default_rng(seed)
    panels, panel, source, target = pairs_of_panels(rng, n_genes)
    candidates = candidate_changes(sp.csr_matrix(source), sp.csr_matrix(target), panels, *panel).toarray()
    rows, genes, changes, kept = draw_imposed(
        sp.csr_matrix(source), sp.csr_matrix(target), panels, *panel, options, rng, 6
    )
    np.testing.assert_array_equal(kept, (candidates != 0).any(1) | (options.min_genes == 0))
    assert kept[rows].all()
    np.testing.assert_array_equal(changes, candidates[rows, genes])
    assert (changes != 0).all()
    for row in range(20):
        own = genes[rows == row]
        assert (np.diff(own) > 0).all()
        available = np.count_nonzero(candidates[row])
        assert min(options.min_genes, available) <= len(own) <= min(options.max_genes, available)


@pytest.mark.parametrize("n_genes", [8, 60])
def test_imposed_genes_are_uniform(n_genes):
    # Half of the genes differ; of 8 so few that many rows are drawn from the list of all.
    rng, n = np.random.default_rng(0), 20_000
    source, target = np.zeros((2, n_genes), dtype=np.float32)
    source[::4], target[2::4], source[1::2] = 2, 3, 1
    target[1::2] = 1
    cells = (sp.csr_matrix(np.tile(row, (n, 1))) for row in (source, target))
    zeros, ones = np.zeros(n, dtype=np.int64), np.ones((1, n_genes), dtype=bool)
    _, genes, _, _ = draw_imposed(*cells, ones, zeros, zeros, OPTIONS[1], rng, 6)
    shares = np.bincount(genes, minlength=n_genes) / n
    assert (shares[1::2] == 0).all()
    np.testing.assert_allclose(shares[::2], 3 / (n_genes // 2), atol=0.015)


def test_uniform_odds():
    n, change = 20_000, np.array([1, 0, -5, 0.1, 2], dtype=np.float32)
    changes = sp.csr_matrix(np.tile(change, (n, 1)))
    _, genes, _ = sample_from_changes(changes, np.full(n, 2), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(genes, minlength=5) / n, [0.5, 0, 0.5, 0.5, 0.5], atol=0.02)


@pytest.mark.parametrize("bounds", [(1, 5), (0, 2), (7, 7)])
def test_numbers(bounds):
    """Of 60 differing genes, so that no row has too few."""
    n, options = 3_000, PerturbationOptions(min_genes=bounds[0], max_genes=bounds[1])
    cells = (sp.csr_matrix(np.full((n, 60), value, dtype=np.float32)) for value in (1, 2))
    zeros, ones = np.zeros(n, dtype=np.int64), np.ones((1, 60), dtype=bool)
    rows, *_ = draw_imposed(*cells, ones, zeros, zeros, options, np.random.default_rng(0), 20)
    counts = np.bincount(np.bincount(rows, minlength=n), minlength=bounds[1] + 1)
    assert counts[: bounds[0]].sum() == 0 and len(counts) == bounds[1] + 1
    np.testing.assert_allclose(counts[bounds[0] :] / n, 1 / (bounds[1] - bounds[0] + 1), atol=0.03)


@pytest.mark.parametrize("bad", [{"min_genes": -1}, {"min_genes": 4, "max_genes": 3}])
def test_malformed(bad):
    with pytest.raises(ValueError, match="`"):
        PerturbationOptions(**bad)
