"""Unsupervised cell states in the space of the factors: a mixture of Gaussians that share one covariance."""

import dataclasses

import numpy as np
import pandas as pd
from scipy.cluster.vq import kmeans2
from scipy.special import softmax

from modeling_gppc.fitting.factor_model import (
    Cells,
    FactorModel,
    factor_information,
    factor_posterior_mean,
    fit_pair_coupling,
    posterior_by_panel,
)

RESTARTS = 3
# Weight of a uniform prior over the components, in cells or pairs.
PRIOR_WEIGHT = 1.0
# EM steps: of the mixture, each costing n C r^2, and of the transitions between its components.
MIXTURE_ITERATIONS = 50
TRANSITION_ITERATIONS = 20
WITHIN_ITERATIONS = 30


@dataclasses.dataclass
class FactorMixture:
    """A factor model whose factors follow a mixture of components with means `(C, r)`: x_j = mean_j + loadings_j z +
    e_j, z ~ sum_c weight_c N(mean_c, I). Loadings are scaled to unit covariance *within* a component."""

    model: FactorModel
    means: np.ndarray
    weights: np.ndarray

    def log_likelihood(self, cells: Cells) -> np.ndarray:
        """Of cells under every component, up to a constant of the cell, `(n, C)`."""
        covariance, _ = posterior_by_panel(self.model, cells.panels)
        information = factor_information(self.model, cells)
        output = np.empty((len(information), len(self.means)))
        for panel in np.unique(cells.panel_index):
            members = cells.panel_index == panel
            shifted = information[members][:, None] + self.means
            output[members] = 0.5 * ((shifted * (shifted @ covariance[panel])).sum(-1) - (self.means**2).sum(1))
        return output


def fit_factor_mixture(model: FactorModel, cells: Cells, n_components: int, seed: int = 0) -> FactorMixture:
    """Fits the mixture by EM in the space of the factors, from k-means on; genes enter through `L' D^-1 x` alone.

    Components are fewer where there are fewer cells; with one the mixture is `model` itself, fitted on the same cells.
    """
    rank, n_cells, panel_index = model.loadings.shape[1], len(cells), cells.panel_index
    if min(n_components, n_cells) <= 1:
        return FactorMixture(model, np.zeros((1, rank)), np.ones(1))
    covariance, precision = posterior_by_panel(model, cells.panels)
    information, factors = factor_information(model, cells), factor_posterior_mean(model, cells)
    order = np.argsort(panel_index, kind="stable")
    label = np.empty(n_cells, dtype=int)
    label[order] = _start(factors[order] * np.linalg.norm(model.loadings, axis=0), min(n_components, n_cells), seed)
    weights = np.bincount(label) / n_cells
    means = np.eye(len(weights))[label].T @ factors / (n_cells * weights)[:, None]
    # Scatter within components, and what the posteriors leave open.
    share = np.bincount(panel_index, minlength=len(cells.panels)) / n_cells
    within = np.cov((factors - means[label]).T, bias=True).reshape(rank, rank) + np.tensordot(share, covariance, 1)
    for _ in range(MIXTURE_ITERATIONS):
        inverse = np.linalg.inv(within)
        posterior = np.linalg.inv(precision + inverse)
        shift = means @ inverse
        total, first, second = np.zeros(len(means)), np.zeros_like(means), np.zeros((rank, rank))
        for panel in np.unique(panel_index):
            shifted = information[panel_index == panel][:, None] + shift
            conditional = shifted @ posterior[panel]
            evidence = 0.5 * ((shifted * conditional).sum(-1) - (means * shift).sum(1))
            probability = softmax(np.log(weights) + evidence, axis=1)
            total += probability.sum(0)
            first += np.einsum("nc,ncr->cr", probability, conditional)
            flat = (conditional * np.sqrt(probability)[:, :, None]).reshape(-1, rank)
            second += flat.T @ flat
        means = first / np.maximum(total, 1e-9)[:, None]
        weights = (total + PRIOR_WEIGHT / len(total)) / (total.sum() + PRIOR_WEIGHT)
        within = (second - (means * total[:, None]).T @ means) / n_cells + np.tensordot(share, posterior, 1)
        within = 0.5 * (within + within.T) + 1e-4 * np.eye(rank)
    size, axes = np.linalg.eigh(within)
    root, inverse_root = (axes * np.sqrt(size)) @ axes.T, (axes / np.sqrt(size)) @ axes.T
    return FactorMixture(FactorModel(model.mean, model.loadings @ root, model.noise), means @ inverse_root, weights)


def fit_within_groups(model: FactorModel, cells: Cells, groups: np.ndarray) -> np.ndarray:
    """
    Covariance of the factors among cells of one group, shape `(r, r)`, by EM: z ~ N(mean of the group, within).

    Args:
        model (`FactorModel`): Loadings and noise of the cells.
        cells ([`Cells`]): The cells.
        groups (`np.ndarray`): Number of the group of each cell, shape `(n,)`.
    """
    _, precision = posterior_by_panel(model, cells.panels)
    information = factor_information(model, cells)
    share = np.bincount(cells.panel_index, minlength=len(cells.panels)) / len(cells)
    freedom = max(len(cells) - len(np.unique(groups)), 1)
    within, mean = np.eye(information.shape[1]), np.zeros_like(information)
    for _ in range(WITHIN_ITERATIONS):
        inverse = np.linalg.inv(within)
        posterior = np.linalg.inv(precision + inverse)
        factors = information + mean @ inverse
        for panel in np.unique(cells.panel_index):
            factors[cells.panel_index == panel] @= posterior[panel]
        mean = pd.DataFrame(factors).groupby(groups).transform("mean").to_numpy()
        rest = factors - mean
        within = rest.T @ rest / freedom + np.tensordot(share, posterior, 1)
        within = 0.5 * (within + within.T) + 1e-4 * np.eye(len(within))
    return within


def _start(points: np.ndarray, n_components: int, seed: int) -> np.ndarray:
    """Labels of the best of several k-means, numbered without gaps."""
    best, label = np.inf, np.zeros(len(points), dtype=int)
    for restart in range(RESTARTS):
        centers, candidate = kmeans2(points, n_components, minit="++", seed=seed + restart)
        spread = float(((points - centers[candidate]) ** 2).sum())
        if spread < best:
            best, label = spread, candidate
    return np.unique(label, return_inverse=True)[1]


def fit_mixture_coupling(mixture: FactorMixture, source: Cells, target: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Transition probabilities P(target's component | source's) `(C, C)`, and the covariance of the two cells' factors
    about their components' means `(r, r)`; from paired cells of the same panels."""
    n_pairs, prior = len(source), np.outer(mixture.weights, mixture.weights)
    likelihoods = [mixture.log_likelihood(cells) for cells in (source, target)]
    given_source, given_target = (np.exp(one - one.max(axis=1, keepdims=True)) for one in likelihoods)

    def normalizer(joint: np.ndarray) -> np.ndarray:
        return np.einsum("nc,cd,nd->n", given_source, joint, given_target)[:, None]

    joint = prior
    for _ in range(TRANSITION_ITERATIONS):
        # Sum over pairs of the posterior of (source's, target's component), without storing it.
        joint = joint * ((given_source / normalizer(joint)).T @ given_target) / n_pairs
    transition = joint + PRIOR_WEIGHT / n_pairs * prior
    centres = mixture.means @ mixture.model.loadings.T
    source_share = given_source * (given_target @ joint.T) / normalizer(joint)
    target_share = given_target * (given_source @ joint) / normalizer(joint)
    coupling = fit_pair_coupling(
        mixture.model,
        dataclasses.replace(source, values=source.values - source_share @ centres),
        dataclasses.replace(target, values=target.values - target_share @ centres),
    )
    return transition / transition.sum(axis=1, keepdims=True), coupling
