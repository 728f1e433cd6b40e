"""What tests ask of a known network: its cells in memory, who acts on whom, and who only seems to."""

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_scripts.synthetic.network import GeneNetwork
from data_scripts.synthetic.network_cells import iterate_cells, make_var


def make_anndata(network: GeneNetwork, dataset: int) -> anndata.AnnData:
    """All cells of one data set in memory; X holds log values (linear) or raw counts (count)."""
    chunks = list(iterate_cells(network, dataset))
    return anndata.AnnData(
        sp.vstack([values for values, _ in chunks], format="csr"),
        obs=pd.concat([obs for _, obs in chunks]),
        var=make_var(network, network.measured[dataset]),
    )


def affects(network: GeneNetwork) -> np.ndarray:
    """Which regulator (row) changes which gene (column), directly or through others: bool `(R, G)`."""
    n = len(network.regulators)
    reach = np.linalg.inv(np.eye(n) - (network.coupling != 0)) > 0.5  # counts paths; [i, s]: s reaches i
    used = np.abs(network.weights).reshape(network.config.n_genes, -1, n)
    if network.config.form == "count":
        partner = network.switches[0].astype(int)
        gate = np.zeros_like(used[:, 2])
        np.add.at(gate, (slice(None), partner), used[:, 2])
        used = np.concatenate([used, gate[:, None]], axis=1)
    direct = used.sum(axis=1) > 0  # (G, R)
    return (direct.astype(np.float64) @ reach > 0.5).T


def confounded_pairs(network: GeneNetwork, n_pairs: int, min_correlation: float = 0.3) -> list[tuple[str, str, float]]:
    """Targets that share a regulator, correlate, and have no effect on each other: gene, gene, correlation of `eta`
    over the unperturbed population, strongest first."""
    rng = np.random.default_rng([network.config.seed, 2])
    targets = np.setdiff1d(np.arange(network.config.n_genes), network.regulators)
    eta = network.eta(network.sample_innovations(rng, *network.sample_labels(rng, 4_000)), targets)
    correlation = np.corrcoef(eta, rowvar=False)
    effects = affects(network)[:, targets].astype(np.float64)
    shared = effects.T @ effects > 0
    first, second = np.nonzero(np.triu(shared & (np.abs(correlation) >= min_correlation), k=1))
    order = np.argsort(-np.abs(correlation[first, second]), kind="stable")[:n_pairs]
    ids = [network.gene_ids[target] for target in targets]
    return [(ids[i], ids[j], float(correlation[i, j])) for i, j in zip(first[order], second[order])]
