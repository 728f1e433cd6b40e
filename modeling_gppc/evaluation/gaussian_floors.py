"""Floors that condition a Gaussian: on the revealed genes, on the source's state, within labels."""

from collections.abc import Sequence

import numpy as np

from modeling_gppc.evaluation.linear_floors import (
    PairMoments,
    StateRegression,
    condition_on_revealed,
    masked_covariance,
    shrink,
)
from modeling_gppc.evaluation.mean_floors import Floor, MeanFloor, context_keys, find_keys, group_sums
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.fitting.factor_model import Cells, fit_factor_model, fit_pair_coupling, predict_factor_model


class LinearRevealedFloor(Floor):
    """E[B | b_S] = mu + Sigma_jS Sigma_SS^-1 (b_S - mu_S)."""

    name = "linear_revealed"
    shares = (0.02, 0.1, 0.25, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "LinearRevealedFloor":
        self.moments = PairMoments(train)
        self.choose("shrinkage", self.shares, validation, self._use)
        return self

    def _use(self, share: float) -> None:
        self.covariance = shrink(self.moments.covariance, share)

    def predict(self, pairs: PairArrays) -> np.ndarray:
        mean = np.tile(self.moments.target_mean.astype(np.float32), (len(pairs), 1))
        return condition_on_revealed(mean, self.covariance, pairs)


class LinearJointFloor(Floor):
    """E[B | A, b_S]: a shrunken linear regression on the whole source state, then conditioning on what is revealed."""

    name = "linear_joint"
    ridges = (0.3, 1.0, 3.0, 10.0, 30.0)
    shares = (0.02, 0.1, 0.25, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "LinearJointFloor":
        self.moments, self.panels = PairMoments(train), train.panels
        self.share = None
        self.choose("ridge", self.ridges, validation.without_revealed(), self._use_state)
        self.choose("shrinkage", self.shares, validation, self._use)
        return self

    def _use_state(self, ridge: float) -> None:
        self.regression = StateRegression(self.moments, self.panels, ridge)
        self.covariances: dict[int, np.ndarray] = {}

    def _use(self, share: float) -> None:
        self.share = share

    def predict(self, pairs: PairArrays) -> np.ndarray:
        mean = self.regression.predict(pairs)
        if pairs.revealed_ids.shape[1] == 0:
            return mean
        keys = self.regression.panel_keys(pairs)
        for key in np.unique(keys):
            if key not in self.covariances:
                self.covariances[key] = self.regression.residual_covariance(int(key))
            rows = np.flatnonzero(keys == key)
            mean[rows] = condition_on_revealed(
                mean[rows], shrink(self.covariances[key], self.share), pairs.select(rows)
            )
        return mean


class ConditionalGaussianFloor(Floor):
    """The factor model of one cell and, `with_coupling`, of two, conditioned exactly on all that is given."""

    name = "conditional_gaussian"
    ranks = (10, 20, 40)

    def __init__(self, with_coupling: bool = True):
        super().__init__()
        self.with_coupling = with_coupling

    def fit(self, train: PairArrays, validation: PairArrays) -> "ConditionalGaussianFloor":
        self.panels = train.panels
        _, first_source = np.unique(train.source_id, return_index=True)
        _, first_target = np.unique(train.target_id, return_index=True)
        # A cell that serves as source and as target counts once.
        fresh = ~np.isin(train.target_id[first_target], train.source_id)
        cells = np.concatenate([train.source[first_source], train.target[first_target[fresh]]])
        panel = np.concatenate([train.source_panel[first_source], train.target_panel[first_target[fresh]]])
        fitted = {}

        def use(rank):
            if rank not in fitted:
                model = fit_factor_model(Cells(cells, panel, self.panels), rank, n_iterations=25)
                coupling = np.zeros((rank, rank))
                if self.with_coupling:
                    source = Cells(train.source, train.source_panel, self.panels)
                    coupling = fit_pair_coupling(model, source, Cells(train.target, train.target_panel, self.panels))
                fitted[rank] = (model, coupling)
            self.model, self.coupling = fitted[rank]

        limit = min(train.n_genes, len(cells)) - 1
        self.choose("n_factors", sorted({max(min(rank, limit), 1) for rank in self.ranks}), validation, use)
        return self

    def predict(self, pairs: PairArrays) -> np.ndarray:
        return self.predict_moments(pairs, with_variance=False)[0]

    def predict_moments(self, pairs: PairArrays, with_variance: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Expectation and variance of every gene of the target, each `(n, V)`."""
        return predict_factor_model(
            self.model,
            self.coupling,
            Cells(pairs.source, pairs.source_panel, pairs.panels),
            pairs.revealed_ids,
            pairs.revealed_levels,
            pairs.revealed_mask,
            with_variance,
        )


class LabelledGaussianFloor(Floor):
    """A mixture of Gaussians over the target's cell type, given the labels of the source and the revealed genes.

    p(type | labels of the source) from training counts, one mean a type, one covariance within types. With pairs of one
    type this is the type's mean and the conditional Gaussian within it.
    """

    name = "conditional_gaussian_labelled"
    uses_labels = True
    contexts = (("dataset",), ("dataset", "donor"), ("dataset", "cell_type"), ("cell_type",))
    shares = (0.05, 0.2, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "LabelledGaussianFloor":
        self._train = train
        overall = MeanFloor().fit(train, validation).mean
        labels = context_keys(train, ("dataset", "target_cell_type"))
        self.types, index = np.unique(labels, return_inverse=True)
        self._type = index.ravel()
        sums, counts = group_sums(train, self._type, len(self.types))
        self.means = ((sums + 10 * overall) / (counts + 10)).astype(np.float32)
        deviation = (train.target - self.means[self._type]) * train.target_measured
        _, first = np.unique(train.target_id, return_index=True)
        panel = train.target_panel[first]
        self.within = masked_covariance(deviation[first], panel, deviation[first], panel, train.panels)
        diagonal = np.arange(train.n_genes)
        self.within[diagonal, diagonal] = np.maximum(np.diag(self.within), 1e-4)
        self._use(self.shares[1])
        self.choose("labels", self.contexts, validation, self._use_context)
        self.choose("shrinkage", self.shares, validation, self._use)
        del self._train, self._type
        return self

    def _use(self, share: float) -> None:
        self.covariance = shrink(self.within, share)

    def _use_context(self, columns: Sequence[str]) -> None:
        n_types = len(self.types)
        overall = np.bincount(self._type, minlength=n_types) / len(self._type)
        self.priors = [((), np.array([""]), overall[None])]
        for width in range(1, len(columns) + 1):
            keys, index = np.unique(context_keys(self._train, columns[:width]), return_inverse=True)
            counts = np.zeros((len(keys), n_types))
            np.add.at(counts, (index.ravel(), self._type), 1.0)
            self.priors.append((columns[:width], keys, counts / counts.sum(axis=1, keepdims=True)))

    def predict(self, pairs: PairArrays) -> np.ndarray:
        prior = np.empty((len(pairs), len(self.types)))
        for columns, keys, table in self.priors:
            found, position = find_keys(context_keys(pairs, columns), keys)
            prior[found] = table[position[found]]
        weights = prior
        if pairs.revealed_ids.shape[1]:
            ids, real = pairs.revealed_ids, pairs.revealed_mask
            both = real[:, :, None] & real[:, None, :]
            within = np.where(both, self.covariance[ids[:, :, None], ids[:, None, :]], 0.0)
            diagonal = np.arange(ids.shape[1])
            within[:, diagonal, diagonal] += np.where(real, 0.0, 1.0)
            # (n, K, types): how far the revealed levels are from each type's.
            surprise = pairs.revealed_levels[:, :, None] - self.means.T[ids]
            surprise = np.where(real[:, :, None], surprise, 0.0)
            log_weights = np.log(np.maximum(prior, 1e-300))
            log_weights -= 0.5 * (surprise * np.linalg.solve(within, surprise)).sum(axis=1)
            weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True)) * (prior > 0)
            weights /= weights.sum(axis=1, keepdims=True)
        mean = weights.astype(np.float32) @ self.means
        return condition_on_revealed(mean, self.covariance, pairs)
