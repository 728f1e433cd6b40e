"""Splits of a build by every key: held out wholly, guarded, and where it was when cells are added."""

import numpy as np
import pandas as pd
import pytest
from pair_store import make_cells

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_options import PairOptions, SplitOptions
from data_scripts.pairs.splits import guard_splits
from data_scripts.store.local_census import CensusSource, write_census

KEYS = ["donor_id", "dataset_id", "cell_type", "tissue"]
TISSUES = {"A": ["blood", "lung", "liver"], "B": ["blood", "spleen"], "C": ["lung"]}


def source(name: str) -> CensusSource:
    cells = make_cells("A" if name == "C" else name)
    rng = np.random.default_rng(ord(name))
    cells.obs["tissue"] = rng.choice(TISSUES[name], cells.n_obs)
    cells.obs["cell_type"] = rng.choice(["B cell", "T cell", "monocyte"], cells.n_obs)
    if name == "C":
        cells.obs["donor_id"] = rng.choice(["d1", "d9"], cells.n_obs)
    return CensusSource(cells, name)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store, and the same store with another data set behind it."""
    root = tmp_path_factory.mktemp("splits")
    write_census(root / "two", [source(name) for name in "AB"])
    write_census(root / "three", [source(name) for name in "ABC"])
    return root


def build(store, out, **splits):
    mapping = {"query": {"uri": str(store)}, "matching": {"pairs_per_cell": 2}, "splits": splits}
    # Cells of any kind are partners here, so that only the split keeps them apart.
    mapping["matching"]["pairings"] = {"any": {"keys": ["is_primary_data"]}}
    return build_pairs(from_mapping(PairOptions, mapping), out, progress=False)


def labels(folder) -> dict[str, pd.DataFrame]:
    return {name: folder.split(name).to_pandas() for name in folder.splits}


@pytest.mark.parametrize("key", KEYS)
def test_a_held_out_key_is_in_one_split(stores, tmp_path, key):
    rules = [{"by": key, "fractions": {"test": 0.4}}]
    seed = next(seed for seed in range(50) if splits_well(stores / "two", key, rules, seed))
    folder = build(stores / "two", tmp_path / "out", rules=rules, seed=seed)
    assert folder.splits == ["train", "test"]
    tables = {name: folder.split(name) for name in folder.splits}
    values = {name: set(table.column(key).to_pylist()) for name, table in tables.items()}
    assert values["train"] and values["test"] and not values["train"] & values["test"]
    if f"target_{key}" in tables["train"].column_names:
        targets = {name: set(table.column(f"target_{key}").to_pylist()) for name, table in tables.items()}
        assert not targets["train"] & values["test"] and not targets["test"] & values["train"]
    guard_splits(tables)
    # Another data set: whatever was held out stays so, and no cell changes sides.
    more = build(stores / "three", tmp_path / "more", rules=rules, seed=seed)
    for name, table in tables.items():
        assert set(table.column("source_soma_joinid").to_pylist()) <= {
            cell for other in [more.split(name)] for cell in other.column("source_soma_joinid").to_pylist()
        }


def splits_well(store, key, rules, seed) -> bool:
    """Whether a seed puts some but not all values of a key into the test split."""
    from data_scripts.pairs.splits import assign_splits
    from data_scripts.store.census_query import open_query
    from data_scripts.store.query_options import QueryOptions

    query = open_query(QueryOptions(uri=str(store)), {key: "test"})
    options = from_mapping(SplitOptions, {"rules": rules, "seed": seed})
    return 0.1 < (assign_splits(query.obs, options) == 2).mean() < 0.9
