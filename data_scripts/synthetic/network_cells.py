"""Cells drawn from a gene network: chunks of log values or molecule counts, and their tables."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_scripts.synthetic.network import GeneNetwork

# Fixed, so that the cells of a seed do not depend on how much memory there is.
CHUNK = 1_000


def sample_counts(rng: np.random.Generator, log_means: np.ndarray, dispersion: float, dropout: float) -> sp.csr_matrix:
    """Negative binomial counts, of variance mean + dispersion x mean^2, with a share `dropout` set to zero, float32,
    given the log of their means before dropout `(n, G)`. A uniform number decides first which are not zero; only those
    go up their distribution function. Large means are drawn as gamma-Poisson."""
    means = np.exp(np.asarray(log_means, dtype=np.float32))
    log_zero = -np.log1p(dispersion * means) / dispersion if dispersion > 0 else -means
    uniform = rng.random(means.shape, dtype=np.float32)
    row, column = np.nonzero((uniform > np.exp(log_zero)) | (means > 8))
    mean = means[row, column].astype(np.float64)
    counts = np.zeros(len(mean))
    large = mean > 8
    rate = mean[large]
    if dispersion > 0:
        rate = rate * rng.gamma(1 / dispersion, dispersion, size=len(rate))
    counts[large] = rng.poisson(rate)
    counts[~large] = _climb(uniform[row, column][~large], mean[~large], dispersion)
    kept = (counts > 0) & (rng.random(len(counts)) >= dropout)
    matrix = sp.csr_matrix((counts[kept].astype(np.float32), (row[kept], column[kept])), shape=means.shape)
    matrix.sort_indices()
    return matrix


def _climb(uniform: np.ndarray, mean: np.ndarray, dispersion: float) -> np.ndarray:
    """Inverse distribution function of the (negative binomial or Poisson) count at `uniform`, above zero."""
    chance = np.exp(-np.log1p(dispersion * mean) / dispersion if dispersion > 0 else -mean)
    odds = mean / (1 + dispersion * mean)
    below = chance.copy()
    counts = np.zeros(len(mean))
    active = np.arange(len(mean))
    for count in range(1, 400):
        chance = chance * odds * (1 + (count - 1) * dispersion) / count
        below = below + chance
        counts[active] = count
        above = uniform[active] > below
        if not above.any():
            break
        active, chance, below, odds = active[above], chance[above], below[above], odds[above]
    return counts


def sample_chunk(
    network: GeneNetwork,
    rng: np.random.Generator,
    labels: tuple[np.ndarray, np.ndarray, np.ndarray],
    measured: np.ndarray,
) -> sp.csr_matrix:
    """Log values (linear) or counts (count) of the `measured` genes of cells with these labels (data set, type and
    donor, `(n,)` each), float32 CSR."""
    eta = network.eta(network.sample_innovations(rng, *labels), np.flatnonzero(measured))
    if network.config.form == "linear":
        noise = rng.standard_normal(eta.shape, dtype=np.float32) * network.noise[measured].astype(np.float32)
        return sp.csr_matrix(eta + noise)
    config = network.config
    library = config.mean_library * np.exp(
        config.library_spread * rng.standard_normal(len(eta)) - 0.5 * config.library_spread**2
    )
    eta -= eta.max(axis=1, keepdims=True)
    total = np.log(np.exp(eta).sum(axis=1))
    # The library counts molecules after dropout.
    eta += (np.log(library / (1 - config.dropout)) - total).astype(np.float32)[:, None]
    return sample_counts(rng, eta, config.dispersion, config.dropout)


def iterate_cells(network: GeneNetwork, dataset: int) -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
    """Cells of one data set in chunks: values `(n, genes measured)` and obs; memory does not grow with the cells."""
    rng = np.random.default_rng([network.config.seed, 1, dataset])
    measured = network.measured[dataset]
    n_cells = dataset_sizes(network)[dataset]
    for start in range(0, n_cells, CHUNK):
        labels = network.sample_labels(rng, min(CHUNK, n_cells - start), dataset)
        names = [f"dataset{dataset + 1}_cell{index}" for index in range(start, start + len(labels[0]))]
        yield sample_chunk(network, rng, labels, measured), make_obs(labels, names)


def dataset_sizes(network: GeneNetwork) -> np.ndarray:
    """Cells of each data set, as even as possible."""
    n_cells, n_datasets = network.config.n_cells, network.config.n_datasets
    return n_cells // n_datasets + (np.arange(n_datasets) < n_cells % n_datasets)


def make_var(network: GeneNetwork, measured: np.ndarray) -> pd.DataFrame:
    """Gene table of the measured genes: index = id, with symbol and length."""
    ids = np.array(network.gene_ids, dtype=object)[measured]
    symbols = np.array(network.gene_symbols, dtype=object)[measured]
    return pd.DataFrame({"feature_id": ids, "feature_name": symbols, "feature_length": 1_000}, index=ids.astype(str))


def make_obs(labels: tuple[np.ndarray, np.ndarray, np.ndarray], names: list[str]) -> pd.DataFrame:
    """Labels of cells as columns of obs."""
    _, cell_type, donor = labels
    return pd.DataFrame(
        {
            "cell_type": [f"synthetic type {index + 1}" for index in cell_type],
            "donor_id": [f"donor {index + 1}" for index in donor],
            "assay": "synthetic",
            "tissue": "synthetic",
        },
        index=names,
    )
