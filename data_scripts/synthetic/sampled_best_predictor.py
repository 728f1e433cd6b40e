"""An estimate of the best predictor of count cells: importance sampling of the latent states of both cells."""

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln, logsumexp
from tqdm import tqdm

from data_scripts.synthetic.best_predictor import ExpectedLogValue, PairQuestion, check_question
from data_scripts.synthetic.network import TARGET_SUM, GeneNetwork, matrix_root

_DEGREES = 8.0  # of freedom of the proposal
_PRIOR_SHARE = 0.15  # of the proposals drawn from the prior, which bounds the weights
_ROUNDS = 6  # adaptations of the proposal to the source cell
_TARGET_REPEATS = 8  # proposals of the target's state for each one kept
_REPLICATES = 2  # independent repetitions, for the standard error
_BANK = 1_024  # states of the population that the first proposal is fitted to


def monte_carlo_optimum(
    network: GeneNetwork,
    source_values: np.ndarray,
    source_library: np.ndarray,
    source_measured: np.ndarray,
    revealed: np.ndarray | None = None,
    pairing: str | Sequence[str] = "same_type",
    *,
    gene_ids: Sequence[str] | None = None,
    n_samples: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates the best predictor of the count form, in three steps for each pair.

    1. States of the source cell given all its counts: importance sampling, the proposal adapted to the cell. 2. States
    of the target cell given those: same type and perhaps donor, or same donor and any type. 3. Weights from the
    negative binomial likelihood of the imposed genes; expected log values, averaged.

    The ceiling is an estimate from below. No predictor scores better in expectation than the true optimum, so finite
    samples and the approximations (normalising by the drawn rather than the nominal library, imposed values treated as
    continuous, the target's library integrated out) can only lower its r2. Monte-Carlo noise adds `mean(standard_error
    ** 2)` to its MSE, which may be subtracted.

    Args:
        source_values (`np.ndarray`): log(1 + 10,000 x count / library) of the source cells, shape `(n, G)`.
        source_library (`np.ndarray`): Their counts over all genes, shape `(n,)`.
        source_measured, revealed, pairing, gene_ids: As in [`optimum`].
        n_samples (`int`, *optional*, defaults to 512): States of each cell and replicate.

    Returns:
        Estimate of E[B | A, b_S, pairing] and its Monte-Carlo standard error from independent replicates, each `(n,
        G)`.

    Raises:
        ValueError: In the linear form, or for arguments that disagree.
    """
    if network.config.form != "count":
        raise ValueError("`monte_carlo_optimum` is for the count form; `optimum` is exact in the linear form.")
    if n_samples < 16:
        raise ValueError(f"`n_samples` is {n_samples}; wanted at least 16.")
    question = check_question(network, source_values, source_measured, revealed, pairing, gene_ids)
    if (question.datasets.sum(axis=1) > 1).any():
        raise ValueError("`source_measured` fits several data sets of the network; wanted data sets that differ.")
    sampler = _Sampler(network, question, np.asarray(source_library, dtype=np.float64), n_samples)
    estimates = np.empty((_REPLICATES, *question.source_values.shape))
    rows_at_once = max(1, 6_000_000 // (n_samples * network.config.n_genes))
    which = question.datasets.argmax(axis=1)
    with tqdm(total=_REPLICATES * len(which), desc="best predictor", unit="pair", disable=not progress) as bar:
        for replicate in range(_REPLICATES):
            for index in np.unique(which):
                rng = np.random.default_rng([seed, replicate, int(index)])
                rows = np.flatnonzero(which == index)
                for start in range(0, len(rows), rows_at_once):
                    part = rows[start : start + rows_at_once]
                    estimates[replicate, part] = sampler(rng, part, int(index))
                    bar.update(len(part))
    known = ~np.isnan(question.revealed)
    error = estimates.std(axis=0, ddof=1) / np.sqrt(_REPLICATES)
    return np.where(known, question.revealed, estimates.mean(axis=0)), np.where(known, 0.0, error)


class _Sampler:
    """What one replicate needs for some pairs of one data set."""

    def __init__(self, network: GeneNetwork, question: PairQuestion, source_library: np.ndarray, n_samples: int):
        self.network, self.question, self.n_samples = network, question, n_samples
        self.same_donor_share = network.config.n_datasets / network.config.n_donors
        self.source_library = source_library
        counts = np.rint(np.expm1(question.source_values) * source_library[:, None] / TARGET_SUM)
        self.counts = counts.astype(np.float32)
        self.expectation = ExpectedLogValue(network)
        total = network.donor_cov + network.within_cov
        self.root = np.linalg.cholesky(total)
        self.whiten = np.linalg.inv(self.root)
        gain = network.donor_cov @ np.linalg.inv(total)
        self.gain, self.donor_rest = gain, matrix_root(network.donor_cov - gain @ network.donor_cov)

    def __call__(self, rng: np.random.Generator, rows: np.ndarray, dataset: int) -> np.ndarray:
        """Predictions `(len(rows), G)`."""
        states = self._source_states(rng, rows, dataset)
        grid = self.expectation.libraries
        # The imposed genes single out few of the target's states, so many more are proposed than are kept.
        repeats = _TARGET_REPEATS if (~np.isnan(self.question.revealed[rows])).any() else 1
        targets, indices, log_weights = [], [], []
        for _ in range(repeats):
            targets.append(self._target_states(rng, rows, dataset, states))
            # Library of each target state, as an index into those tabulated.
            indices.append(rng.integers(0, len(grid), states.shape[:2]))
            log_means = self._log_means(targets[-1], grid[indices[-1]], dataset)
            log_weights.append(self._revealed_likelihood(rows, log_means, grid[indices[-1]]))
        chosen = _resample(rng, _normalized(np.concatenate(log_weights, axis=1)), self.n_samples)
        target = np.take_along_axis(np.concatenate(targets, axis=1), chosen[:, :, None], axis=1)
        index = np.take_along_axis(np.concatenate(indices, axis=1), chosen, axis=1)
        return self.expectation(self._log_means(target, grid[index], dataset), index).mean(axis=1)

    def _log_means(self, states: np.ndarray, library: np.ndarray, dataset: int) -> np.ndarray:
        """Log mean molecules before dropout of the question's genes, `(n, S, G)`, for states `(n, S, R)`."""
        eta = self.network.eta(states.reshape(-1, states.shape[-1])).reshape(*states.shape[:2], -1)
        return self.expectation.log_means(eta, self.network.measured[dataset], library)[..., self.question.columns]

    def _prior(self, states: np.ndarray, dataset: int) -> np.ndarray:
        """Log joint density of states and types, `(..., T)`, up to a constant, donors integrated out."""
        white = (states - self.network.dataset_effects[dataset]) @ self.whiten.T
        centres = self.network.type_effects @ self.whiten.T
        square = (white**2).sum(axis=-1)[..., None] - 2 * white @ centres.T + (centres**2).sum(axis=1)
        return np.log(self.network.type_shares) - 0.5 * square

    def _draw_prior(self, rng: np.random.Generator, shape: tuple[int, int], dataset: int) -> np.ndarray:
        types = rng.choice(len(self.network.type_shares), size=shape, p=self.network.type_shares)
        noise = rng.standard_normal((*shape, len(self.root))) @ self.root.T
        return self.network.dataset_effects[dataset] + self.network.type_effects[types] + noise

    def _source_likelihood(self, rows: np.ndarray, states: np.ndarray, dataset: int) -> np.ndarray:
        """Log likelihood of the source cells' counts, `(n, S)`, for states `(n, S, R)`; parts of `S` at a time."""
        parts = []
        for start in range(0, states.shape[1], self.n_samples):
            part = states[:, start : start + self.n_samples]
            library = np.broadcast_to(self.source_library[rows, None], part.shape[:2])
            log_means = self._log_means(part, library, dataset)
            log_chance = self._log_chance(self.counts[rows][:, None], log_means)
            parts.append(np.einsum("nsg,ng->ns", log_chance, self.question.source_measured[rows].astype(np.float32)))
        return np.concatenate(parts, axis=1).astype(np.float64)

    def _log_chance(self, counts: np.ndarray, log_means: np.ndarray) -> np.ndarray:
        """Log probability of counts, up to terms that do not depend on the mean."""
        dispersion, dropout = self.network.config.dispersion, self.network.config.dropout
        means = np.exp(log_means)
        if dispersion > 0:
            log_size = np.log1p(dispersion * means) / dispersion
            positive = counts * (log_means - dispersion * log_size) - log_size
        else:
            log_size = means
            positive = counts * log_means - means
        zero = np.log(dropout + (1 - dropout) * np.exp(-log_size)) if dropout > 0 else -log_size
        return np.where(counts > 0, positive, zero)

    def _source_states(self, rng: np.random.Generator, rows: np.ndarray, dataset: int) -> np.ndarray:
        """Equally weighted states `(n, S, R)` of the source cells given their counts."""
        n, size = len(rows), len(self.root)
        states = np.broadcast_to(self._draw_prior(rng, (1, _BANK), dataset), (n, _BANK, size))
        log_weights = self._source_likelihood(rows, states, dataset)
        for _ in range(_ROUNDS):
            weights = _normalized(_tempered(log_weights, 2.0 * size))
            centre = np.einsum("ns,nsr->nr", weights, states)
            deviation = states - centre[:, None]
            spread = deviation.transpose(0, 2, 1) @ (weights[:, :, None] * deviation)
            # Few effective samples understate the spread; a touch of the prior keeps the proposal open.
            root = np.linalg.cholesky(1.2 * spread + 0.01 * (self.root @ self.root.T))
            chi = rng.chisquare(_DEGREES, (n, self.n_samples, 1)) / _DEGREES
            normal = rng.standard_normal((n, self.n_samples, size))
            states = centre[:, None] + (normal / np.sqrt(chi)) @ root.transpose(0, 2, 1)
            broad = rng.random((n, self.n_samples)) < _PRIOR_SHARE
            states[broad] = self._draw_prior(rng, (n, self.n_samples), dataset)[broad]

            log_prior = logsumexp(self._prior(states, dataset), axis=-1)
            log_determinant = np.log(np.abs(np.diagonal(root, axis1=1, axis2=2))).sum(axis=1)
            white = np.linalg.solve(root, (states - centre[:, None]).transpose(0, 2, 1))
            heavy = 0.5 * (_DEGREES + size) * np.log1p((white**2).sum(axis=1) / _DEGREES)
            log_heavy = (
                gammaln(0.5 * (_DEGREES + size)) - gammaln(0.5 * _DEGREES) - 0.5 * size * np.log(0.5 * _DEGREES)
            ) - (log_determinant[:, None] + heavy)  # both densities without their common (2 pi)^(-R/2)
            log_broad = log_prior - np.log(np.diag(self.root)).sum()
            proposal = np.logaddexp(np.log(1 - _PRIOR_SHARE) + log_heavy, np.log(_PRIOR_SHARE) + log_broad)
            log_weights = self._source_likelihood(rows, states, dataset) + log_broad - proposal
        chosen = _resample(rng, _normalized(log_weights), self.n_samples)
        return np.take_along_axis(states, chosen[:, :, None], axis=1)

    def _target_states(
        self, rng: np.random.Generator, rows: np.ndarray, dataset: int, states: np.ndarray
    ) -> np.ndarray:
        """States of target cells `(n, S, R)` that share the pairing's context with source cells in `states`."""
        network = self.network
        log_types = self._prior(states, dataset)
        share = np.exp(log_types - log_types.max(axis=-1, keepdims=True)).cumsum(axis=-1)
        source_type = (share < rng.random(states.shape[:2])[..., None] * share[..., -1:]).sum(axis=-1)
        same_type = self.question.same_type[rows][:, None]
        other_type = rng.choice(len(network.type_shares), size=source_type.shape, p=network.type_shares)
        same_donor = ~same_type | (rng.random(source_type.shape) < self.same_donor_share)
        normal = rng.standard_normal((2, *states.shape))
        rest = states - network.dataset_effects[dataset] - network.type_effects[source_type]
        donor = np.where(
            same_donor[..., None],
            rest @ self.gain.T + normal[0] @ self.donor_rest.T,
            normal[0] @ matrix_root(network.donor_cov).T,
        )
        own = normal[1] @ np.linalg.cholesky(network.within_cov).T
        types = network.type_effects[np.where(same_type, source_type, other_type)]
        return network.dataset_effects[dataset] + types + donor + own

    def _revealed_likelihood(self, rows: np.ndarray, log_means: np.ndarray, library: np.ndarray) -> np.ndarray:
        """Log likelihood `(n, S)` of the imposed genes given log means `(n, S, G)` and libraries `(n, S)`."""
        revealed = self.question.revealed[rows]
        known = ~np.isnan(revealed)
        total = np.zeros(library.shape)
        for row in np.flatnonzero(known.any(axis=1)):
            at = np.flatnonzero(known[row])
            counts = np.expm1(revealed[row, at]) * library[row][:, None] / TARGET_SUM
            chance = self._log_chance(counts, log_means[row][:, at].astype(np.float64))
            positive = revealed[row, at] > 0
            if positive.any():
                size = counts[:, positive]
                # The part that depends on the count, which varies with the library here, and the density's
                # change of variable from counts to values.
                dispersion = self.network.config.dispersion
                if dispersion > 0:
                    combinations = gammaln(size + 1 / dispersion) + size * np.log(dispersion) - gammaln(size + 1)
                else:
                    combinations = -gammaln(size + 1)
                chance[:, positive] += combinations + np.log(library[row])[:, None]
                # Less than one molecule cannot be: such libraries are all but excluded.
                chance[:, positive] -= np.where(size < 0.75, 30.0, 0.0)
            total[row] = chance.sum(axis=1)
        return total


def _normalized(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 over the last axis."""
    return np.exp(log_weights - logsumexp(log_weights, axis=-1, keepdims=True))


def _tempered(log_weights: np.ndarray, least: float) -> np.ndarray:
    """Log weights `(n, S)` flattened just enough that each row has `least` effective samples."""
    low, high = np.zeros(len(log_weights)), np.ones(len(log_weights))
    weights = _normalized(log_weights)
    enough = 1 / (weights**2).sum(axis=1) >= least
    for _ in range(20):
        middle = 0.5 * (low + high)
        weights = _normalized(middle[:, None] * log_weights)
        fits = 1 / (weights**2).sum(axis=1) >= least
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(enough, 1.0, low)[:, None] * log_weights


def _resample(rng: np.random.Generator, weights: np.ndarray, size: int) -> np.ndarray:
    """Systematic resampling: indices `(n, size)` of samples drawn by weight."""
    n = len(weights)
    points = (np.arange(size) + rng.random((n, 1))) / size
    cumulative = np.minimum(weights.cumsum(axis=1), 1.0)
    cumulative[:, -1] = 1.0  # despite rounding
    return np.stack([np.searchsorted(cumulative[row], points[row]) for row in range(n)])
