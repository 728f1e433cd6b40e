"""Partner matching as tables and properties."""

from collections import Counter

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.pairs.pair_options import MatchingOptions, PairingOptions
from data_scripts.pairs.partner_matching import ALONE, FEW_SHARED, NO_CONTEXT, match_partners


def options(n_pairings=1, weights=(1.0, 1.0, 1.0), **settings_of_matching) -> MatchingOptions:
    pairings = {f"p{index}": PairingOptions(keys=["k"], weight=weights[index]) for index in range(n_pairings)}
    return MatchingOptions(pairings=pairings, **settings_of_matching)


def match(groups, opts, different=None, panel=None, shared=((9,),), values=None, seed=0):
    groups = [np.asarray(group) for group in groups]
    different = different or [None] * len(groups)
    panel = np.zeros(len(groups[0]), dtype=np.int64) if panel is None else np.asarray(panel)
    values = None if values is None else sp.csr_matrix(np.asarray(values, dtype=np.float32))
    rng = np.random.default_rng(seed)
    return match_partners(groups, different, panel, np.asarray(shared), opts, rng, values)


def table(pairs):
    return list(zip(pairs.source.tolist(), pairs.target.tolist(), pairs.pairing.tolist()))


def test_only_one_partner_is_possible():
    # cells 0 and 3 share context 0, cells 1 and 2 context 1, cell 4 is alone, cell 5 has no context
    pairs = match([[0, 1, 1, 0, 2, -1]], options())
    assert table(pairs) == [(0, 3, 0), (1, 2, 0), (2, 1, 0), (3, 0, 0)]
    assert pairs.unpaired == {ALONE: 1, NO_CONTEXT: 1}


def test_the_next_pairing_is_tried():
    pairs = match([[0, 1, 2], [7, 7, -1]], options(2))
    assert table(pairs) == [(0, 1, 1), (1, 0, 1)]
    assert pairs.unpaired == {ALONE: 1}


def test_partners_that_must_differ():
    # context 0 holds donors a a b: only cell 2 may partner the others
    pairs = match([[0, 0, 0]], options(), different=[np.array([4, 4, 8])])
    assert table(pairs)[:2] == [(0, 2, 0), (1, 2, 0)] and pairs.target[2] in (0, 1)
    assert match([[0, 0]], options(), different=[np.array([4, 4])]).unpaired == {ALONE: 2}


def test_too_few_shared_genes():
    # panels 0 and 1 share 2 genes; 3 are wanted
    shared = [[5, 2], [2, 5]]
    pairs = match([[0, 0, 0, 0]], options(min_shared_genes=3), panel=[0, 1, 0, 1], shared=shared)
    assert table(pairs) == [(0, 2, 0), (1, 3, 0), (2, 0, 0), (3, 1, 0)]
    pairs = match([[0, 0, 0]], options(min_shared_genes=3), panel=[0, 1, 0], shared=shared)
    assert table(pairs) == [(0, 2, 0), (2, 0, 0)] and pairs.unpaired == {FEW_SHARED: 1}


def test_rare_fitting_partners_are_listed_when_redraws_fail():
    panel = np.ones(400, dtype=np.int64)
    panel[[7, 300]] = 0
    pairs = match([np.zeros(400, int)], options(min_shared_genes=3), panel=panel, shared=[[5, 2], [2, 5]])
    target = dict(zip(pairs.source.tolist(), pairs.target.tolist()))
    assert target[7] == 300 and target[300] == 7 and len(target) == 400


VALUES = [[0.0, 0], [1, 0], [3, 0], [3, 4], [100, 100]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("nearest", [1, 0, 1, 2]),
        ("farthest", [3, 3, 3, 0]),
    ],
)
def test_policies_by_distance(policy, expected):
    pairs = match([[0, 0, 0, 0, 1]], options(policy=policy), values=VALUES)
    assert pairs.target.tolist() == expected and pairs.unpaired == {ALONE: 1}


def test_later_draws_take_the_next_nearest():
    pairs = match([[0, 0, 0, 0, 1]], options(policy="nearest", pairs_per_cell=4), values=VALUES)
    ranked = {cell: pairs.target[pairs.source == cell].tolist() for cell in range(4)}
    # three others for four draws: the last draw finds nobody new
    assert ranked == {0: [1, 2, 3], 1: [0, 2, 3], 2: [1, 0, 3], 3: [2, 1, 0]}


def test_nearest_respects_donors_and_panels():
    different = [np.array([1, 1, 1, 2, 3])]
    pairs = match([[0] * 4 + [1]], options(policy="nearest"), different=different, values=VALUES)
    assert pairs.target.tolist() == [3, 3, 3, 2]
    panel, shared = [0, 1, 0, 1, 0], [[5, 0], [0, 5]]
    pairs = match([[0] * 4 + [1]], options(policy="nearest"), panel=panel, shared=shared, values=VALUES)
    assert pairs.target.tolist() == [2, 3, 0, 1]


def test_random_partners_are_uniform():
    pairs = match([np.zeros(5, int)], options(pairs_per_cell=4000))
    counts = Counter(table(pairs))
    assert len(counts) == 20 and all(abs(count - 1000) < 150 for count in counts.values())


def test_pairings_get_their_share():
    groups = [np.zeros(500, int), np.zeros(500, int)]
    pairs = match(groups, options(2, weights=(3.0, 1.0), pairs_per_cell=4))
    per_cell = np.stack([np.bincount(pairs.source[pairs.pairing == index], minlength=500) for index in range(2)])
    assert (per_cell == [[3], [1]]).all()


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["random", "nearest", "farthest"]),
    st.integers(0, 10**6),
)
def test_no_pair_is_bad_and_no_cell_is_lost(n, n_pairings, draws, policy, seed):
    rng = np.random.default_rng(seed)
    groups = [rng.integers(-1, 4, n) for _ in range(n_pairings)]
    different = [rng.integers(0, 3, n) if rng.random() < 0.5 else None for _ in range(n_pairings)]
    panel, shared = rng.integers(0, 3, n), rng.integers(0, 6, (3, 3))
    shared = np.maximum(shared, shared.T)
    opts = options(n_pairings, policy=policy, pairs_per_cell=draws, min_shared_genes=3)
    values = rng.poisson(1.0, (n, 5))
    pairs = match(groups, opts, different, panel, shared, values, seed)
    possible = np.zeros((n_pairings, n, n), dtype=bool)
    for index, (group, code) in enumerate(zip(groups, different)):
        possible[index] = (group[:, None] == group[None, :]) & (group[:, None] >= 0) & ~np.eye(n, dtype=bool)
        if code is not None:
            possible[index] &= code[:, None] != code[None, :]
        possible[index] &= shared[panel[:, None], panel[None, :]] >= 3
    assert possible[pairs.pairing, pairs.source, pairs.target].all()
    assert set(pairs.source.tolist()) == set(np.flatnonzero(possible.any((0, 2))).tolist())
    assert sum(pairs.unpaired.values()) == n - len(set(pairs.source.tolist()))
