"""The best possible predictor of a pair of synthetic cells, in closed form."""

from collections.abc import Sequence

import numpy as np
from scipy.special import logsumexp

from data_scripts.synthetic.network import GeneNetwork

PAIRINGS = ("same_type", "same_dataset")
BATCH = 256  # pairs at a time


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
        ValueError: In the count form, for unknown genes or pairings, or for measured genes that no data set has.
    """
    if network.config.form != "linear":
        raise ValueError("`network` makes counts; the best predictor is known for the form `linear` only.")
    columns = np.arange(network.config.n_genes) if gene_ids is None else network.gene_index(gene_ids)
    values = np.asarray(source_values, dtype=np.float64)
    pairings = np.array([pairing] * len(values) if isinstance(pairing, str) else list(pairing), dtype=object)
    unknown = sorted(set(pairings.tolist()) - set(PAIRINGS))
    if unknown or len(pairings) != len(values):
        raise ValueError(f"`pairing` is {unknown or len(pairings)}; wanted {len(values)} of {', '.join(PAIRINGS)}.")
    if revealed is None:
        revealed = np.full(values.shape, np.nan)
    if same_donor_share is None:
        same_donor_share = network.config.n_datasets / network.config.n_donors
    # Data sets that each pair can come from, (n, K).
    datasets = np.ones((len(values), network.config.n_datasets), dtype=bool)
    measured = np.ones(values.shape, dtype=bool)
    if source_measured is not None:
        measured = np.asarray(source_measured, dtype=bool)
        datasets = (measured[:, None, :] == network.measured[None][:, :, columns]).all(axis=2)
        for row in np.flatnonzero(~datasets.any(axis=1)):
            raise ValueError(
                f"`source_measured` of pair {row} fits none of the {network.config.n_datasets} data sets of the "
                "network; give the masks of its own cells."
            )
    mean, variance = np.empty(values.shape), np.empty(values.shape)
    for start in range(0, len(values), BATCH):
        for name in PAIRINGS:
            rows = start + np.flatnonzero(pairings[start : start + BATCH] == name)
            if len(rows):
                given = (values[rows], measured[rows], revealed[rows], datasets[rows])
                mean[rows], variance[rows] = _posterior(network, columns, *given, name, same_donor_share)
    imposed = ~np.isnan(revealed)
    return np.where(imposed, revealed, mean), np.where(imposed, 0.0, variance)


def _posterior(
    network: GeneNetwork,
    columns: np.ndarray,
    source_values: np.ndarray,
    measured: np.ndarray,
    revealed: np.ndarray,
    datasets: np.ndarray,
    pairing: str,
    same_donor_share: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the target's genes, `(n, G)` each, for pairs of one pairing."""
    same_type, loadings = pairing == "same_type", network.loadings()[columns]
    n_reg = loadings.shape[1]
    base = network.base[columns]
    noise = network.noise[columns] ** 2
    outer = (loadings[:, :, None] * loadings[:, None, :]).reshape(len(base), -1)
    imposed = ~np.isnan(revealed)
    precision = np.zeros((len(source_values), 2 * n_reg, 2 * n_reg))
    precision[:, :n_reg, :n_reg] = ((measured / noise) @ outer).reshape(-1, n_reg, n_reg)
    precision[:, n_reg:, n_reg:] = ((imposed / noise) @ outer).reshape(-1, n_reg, n_reg)
    source = np.where(measured, source_values - base, 0.0) / noise
    target = np.where(imposed, revealed - base, 0.0) / noise
    information = np.concatenate([source @ loadings, target @ loadings], axis=1)

    # Labels that a pair may have, data set by data set: uniform over types, as many donors as a data set has.
    types = np.arange(len(network.type_effects))
    pairs = np.stack([types, types], axis=1) if same_type else np.stack(np.meshgrid(types, types), -1).reshape(-1, 2)
    type_means = network.type_effects[pairs].reshape(len(pairs), -1)
    centres = (np.tile(network.dataset_effects, 2)[:, None] + type_means).reshape(-1, 2 * n_reg)  # (K C, 2R)
    with np.errstate(divide="ignore"):
        log_prior = np.log(datasets * np.bincount(network.donor_dataset, minlength=datasets.shape[1]))
    log_prior = np.repeat(log_prior, len(pairs), axis=1)

    log_weights, states, covariances = [], [], []
    donor_states = ((1.0, same_donor_share), (0.0, 1 - same_donor_share)) if same_type else ((1.0, 1.0),)
    for shared, share in donor_states:
        if share <= 0:
            continue
        total = network.donor_cov + network.within_cov
        prior = np.block([[total, shared * network.donor_cov], [shared * network.donor_cov, total]])
        prior_precision = np.linalg.inv(prior)
        posterior = np.linalg.inv(precision + prior_precision)
        log_scale = 0.5 * (np.linalg.slogdet(posterior)[1] - np.linalg.slogdet(prior)[1]) + np.log(share)
        pull = centres @ prior_precision
        pulled = pull + information[:, None]
        mean = pulled @ posterior  # symmetric
        quadratic = np.einsum("nci,nci->nc", mean, pulled) - np.einsum("ci,ci->c", pull, centres)
        log_weights.append(0.5 * quadratic + log_prior + log_scale[:, None])
        states.append(mean[:, :, n_reg:])
        covariances.append(posterior[:, n_reg:, n_reg:])
    log_weight, state = np.concatenate(log_weights, axis=1), np.concatenate(states, axis=1)
    weights = np.exp(log_weight - logsumexp(log_weight, axis=1, keepdims=True))
    mean_state = np.einsum("nc,nci->ni", weights, state)
    deviation = state - mean_state[:, None]
    covariance = deviation.transpose(0, 2, 1) @ (weights[:, :, None] * deviation)
    for part, left in zip(np.split(weights, len(covariances), axis=1), covariances):
        covariance += part.sum(axis=1)[:, None, None] * left
    explained = ((loadings @ covariance) * loadings).sum(axis=2)
    return base + mean_state @ loadings.T, explained + noise
