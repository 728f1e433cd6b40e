"""Fits what perturbations of a screen do: weights, size and spread by leave-one-out over those that were seen."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from data_scripts.cells.control_halves import control_halves
from data_scripts.cells.screens import Screen
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions
from modeling_gppc.fitting.observed_responses import ObservedResponses
from modeling_gppc.fitting.replicate_variance import responses_by_group, variance_between
from modeling_gppc.linear_response_gppc import GppcLinearResponse
from modeling_gppc.screen_response_gppc import GppcScreenResponse

# With shared controls each response is divided by its length to one of these powers before it is averaged, as it used to
# be; clean leave-one-out never wants it: noise of the controls is raised to the length of signal.
SHARED_POWERS = (0.0, 0.5, 1.0)
# Weight of the linear response to the change at the target, relative to what perturbations share. Leave-one-out scores are
# flat below .3 on every screen seen; with none of it all perturbations without features would be predicted alike.
WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.6)
SHARED_WEIGHTS = (0.0, *WEIGHTS)
# Variance of a response that features of its target do not explain, in units of what they do.
UNEXPLAINED = 1.0
# Weight of what features of the target explain, relative to what they do not; 0 where they do not help.
FEATURE_WEIGHTS = (0.0, 0.3, 1.0)
# Least size of a response relative to the predicted direction: where no size is shown there is a direction all the same.
LEAST_SCALE = 0.05
Z90 = 1.6448536


def process_mean(votes: np.ndarray, like: np.ndarray, to: np.ndarray, unexplained: float = UNEXPLAINED) -> np.ndarray:
    """Posterior mean `(P, V)` of a Gaussian process about the mean of its observations `votes` `(T, V)`, given its
    kernel among them `(T, T)` and `to` them `(P, T)`; `unexplained` is the noise in units of the kernel."""
    mean = votes.mean(axis=0)
    return mean + to @ np.linalg.solve(like + unexplained * np.eye(len(votes)), votes - mean)


@dataclasses.dataclass
class SeenPerturbations:
    """The T perturbations that are seen: their names in the screen; `(T, K)` ids of their targets, measured changes of
    log value (0 where not measured) and 1 where real; and the likeness `(V + E, T)` of every gene that may be asked
    about to each."""

    labels: list[str]
    ids: np.ndarray
    changes: np.ndarray
    mask: np.ndarray
    likeness: np.ndarray

    @property
    def kernel(self) -> np.ndarray:
        """How alike they are among each other, `(T, T)`."""
        return (self.likeness[self.ids] * self.mask[:, :, None]).sum(axis=1)

    @property
    def related(self) -> np.ndarray:
        """Which share a gene, each with itself too; bool of shape `(T, T)`."""
        genes = np.where(self.mask, self.ids, -1 - np.arange(len(self.ids))[:, None])
        return (genes[:, None, :, None] == genes[None, :, None, :]).any(axis=(2, 3))


@torch.no_grad()
def fit_screen_response(
    part: GppcScreenResponse,
    linear_response: GppcLinearResponse,
    screen: Screen,
    seen: SeenPerturbations,
    options: ScreenFitOptions,
) -> None:
    """Fills the part of a screen response that is learned from perturbations, in place.

    Weight, size and spread are chosen by leaving out each perturbation, with all that share a gene with it, as folds
    do. What is left out is measured from other control cells than what it is predicted with. `counted` and `held` of
    `part` are set before; of the screen only controls and cells of the seen perturbations are read.
    """
    labels, counted = seen.labels, part.counted.numpy()
    tensors = (torch.as_tensor(array) for array in (seen.ids, seen.changes, seen.mask))
    linear, _, _ = linear_response.within_state(*tensors, part.held)
    direction = unit(linear.numpy(), counted)
    observed = ObservedResponses.of(screen, labels)
    shared = options.controls == "shared"
    pairs = [(observed, observed)]
    if not shared:
        halves = control_halves(screen, options.divisions, options.seed)
        both = {rows.tobytes(): ObservedResponses.of(screen, labels, rows) for rows, _ in halves}
        pairs = [(both[first.tobytes()], both[second.tobytes()]) for first, second in halves]
    choice = choose_weights(pairs, seen, direction, shared)
    votes = training_votes(observed, choice.power, shrink=not shared)
    groups = responses_by_group(screen, labels, getattr(screen, options.replicates))
    share, mean = observed.signal_share, votes.mean(axis=0)
    fitted = {
        "mean": mean,
        "votes": np.linalg.solve(choice.features * seen.kernel + UNEXPLAINED * np.eye(len(votes)), votes - mean),
        "likeness": choice.features * seen.likeness,
        "weight": choice.weight,
        "scale": choice.scale,
        "variance": np.mean(
            [error_variance(gap, truth, shared) for gap, (_, truth) in zip(choice.residuals, pairs)], axis=0
        ),
        "seen_targets": np.where(seen.mask, seen.ids, -1),
        "own": observed.shrunken,
        "between": variance_between(screen, groups, options.replicates),
        "within": observed.within,
        "own_between": [1 + 1 / max(len(groups[label].groups), 1) for label in labels],
        # Drawn towards zero, an estimate has so much less error (its posterior variance).
        "own_within": share * (1 / observed.n_cells + 1 / observed.n_controls),
    }
    for name, value in fitted.items():
        getattr(part, name).copy_(torch.as_tensor(np.asarray(value)))


def training_votes(observed: ObservedResponses, power: float, shrink: bool) -> np.ndarray:
    """Responses as they are averaged, `(T, V)`: divided by their length to a power, or shrunk by the share of their
    squared length that sampling explains, so that weak responses, which are mostly noise, count for little."""
    if shrink:
        return observed.shrunken
    norms = np.linalg.norm(observed.delta[:, observed.counted], axis=1, keepdims=True)
    return observed.delta / np.maximum(norms, 1e-12) ** power


@dataclasses.dataclass
class ChosenWeights:
    """What leave-one-out chose: see [`SHARED_POWERS`], [`FEATURE_WEIGHTS`] and [`WEIGHTS`]; `scale` is the size of the
    responses relative to what these give, `residuals` are responses minus predictions, `(T, V)` a pair of halves."""

    power: float
    features: float
    weight: float
    scale: float
    residuals: list[np.ndarray]


def choose_weights(
    pairs: Sequence[tuple[ObservedResponses, ObservedResponses]],
    seen: SeenPerturbations,
    direction: np.ndarray,
    shared_controls: bool,
) -> ChosenWeights:
    """Weights whose leave-one-out predictions have the highest mean cosine with the responses, and the size that fits
    best. A pair holds responses that predictions are made of and those that they are compared with; `direction` is the
    linear response to each, `(T, V)`; `shared_controls`: both are measured from the same controls, as in the
    literature."""
    related, counted, shrink = seen.related, pairs[0][0].counted, not shared_controls
    powers = SHARED_POWERS if shared_controls else (0.0,)
    feature_weights = FEATURE_WEIGHTS if shrink and seen.likeness.any() else (1.0,)
    best, chosen, guesses = -np.inf, (0.0, 0.0, 0.0), []
    targets = [unit(truth.delta, counted)[:, counted] for _, truth in pairs]
    for power, features in itertools.product(powers, feature_weights):
        votes = [training_votes(given, power, shrink) for given, _ in pairs]
        shared = [leave_one_out(rows, features * seen.kernel, related) for rows in votes]
        sizes = [np.linalg.norm(rows[:, counted], axis=1, keepdims=True) for rows in shared]
        for weight in WEIGHTS if shrink else SHARED_WEIGHTS:
            found = [rows + weight * size * direction for rows, size in zip(shared, sizes)]
            agreement = np.mean(
                [(unit(rows, counted)[:, counted] * target).sum(axis=1).mean() for rows, target in zip(found, targets)]
            )
            if agreement > best + 1e-9:
                best, chosen, guesses = agreement, (power, features, weight), found
    scale = fitted_scale(guesses, [truth for _, truth in pairs], shrink)
    return ChosenWeights(*chosen, scale, [truth.delta - scale * guess for guess, (_, truth) in zip(guesses, pairs)])


def fitted_scale(guesses: Sequence[np.ndarray], truths: Sequence[ObservedResponses], shrink: bool) -> float:
    """Size of responses relative to predicted ones, `(T, V)` each, that makes the mean normalised squared error least; as it
    used to be, between that size and the one of the least pooled error."""
    counted, power = truths[0].counted, 2 if shrink else 1
    products = squares = 0.0
    for guess, truth in zip(guesses, truths):
        weights = np.maximum(np.linalg.norm(truth.delta[:, counted], axis=1), 1e-12) ** -power
        products += (guess * truth.delta)[:, counted].sum(axis=1) @ weights
        squares += (guess**2)[:, counted].sum(axis=1) @ weights
    return max(float(products / max(squares, 1e-12)), LEAST_SCALE if shrink else 0.0)


def leave_one_out(votes: np.ndarray, kernel: np.ndarray, related: np.ndarray) -> np.ndarray:
    """Posterior mean at each perturbation of the process about the mean of those not related to it, `(T, V)`; zero
    where there is none. With A = (K + u I)^-1 and any mean m one inverse gives y_i - (A (y - m))_i / A_ii (Rasmussen
    and Williams 2006, 5.12) for a perturbation that is related to itself alone."""
    n = len(votes)
    if n < 2:
        return np.zeros_like(votes)
    inverse = np.linalg.inv(kernel + UNEXPLAINED * np.eye(n))
    means = (votes.sum(axis=0) - votes) / (n - 1)
    found = votes - (inverse @ votes - inverse.sum(axis=1)[:, None] * means) / np.diag(inverse)[:, None]
    for row in np.flatnonzero(related.sum(axis=1) > 1):
        rest = np.flatnonzero(~related[row])
        found[row] = 0.0
        if len(rest):
            found[row] = process_mean(votes[rest], kernel[np.ix_(rest, rest)], kernel[row][None, rest])[0]
    return found


def error_variance(residual: np.ndarray, observed: ObservedResponses, shared_controls: bool) -> np.ndarray:
    """Variance of true responses about predicted ones, a gene, from leave-one-out errors `(T, V)`; shape `(V,)`. Half
    the gene's own error, half what genes of its spread have, scaled so that 90 % of the errors lie within the 90 %
    interval, then freed of the sampling error."""
    counted, within = observed.counted, observed.within
    shared = (residual[:, counted] ** 2).mean(axis=0).sum() / max(within[counted].sum(), 1e-12) * within
    spread = np.sqrt(0.5 * (residual**2).mean(axis=0) + 0.5 * shared)
    widening = np.quantile(np.abs(residual[:, counted]) / np.maximum(spread[counted], 1e-9), 0.9) / Z90
    variance = (spread * widening) ** 2
    # The error of a mean of controls that both sides subtract is not in their difference.
    sampling = within * np.mean(1 / observed.n_cells + (0 if shared_controls else 1 / observed.n_controls))
    return np.maximum(variance - sampling, 0.05 * variance)


def unit(rows: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Rows divided by their length over the genes `counted`; zero where they have none."""
    norms = np.linalg.norm(rows[:, counted], axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)
