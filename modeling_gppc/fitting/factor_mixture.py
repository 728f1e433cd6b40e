"""Unsupervised cell states in the space of the factors: a mixture of Gaussians that share one covariance."""

import dataclasses

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.special import logsumexp

from modeling_gppc.fitting.factor_model import FactorModel, factor_information, fit_pair_coupling, posterior_by_panel

RESTARTS = 3
# Weight of a uniform prior over the components, in cells or pairs.
PRIOR_WEIGHT = 1.0


@dataclasses.dataclass
class FactorMixture:
    """
    A factor model whose factors follow a mixture: x_j = mean_j + loadings_j z + e_j, z ~ sum_c weight_c N(mean_c, I).

    Args:
        model (`FactorModel`): Mean, loadings and noise; loadings are scaled to unit covariance *within* a component.
        means (`np.ndarray`): Of the components, shape `(C, r)`.
        weights (`np.ndarray`): Shape `(C,)`, sum 1.
    """

    model: FactorModel
    means: np.ndarray
    weights: np.ndarray

    def evidence(self, information: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log likelihood of cells under every component, up to a constant of the cell, and its factors' means.

        Args:
            information (`np.ndarray`): `L' D^-1 (x - mean)` of cells of one panel, shape `(n, r)`.
            covariance (`np.ndarray`): Posterior covariance of the factors for that panel, shape `(r, r)`.

        Returns:
            `(n, C)` and `(n, C, r)`.
        """
        shifted = information[:, None] + self.means
        factors = shifted @ covariance
        return 0.5 * ((shifted * factors).sum(-1) - (self.means**2).sum(1)), factors


def fit_factor_mixture(
    model: FactorModel,
    values: np.ndarray,
    panel_index: np.ndarray,
    panels: np.ndarray,
    n_components: int,
    n_iterations: int = 50,
    seed: int = 0,
) -> FactorMixture:
    """
    Fits the mixture by EM in the space of the factors, starting from k-means; genes enter through `L' D^-1 x` alone.

    Args:
        model (`FactorModel`): Fitted on the same cells.
        values (`np.ndarray`): Normalised values, shape `(n, V)`.
        panel_index (`np.ndarray`): Row of `panels` of each cell, shape `(n,)`.
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        n_components (`int`): C; fewer where there are fewer cells. With 1 the mixture is the factor model itself.
        n_iterations (`int`, *optional*, defaults to 50): EM steps, each costing n C r^2.
        seed (`int`, *optional*, defaults to 0): Of k-means.
    """
    rank = model.loadings.shape[1]
    n_components = min(n_components, len(values))
    if n_components <= 1:
        return FactorMixture(model, np.zeros((1, rank)), np.ones(1))
    present = np.unique(panel_index)
    covariance, precision = posterior_by_panel(model, panels)
    information = factor_information(model, values, panel_index, panels)
    factors = np.concatenate([information[panel_index == panel] @ covariance[panel] for panel in present])
    order = np.concatenate([np.flatnonzero(panel_index == panel) for panel in present])
    label = _start(factors * np.linalg.norm(model.loadings, axis=0), n_components, seed)
    n_components = label.max() + 1
    share = np.bincount(panel_index, minlength=len(panels)) / len(values)
    responsibility = np.eye(n_components)[label[np.argsort(order)]]
    factors = factors[np.argsort(order)]
    means = responsibility.T @ factors / responsibility.sum(0)[:, None]
    weights = responsibility.mean(0)
    within = np.cov((factors - means[responsibility.argmax(1)]).T, bias=True).reshape(rank, rank)
    within = within + np.einsum("p,prs->rs", share, covariance)
    for _ in range(n_iterations):
        inverse = np.linalg.inv(within)
        posterior = np.linalg.inv(precision + inverse)
        shift = means @ inverse
        total, first, second = np.zeros(n_components), np.zeros((n_components, rank)), np.zeros((rank, rank))
        for panel in present:
            shifted = information[panel_index == panel][:, None] + shift
            conditional = shifted @ posterior[panel]
            log_joint = np.log(weights) + 0.5 * ((shifted * conditional).sum(-1) - (means * shift).sum(1))
            q = np.exp(log_joint - logsumexp(log_joint, axis=1, keepdims=True))
            total += q.sum(0)
            first += np.einsum("nc,ncr->cr", q, conditional)
            flat = (conditional * np.sqrt(q)[:, :, None]).reshape(-1, rank)
            second += flat.T @ flat
        means = first / np.maximum(total, 1e-9)[:, None]
        weights = (total + PRIOR_WEIGHT / n_components) / (total.sum() + PRIOR_WEIGHT)
        # Within-component scatter around the new means, and what the posteriors leave open.
        within = (second - (means * total[:, None]).T @ means) / len(values)
        within = within + np.einsum("p,prs->rs", share, posterior)
        within = 0.5 * (within + within.T) + 1e-4 * np.eye(rank)
    size, axes = np.linalg.eigh(within)
    root, inverse_root = (axes * np.sqrt(size)) @ axes.T, (axes / np.sqrt(size)) @ axes.T
    return FactorMixture(FactorModel(model.mean, model.loadings @ root, model.noise), means @ inverse_root, weights)


def _start(points: np.ndarray, n_components: int, seed: int) -> np.ndarray:
    """Labels of the best of several k-means, numbered without gaps."""
    best, label = np.inf, np.zeros(len(points), dtype=int)
    for restart in range(RESTARTS):
        centers, candidate = kmeans2(points, n_components, minit="++", seed=seed + restart)
        spread = float(((points - centers[candidate]) ** 2).sum())
        if spread < best:
            best, label = spread, candidate
    return np.unique(label, return_inverse=True)[1]


def fit_mixture_coupling(
    mixture: FactorMixture,
    source_values: np.ndarray,
    source_panel: np.ndarray,
    target_values: np.ndarray,
    target_panel: np.ndarray,
    panels: np.ndarray,
    n_iterations: int = 20,
) -> tuple[np.ndarray, np.ndarray]:
    """
    How the target's state follows from the source's: between components, and within them.

    Args:
        mixture (`FactorMixture`): Fitted on training cells.
        source_values, target_values (`np.ndarray`): Paired cells, shape `(n, V)`.
        source_panel, target_panel (`np.ndarray`): Rows of `panels`, shape `(n,)`.
        panels (`np.ndarray` of bool): Shape `(P, V)`.
        n_iterations (`int`, *optional*, defaults to 20): EM steps for the transitions.

    Returns:
        Transition probabilities P(target's component | source's) `(C, C)`, and the covariance of the two cells'
        factors around their components' means `(r, r)`.
    """
    covariance, _ = posterior_by_panel(mixture.model, panels)
    likelihoods = []
    for values, panel_index in ((source_values, source_panel), (target_values, target_panel)):
        information = factor_information(mixture.model, values, panel_index, panels)
        log_likelihood = np.empty((len(values), len(mixture.weights)))
        for panel in np.unique(panel_index):
            members = panel_index == panel
            log_likelihood[members] = mixture.evidence(information[members], covariance[panel])[0]
        likelihoods.append(np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True)))
    source, target = likelihoods
    joint = np.outer(mixture.weights, mixture.weights)
    for _ in range(n_iterations):
        # Sum over pairs of the posterior of (source's, target's component), without storing it.
        scale = np.einsum("nc,cd,nd->n", source, joint, target)
        joint = joint * ((source / scale[:, None]).T @ target) / len(source)
    floor = PRIOR_WEIGHT / len(source)
    prior = floor * np.outer(mixture.weights, mixture.weights)
    transition = (joint + prior) / (joint + prior).sum(axis=1, keepdims=True)
    scale = np.einsum("nc,cd,nd->n", source, joint, target)
    source_share = source * (target @ joint.T) / scale[:, None]
    target_share = target * (source @ joint) / scale[:, None]
    coupling = fit_pair_coupling(
        mixture.model,
        source_values - source_share @ mixture.means @ mixture.model.loadings.T,
        source_panel,
        target_values - target_share @ mixture.means @ mixture.model.loadings.T,
        target_panel,
        panels,
    )
    return transition, coupling.matrix
