"""The best possible predictor of a pair of synthetic cells, in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, logsumexp, ndtri
from scipy.stats import nbinom, poisson

from data_scripts.synthetic.network import TARGET_SUM, GeneNetwork

PAIRINGS = ("same_type", "same_dataset")
BATCH = 256  # pairs at a time


@dataclass(frozen=True)
class PairQuestion:
    """
    Pairs of cells, aligned with the genes of a network.

    Attributes:
        columns (`np.ndarray`): Network gene of each column, shape `(G,)`.
        source_values, source_measured (`np.ndarray`): Log values of the source cells, zero where unmeasured, `(n, G)`.
        revealed (`np.ndarray`): Log value of each imposed gene in the target cell, NaN elsewhere, shape `(n, G)`.
        same_type (`np.ndarray` of bool): Pairing `same_type` (else `same_dataset`), shape `(n,)`.
        datasets (`np.ndarray` of bool): Data sets each pair can come from, shape `(n, K)`.
    """

    columns: np.ndarray
    source_values: np.ndarray
    source_measured: np.ndarray
    revealed: np.ndarray
    same_type: np.ndarray
    datasets: np.ndarray


def check_question(
    network: GeneNetwork,
    source_values: np.ndarray,
    source_measured: np.ndarray | None,
    revealed: np.ndarray | None,
    pairing: str | Sequence[str],
    gene_ids: Sequence[str] | None,
) -> PairQuestion:
    """Aligns pairs with the network and finds the data sets that measure what was measured.

    Raises `ValueError` for unknown genes or pairings, or a set of measured genes that no data set has.
    """
    columns = np.arange(network.config.n_genes) if gene_ids is None else network.gene_index(gene_ids)
    values = np.asarray(source_values, dtype=np.float64)
    n = len(values)
    measured = np.ones(values.shape, bool) if source_measured is None else np.asarray(source_measured, dtype=bool)
    revealed = np.full(values.shape, np.nan) if revealed is None else np.asarray(revealed, dtype=np.float64)
    pairings = np.asarray([pairing] * n if isinstance(pairing, str) else list(pairing), dtype=object)
    unknown = sorted(set(pairings.tolist()) - set(PAIRINGS))
    if unknown or len(pairings) != n:
        raise ValueError(f"`pairing` is {unknown or len(pairings)}; wanted {n} of {', '.join(PAIRINGS)}.")
    candidates = np.ones((n, network.config.n_datasets), dtype=bool)
    if source_measured is not None:
        candidates = (measured[:, None, :] == network.measured[None][:, :, columns]).all(axis=2)
        for row in np.flatnonzero(~candidates.any(axis=1)):
            raise ValueError(
                f"`source_measured` of pair {row} fits none of the {network.config.n_datasets} data sets of the "
                "network; give the masks of its own cells."
            )
    return PairQuestion(
        columns, np.where(measured, values, 0.0), measured, revealed, pairings == "same_type", candidates
    )


def optimum(
    network: GeneNetwork,
    source_values: np.ndarray,
    source_measured: np.ndarray | None = None,
    revealed: np.ndarray | None = None,
    pairing: str | Sequence[str] = "same_type",
    *,
    gene_ids: Sequence[str] | None = None,
    same_donor_share: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The exact best predictor E[B | A, b_S, pairing] of the linear form.

    Given data set, types of both cells and whether they share a donor, the two cells are jointly Gaussian; the labels
    are finitely many, so the posterior mean is a finite mixture, computed exactly in the R-dimensional state:
    precision `P^-1 + sum_j l_j l_j' / d_j` over the observed genes, evidence in closed form for every label. Donor
    effects are integrated over their population, so the optimum is that for donors nobody has seen. It is given the
    fixed effects of types and data sets, which training data can teach. Types are uniform in every donor.

    Args:
        source_values (`np.ndarray`): Log values of the source cells, shape `(n, G)`.
        source_measured (`np.ndarray` of bool, *optional*): Shape `(n, G)`; defaults to all. Tells the data set: those
            are considered whose measured genes are these.
        revealed (`np.ndarray`, *optional*): Target's log value of each imposed gene, NaN elsewhere, shape `(n, G)`;
            defaults to none imposed.
        pairing (`str` or `Sequence[str]`): `same_type` (same data set and type, any donor) or `same_dataset` (same
            data set and donor, any type), for all pairs or for each.
        gene_ids (`Sequence[str]`, *optional*): Gene of each column; defaults to all in network order.
        same_donor_share (`float`, *optional*): Share of `same_type` pairs whose cells also share their donor; defaults
            to one over the donors of a data set.

    Returns:
        Mean and variance of every gene of the target cell, each `(n, G)`; imposed genes have their value and variance
        0.

    Raises:
        ValueError: In the count form, or for arguments that disagree.
    """
    if network.config.form != "linear":
        raise ValueError("`optimum` is exact in the linear form only; use `monte_carlo_optimum` for the count form.")
    question = check_question(network, source_values, source_measured, revealed, pairing, gene_ids)
    if same_donor_share is None:
        same_donor_share = network.config.n_datasets / network.config.n_donors
    mean = np.empty(question.source_values.shape)
    variance = np.empty_like(mean)
    loadings = network.loadings()[question.columns]
    for start in range(0, len(mean), BATCH):
        for same_type in (True, False):
            rows = start + np.flatnonzero(question.same_type[start : start + BATCH] == same_type)
            if len(rows):
                mean[rows], variance[rows] = _posterior(network, question, loadings, rows, same_type, same_donor_share)
    known = ~np.isnan(question.revealed)
    return np.where(known, question.revealed, mean), np.where(known, 0.0, variance)


def _posterior(
    network: GeneNetwork,
    question: PairQuestion,
    loadings: np.ndarray,
    rows: np.ndarray,
    same_type: bool,
    same_donor_share: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the target's genes, `(len(rows), G)` each, for pairs of one pairing."""
    n_reg = loadings.shape[1]
    base = network.base[question.columns]
    noise = network.noise[question.columns] ** 2
    outer = (loadings[:, :, None] * loadings[:, None, :]).reshape(len(base), -1)
    measured = question.source_measured[rows]
    known = ~np.isnan(question.revealed[rows])
    precision = np.zeros((len(rows), 2 * n_reg, 2 * n_reg))
    precision[:, :n_reg, :n_reg] = ((measured / noise) @ outer).reshape(-1, n_reg, n_reg)
    precision[:, n_reg:, n_reg:] = ((known / noise) @ outer).reshape(-1, n_reg, n_reg)
    source = np.where(measured, question.source_values[rows] - base, 0.0) / noise
    target = np.where(known, question.revealed[rows] - base, 0.0) / noise
    information = np.concatenate([source @ loadings, target @ loadings], axis=1)

    types = np.arange(len(network.type_shares))
    pairs = np.stack([types, types], axis=1) if same_type else np.stack(np.meshgrid(types, types), -1).reshape(-1, 2)
    log_prior = np.log(network.type_shares[pairs[:, 0]])
    if not same_type:
        log_prior = log_prior + np.log(network.type_shares[pairs[:, 1]])
    type_means = network.type_effects[pairs].reshape(len(pairs), -1)
    donors_per_dataset = np.bincount(network.donor_dataset, minlength=network.config.n_datasets)

    log_weights, means, covariances = [], [], []
    donor_states = ((1.0, same_donor_share), (0.0, 1 - same_donor_share)) if same_type else ((1.0, 1.0),)
    for shared, share in donor_states:
        if share <= 0:
            continue
        total = network.donor_cov + network.within_cov
        prior = np.block([[total, shared * network.donor_cov], [shared * network.donor_cov, total]])
        prior_precision = np.linalg.inv(prior)
        posterior = np.linalg.inv(precision + prior_precision)
        log_scale = 0.5 * (np.linalg.slogdet(posterior)[1] - np.linalg.slogdet(prior)[1]) + np.log(share)
        for index, shift in enumerate(network.dataset_effects):
            centre = type_means + np.tile(shift, 2)  # (C, 2R)
            pull = centre @ prior_precision
            pulled = pull + information[:, None]
            means.append(pulled @ posterior)  # symmetric
            quadratic = np.einsum("nci,nci->nc", means[-1], pulled)
            log_weight = 0.5 * (quadratic - np.einsum("ci,ci->c", pull, centre)) + log_prior + log_scale[:, None]
            with np.errstate(divide="ignore"):
                log_weight = log_weight + np.log(question.datasets[rows, index] * donors_per_dataset[index])[:, None]
            log_weights.append(log_weight)
            covariances.append(np.broadcast_to(posterior[:, None], (*log_weight.shape, 2 * n_reg, 2 * n_reg)))
    log_weight = np.concatenate(log_weights, axis=1)
    weights = np.exp(log_weight - logsumexp(log_weight, axis=1, keepdims=True))
    state = np.concatenate(means, axis=1)[:, :, n_reg:]
    mean_state = np.einsum("nc,nci->ni", weights, state)
    deviation = state - mean_state[:, None]
    covariance = deviation.transpose(0, 2, 1) @ (weights[:, :, None] * deviation)
    at = 0
    for block in covariances:
        share = weights[:, at : at + block.shape[1]].sum(axis=1)
        covariance += share[:, None, None] * block[:, 0, n_reg:, n_reg:]
        at += block.shape[1]
    explained = ((loadings @ covariance) * loadings).sum(axis=2)
    return base + mean_state @ loadings.T, explained + noise


class ExpectedLogValue:
    """
    Expected normalised log value of a count given its mean: a table for some library sizes, by default 24 even
    quantiles of their distribution, interpolated linearly in the log mean.
    """

    low, step, size = -14.0, 0.05, 440  # log means from 8e-7 to 3,000

    def __init__(self, network: GeneNetwork, libraries: np.ndarray | None = None):
        config = network.config
        self.dropout = config.dropout
        if libraries is None:
            spread = config.library_spread
            libraries = config.mean_library * np.exp(spread * ndtri((np.arange(24) + 0.5) / 24) - 0.5 * spread**2)
        self.libraries = np.asarray(libraries, dtype=np.float64)
        self.table = self._tabulate(config.dispersion, self.libraries)

    @classmethod
    def _tabulate(cls, dispersion: float, libraries: np.ndarray) -> np.ndarray:
        """Expected log value before dropout, `(n_libraries, size)`."""
        table = np.empty((len(libraries), cls.size))
        for row in range(cls.size):
            mean = np.exp(cls.low + row * cls.step)
            if mean < 300:
                counts = np.arange(1, int(mean + 12 * np.sqrt(mean + dispersion * mean**2) + 12))
                if dispersion > 0:
                    chance = nbinom.pmf(counts, 1 / dispersion, 1 / (1 + dispersion * mean))
                else:
                    chance = poisson.pmf(counts, mean)
                table[:, row] = np.log1p(TARGET_SUM * counts / libraries[:, None]) @ chance
            else:  # many molecules: the mean of the log of a gamma variable
                shift = digamma(1 / dispersion) + np.log(dispersion) if dispersion > 0 else 0.0
                table[:, row] = np.log1p(TARGET_SUM * mean * np.exp(shift - 0.5 / mean) / libraries)
        return table

    def log_means(self, eta: np.ndarray, measured: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Log mean molecules before dropout of genes with log rates `eta` `(..., G)` in cells of these libraries."""
        peak = eta.max(axis=-1, keepdims=True)
        total = np.log(np.exp(eta - peak) @ measured.astype(eta.dtype))[..., None] + peak
        return eta - total + np.log(library / (1 - self.dropout)).astype(eta.dtype)[..., None]

    def __call__(self, log_means: np.ndarray, library_index: np.ndarray) -> np.ndarray:
        """Expected normalised log values, shaped like `log_means` `(..., G)`, for libraries given by index `(...)`."""
        position = np.clip((log_means - self.low) / self.step, 0, self.size - 1.001)
        left = position.astype(np.int32)
        flat = (1 - self.dropout) * self.table.astype(np.float32).ravel()
        at = left + (np.asarray(library_index, dtype=np.int32) * self.size)[..., None]
        below = flat[at]
        return below + (position - left).astype(np.float32) * (flat[at + 1] - below)
