"""Floors that condition a Gaussian: on the imposed genes, on the source's state, within labels."""

import functools
from collections.abc import Sequence

import numpy as np

from modeling_gppc.evaluation.mean_floors import Floor, MeanFloor, context_keys, find_keys, group_sums, masked_mean
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.fitting.factor_model import Cells, fit_factor_model, fit_pair_coupling, predict_factor_model

# More panels than this and a missing source gene counts as average instead of being marginalised exactly.
MAX_EXACT_PANELS = 6
ALL_GENES = -1  # stands for the panel of all genes


class PairMoments:
    """First and second moments of training pairs: means (of a gene that one side never measures the other side's),
    `covariance` of one cell, sources and targets pooled, and `cross`, Cov(target_j, source_i)."""

    def __init__(self, pairs: PairArrays):
        panels = pairs.panels
        self.source_mean, source_counts = masked_mean(pairs.source, pairs.source_panel, panels)
        self.target_mean, target_counts = masked_mean(pairs.target, pairs.target_panel, panels)
        self.source_mean = np.where(source_counts > 0, self.source_mean, self.target_mean)
        self.target_mean = np.where(target_counts > 0, self.target_mean, self.source_mean)
        source = centre(pairs.source, pairs.source_panel, panels, self.source_mean)
        target = centre(pairs.target, pairs.target_panel, panels, self.target_mean)
        self.cross = masked_covariance(target, pairs.target_panel, source, pairs.source_panel, panels)
        # A cell that is in many pairs says no more about the spread of cells than one that is in a single pair.
        _, first_source = np.unique(pairs.source_id, return_index=True)
        _, first_target = np.unique(pairs.target_id, return_index=True)
        cells = np.concatenate([source[first_source], target[first_target]])
        panel = np.concatenate([pairs.source_panel[first_source], pairs.target_panel[first_target]])
        self.covariance = with_least_variance(masked_covariance(cells, panel, cells, panel, panels))


def centre(values: np.ndarray, panel_index: np.ndarray, panels: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Values minus the gene's mean, zero where not measured."""
    return (values - mean.astype(values.dtype)) * panels[panel_index]


def masked_covariance(first, first_panel, second, second_panel, panels: np.ndarray) -> np.ndarray:
    """Cov(first_j, second_i) over the rows that measure both; inputs centred and zero where not measured."""
    pairs_of_panels, times = np.unique(np.stack([first_panel, second_panel]), axis=1, return_counts=True)
    if panels[np.unique(pairs_of_panels)].all():
        return (first.T @ second).astype(np.float64) / len(first)
    used = panels.astype(np.float64)
    counts = (used[pairs_of_panels[0]].T * times) @ used[pairs_of_panels[1]]
    return (first.T @ second).astype(np.float64) / np.maximum(counts, 1)


def with_least_variance(covariance: np.ndarray) -> np.ndarray:
    """The covariance with no variance below 1e-4; changed in place."""
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), 1e-4))
    return covariance


def shrink(covariance: np.ndarray, share: float) -> np.ndarray:
    """Off-diagonal entries scaled by 1 - `share`."""
    return (1 - share) * covariance + np.diag(share * np.diag(covariance))


def covariance_of_imposed(covariance: np.ndarray, ids: np.ndarray, real: np.ndarray, jitter: float) -> np.ndarray:
    """C_SS of each pair, shape `(n, K, K)`, `jitter` on its diagonal; the unit matrix where entries are padding."""
    both = real[:, :, None] & real[:, None, :]
    within = np.where(both, covariance[ids[:, :, None], ids[:, None, :]], 0.0)
    diagonal = np.arange(ids.shape[1])
    within[:, diagonal, diagonal] += np.where(real, jitter, 1.0)
    return within


def condition_on_imposed(mean: np.ndarray, covariance: np.ndarray, pairs: PairArrays, block: int = 512) -> np.ndarray:
    """mean_j + C_jS C_SS^-1 (b_S - mean_S) for each pair, `(n, V)`, from expectations `mean` `(n, V)` before anything is
    imposed and the covariance C `(V, V)`."""
    if pairs.revealed_ids.shape[1] == 0:
        return mean
    columns = covariance.astype(mean.dtype)
    output = mean.copy()
    for start in range(0, len(mean), block):
        rows = slice(start, start + block)
        ids, real = pairs.revealed_ids[rows], pairs.revealed_mask[rows]
        within = covariance_of_imposed(covariance, ids, real, 1e-6)
        surprise = pairs.revealed_levels[rows] - np.take_along_axis(mean[rows], ids, axis=1)
        coefficients = np.linalg.solve(within, np.where(real, surprise, 0.0)[..., None])[..., 0].astype(mean.dtype)
        output[rows] += np.matmul(coefficients[:, None, :], columns[ids])[:, 0]
    return output


class LinearRevealedFloor(Floor):
    """E[B | b_S] = mu + Sigma_jS Sigma_SS^-1 (b_S - mu_S)."""

    name = "linear_revealed"
    shares = (0.02, 0.1, 0.25, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "LinearRevealedFloor":
        self.moments = PairMoments(train)
        self.choose("shrinkage", self.shares, validation)
        return self

    def predict(self, pairs: PairArrays) -> np.ndarray:
        mean = np.tile(self.moments.target_mean.astype(np.float32), (len(pairs), 1))
        return condition_on_imposed(mean, shrink(self.moments.covariance, self.shrinkage), pairs)


class LinearJointFloor(Floor):
    """E[B | A, b_S]: a shrunken linear regression on the whole source state, then conditioning on what is imposed.

    E[B | A] = mu_B + W (A - mu_A), W = T (Sigma + ridge D)^-1 over the genes that the source's panel measures; D holds
    the variances, T is the covariance of target and source.
    """

    name = "linear_joint"
    ridges = (0.3, 1.0, 3.0, 10.0, 30.0)
    shares = (0.02, 0.1, 0.25, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "LinearJointFloor":
        self.moments, self.panels = PairMoments(train), train.panels
        self.choose("ridge", self.ridges, validation.without_revealed(), self.use_ridge)
        self.choose("shrinkage", self.shares, validation)
        return self

    def use_ridge(self, ridge: float) -> None:
        """Regresses with so much of the variances added to Sigma's diagonal."""
        penalised = self.moments.covariance + ridge * np.diag(np.diag(self.moments.covariance))
        self.weights = functools.cache(functools.partial(self._weights, penalised))
        self.residual_covariance = functools.cache(self._residual_covariance)

    def _weights(self, penalised: np.ndarray, panel: int) -> np.ndarray:
        """W of one panel, shape `(V, V)`, zero columns at its unmeasured genes."""
        measured = np.ones(len(penalised), dtype=bool) if panel == ALL_GENES else self.panels[panel]
        weights = np.zeros_like(penalised)
        solved = np.linalg.solve(penalised[np.ix_(measured, measured)], self.moments.cross[:, measured].T)
        weights[:, measured] = solved.T
        return weights

    def _residual_covariance(self, panel: int) -> np.ndarray:
        """Cov(B - E[B | A]) under the moments, Sigma - W T' - T W' + W Sigma W'; positive for any weights."""
        weights, covariance = self.weights(panel), self.moments.covariance
        explained = weights @ self.moments.cross.T
        return covariance - explained - explained.T + weights @ covariance @ weights.T

    def predict(self, pairs: PairArrays) -> np.ndarray:
        centred = centre(pairs.source, pairs.source_panel, pairs.panels, self.moments.source_mean)
        panel_of = pairs.source_panel
        if len(self.panels) > MAX_EXACT_PANELS or self.panels[np.unique(panel_of)].all():
            panel_of = np.full(len(pairs), ALL_GENES)
        target_mean = self.moments.target_mean.astype(centred.dtype)
        output = np.empty_like(centred)
        for panel in np.unique(panel_of).tolist():
            rows = np.flatnonzero(panel_of == panel)
            mean = centred[rows] @ self.weights(panel).T.astype(centred.dtype) + target_mean
            if pairs.revealed_ids.shape[1]:
                left = shrink(self.residual_covariance(panel), self.shrinkage)
                mean = condition_on_imposed(mean, left, pairs.select(rows))
            output[rows] = mean
        return output


class ConditionalGaussianFloor(Floor):
    """The factor model of one cell and, `with_coupling`, of two, conditioned exactly on all that is given."""

    name = "conditional_gaussian"
    ranks = (10, 20, 40)

    def __init__(self, with_coupling: bool = True):
        super().__init__()
        self.with_coupling = with_coupling

    def fit(self, train: PairArrays, validation: PairArrays) -> "ConditionalGaussianFloor":
        _, first_source = np.unique(train.source_id, return_index=True)
        _, first_target = np.unique(train.target_id, return_index=True)
        # A cell that serves as source and as target counts once.
        fresh = first_target[~np.isin(train.target_id[first_target], train.source_id)]
        cells = np.concatenate([train.source[first_source], train.target[fresh]])
        panel = np.concatenate([train.source_panel[first_source], train.target_panel[fresh]])

        @functools.cache
        def fitted(rank):
            model = fit_factor_model(Cells(cells, panel, train.panels), rank, n_iterations=25)
            if not self.with_coupling:
                return model, np.zeros((rank, rank))
            source = Cells(train.source, train.source_panel, train.panels)
            return model, fit_pair_coupling(model, source, Cells(train.target, train.target_panel, train.panels))

        def use(rank):
            self.model, self.coupling = fitted(rank)

        limit = min(train.n_genes, len(cells)) - 1
        self.choose("n_factors", sorted({max(min(rank, limit), 1) for rank in self.ranks}), validation, use)
        return self

    def predict(self, pairs: PairArrays) -> np.ndarray:
        return self.predict_moments(pairs)[0]

    def predict_moments(self, pairs: PairArrays) -> tuple[np.ndarray, np.ndarray]:
        """Expectation and variance of every gene of the target, each `(n, V)`."""
        source = Cells(pairs.source, pairs.source_panel, pairs.panels)
        imposed = (pairs.revealed_ids, pairs.revealed_levels, pairs.revealed_mask)
        return predict_factor_model(self.model, self.coupling, source, *imposed)


class LabelledGaussianFloor(Floor):
    """A mixture of Gaussians over the target's cell type, given the labels of the source and the imposed genes.

    p(type | labels of the source) from training counts, one mean a type, one covariance within types. With pairs of one
    type this is the type's mean and the conditional Gaussian within it.
    """

    name = "conditional_gaussian_labelled"
    uses_labels = True
    contexts = (("dataset",), ("dataset", "donor"), ("dataset", "cell_type"), ("cell_type",))
    shares = (0.05, 0.2, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "LabelledGaussianFloor":
        overall = MeanFloor().fit(train, validation).mean
        types, type_of = np.unique(context_keys(train, ("dataset", "target_cell_type")), return_inverse=True)
        sums, counts = group_sums(train, type_of, len(types))
        self.means = ((sums + 10 * overall) / (counts + 10)).astype(np.float32)
        deviation = (train.target - self.means[type_of]) * train.target_measured
        _, first = np.unique(train.target_id, return_index=True)
        panel = train.target_panel[first]
        within = masked_covariance(deviation[first], panel, deviation[first], panel, train.panels)
        self.covariance = with_least_variance(within)
        self.shrinkage = self.shares[1]
        self.choose("labels", self.contexts, validation, functools.partial(self._count_types, train, type_of))
        self.choose("shrinkage", self.shares, validation)
        return self

    def _count_types(self, train: PairArrays, type_of: np.ndarray, columns: Sequence[str]) -> None:
        n_types = len(self.means)
        overall = np.bincount(type_of, minlength=n_types) / len(type_of)
        self.priors = [((), np.array([""]), overall[None])]
        for width in range(1, len(columns) + 1):
            keys, index = np.unique(context_keys(train, columns[:width]), return_inverse=True)
            counts = np.zeros((len(keys), n_types))
            np.add.at(counts, (index, type_of), 1.0)
            self.priors.append((columns[:width], keys, counts / counts.sum(axis=1, keepdims=True)))

    def predict(self, pairs: PairArrays) -> np.ndarray:
        weights = np.empty((len(pairs), len(self.means)))
        for columns, keys, table in self.priors:
            found, position = find_keys(context_keys(pairs, columns), keys)
            weights[found] = table[position[found]]
        covariance = shrink(self.covariance, self.shrinkage)
        ids, real = pairs.revealed_ids, pairs.revealed_mask
        if ids.shape[1]:
            within = covariance_of_imposed(covariance, ids, real, 0.0)
            # (n, K, types): how far the imposed levels are from each type's.
            surprise = pairs.revealed_levels[:, :, None] - self.means.T[ids]
            surprise = np.where(real[:, :, None], surprise, 0.0)
            log_weights = np.log(np.maximum(weights, 1e-300))
            log_weights -= 0.5 * (surprise * np.linalg.solve(within, surprise)).sum(axis=1)
            weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True)) * (weights > 0)
            weights /= weights.sum(axis=1, keepdims=True)
        return condition_on_imposed(weights.astype(np.float32) @ self.means, covariance, pairs)
