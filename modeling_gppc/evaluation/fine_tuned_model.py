"""GPPC fine-tuned on some perturbations of a screen: what they share, what the target's correlates say, what is like it."""

import dataclasses
import itertools

import numpy as np

from data_scripts.screens import CONTROL
from modeling_gppc.evaluation.in_context_model import InContextModel
from modeling_gppc.evaluation.screen_baselines import ScreenContext
from modeling_gppc.evaluation.screen_scores import ScreenPrediction


@dataclasses.dataclass
class Blend:
    """How the parts are put together; chosen by leave-one-out over the training perturbations of a fold.

    Args:
        power (`float`): Each training response is divided by its length to this power: 0 is the plain mean, 1 gives
            every perturbation the same length, so that strong perturbations do not drown the others.
        focus (`float`): Share of the average that goes to perturbations whose targets have like features.
        weight (`float`): Weight of the in-context response, both directions having unit length.
    """

    power: float
    focus: float
    weight: float


class FineTunedModel:
    """
    GPPC adapted on the controls, then on the training perturbations.

    response = size x (average of training responses + weight x in-context response of the target). What is averaged is
    in part what all perturbations have in common, in part what those with like targets do. Every number is chosen by
    leave-one-out over the training perturbations, whose errors give the uncertainty; a perturbation left out takes with
    it all that share a gene, as the folds do.

    Args:
        in_context ([`InContextModel`]): Adapted on the controls of the same screen.
        powers, focuses, weights (`tuple[float, ...]`, *optional*): Candidates, see [`Blend`].

    Attributes:
        blend (`Blend`): What the last fold chose.
        scale (`float`): Size of the response, in log values.
    """

    def __init__(
        self,
        in_context: InContextModel,
        powers: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0),
        focuses: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
        weights: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6),
    ):
        self.in_context, self.powers, self.focuses, self.weights = in_context, powers, focuses, weights

    def predict(self, context: ScreenContext) -> ScreenPrediction:
        """Responses of the test perturbations.

        Raises:
            ValueError: If there are fewer than two training perturbations.
        """
        train = context.train_delta
        if len(train) < 2:
            raise ValueError(
                f"`train` holds {len(train)} perturbations; fine-tuning needs at least 2: use fewer folds."
            )
        mask = np.ones(train.shape[1], dtype=bool)
        mask[context.screen.panel_targets] = False
        norms = np.maximum(np.linalg.norm(train[:, mask], axis=1, keepdims=True), 1e-12)
        own, other = self._responses(context, context.train), self._responses(context, context.test)
        own, other = _unit(own, mask), _unit(other, mask)
        likeness = _likeness(context, context.train)
        likeness[relatives(context)] = 0.0
        everyone = (~relatives(context)).astype(float)
        self.blend = self._choose(train, norms, everyone, likeness, own, mask)
        guess = _average(train / norms**self.blend.power, everyone, likeness, self.blend.focus, mask)
        guess = guess + self.blend.weight * own
        # Least squares with weights between "every gene alike" and "every perturbation alike".
        weights = 1 / norms[:, 0]
        products, squares = (guess * train)[:, mask].sum(axis=1), (guess**2)[:, mask].sum(axis=1)
        self.scale = max(float(weights @ products / max(weights @ squares, 1e-12)), 0.0)
        test_likeness = _likeness(context, context.test)
        average = _average(
            train / norms**self.blend.power, np.ones_like(test_likeness), test_likeness, self.blend.focus, mask
        )
        delta = self.scale * (average + self.blend.weight * other)
        seen = self._seen(context, mask)
        for row, label in enumerate(context.test):
            members = context.screen.perturbations[label].genes
            if label in seen:
                delta[row] = seen[label]
            elif len(members) > 1 and any(member in seen for member in members):
                # A member not seen alone is expected to do what perturbations of this screen do on average.
                delta[row] = sum(seen.get(member, delta[row]) for member in members)
            genes, changes = context.changes(label)
            delta[row, genes] = changes
        variance = self._variance(context, train - self.scale * guess, mask)
        return ScreenPrediction(delta, np.tile(variance, (len(delta), 1)), reads_perturbed_cells=True)

    def _choose(self, train, norms, everyone, likeness, own, mask) -> Blend:
        """The blend whose leave-one-out predictions have the highest mean cosine with the training responses."""
        best, best_agreement = Blend(self.powers[0], 0.0, 0.0), -np.inf
        focuses = self.focuses if likeness.any() else (0.0,)
        for power, focus in itertools.product(self.powers, focuses):
            average = _average(train / norms**power, everyone, likeness, focus, mask)
            for weight in self.weights:
                agreement = _cosine(average + weight * own, train, mask).mean()
                if agreement > best_agreement + 1e-9:
                    best, best_agreement = Blend(power, focus, weight), agreement
        return best

    def _seen(self, context: ScreenContext, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Response to each training perturbation, drawn towards zero by the share of its size that sampling explains."""
        controls = context.screen.values[context.screen.cells_of(CONTROL)]
        seen = {}
        for label, response in zip(context.train, context.train_delta):
            cells = context.screen.values[context.screen.cells_of(label)]
            error = cells.var(axis=0) / len(cells) + controls.var(axis=0) / len(controls)
            size = max(float((response[mask] ** 2).sum()), 1e-12)
            seen[label] = response * max(1 - float(error[mask].sum()) / size, 0.0)
        return seen

    def _variance(self, context: ScreenContext, residual: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Variance of true responses about predicted ones, a gene, from leave-one-out errors; shape `(V,)`.

        Half the gene's own error, half what genes of its spread have: a variance from a handful of perturbations is
        itself noisy. Scaled so that 90 % of the errors lie within the 90 % interval, then freed of the sampling error
        that the errors contain.
        """
        deviation = np.maximum(self.in_context.deviation, 1e-6)
        shared = np.mean((residual[:, mask] / deviation[mask]) ** 2) * deviation**2
        spread = np.sqrt(0.5 * (residual**2).mean(axis=0) + 0.5 * shared)
        widening = np.quantile(np.abs(residual[:, mask]) / np.maximum(spread[mask], 1e-9), 0.9) / 1.6448536
        variance = (spread * widening) ** 2
        cells = [context.screen.cells_of(label) for label in context.train]
        sampling = np.mean([context.screen.values[rows].var(axis=0) / len(rows) for rows in cells], axis=0)
        return np.maximum(variance - sampling, 0.05 * variance)

    def _responses(self, context: ScreenContext, labels: list[str]) -> np.ndarray:
        return self.in_context.predict(dataclasses.replace(context, test=list(labels))).delta


def relatives(context: ScreenContext) -> np.ndarray:
    """Which training perturbations share a gene, each with itself too; bool of shape `(T, T)`."""
    genes = [set(context.screen.perturbations[label].genes) for label in context.train]
    return np.array([[bool(first & second) for second in genes] for first in genes])


def _likeness(context: ScreenContext, labels: list[str]) -> np.ndarray:
    """Cosine of the features of `labels` with those of the training perturbations, below zero cut off; `(n, T)`."""
    rows, columns = context.feature_matrix(labels), context.feature_matrix(context.train)
    products = rows @ columns.T
    norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(columns, axis=1)
    return np.maximum(np.divide(products, norms, out=np.zeros_like(products), where=norms > 1e-12), 0.0)


def _average(votes: np.ndarray, everyone: np.ndarray, likeness: np.ndarray, focus: float, mask) -> np.ndarray:
    """Weighted averages of the votes `(T, V)`, of unit length; where nothing is alike, everyone's average."""
    totals = likeness.sum(axis=1, keepdims=True)
    alike = np.divide(likeness, totals, out=np.zeros_like(likeness), where=totals > 1e-12)
    whole = everyone / np.maximum(everyone.sum(axis=1, keepdims=True), 1e-12)
    share = np.where(totals > 1e-12, focus, 0.0)
    return _unit(((1 - share) * whole + share * alike) @ votes, mask)


def _unit(rows: np.ndarray, mask: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows[:, mask], axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)


def _cosine(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (_unit(first, mask)[:, mask] * _unit(second, mask)[:, mask]).sum(axis=1)
