"""What a floor is, and floors that read nothing but labels and the source itself."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from modeling_gppc.evaluation.pair_arrays import PairArrays


def masked_mse(predicted: np.ndarray, pairs: PairArrays) -> float:
    """Mean squared error over the scored entries of all pairs."""
    scored = pairs.scored
    return float((((predicted - pairs.target) ** 2) * scored).sum(dtype=np.float64) / max(int(scored.sum()), 1))


def masked_mean(values: np.ndarray, panel_index: np.ndarray, panels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each gene over the cells that measure it, and their number; values are zero where not measured."""
    counts = np.bincount(panel_index, minlength=len(panels)) @ panels.astype(np.int64)
    return values.sum(axis=0, dtype=np.float64) / np.maximum(counts, 1), counts


class Floor:
    """A predictor fitted on pairs. It may read cell types (`uses_labels`), which the model does not; `uses_revealed`:
    the imposed genes change its prediction; `settings` are what validation chose."""

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
        raise TypeError(f"`{type(self).__name__}` is abstract; use one of its subclasses.")

    def predict_moments(self, pairs: PairArrays) -> tuple[np.ndarray, np.ndarray | None]:
        """The same, and its variance where the floor has one, each `(n, V)`."""
        return self.predict(pairs), None

    def choose(
        self, setting: str, candidates: Sequence, validation: PairArrays, apply: Callable | None = None
    ) -> None:
        """Keeps the candidate with the smallest validation error; the middle one where there is no validation.

        `apply` makes a candidate the one that `predict` uses; by default it is the attribute named like the setting.
        """
        apply = apply or functools.partial(setattr, self, setting)
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
        self.overall = MeanFloor().fit(train, validation).mean
        self.choose("labels", self.levels, validation, functools.partial(self._fit_means, train))
        return self

    def _fit_means(self, train: PairArrays, columns: Sequence[str]) -> None:
        # From the widest group to the narrowest, so that a label never seen leaves the mean of the wider group.
        self.means = []
        for width in range(1, len(columns) + 1):
            used = columns[:width]
            keys, first, index = np.unique(context_keys(train, used), return_index=True, return_inverse=True)
            sums, counts = group_sums(train, index, len(keys))
            parent = self.predict(train)[first]
            self.means.append((used, keys, ((sums + 10 * parent) / (counts + 10)).astype(np.float32)))

    def predict(self, pairs: PairArrays) -> np.ndarray:
        output = np.tile(self.overall, (len(pairs), 1))
        for columns, keys, means in self.means:
            found, position = find_keys(context_keys(pairs, columns), keys)
            output[found] = means[position[found]]
        return output


def context_keys(pairs: PairArrays, columns: Sequence[str]) -> np.ndarray:
    """One text a pair made of some of its labels, e.g. of `("dataset", "cell_type")`."""
    key = np.full(len(pairs), "", dtype=object)
    for column in columns:
        key = key + getattr(pairs, column).astype(object) + "\x1f"
    return key.astype(str)


def find_keys(wanted: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each text is among the sorted `keys`, and its position there."""
    position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return keys[position] == wanted, position


def group_sums(pairs: PairArrays, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the targets of each group and the number of measured entries, each `(n_groups, V)`."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(n_groups))
    sums = np.add.reduceat(pairs.target[order], starts, axis=0, dtype=np.float64)
    counts = np.zeros((n_groups, len(pairs.panels)))
    np.add.at(counts, (group, pairs.target_panel), 1.0)
    return sums, counts @ pairs.panels
