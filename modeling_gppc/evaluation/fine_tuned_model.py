"""GPPC fine-tuned on some perturbations of a screen: what they share, what the target's correlates say, what is like it."""

import dataclasses

import numpy as np

from data_scripts.cells.screens import CONTROL
from modeling_gppc.evaluation.group_variance import responses_by_group, variance_between
from modeling_gppc.evaluation.in_context_model import InContextModel
from modeling_gppc.evaluation.screen_baselines import ScreenContext
from modeling_gppc.evaluation.screen_scores import ScreenPrediction, scored_genes, within_variance


@dataclasses.dataclass
class Blend:
    """How the parts are put together; chosen by leave-one-out over the training perturbations of a fold.

    Args:
        power (`float`): Each training response is divided by its length to this power: 0 is the plain mean, 1 gives
            every perturbation the same length, so that strong perturbations do not drown the others.
        weight (`float`): Weight of the in-context response, relative to the rest.
    """

    power: float
    weight: float


class FineTunedModel:
    """
    GPPC adapted on the controls, then on the training perturbations.

    response = size x (what perturbations of the screen do + weight x in-context response of the target). The first part
    is a Gaussian process over perturbations about their mean: where features of genes are given, perturbations whose
    targets have like features respond alike (cosine, and as much of a response that no feature explains as one that
    does); where none are, it is the mean. Power, weight and size are chosen by leave-one-out over the training
    perturbations, whose errors give the uncertainty; a perturbation left out takes with it all that share a gene, as the
    folds do.

    Args:
        in_context ([`InContextModel`]): Adapted on the controls of the same screen.
        powers, weights (`tuple[float, ...]`, *optional*): Candidates, see [`Blend`].
        unexplained (`float`, *optional*, defaults to 1): Variance of a response that features do not explain, in units
            of what they do.

    Attributes:
        blend (`Blend`): What the last fold chose.
        scale (`float`): Size of the response relative to the blend.
    """

    def __init__(
        self,
        in_context: InContextModel,
        powers: tuple[float, ...] = (0.0, 0.5, 1.0),
        weights: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6),
        unexplained: float = 1.0,
    ):
        self.in_context, self.powers, self.weights, self.unexplained = in_context, powers, weights, unexplained

    def predict(self, context: ScreenContext) -> ScreenPrediction:
        """Responses of the test perturbations.

        Raises:
            ValueError: If there are fewer than two training perturbations.
        """
        train = context.train_delta
        mask = scored_genes(context.screen)
        if len(train) < 2:
            raise ValueError(
                f"`train` holds {len(train)} perturbations; fine-tuning needs at least 2: use fewer folds."
            )
        norms = np.maximum(np.linalg.norm(train[:, mask], axis=1, keepdims=True), 1e-12)
        own, other = self._responses(context, context.train), self._responses(context, context.test)
        own, other = _unit(own, mask), _unit(other, mask)
        likeness = _likeness(context, context.train)
        guess = self._choose(train, norms, likeness, relatives(context), own, mask)
        # Least squares with weights between "every gene alike" and "every perturbation alike".
        weights = 1 / norms[:, 0]
        products, squares = (guess * train)[:, mask].sum(axis=1), (guess**2)[:, mask].sum(axis=1)
        self.scale = max(float(weights @ products / max(weights @ squares, 1e-12)), 0.0)
        shared = self._process(train / norms**self.blend.power, likeness, _likeness(context, context.test))
        delta = self.scale * _with(shared, other, self.blend.weight, mask)
        seen = shrunken_responses(context)
        for row, label in enumerate(context.test):
            members = context.screen.perturbations[label].genes
            if len(members) > 1 and any(member in seen for member in members):
                # A member not seen alone is expected to do what perturbations of this screen do on average.
                delta[row] = sum(seen.get(member, delta[row]) for member in members)
            genes, changes = context.changes(label)
            delta[row, genes] = changes
        variance = self._variance(context, train - self.scale * guess, mask)
        return ScreenPrediction(delta, np.tile(variance, (len(delta), 1)), reads_perturbed_cells=True)

    def _choose(self, train, norms, likeness, related, own, mask) -> np.ndarray:
        """Sets the blend whose leave-one-out predictions have the highest mean cosine with the training responses; returns
        those predictions `(T, V)`."""
        best, best_agreement = None, -np.inf
        for power in self.powers:
            votes, shared = train / norms**power, np.zeros_like(train)
            for row in range(len(train)):
                rest = np.flatnonzero(~related[row])
                if len(rest):
                    shared[row] = self._process(votes[rest], likeness[np.ix_(rest, rest)], likeness[row][None, rest])[
                        0
                    ]
            for weight in self.weights:
                guess = _with(shared, own, weight, mask)
                agreement = _cosine(guess, train, mask).mean()
                if agreement > best_agreement + 1e-9:
                    best, best_agreement, self.blend = guess, agreement, Blend(power, weight)
        return best

    def _process(self, votes: np.ndarray, likeness: np.ndarray, to_test: np.ndarray) -> np.ndarray:
        """Posterior mean of the process at test perturbations: `votes` `(T, V)`, `likeness` `(T, T)`, `(P, T)`."""
        mean = votes.mean(axis=0)
        weights = np.linalg.solve(likeness + self.unexplained * np.eye(len(votes)), votes - mean)
        return mean + to_test @ weights

    def _variance(self, context: ScreenContext, residual: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Variance of true responses about predicted ones, a gene, from leave-one-out errors; shape `(V,)`.

        Half the gene's own error, half what genes of its spread have: a variance from a handful of perturbations is
        itself noisy. Scaled so that 90 % of the errors lie within the 90 % interval, then freed of the sampling error
        that the errors contain.
        """
        within = within_variance(context.screen, [CONTROL, *context.train])
        shared = (residual[:, mask] ** 2).mean(axis=0).sum() / max(within[mask].sum(), 1e-12) * within
        spread = np.sqrt(0.5 * (residual**2).mean(axis=0) + 0.5 * shared)
        widening = np.quantile(np.abs(residual[:, mask]) / np.maximum(spread[mask], 1e-9), 0.9) / 1.6448536
        variance = (spread * widening) ** 2
        sampling = within * np.mean([1 / len(context.screen.cells_of(label)) for label in context.train])
        return np.maximum(variance - sampling, 0.05 * variance)

    def _responses(self, context: ScreenContext, labels: list[str]) -> np.ndarray:
        return self.in_context.predict(dataclasses.replace(context, test=list(labels))).delta


def signal_shares(context: ScreenContext) -> dict[str, float]:
    """Share of the size of each training response that sampling does not explain.

    A tenth is always left: a response too small to be told from noise has a direction all the same.
    """
    mask = scored_genes(context.screen)
    shares = {}
    for label, response in zip(context.train, context.train_delta):
        size = max(float((response[mask] ** 2).sum()), 1e-12)
        shares[label] = max(1 - float(sampling_error(context, label)[mask].sum()) / size, 0.1)
    return shares


def shrunken_responses(context: ScreenContext) -> dict[str, np.ndarray]:
    """Response to each training perturbation, drawn towards zero by the share of its size that sampling explains."""
    shares = signal_shares(context)
    return {label: response * shares[label] for label, response in zip(context.train, context.train_delta)}


def sampling_error(context: ScreenContext, label: str) -> np.ndarray:
    """Variance of the observed response to a training perturbation by the number of cells it has; `(V,)`."""
    within = within_variance(context.screen, [CONTROL, *context.train])
    counts = [len(context.screen.cells_of(name)) for name in (label, CONTROL)]
    return within * sum(1 / count for count in counts)


def predict_elsewhere(context: ScreenContext, kind: str) -> ScreenPrediction:
    """Responses in a batch or cell line that was held out: as they were in the others, drawn towards zero by their
    sampling error; uncertain by that error and by how much responses differ between those others.

    Args:
        context (`ScreenContext`): Cells of the other groups.
        kind (`str`): `"batch"` or `"cell_line"`.
    """
    seen, shares = shrunken_responses(context), signal_shares(context)
    parts = responses_by_group(context, getattr(context.screen, kind))
    between = variance_between(context, parts, kind)
    delta = np.array([seen[label] for label in context.test])
    variance = np.array(
        [
            # Drawn towards zero, an estimate has so much less error (its posterior variance).
            between * (1 + 1 / max(len(parts[label].groups), 1)) + shares[label] * sampling_error(context, label)
            for label in context.test
        ]
    )
    return ScreenPrediction(delta, variance, reads_perturbed_cells=True)


def relatives(context: ScreenContext) -> np.ndarray:
    """Which training perturbations share a gene, each with itself too; bool of shape `(T, T)`."""
    genes = [set(context.screen.perturbations[label].genes) for label in context.train]
    return np.array([[bool(first & second) for second in genes] for first in genes])


def _likeness(context: ScreenContext, labels: list[str]) -> np.ndarray:
    """Cosine of the given features of `labels` with those of the training perturbations, `(n, T)`; zero without any."""
    if context.features is None:
        return np.zeros((len(labels), len(context.train)))
    rows, columns = context.feature_matrix(labels), context.feature_matrix(context.train)
    products = rows @ columns.T
    norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(columns, axis=1)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 1e-12)


def _with(shared: np.ndarray, own: np.ndarray, weight: float, mask: np.ndarray) -> np.ndarray:
    """`shared` plus `weight` times its length times the unit vectors `own`, row by row."""
    return shared + weight * np.linalg.norm(shared[:, mask], axis=1, keepdims=True) * own


def _unit(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows[:, mask], axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)


def _cosine(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (_unit(first, mask)[:, mask] * _unit(second, mask)[:, mask]).sum(axis=1)
