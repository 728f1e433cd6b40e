"""The gene panel on tables small enough to check by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest

from data_scripts.pairs.gene_selection import (
    PanelPart,
    find_genes,
    gene_lengths_of,
    read_gene_list,
    select_genes,
    standardized_dispersion,
)
from data_scripts.pairs.pair_options import PanelOptions

# Two data sets of 10 and 30 cells; gene 3 is measured by the second only, gene 4 by none.
CELLS = np.array([10, 30])
MEASURED = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=bool)
EXPRESSED = np.array([[10, 2, 0, 0, 0], [3, 15, 0, 30, 0]], dtype=np.int32)


def parts(*splits):
    """The same statistics, cut into parts at the given cells of the second data set."""
    nothing = np.zeros((1, 0))
    yield PanelPart(np.array([0]), CELLS[:1], EXPRESSED[:1], nothing, nothing)
    cuts = [0, *splits, 30]
    for first, last in itertools.pairwise(cuts):
        share = np.minimum(EXPRESSED[1], last) - np.minimum(EXPRESSED[1], first)
        yield PanelPart(np.array([1]), np.array([last - first]), share[None].astype(np.int32), nothing, nothing)


ALL = np.ones(5, dtype=bool)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 3]),  # genes 2 and 4 are never expressed
        ({"min_measured": 0.8}, [0, 1]),  # gene 3: 30 of 40 cells
        ({"min_expressed": 0.4}, [1, 3]),  # gene 0: 13 of 40, gene 1: 17 of 40, gene 3: 30 of the 30 that measure it
        ({"n_genes": 1}, [0]),  # by data set: (1 + .1) / 2 against (.2 + .5) / 2 and (0 + 1) / 2
        ({"n_genes": 2}, [0, 3]),
        ({"n_genes": 1, "dataset_weighting": "cells"}, [3]),  # 13, 17 and 30 of 40
    ],
)
@pytest.mark.parametrize("splits", [(), (7,), (1, 2, 29)])
def test_common(options, expected, splits):
    genes, steps = select_genes(parts(*splits), CELLS, MEASURED, ALL, PanelOptions(**options))
    assert genes.tolist() == expected and steps["chosen"] == len(expected)


def test_var_filter_and_nothing_left():
    genes, _ = select_genes(parts(), CELLS, MEASURED, np.array([0, 1, 1, 0, 1], bool), PanelOptions())
    assert genes.tolist() == [1]
    with pytest.raises(ValueError, match=r"`panel` leaves no gene .* lower `min_measured`"):
        select_genes(parts(), CELLS, MEASURED, ALL, PanelOptions(min_measured=0.8, min_expressed=0.9))


def test_variable_genes_are_found():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 0.3, (400, 60))
    values[:200, [5, 17, 40]] += 1.0  # two groups of cells differ in these
    values[200:, [5, 17, 40]] -= 1.0
    n = np.array([400])
    part = PanelPart(np.array([0]), n, np.full((1, 60), 400, np.int32), values.sum(0)[None], (values**2).sum(0)[None])
    options = PanelOptions(rule="variable", n_genes=3)
    genes, _ = select_genes([part], n, np.ones((1, 60), bool), np.ones(60, bool), options)
    assert genes.tolist() == [5, 17, 40]


def test_dispersion_is_standardised_within_bins():
    rng = np.random.default_rng(1)
    mean = np.exp(rng.uniform(-2, 2, 500))
    values = rng.gamma(mean / 2, 2.0, (300, 500))
    z = standardized_dispersion(300, np.full(500, 300), values.sum(0), (values**2).sum(0))
    assert abs(z.mean()) < 1e-9 and z.std() == pytest.approx(1, abs=0.01)


def test_gene_lists(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("# regulators\nENSG2\n\nSTAT1 # symbol\n")
    names = read_gene_list(path)
    assert names == ["ENSG2", "STAT1"]
    assert find_genes(names, ["ENSG1", "ENSG2"], ["STAT1", "JUN"], "file").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"`file` names 1 unknown genes, first 'STAT2'; did you mean `STAT1`"):
        find_genes(["STAT2"], ["ENSG1"], ["STAT1"], "file")
    with pytest.raises(ValueError, match="does not exist"):
        read_gene_list(tmp_path / "none")
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="names no gene"):
        read_gene_list(path)


def test_lengths_are_needed_for_log_tpm():
    with pytest.raises(ValueError, match="no column feature_length"):
        gene_lengths_of(pd.DataFrame({"feature_id": ["a"]}))
    with pytest.raises(ValueError, match="1 genes have no feature_length, first b"):
        gene_lengths_of(pd.DataFrame({"feature_id": ["a", "b"], "feature_length": [10, 0]}))
