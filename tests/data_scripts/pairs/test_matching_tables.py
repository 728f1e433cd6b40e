"""Matching from a store to rows: exact tables for every policy, and what partners explain of real cells."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.store.local_census import CensusSource, write_census
from modeling_gppc.evaluation.pair_arrays import PairArrays

GENES = [f"ENSG{index:011d}" for index in range(1, 5)]
# Counts of four genes whose sum is 100 in every cell, so that cells lie on a line: gene 1 against gene 2.
POSITION = {"a": [10, 12, 20, 60], "b": [15, 50]}
DONOR = {"a": ["x", "x", "y", "y"], "b": ["x", "y"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Cells 0 to 3 are of type a, cells 4 and 5 of type b, cell 6 is alone in its type; one data set."""
    first = np.array([*POSITION["a"], *POSITION["b"], 33])
    counts = np.stack([first, 90 - first, np.full(7, 6), np.full(7, 4)], axis=1)
    cells = anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    cells.var_names = GENES
    cells.obs_names = [f"cell{index}" for index in range(7)]
    cells.obs["cell_type"] = ["a"] * 4 + ["b"] * 2 + ["c"]
    cells.obs["donor_id"] = [*DONOR["a"], *DONOR["b"], "x"]
    path = tmp_path_factory.mktemp("tables") / "store"
    write_census(path, [CensusSource(cells, "one")])
    return path


def rows_of(store, out, **matching):
    mapping = {"query": {"uri": str(store)}, "matching": matching, "splits": {"rules": []}}
    folder = build_pairs(from_mapping(PairOptions, mapping), out, progress=False)
    return folder.split("train"), folder.manifest["report"]["splits"]["train"]


def pairs_of(rows) -> list[tuple[int, int]]:
    return sorted(zip(rows.column("source_soma_joinid").to_pylist(), rows.column("target_soma_joinid").to_pylist()))


TYPE = {"type": {"keys": ["cell_type"]}}
OTHER_DONOR = {"type": {"keys": ["cell_type"], "different": ["donor_id"]}}
TABLES = [
    ("nearest", TYPE, 1, [(0, 1), (1, 0), (2, 1), (3, 2), (4, 5), (5, 4)]),
    ("farthest", TYPE, 1, [(0, 3), (1, 3), (2, 3), (3, 0), (4, 5), (5, 4)]),
    (
        "nearest",
        TYPE,
        2,
        [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (3, 1), (3, 2), (4, 5), (5, 4)],
    ),
    ("nearest", OTHER_DONOR, 1, [(0, 2), (1, 2), (2, 1), (3, 1), (4, 5), (5, 4)]),
    ("farthest", OTHER_DONOR, 1, [(0, 3), (1, 3), (2, 0), (3, 0), (4, 5), (5, 4)]),
    ("random", {"both": {"keys": ["cell_type", "donor_id"]}}, 1, [(0, 1), (1, 0), (2, 3), (3, 2)]),
]


@pytest.mark.parametrize(("policy", "pairings", "n", "expected"), TABLES)
def test_exact_pairs(store, tmp_path, policy, pairings, n, expected):
    rows, report = rows_of(store, tmp_path / "out", policy=policy, pairings=pairings, pairs_per_cell=n)
    assert pairs_of(rows) == expected
    paired = {source for source, _ in expected}
    assert report["cells_paired"] == len(paired) and sum(report["cells_unpaired"].values()) == 7 - len(paired)
    assert report["cells_unpaired"] == {"alone_in_context": 7 - len(paired)}
    assert report["mean_differing_genes"] == 2  # the two genes that tell cells apart
    assert report["mean_shared_genes"] == 4


def test_states_of_two_cells(store, tmp_path):
    rows, report = rows_of(store, tmp_path / "out", pairings=TYPE, pseudobulk=2)
    # Type a makes two states that partner each other; b makes one, which is alone, and c none.
    assert report["cells_paired"] == 4 and rows.num_rows == 2
    assert report["cells_unpaired"] == {"alone_in_context": 2, "too_few_for_a_state": 1}
    means = {tuple(np.round(np.expm1(row["source_values"]) / 100, 4)) for row in rows.to_pylist()}
    halves = [
        {
            tuple(np.mean([[POSITION["a"][cell], 90 - POSITION["a"][cell], 6, 4] for cell in half], axis=0))
            for half in split
        }
        for split in (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
    ]
    assert any(means == {tuple(np.round(state, 4)) for state in split} for split in halves)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(600)
def test_policies_on_real_cells(real_data, tmp_path):
    """Nearest partners explain most of a cell, farthest least."""
    files = sorted((real_data / "singlecell").glob("tian*.h5ad")) + sorted((real_data / "singlecell").glob("pbmc3k*"))
    write_census(
        tmp_path / "store",
        [CensusSource(file, file.stem) for file in files],
        gene_table=real_data / "genes" / "symbol_to_ensembl.parquet",
    )
    for pairing, keys in (("same_type", ["dataset_id", "cell_type"]), ("same_dataset", ["dataset_id", "donor_id"])):
        explained = {}
        for policy in ("random", "nearest", "farthest"):
            matching = {"policy": policy, "pairings": {pairing: {"keys": keys}}}
            query = {"uri": str(tmp_path / "store")}
            mapping = {"query": query, "matching": matching, "splits": {"rules": []}, "panel": {"n_genes": 1_000}}
            out = tmp_path / f"{pairing}-{policy}"
            folder = build_pairs(from_mapping(PairOptions, mapping), out, progress=False)
            report = folder.manifest["report"]["splits"]["train"]
            assert report["cells_paired"] > 0.99 * report["cells"]
            pairs = PairArrays.from_table(folder.split("train"), folder.panels)
            both = pairs.source_measured & pairs.target_measured
            explained[policy] = 1 - ((pairs.source - pairs.target) ** 2)[both].mean() / pairs.target[both].var()
        assert explained["nearest"] > explained["random"] > explained["farthest"]
