"""Floors: what any model must beat. Fitted on training pairs, tuned on validation pairs, masked like the model."""

import functools
import itertools
from collections.abc import Iterable

import numpy as np
from tqdm.auto import tqdm

from modeling_gppc.evaluation.gaussian_floors import (
    ConditionalGaussianFloor,
    LabelledGaussianFloor,
    LinearJointFloor,
    LinearRevealedFloor,
    centre,
)
from modeling_gppc.evaluation.mean_floors import ContextMeanFloor, Floor, MeanFloor, NoChangeFloor, masked_mean
from modeling_gppc.evaluation.pair_arrays import PairArrays, sample_rows

# Dense covariances up to this many genes; above, the linear floors use a factor model's covariance.
MAX_DENSE_GENES = 2_000


class NearestFloor(Floor):
    """Targets of training pairs weighted by how alike their sources and their values of the imposed genes are.

    Distance in the leading principal components of the source (missing genes average) plus squared differences of the
    imposed genes over their variance; Gaussian kernel, widths chosen on validation.
    """

    name = "knn"
    max_pairs = 5_000
    n_components = 20
    state_widths = (0.3, 1.0, 3.0)
    revealed_widths = (0.1, 0.5)

    def fit(self, train: PairArrays, validation: PairArrays) -> "NearestFloor":
        train = train.select(sample_rows(len(train), self.max_pairs, seed=0))
        validation = validation.select(sample_rows(len(validation), 500, seed=0))
        self.target = np.where(train.target_measured, train.target, MeanFloor().fit(train, validation).mean)
        self.variance = np.maximum(self.target.var(axis=0), 1e-2)
        self.source_mean, _ = masked_mean(train.source, train.source_panel, train.panels)
        state = centre(train.source, train.source_panel, train.panels, self.source_mean)
        gram = state.T @ state if train.n_genes <= len(train) else state @ state.T
        values, vectors = np.linalg.eigh(gram.astype(np.float64))
        vectors = vectors[:, np.argsort(values)[::-1][: self.n_components]].astype(np.float32)
        self.axes = vectors if train.n_genes <= len(train) else np.linalg.qr(state.T @ vectors)[0]
        self.state = state @ self.axes
        # The typical squared distance between two sources, so that widths mean the same everywhere.
        self.scale = float(max(2 * self.state.var(axis=0).sum(), 1e-12))
        self.choose("widths", list(itertools.product(self.state_widths, self.revealed_widths)), validation)
        return self

    def predict(self, pairs: PairArrays) -> np.ndarray:
        state_width, revealed_width = self.widths
        output = [np.empty((0, pairs.n_genes), dtype=np.float32)]
        squares = (self.state**2).sum(axis=1)
        for batch in pairs.batches(256):
            state = centre(batch.source, batch.source_panel, batch.panels, self.source_mean) @ self.axes
            distance = squares - 2 * state @ self.state.T + (state**2).sum(axis=1)[:, None]
            energy = distance / (self.scale * state_width**2 / 4)
            levels = batch.revealed_levels.astype(np.float32)
            for position in range(levels.shape[1]):
                genes, real = batch.revealed_ids[:, position], batch.revealed_mask[:, position]
                difference = levels[:, position, None] - self.target[:, genes].T
                scale = np.where(real, 1 / (self.variance[genes] * revealed_width), 0.0).astype(np.float32)
                energy += difference**2 * scale[:, None]
            weights = np.exp(-0.5 * (energy - energy.min(axis=1, keepdims=True)))
            output.append(weights / weights.sum(axis=1, keepdims=True) @ self.target)
        return np.concatenate(output)


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


def fit_floors(
    train: PairArrays, validation: PairArrays, names: Iterable[str] | None = None, progress: bool = True
) -> dict[str, Floor]:
    """Fits the named floors, by default all, on training pairs and chooses their settings on validation pairs."""
    validation = validation.select(sample_rows(len(validation), 1_500, seed=0))
    kinds = FLOORS
    if train.n_genes > MAX_DENSE_GENES:
        revealed = functools.partial(ConditionalGaussianFloor, with_coupling=False)
        kinds = {**FLOORS, "linear_revealed": revealed, "linear_joint": ConditionalGaussianFloor}
    bar = tqdm(FLOORS if names is None else names, desc="floors", unit="floor", disable=not progress)
    return {name: kinds[name]().fit(train, validation) for name in bar}
