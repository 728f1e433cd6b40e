"""Splits by stable hash: a cell's split depends on its own labels only, never on the other cells."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from data_scripts.pairs.pair_options import SplitOptions, SplitRule
from data_scripts.pairs.schema import SPLITS
from modeling_gppc.normalization_gppc import close_matches

HELD_OUT = 0.1  # of the cells, at least, for test and as many again for validation, where no rules are given


def stable_uniform(seed: int, column: str, values: Sequence) -> np.ndarray:
    """Number in [0, 1) for each value, from the blake2b hash of `seed|column|value`."""
    prefix = f"{seed}|{column}|"
    draws = [
        int.from_bytes(hashlib.blake2b(f"{prefix}{value}".encode(), digest_size=8).digest(), "big") for value in values
    ]
    return (np.array(draws, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) / 2.0**53


def default_rules(obs: pd.DataFrame, seed: int) -> list[SplitRule]:
    """Rules for cells that come without: whole donors, in the order of their hash, until a tenth of the cells is for
    test and another tenth for validation, if at least half is left for training; else single cells."""
    donors, sizes = np.unique(obs["donor_id"].astype(str), return_counts=True)
    order = np.argsort(stable_uniform(seed, "donor_id", donors.tolist()))
    share = np.cumsum(sizes[order]) / len(obs)
    test = int(np.searchsorted(share, HELD_OUT)) + 1
    both = int(np.searchsorted(share, share[test - 1] + HELD_OUT)) + 1
    if both > len(donors) or share[both - 1] > 0.5:
        return [SplitRule(by="cell", fractions={"test": HELD_OUT, "validation": HELD_OUT})]
    names = donors[order].tolist()
    return [
        SplitRule(where={"donor_id": names[:test]}, split="test"),
        SplitRule(where={"donor_id": names[test:both]}, split="validation"),
    ]


def describe_rules(rules: Sequence[SplitRule]) -> str:
    """What [`default_rules`] chose, for people."""
    if rules[0].by == "cell":
        return "single cells, for there are too few donors"
    held_out = [(rule.split, rule.where["donor_id"]) for rule in rules]
    shown = [f"{split} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for split, names in held_out]
    return f"whole donors ({'; '.join(shown)})"


def assign_splits(obs: pd.DataFrame, options: SplitOptions) -> np.ndarray:
    """Split of every cell, int8 index into `SPLITS`; `ValueError` if a rule names a column or value that obs does not
    hold. `cell` in a rule is `observation_joinid` within its data set where obs has it (it survives new releases of a
    store), else `soma_joinid`. Without rules those of [`default_rules`] hold."""
    split = np.full(len(obs), -1, dtype=np.int8)
    held_out: list[tuple[str, np.ndarray, np.ndarray]] = []
    # Share of each column's hash range that earlier rules tried and passed on; the rest is spread over [0, 1) again,
    # so that a second rule by the same column takes its share of what the first one left.
    passed: dict[str, np.ndarray] = {}
    for rule in default_rules(obs, options.seed) if options.rules is None else options.rules:
        chosen = (split < 0) & _matches(obs, rule.where)
        if rule.split is not None:
            split[chosen] = SPLITS.index(rule.split)
            continue
        draws = _draws(obs, rule.by, options.seed)
        tried = passed.setdefault(rule.by, np.zeros(len(obs)))
        position = (draws - tried) / np.maximum(1.0 - tried, 1e-300)
        lower = 0.0
        for name in SPLITS:  # in a fixed order, so that the order in the file does not matter
            share = rule.fractions.get(name, 0.0)
            given = chosen & (position >= lower) & (position < lower + share)
            split[given] = SPLITS.index(name)
            lower += share
            if rule.by != "cell" and name != "train" and given.any():
                held_out.append((rule.by, _matches(obs, rule.where), given))
        tried[chosen] += (1.0 - tried[chosen]) * lower
    split[split < 0] = SPLITS.index("train")
    for column, scope, given in held_out:
        check_held_out(obs[column].to_numpy()[scope], split[scope], given[scope], column)
    return split


def check_held_out(values: np.ndarray, split: np.ndarray, given: np.ndarray, column: str) -> None:
    """Raises `ValueError` if a value of the column that held some cells out (`given`) turns up in another split."""
    home = SPLITS[split[given][0]]
    shared = pd.unique(values[np.isin(values, pd.unique(values[given])) & (split != split[given][0])])
    if len(shared):
        other = SPLITS[split[(values == shared[0]) & (split != split[given][0])][0]]
        raise ValueError(
            f"`splits.rules` hold out {column} {shared[0]!r} for {home}, but an earlier rule puts some of its cells in "
            f"{other}; put the rule by {column!r} first, or limit it with `where`."
        )


def guard_splits(tables: Mapping[str, pa.Table]) -> None:
    """Raises `ValueError` if pair tables of splits (name -> rows in `PAIR_SCHEMA`) share a cell, naming it."""
    seen: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        sides = [table.column(f"{side}_soma_joinid").to_numpy() for side in ("source", "target")]
        cells = np.unique(np.concatenate(sides))
        for other, known in seen.items():
            shared = np.intersect1d(cells, known, assume_unique=True)
            if len(shared):
                raise ValueError(f"splits {other} and {name} share soma_joinid {shared[0]} ({len(shared)} in all).")
        seen[name] = cells


def _matches(obs: pd.DataFrame, where: dict) -> np.ndarray:
    chosen = np.ones(len(obs), dtype=bool)
    for column, value in where.items():
        _check_column(obs, column)
        values = value if isinstance(value, (list, tuple)) else [value]
        known = obs[column].unique()
        for wanted in values:
            if wanted not in known:
                raise ValueError(
                    f"`where` asks for {column} {wanted!r}, which no cell has{close_matches(str(wanted), known)}"
                )
        chosen &= obs[column].isin(values).to_numpy()
    return chosen


def _draws(obs: pd.DataFrame, by: str, seed: int) -> np.ndarray:
    if by == "cell":
        if "observation_joinid" in obs:
            names = obs["dataset_id"].astype(str).str.cat(obs["observation_joinid"].astype(str), sep="|")
        else:
            names = obs["soma_joinid"]
        return stable_uniform(seed, by, names.tolist())
    _check_column(obs, by)
    codes, values = pd.factorize(obs[by])
    return stable_uniform(seed, by, list(values))[codes]


def _check_column(obs: pd.DataFrame, column: str) -> None:
    if column not in obs:
        raise ValueError(f"`rules` names {column!r}, which is not a column of obs{close_matches(column, obs.columns)}")
