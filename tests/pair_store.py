"""A store of a few cells for the tests of the pair build."""

from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp

from data_scripts.store.local_census import CensusSource, write_census

GENES = [f"ENSG{index:011d}" for index in range(1, 41)]
# data set -> cells, measured genes, donors
DATASETS = {"A": (70, GENES, ("d1", "d2")), "B": (50, GENES[:30], ("d3", "d4", "d5"))}


def make_cells(name: str) -> anndata.AnnData:
    """Counts of one data set, with two cell types; the same at every call."""
    n_cells, genes, donors = DATASETS[name]
    rng = np.random.default_rng(ord(name))
    counts = rng.poisson(rng.gamma(1.0, 1.0, len(genes)), (n_cells, len(genes))).astype(np.float32)
    counts[:, 0] += 1  # no empty cell
    cells = anndata.AnnData(sp.csr_matrix(counts))
    cells.var_names = genes
    cells.obs_names = [f"{name}{index}" for index in range(n_cells)]
    cells.obs["cell_type"] = rng.choice(["B cell", "T cell"], n_cells)
    cells.obs["donor_id"] = rng.choice(donors, n_cells)
    return cells


def make_store(path: Path) -> Path:
    """Writes both data sets to a store."""
    write_census(path, [CensusSource(make_cells(name), name) for name in DATASETS])
    return path


def dense_counts() -> np.ndarray:
    """Counts of all cells in store order, `(n_cells, n_genes)`; genes in the order of `GENES`."""
    counts = np.zeros((sum(entry[0] for entry in DATASETS.values()), len(GENES)))
    first = 0
    for name, (n_cells, genes, _) in DATASETS.items():
        counts[first : first + n_cells, : len(genes)] = make_cells(name).X.toarray()
        first += n_cells
    return counts
