"""Fits what perturbations of a screen do: blend, size and spread by leave-one-out over those that were seen."""

from collections.abc import Sequence

import numpy as np
import torch

from data_scripts.cells.screens import Screen
from modeling_gppc.fitting.observed_responses import ObservedResponses
from modeling_gppc.fitting.replicate_variance import responses_by_group, variance_between
from modeling_gppc.linear_response_gppc import GppcLinearResponse
from modeling_gppc.screen_response_gppc import GppcScreenResponse

# Each response is divided by its length to this power before it is averaged: 0 is the plain mean, 1 gives every
# perturbation the same length, so that strong ones do not drown the others.
POWERS = (0.0, 0.5, 1.0)
# Weight of the linear response to the change at the target, relative to what perturbations share.
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
# Variance of a response that features of its target do not explain, in units of what they do.
UNEXPLAINED = 1.0
Z90 = 1.6448536


def process_mean(votes: np.ndarray, like: np.ndarray, to: np.ndarray, unexplained: float = UNEXPLAINED) -> np.ndarray:
    """Posterior mean of a Gaussian process about the mean of its observations.

    Args:
        votes (`np.ndarray`): Observations, shape `(T, V)`.
        like (`np.ndarray`): Kernel between them, shape `(T, T)`.
        to (`np.ndarray`): Kernel between what is asked for and them, shape `(P, T)`.
        unexplained (`float`, *optional*, defaults to 1): Noise, in units of the kernel.

    Returns:
        `np.ndarray` of shape `(P, V)`.
    """
    mean = votes.mean(axis=0)
    return mean + to @ np.linalg.solve(like + unexplained * np.eye(len(votes)), votes - mean)


@torch.no_grad()
def fit_screen_response(
    part: GppcScreenResponse,
    linear_response: GppcLinearResponse,
    screen: Screen,
    labels: Sequence[str],
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    likeness: np.ndarray,
    replicates: str = "batch",
) -> None:
    """
    Fills the part of a screen response that knows perturbations, in place.

    A perturbation that is left out takes with it all that share a gene with it, as folds over perturbations do.

    Args:
        part ([`GppcScreenResponse`]): Its `counted` and `held` are set.
        linear_response ([`GppcLinearResponse`]): Of the control cells.
        screen (`Screen`): Only the controls and the cells of `labels` are read.
        labels (`Sequence[str]`): The T perturbations that are seen.
        inputs (`tuple`): Target ids, changes and mask of the T perturbations, each `(T, K)`.
        likeness (`np.ndarray`): Of every gene that may be asked about to each perturbation, `(V + E, T)`.
        replicates (`str`, *optional*, defaults to `"batch"`): What replicates differ in: `"batch"` or `"cell_line"`.
    """
    observed = ObservedResponses.of(screen, labels)
    counted, delta = observed.counted, observed.delta
    ids, changes, mask = inputs
    tensors = (torch.as_tensor(ids), torch.as_tensor(changes), torch.as_tensor(mask) > 0)
    direction = unit(part.linear(linear_response, *tensors).double().numpy(), counted)
    related = (ids[:, None, :, None] == ids[None, :, None, :]) & mask[:, None, :, None] & mask[None, :, None, :]
    related = related.any(axis=(2, 3))
    like = (likeness[ids] * mask[:, :, None]).sum(axis=1)
    norms = np.maximum(np.linalg.norm(delta[:, counted], axis=1, keepdims=True), 1e-12)
    power, weight, guess = choose_blend(delta, norms, like, related, direction, counted)
    votes = delta / norms**power
    # Least squares with weights between "every gene alike" and "every perturbation alike".
    products, squares = (guess * delta)[:, counted].sum(axis=1), (guess**2)[:, counted].sum(axis=1)
    scale = max(float((products / norms[:, 0]).sum() / max((squares / norms[:, 0]).sum(), 1e-12)), 0.0)
    groups = responses_by_group(screen, labels, getattr(screen, replicates))
    share, mean = observed.signal_share, votes.mean(axis=0)
    fitted = {
        "mean": mean,
        "votes": np.linalg.solve(like + UNEXPLAINED * np.eye(len(votes)), votes - mean),
        "likeness": likeness,
        "weight": weight,
        "scale": scale,
        "variance": error_variance(delta - scale * guess, observed),
        "seen_targets": np.where(mask, ids, -1),
        "own": observed.shrunken,
        "between": variance_between(screen, groups, replicates),
        "within": observed.within,
        "own_between": [1 + 1 / max(len(groups[label].groups), 1) for label in labels],
        # Drawn towards zero, an estimate has so much less error (its posterior variance).
        "own_within": share * (1 / observed.n_cells + 1 / observed.n_controls),
    }
    for name, value in fitted.items():
        getattr(part, name).copy_(torch.as_tensor(np.asarray(value)))


def choose_blend(
    delta: np.ndarray,
    norms: np.ndarray,
    like: np.ndarray,
    related: np.ndarray,
    direction: np.ndarray,
    counted: np.ndarray,
) -> tuple[float, float, np.ndarray]:
    """Power and weight whose leave-one-out predictions have the highest mean cosine with the responses, and those
    predictions `(T, V)`; see [`POWERS`] and [`WEIGHTS`]."""
    best, found = -np.inf, None
    target = unit(delta, counted)[:, counted]
    for power in POWERS:
        votes, shared = delta / norms**power, np.zeros_like(delta)
        for row in range(len(delta)):
            rest = np.flatnonzero(~related[row])
            if len(rest):
                shared[row] = process_mean(votes[rest], like[np.ix_(rest, rest)], like[row][None, rest])[0]
        size = np.linalg.norm(shared[:, counted], axis=1, keepdims=True)
        for weight in WEIGHTS:
            guess = shared + weight * size * direction
            agreement = (unit(guess, counted)[:, counted] * target).sum(axis=1).mean()
            if agreement > best + 1e-9:
                best, found = agreement, (power, weight, guess)
    return found


def error_variance(residual: np.ndarray, observed: ObservedResponses) -> np.ndarray:
    """Variance of true responses about predicted ones, a gene, from leave-one-out errors `(T, V)`; shape `(V,)`.

    Half the gene's own error, half what genes of its spread have: a variance from a handful of perturbations is itself
    noisy. Scaled so that 90 % of the errors lie within the 90 % interval, then freed of the sampling error that the
    errors contain.
    """
    counted, within = observed.counted, observed.within
    shared = (residual[:, counted] ** 2).mean(axis=0).sum() / max(within[counted].sum(), 1e-12) * within
    spread = np.sqrt(0.5 * (residual**2).mean(axis=0) + 0.5 * shared)
    widening = np.quantile(np.abs(residual[:, counted]) / np.maximum(spread[counted], 1e-9), 0.9) / Z90
    variance = (spread * widening) ** 2
    return np.maximum(variance - within * np.mean(1 / observed.n_cells), 0.05 * variance)


def unit(rows: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Rows divided by their length over the genes `counted`; zero where they have none."""
    norms = np.linalg.norm(rows[:, counted], axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)
