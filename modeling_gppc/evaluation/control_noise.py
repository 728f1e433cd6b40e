"""Correlations on all control cells, freed of what the error of their mean adds: beside the scores on divided controls.

Where training responses and the truth subtract the mean of the *same* controls, its sampling error e is in both. A response
is d = r - e, a prediction that is linear in training responses p = q - w e, with r and q free of e. Over genes, centred,

    E<p, d> = <q, r> + w E|e|^2,   E|d|^2 = |r|^2 + E|e|^2,   E|p|^2 = |q|^2 + w^2 E|e|^2

so that E|e|^2, the centred variance of control cells over their number, is taken out of the product and of both squared
norms. What remains estimates the correlation that controls without end would give. With matched controls e is a mix of the
errors of the groups' means (batches, cell lines), which are independent.

A ratio of estimates that err together is itself biased: |e|^2 is not its expectation, and moves product and norms alike. A
jackknife over tenths of the controls takes that out to first order (Quenouille 1956); nothing is fitted again, because p and
d move with the mean of the controls as above.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.evaluation.screen_scores import ScreenPrediction
from modeling_gppc.evaluation.screen_truth import ScreenTruth

N_PARTS = 10


@dataclasses.dataclass
class ControlMeans:
    """Means of some of the control cells by group over the scored genes `(G, n_scored)`, and E|e|^2 of each, genes
    centred `(G,)`."""

    means: np.ndarray
    error: np.ndarray


def control_means(screen: Screen, mask: np.ndarray, n_parts: int = N_PARTS) -> list[ControlMeans]:
    """Means of all controls, and without each of `n_parts` parts of them in turn; groups of few controls have the
    variance of all."""
    controls = screen.cells_of(CONTROL)
    controls = controls[np.argsort(screen.group[controls], kind="stable")]
    values = screen.values[controls][:, mask]
    names, place = np.unique(screen.group[controls], return_inverse=True)
    groups = (place[:, None] == np.arange(len(names))).astype(np.float32)

    def means_of(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = groups[kept].sum(axis=0, dtype=np.float64)
        return groups[kept].T @ values[kept] / counts[:, None], counts

    means, counts = means_of(np.ones(len(values), dtype=bool))
    squares = 0.0
    for index in range(len(names)):
        residual = values[place == index] - means[index]
        squares += ((residual - residual.mean(axis=1, keepdims=True)) ** 2).sum()
    variance = squares / max(len(values) - len(names), 1)
    found = [ControlMeans(means, variance / counts)]
    for part in range(n_parts):
        left, counts = means_of(np.arange(len(values)) % n_parts != part)
        found.append(ControlMeans(left, variance / counts))
    return found


def corrected_pearson(
    predictions: Mapping[str, ScreenPrediction], truth: ScreenTruth, screen: Screen, train_shares: np.ndarray
) -> dict[str, np.ndarray]:
    """pearson_delta of every method without the error of the mean of the controls that `truth` was measured from,
    `(P,)`; 0 where nothing is left of a norm. `train_shares` `(P, G)` is the mix of groups among the training responses
    of each perturbation."""
    shares = np.stack([screen.control_shares(label) for label in truth.labels])
    whole, *parts = control_means(screen, truth.mask)

    def correlation(prediction: ScreenPrediction, controls: ControlMeans) -> np.ndarray:
        weight = np.zeros(len(truth.labels)) if prediction.control_weight is None else prediction.control_weight
        moved = controls.means - whole.means
        p = prediction.delta[:, truth.mask] - weight[:, None] * (train_shares @ moved)
        d = truth.delta[:, truth.mask] - shares @ moved
        p, d = p - p.mean(axis=1, keepdims=True), d - d.mean(axis=1, keepdims=True)
        product = (p * d).sum(axis=1) - weight * ((shares * train_shares) @ controls.error)
        left = (p**2).sum(axis=1) - weight**2 * (train_shares**2 @ controls.error)
        right = (d**2).sum(axis=1) - shares**2 @ controls.error
        norms = np.sqrt(np.maximum(left, 0) * np.maximum(right, 0))
        return np.divide(product, norms, out=np.zeros_like(product), where=norms > 1e-12)

    found = {}
    for name, prediction in predictions.items():
        without = np.mean([correlation(prediction, part) for part in parts], axis=0)
        found[name] = len(parts) * correlation(prediction, whole) - (len(parts) - 1) * without
    return found
