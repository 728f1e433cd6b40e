"""Floors: what any model must beat. Fitted on training pairs, tuned on validation pairs, masked like the model."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from tqdm.auto import tqdm

from modeling_gppc.evaluation.linear_floors import (
    PairMoments,
    StateRegression,
    centre,
    condition_on_revealed,
    masked_covariance,
    masked_mean,
    shrink,
)
from modeling_gppc.evaluation.pair_arrays import PairArrays, sample_rows
from modeling_gppc.feature_extraction_gppc import close_matches
from modeling_gppc.training.factor_model import (
    PairCoupling,
    fit_factor_model,
    fit_pair_coupling,
    predict_factor_model,
)

# Dense covariances up to this many genes; above, the linear floors use a factor model's covariance.
MAX_DENSE_GENES = 2_000


def masked_mse(predicted: np.ndarray, pairs: PairArrays) -> float:
    """Mean squared error over the scored entries of all pairs."""
    scored = pairs.scored
    return float((((predicted - pairs.target) ** 2) * scored).sum(dtype=np.float64) / max(int(scored.sum()), 1))


class Floor:
    """A predictor fitted on pairs.

    Attributes:
        name (`str`): Its name in every table.
        uses_labels (`bool`): Whether it reads cell types; the model does not.
        uses_revealed (`bool`): Whether the revealed genes change its prediction.
        settings (`dict`): What validation chose.
    """

    name = ""
    uses_labels = False
    uses_revealed = True

    def __init__(self):
        self.settings: dict = {}

    def fit(self, train: PairArrays, validation: PairArrays) -> "Floor":
        """Fits on `train`, chooses settings by the error on `validation`."""
        return self

    def predict(self, pairs: PairArrays) -> np.ndarray:
        """Expected value of every gene of the target, shape `(n, V)`."""
        raise TypeError(f"`{type(self).__name__}` is abstract; use one of {', '.join(FLOORS)}.")

    def choose(self, setting: str, candidates: Sequence, validation: PairArrays, apply) -> None:
        """Keeps the candidate with the smallest validation error; the middle one where there is no validation."""
        errors = []
        if len(candidates) > 1 and len(validation):
            for candidate in candidates:
                apply(candidate)
                errors.append(masked_mse(self.predict(validation), validation))
        best = int(np.argmin(errors)) if errors else len(candidates) // 2
        apply(candidates[best])
        self.settings[setting] = candidates[best]


class MeanFloor(Floor):
    """Mean of the training targets."""

    name = "mean"
    uses_revealed = False

    def fit(self, train: PairArrays, validation: PairArrays) -> "MeanFloor":
        mean, counts = masked_mean(train.target, train.target_panel, train.panels)
        source_mean, _ = masked_mean(train.source, train.source_panel, train.panels)
        self.mean = np.where(counts > 0, mean, source_mean).astype(np.float32)
        return self

    def predict(self, pairs: PairArrays) -> np.ndarray:
        return np.broadcast_to(self.mean, (len(pairs), len(self.mean)))


class NoChangeFloor(MeanFloor):
    """The source cell itself; the mean where the source did not measure a gene."""

    name = "no_change"

    def predict(self, pairs: PairArrays) -> np.ndarray:
        return np.where(pairs.source_measured, pairs.source, self.mean)


def context_keys(pairs: PairArrays, columns: Sequence[str]) -> np.ndarray:
    """One text a pair made of some of its labels, e.g. of `("dataset", "cell_type")`."""
    key = np.full(len(pairs), "", dtype=object)
    for column in columns:
        key = key + getattr(pairs, column).astype(object) + "\x1f"
    return key.astype(str)


class ContextMeanFloor(Floor):
    """Mean of the training targets whose pair has the same labels; validation chooses which labels.

    Means of small groups are drawn towards those of the wider group by 10 cells' weight.
    """

    name = "context_mean"
    uses_labels = True
    uses_revealed = False
    levels = (
        ("dataset",),
        ("dataset", "donor"),
        ("dataset", "cell_type"),
        ("cell_type",),
        ("dataset", "donor", "cell_type"),
    )

    def fit(self, train: PairArrays, validation: PairArrays) -> "ContextMeanFloor":
        self._train = train
        self.overall = MeanFloor().fit(train, validation).mean
        self.choose("labels", self.levels, validation, self._use)
        del self._train
        return self

    def _use(self, columns: Sequence[str]) -> None:
        # From the widest group to the narrowest, so that unknown labels fall back on what is known of them.
        self.means = []
        for width in range(1, len(columns) + 1):
            used = columns[:width]
            keys, index = np.unique(context_keys(self._train, used), return_inverse=True)
            sums, counts = group_sums(self._train, index.ravel(), len(keys))
            parent = self._lookup(self._train)[np.unique(index.ravel(), return_index=True)[1]]
            self.means.append((used, keys, ((sums + 10 * parent) / (counts + 10)).astype(np.float32)))

    def _lookup(self, pairs: PairArrays) -> np.ndarray:
        output = np.tile(self.overall, (len(pairs), 1))
        for used, keys, means in self.means:
            found, position = find_keys(context_keys(pairs, used), keys)
            output[found] = means[position[found]]
        return output

    def predict(self, pairs: PairArrays) -> np.ndarray:
        return self._lookup(pairs)


def group_sums(pairs: PairArrays, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the targets of each group and the number of measured entries, each `(n_groups, V)`."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(n_groups))
    sums = np.add.reduceat(pairs.target[order], starts, axis=0, dtype=np.float64)
    counts = np.zeros((n_groups, len(pairs.panels)))
    np.add.at(counts, (group, pairs.target_panel), 1.0)
    return sums, counts @ pairs.panels


def find_keys(wanted: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each text is among the sorted `keys`, and its position there."""
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return keys[position] == wanted, position


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
    """The factor model of one cell and the coupling of two, conditioned exactly on all that is given."""

    name = "conditional_gaussian"
    ranks = (10, 20, 40)
    with_coupling = True

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
                model = fit_factor_model(cells, panel, self.panels, rank, n_iterations=25)
                coupling = PairCoupling(np.zeros((rank, rank)), np.zeros(rank))
                if self.with_coupling:
                    coupling = fit_pair_coupling(
                        model, train.source, train.source_panel, train.target, train.target_panel, self.panels
                    )
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
            pairs.source,
            pairs.source_panel,
            pairs.panels,
            pairs.revealed_ids,
            pairs.revealed_levels,
            pairs.revealed_mask,
            with_variance,
        )


class FactorRevealedFloor(ConditionalGaussianFloor):
    """`linear_revealed` for more genes than a dense covariance allows: the factor model without the source."""

    name = "linear_revealed"
    with_coupling = False


class FactorJointFloor(ConditionalGaussianFloor):
    """`linear_joint` for more genes than a dense covariance allows."""

    name = "linear_joint"


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


class NearestFloor(Floor):
    """Targets of training pairs weighted by how alike their sources and their values of the revealed genes are.

    Distance in the leading principal components of the source (missing genes average) plus squared differences of the
    revealed genes over their variance; Gaussian kernel, widths chosen on validation.
    """

    name = "knn"
    max_pairs = 5_000
    n_components = 20
    state_widths = (0.3, 1.0, 3.0)
    revealed_widths = (0.1, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "NearestFloor":
        train = train.select(sample_rows(len(train), self.max_pairs, seed=0))
        validation = validation.select(sample_rows(len(validation), 500, seed=0))
        self.overall = MeanFloor().fit(train, validation).mean
        self.target = np.where(train.target_measured, train.target, self.overall)
        self.variance = np.maximum(self.target.var(axis=0), 1e-2)
        self.source_mean, _ = masked_mean(train.source, train.source_panel, train.panels)
        state = centre(train.source, train.source_panel, train.panels, self.source_mean)
        gram = state.T @ state if train.n_genes <= len(train) else state @ state.T
        values, vectors = np.linalg.eigh(gram.astype(np.float64))
        vectors = vectors[:, np.argsort(values)[::-1][: self.n_components]].astype(np.float32)
        if train.n_genes > len(train):
            vectors = np.linalg.qr(state.T @ vectors)[0]
        self.axes = vectors
        self.state = state @ vectors
        # The typical squared distance between two sources, so that widths mean the same everywhere.
        self.scale = float(max(2 * self.state.var(axis=0).sum(), 1e-12))
        self.widths = (1.0, 0.5)
        candidates = [(a, b) for a in self.state_widths for b in self.revealed_widths]
        self.choose("widths", candidates, validation, self._use)
        return self

    def _use(self, widths: tuple[float, float]) -> None:
        self.widths = widths

    def predict(self, pairs: PairArrays) -> np.ndarray:
        output = np.empty((len(pairs), pairs.n_genes), dtype=np.float32)
        squares = (self.state**2).sum(axis=1)
        done = 0
        for batch in pairs.batches(256):
            state = centre(batch.source, batch.source_panel, batch.panels, self.source_mean) @ self.axes
            distance = squares - 2 * state @ self.state.T + (state**2).sum(axis=1)[:, None]
            energy = distance / (self.scale * self.widths[0] ** 2 / 4)
            levels = batch.revealed_levels.astype(np.float32)
            for position in range(levels.shape[1]):
                genes, real = batch.revealed_ids[:, position], batch.revealed_mask[:, position]
                difference = levels[:, position, None] - self.target[:, genes].T
                scale = np.where(real, 1 / (self.variance[genes] * self.widths[1]), 0.0).astype(np.float32)
                energy += difference**2 * scale[:, None]
            energy -= energy.min(axis=1, keepdims=True)
            weights = np.exp(-0.5 * energy)
            weights /= weights.sum(axis=1, keepdims=True)
            output[done : done + len(batch)] = weights @ self.target
            done += len(batch)
        return output


FLOORS = {
    floor.name: floor
    for floor in (
        NoChangeFloor,
        MeanFloor,
        ContextMeanFloor,
        LinearRevealedFloor,
        LinearJointFloor,
        ConditionalGaussianFloor,
        LabelledGaussianFloor,
        NearestFloor,
    )
}


@dataclasses.dataclass
class FittedFloors:
    """Floors of one split: `floors` by name, and `fitted_on`, which says what they saw."""

    floors: dict[str, Floor]
    fitted_on: dict


def fit_floors(
    train: PairArrays,
    validation: PairArrays,
    split: PairArrays,
    names: Iterable[str] | None = None,
    minimum: int = 1_000,
    progress: bool = True,
) -> FittedFloors:
    """Fits floors for the pairs of `split`, on the training pairs most like them.

    Training and validation pairs are restricted to the pairings and data sets of `split` as long as at least `minimum`
    training pairs are left, which makes the floors stronger; what was done is recorded.

    Args:
        train, validation (`PairArrays`): Training and validation pairs; the only ones read.
        split (`PairArrays`): The pairs to be scored; only their pairing and data set are looked at.
        names (`Iterable[str]`, *optional*): Which floors; defaults to all.
        minimum (`int`, *optional*, defaults to 1,000): Least number of training pairs of a restriction.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a bar.

    Raises:
        ValueError: For an unknown floor or no training pairs.
    """
    names = list(FLOORS if names is None else names)
    for name in names:
        if name not in FLOORS:
            raise ValueError(f"`floors` names `{name}`, which is none{close_matches(name, FLOORS)}.")
    if not len(train):
        raise ValueError("`train` holds no pairs; floors are fitted on training pairs.")
    used = []
    for column in ("pairing", "dataset"):
        wanted = np.unique(getattr(split, column))
        rows = np.flatnonzero(np.isin(getattr(train, column), wanted))
        if len(rows) < min(minimum, len(train)):
            continue
        used.append(column)
        if len(rows) < len(train):
            train = train.select(rows)
        alike = np.flatnonzero(np.isin(getattr(validation, column), wanted))
        validation = validation.select(alike) if len(alike) else validation
    validation = validation.select(sample_rows(len(validation), 1_500, seed=0))
    floors = {}
    for name in tqdm(names, desc="floors", unit="floor", disable=not progress):
        kind = FLOORS[name]
        if train.n_genes > MAX_DENSE_GENES:
            kind = {"linear_revealed": FactorRevealedFloor, "linear_joint": FactorJointFloor}.get(name, kind)
        floors[name] = kind().fit(train, validation)
    return FittedFloors(
        floors,
        {
            "restricted_to": used,
            "n_train_pairs": len(train),
            "n_validation_pairs": len(validation),
            "settings": {name: floor.settings for name, floor in floors.items()},
        },
    )
