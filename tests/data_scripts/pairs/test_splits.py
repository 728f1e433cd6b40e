"""Splits: stable, in the order of the rules, and never moved by other cells."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts.pairs.pair_options import SplitOptions, SplitRule
from data_scripts.pairs.schema import SPLITS
from data_scripts.pairs.splits import (
    assign_splits,
    default_rules,
    describe_rules,
    guard_splits,
    stable_uniform,
)

OBS = pd.DataFrame(
    {
        "soma_joinid": np.arange(3000),
        "dataset_id": pd.Categorical(["kang"] * 1000 + ["zheng"] * 1000 + ["tian_p3"] * 500 + ["tian_p1"] * 500),
        "donor_id": [f"k{i % 5}" for i in range(1000)] + ["z"] * 1000 + ["t"] * 1000,
    }
)
RULES = [
    SplitRule(where={"dataset_id": "kang", "donor_id": "k3"}, split="test"),
    SplitRule(where={"dataset_id": ["tian_p3"]}, split="test"),
    SplitRule(where={"dataset_id": "zheng"}, by="cell", fractions={"test": 0.2}),
    SplitRule(by="cell", fractions={"validation": 0.1}),
]


def shares(obs, split):
    table = pd.crosstab(obs["dataset_id"], np.array(SPLITS)[split], normalize="index")
    return table.reindex(columns=SPLITS, fill_value=0.0)


def test_hash_is_what_it_was():
    # Changing the hash would move cells between the splits of published data.
    assert stable_uniform(0, "donor_id", ["k1", "k2"]).tolist() == [0.004764174319319969, 0.9390413548346807]


def test_rules_in_order():
    split = assign_splits(OBS, SplitOptions(rules=RULES))
    table = shares(OBS, split)
    assert table.loc["tian_p3", "test"] == 1.0
    assert (np.array(SPLITS)[split[(OBS["donor_id"] == "k3").to_numpy()]] == "test").all()
    assert table.loc["kang", "test"] == 0.2
    assert table.loc["zheng", "test"] == pytest.approx(0.2, abs=0.04)
    # The second rule by cell takes its tenth of what the first one left.
    assert table.loc["zheng", "validation"] == pytest.approx(0.08, abs=0.03)
    assert table.loc["tian_p1", "validation"] == pytest.approx(0.1, abs=0.04)


@given(st.integers(1, 2999), st.integers(0, 5))
def test_other_cells_do_not_matter(n, seed):
    options = SplitOptions(rules=[SplitRule(by="donor_id", fractions={"test": 0.5}), *RULES[2:]], seed=seed)
    whole = assign_splits(OBS, options)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(OBS))[:n])
    part = OBS.iloc[chosen].reset_index(drop=True)
    if "zheng" in set(part["dataset_id"]):
        np.testing.assert_array_equal(assign_splits(part, options), whole[chosen])


def test_a_donor_is_in_one_split():
    split = assign_splits(OBS, SplitOptions(rules=[SplitRule(by="donor_id", fractions={"test": 0.4})], seed=3))
    assert pd.Series(split).groupby(OBS["donor_id"]).nunique().max() == 1


def test_a_held_out_donor_is_held_out_everywhere():
    rules = [SplitRule(by="cell", fractions={"validation": 0.1}), SplitRule(by="donor_id", fractions={"test": 0.5})]
    with pytest.raises(ValueError, match=r"hold out donor_id '\w+' for test, but an earlier rule .* in validation"):
        assign_splits(OBS, SplitOptions(rules=rules))


# Cells of each donor -> whether there are enough donors.
DONORS = {
    "one": ([500], False),
    "three of equal size": ([100, 100, 100], False),
    "four of equal size": ([100, 100, 100, 100], True),
    "five": ([226, 187, 181, 170, 105], True),
    "many small ones": ([10] * 40, True),
    "one with nearly all cells": ([1000, 5, 5, 5, 5], False),
    "no cell of most": ([300, 1], False),
}


@pytest.mark.parametrize("name", DONORS)
@pytest.mark.parametrize("seed", range(5))
def test_whole_donors_are_held_out_where_they_suffice(name, seed):
    sizes, enough = DONORS[name]
    donors = np.repeat([f"d{index}" for index in range(len(sizes))], sizes)
    obs = pd.DataFrame({"soma_joinid": np.arange(len(donors)), "donor_id": pd.Categorical(donors)})
    split = assign_splits(obs, SplitOptions(seed=seed))
    shares = np.bincount(split, minlength=3) / len(obs)
    assert (shares[1:] > 0.05).all() and shares[0] >= 0.5
    by_donor = pd.Series(split).groupby(donors).nunique().max() == 1
    assert by_donor == enough
    assert describe_rules(default_rules(obs, seed)).startswith("whole donors (test d" if enough else "single cells")


def pair_rows(cells):
    return pa.table({"source_soma_joinid": cells, "target_soma_joinid": cells})


def test_guard_over_pair_tables():
    train, test = pair_rows([1, 2]), pair_rows([3, 4])
    guard_splits({"train": train, "test": test})
    with pytest.raises(ValueError, match="splits train and test share soma_joinid 2"):
        guard_splits({"train": train, "test": pair_rows([2])})


def test_cell_hash_survives_new_joinids():
    obs = OBS.assign(observation_joinid=[f"o{i}" for i in range(len(OBS))])
    options = SplitOptions(rules=[SplitRule(by="cell", fractions={"test": 0.3})])
    moved = obs.assign(soma_joinid=obs["soma_joinid"] + 17)
    np.testing.assert_array_equal(assign_splits(obs, options), assign_splits(moved, options))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"where": {"donor": "k1"}, "split": "test"}, "`rules` names 'donor', .* did you mean `donor_id`"),
        ({"where": {"donor_id": "k9"}, "split": "test"}, "asks for donor_id 'k9', which no cell has"),
        ({"by": "donr_id", "fractions": {"test": 0.1}}, "did you mean `donor_id`"),
    ],
)
def test_unknown_names(rule, message):
    with pytest.raises(ValueError, match=message):
        assign_splits(OBS, SplitOptions(rules=[SplitRule(**rule)]))


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"split": "tset"},
        {"split": "test", "by": "cell"},
        {"by": "cell"},
        {"by": "cell", "fractions": {"test": 0.7, "validation": 0.4}},
        {"split": "test", "fractions": {"test": 0.1}},
    ],
)
def test_malformed_rules(rule):
    with pytest.raises(ValueError, match="`"):
        SplitRule(**rule)
