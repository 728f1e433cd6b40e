"""RowGenerator: exact values, independence of the batch, uniformity."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data_scripts.batches.row_generator import RowGenerator

MASK = 2**64 - 1
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(state):
    state = ((state ^ (state >> 30)) * FIRST) & MASK
    state = ((state ^ (state >> 27)) * SECOND) & MASK
    return state ^ (state >> 31)


def by_hand(seed, epoch, row, draw):
    """The same arithmetic in Python's integers: the `draw`-th number of a row, counted from 0."""
    start = mix((seed * GAMMA + GAMMA) & MASK) ^ mix((epoch * GAMMA + FIRST) & MASK)
    key = mix((row * GAMMA + start) & MASK)
    return (mix((key + (draw + 1) * GAMMA) & MASK) >> 11) * 2**-53


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**40 + 1, 1000)])
def test_values_by_hand(seed, epoch):
    rows = np.array([0, 5, 123_456_789])
    generator = RowGenerator(seed, epoch, rows)
    first, second = generator.random(3), generator.random((3, 4))
    assert first.tolist() == [by_hand(seed, epoch, row, 0) for row in rows.tolist()]
    assert second.tolist() == [[by_hand(seed, epoch, row, 1 + place) for place in range(4)] for row in rows.tolist()]


def draws(seed, epoch, rows):
    generator = RowGenerator(seed, epoch, np.asarray(rows))
    n = len(rows)
    return [
        generator.random(n),
        generator.integers(1, 6, n),
        generator.random((n, 5)),
        generator.random(n),
    ]


@settings(max_examples=50)
@given(
    st.integers(0, 2**62), st.integers(0, 1000), st.lists(st.integers(0, 2**40), min_size=1, max_size=9, unique=True)
)
def test_a_row_does_not_depend_on_its_batch(seed, epoch, rows):
    whole = draws(seed, epoch, rows)
    backwards = draws(seed, epoch, rows[::-1])
    for place, row in enumerate(rows):
        for together, reverse, alone in zip(whole, backwards, draws(seed, epoch, [row])):
            np.testing.assert_array_equal(together[place], alone[0])
            np.testing.assert_array_equal(reverse[len(rows) - 1 - place], alone[0])


@pytest.mark.parametrize("other", [(1, 0, [3]), (0, 1, [3]), (0, 0, [4])])
def test_seed_epoch_and_row_change_the_draw(other):
    assert RowGenerator(*other[:2], np.array(other[2])).random(1) != RowGenerator(0, 0, np.array([3])).random(1)


def test_distributions():
    n = 20_000
    generator = RowGenerator(11, 2, np.arange(n))
    assert stats.kstest(generator.random(n), "uniform").pvalue > 1e-3
    assert stats.kstest(generator.random((n, 2))[:, 1], "uniform").pvalue > 1e-3
    counts = np.bincount(generator.integers(2, 7, n), minlength=7)
    assert counts[:2].sum() == 0
    assert stats.chisquare(counts[2:]).pvalue > 1e-3
    # Successive draws of a row, and equal draws of successive rows and epochs, are unrelated.
    first, second = generator.random(n), generator.random(n)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03
    other = RowGenerator(11, 3, np.arange(n)).random(n)
    assert abs(np.corrcoef(RowGenerator(11, 2, np.arange(n)).random(n), other)[0, 1]) < 0.03


def test_overflow_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            draws(seed, seed, [0, 1, 2**40])


def test_types_and_bounds():
    generator = RowGenerator(0, 0, np.arange(1000))
    values = generator.random((1000, 3))
    assert values.min() >= 0 and values.max() < 1
    assert generator.integers(0, 3, 1000).dtype == np.int64
