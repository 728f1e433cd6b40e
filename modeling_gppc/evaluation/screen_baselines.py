"""Baselines of perturbation responses, and what any prediction may know of a screen."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from data_scripts.cells.screens import Screen
from modeling_gppc.evaluation.screen_scores import ScreenPrediction
from modeling_gppc.fitting.observed_responses import ObservedResponses

N_FEATURES = 20


@dataclasses.dataclass
class ScreenContext:
    """What a method may read when it predicts `test`: all control cells, training perturbations, target changes.

    Args:
        screen (`Screen`): The cells; only rows of controls and of `train` may be read.
        train, test (`list[str]`): Perturbations.
        train_delta (`np.ndarray`): Observed responses of `train`, shape `(T, V)`.
        train_spread (`np.ndarray`): Variance of true responses of `train` about their mean, shape `(V,)`.
        features (`dict[str, np.ndarray]`): One vector a gene, for baselines over perturbation features.
        substitutes (`dict[str, np.ndarray]`, *optional*): Columns that take the place of a perturbation's targets, for
            the target-shuffled null; the changes stay those of the targets.
    """

    screen: Screen
    train: list[str]
    test: list[str]
    train_delta: np.ndarray
    train_spread: np.ndarray
    features: dict[str, np.ndarray]
    substitutes: dict[str, np.ndarray] | None = None

    @classmethod
    def build(
        cls,
        screen: Screen,
        train: Sequence[str],
        test: Sequence[str],
        features: dict[str, np.ndarray] | None = None,
    ) -> "ScreenContext":
        """Computes the training responses, and features from the controls where none are given; reads cells of `train`
        and controls."""
        if features is None:
            features = control_features(screen) if len(train) > 1 else {}
        observed = ObservedResponses.of(screen, train)
        return cls(screen, list(train), list(test), observed.delta, observed.spread, features)

    @property
    def mean_response(self) -> np.ndarray:
        """Mean of the training responses, `(V,)`; zero where nothing was trained on."""
        return self.train_delta.mean(axis=0) if len(self.train) else np.zeros(self.screen.values.shape[1])

    def changes(self, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the measured targets of a perturbation and the change at each."""
        found = self.screen.target_changes(label)
        genes = np.array([c for c, _, _ in found], dtype=int)
        if self.substitutes is not None and len(genes):
            genes = self.substitutes[label]
        return genes, np.array([d for _, d, _ in found], dtype=float)

    def feature_matrix(self, labels: Sequence[str]) -> np.ndarray:
        """Summed features of the targets of each perturbation, `(len(labels), F)`; zeros where nothing is known."""
        table = self.features
        width = len(next(iter(table.values()))) if table else 1
        rows = [
            sum((table[gene] for gene in self.screen.perturbations[label].genes if gene in table), np.zeros(width))
            for label in labels
        ]
        return np.array(rows).reshape(len(labels), width)


def control_features(screen: Screen) -> dict[str, np.ndarray]:
    """Loadings of each gene on the leading principal components of the controls, by symbol."""
    covariance = screen.control_covariance
    n = len(covariance)
    leading = (n - min(N_FEATURES, n - 1), n - 1)
    eigenvalues, vectors = scipy.linalg.eigh(covariance, subset_by_index=leading)
    loadings = (vectors * np.sqrt(np.maximum(eigenvalues, 0)))[:, ::-1]
    return dict(zip(screen.gene_symbols, loadings))


def zeros(context: ScreenContext) -> ScreenPrediction:
    """A prediction to be filled."""
    return ScreenPrediction(np.zeros((len(context.test), context.screen.values.shape[1])))


def no_change(context: ScreenContext) -> ScreenPrediction:
    """Nothing happens, and that is certain: what is observed is sampling error."""
    prediction = zeros(context)
    return dataclasses.replace(prediction, variance=np.zeros_like(prediction.delta))


def target_only(context: ScreenContext) -> ScreenPrediction:
    """Only the targets themselves change."""
    prediction = zeros(context)
    for row, label in enumerate(context.test):
        genes, changes = context.changes(label)
        prediction.delta[row, genes] = changes
    return prediction


def covariance(context: ScreenContext) -> ScreenPrediction:
    """CIPHER's rule with the size taken from the target's own change: Sigma_jS Sigma_SS^-1 delta_S.

    Sigma is the covariance of all control cells. For one target this is its column of Sigma divided by its variance;
    the direction is that of `cipher.forward_prediction` (which fits the sign and size on the response itself).
    """
    return respond(context, context.screen.control_covariance)


def respond(context: ScreenContext, sigma: np.ndarray, noise: np.ndarray | None = None) -> ScreenPrediction:
    """Sigma_jS (Sigma_SS + noise_S)^-1 delta_S for every test perturbation; zero where no target is measured."""
    prediction = zeros(context)
    for row, label in enumerate(context.test):
        genes, changes = context.changes(label)
        if len(genes):
            within = sigma[np.ix_(genes, genes)] + np.diag(
                np.full(len(genes), 1e-9) + (0.0 if noise is None else noise[genes])
            )
            prediction.delta[row] = sigma[:, genes] @ np.linalg.solve(within, changes)
    return prediction


def mean_of_training(context: ScreenContext) -> ScreenPrediction:
    """The mean of the training responses, whatever is perturbed."""
    return ScreenPrediction(np.tile(context.mean_response, (len(context.test), 1)), reads_perturbed_cells=True)


def mean_with_spread(context: ScreenContext) -> ScreenPrediction:
    """The mean of the training responses, as uncertain as they differ from each other."""
    spread = np.tile(context.train_spread, (len(context.test), 1))
    return dataclasses.replace(mean_of_training(context), variance=spread)


def matching_mean(context: ScreenContext) -> ScreenPrediction:
    """For a combination the mean of the training responses that share a gene with it; else the mean of all."""
    prediction = mean_of_training(context)
    for row, label in enumerate(context.test):
        genes = set(context.screen.perturbations[label].genes)
        sharing = [i for i, name in enumerate(context.train) if genes & set(context.screen.perturbations[name].genes)]
        if sharing:
            prediction.delta[row] = context.train_delta[sharing].mean(axis=0)
    return prediction


def additive(context: ScreenContext) -> ScreenPrediction:
    """Sum of the responses to each gene alone; the mean response stands in for a gene not seen alone."""
    prediction = mean_of_training(context)
    alone = {
        context.screen.perturbations[name].genes[0]: delta
        for name, delta in zip(context.train, context.train_delta)
        if len(context.screen.perturbations[name].genes) == 1
    }
    for row, label in enumerate(context.test):
        genes = context.screen.perturbations[label].genes
        prediction.delta[row] = sum(alone.get(gene, context.mean_response) for gene in genes)
    return prediction


def ridge(context: ScreenContext, penalties: Sequence[float] = (0.1, 1.0, 10.0, 100.0)) -> ScreenPrediction:
    """Ridge regression from features of the targets to the response, penalty by leave-one-out over training."""
    train, test = _standardised(context)
    centred = context.train_delta - context.mean_response
    left, singular, right = np.linalg.svd(train, full_matrices=False)
    projected = left.T @ centred
    errors = []
    for penalty in penalties:
        shrunken = left * (singular**2 / (singular**2 + penalty))
        leverage = np.einsum("tk,tk->t", shrunken, left)
        residual = (centred - shrunken @ projected) / np.maximum(1 - leverage, 1e-6)[:, None]
        errors.append((residual**2).sum())
    penalty = penalties[int(np.argmin(errors))]
    weights = right.T @ (projected * (singular / (singular**2 + penalty))[:, None])
    return ScreenPrediction(context.mean_response + test @ weights, reads_perturbed_cells=True)


def bilinear(context: ScreenContext, n_components: int = 10, penalty: float = 0.1) -> ScreenPrediction:
    """The linear model of Ahlmann-Eltze et al. 2025: delta = G W p + b, G from principal components of training.

    The embedding p of a perturbation is its target's row of G (its own column among the genes); targets that are not
    among the measured genes have none and get b.
    """
    prediction = mean_of_training(context)
    centred = context.train_delta - context.mean_response
    rank = min(n_components, max(len(context.train) - 1, 1))
    genes = principal_components(centred.T, rank)

    def embed(labels):
        rows = np.zeros((len(labels), rank))
        for row, label in enumerate(labels):
            index = context.screen.perturbations[label].gene_index
            rows[row] = genes[index[index >= 0]].sum(axis=0)
        return rows

    train, test = embed(context.train), embed(context.test)
    inner = np.linalg.solve(genes.T @ genes + penalty * np.eye(rank), genes.T @ centred.T @ train)
    weights = inner @ np.linalg.inv(train.T @ train + penalty * np.eye(rank))
    prediction.delta = prediction.delta + test @ weights.T @ genes.T
    return prediction


def principal_components(rows: np.ndarray, rank: int) -> np.ndarray:
    """Left singular vectors of the `rank` largest singular values, times those; shape `(len(rows), rank)`."""
    if rank < min(rows.shape) // 2:
        start = np.random.default_rng(0).normal(size=min(rows.shape))
        left, singular, _ = scipy.sparse.linalg.svds(rows, k=rank, v0=start)
        return (left * singular)[:, ::-1]
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    return left[:, :rank] * singular[:rank]


def nearest(context: ScreenContext, k: int = 3) -> ScreenPrediction:
    """Mean response of the k training perturbations whose target features are most alike (cosine)."""
    prediction = mean_of_training(context)
    train, test = context.feature_matrix(context.train), context.feature_matrix(context.test)
    for row, features in enumerate(test):
        norms = np.linalg.norm(train, axis=1) * np.linalg.norm(features)
        known = np.flatnonzero(norms > 0)
        if len(known) >= k:
            likeness = train[known] @ features / norms[known]
            prediction.delta[row] = context.train_delta[known[np.argsort(-likeness)[:k]]].mean(axis=0)
    return prediction


def _standardised(context: ScreenContext) -> tuple[np.ndarray, np.ndarray]:
    train, test = context.feature_matrix(context.train), context.feature_matrix(context.test)
    scale = train.std(axis=0)
    # A feature that hardly varies in training would be blown up where it does.
    scale = np.maximum(scale, 0.01 * scale.max(initial=0)) if scale.any() else np.ones_like(scale)
    return (train - train.mean(axis=0)) / scale, (test - train.mean(axis=0)) / scale


BASELINES: dict[str, Callable[[ScreenContext], ScreenPrediction]] = {
    "no_change": no_change,
    "target_only": target_only,
    "covariance": covariance,
    "mean": mean_with_spread,
    "matching_mean": matching_mean,
    "additive": additive,
    "ridge": ridge,
    "bilinear": bilinear,
    "knn": nearest,
}
# Those that read no perturbed cell beyond the change at the target.
CONTROL_ONLY = ("no_change", "target_only", "covariance")


def run_baselines(
    context: ScreenContext, names: Sequence[str] | None = None, mode: str = "fine-tuned", weigh: bool = False
) -> dict[str, ScreenPrediction]:
    """Predictions of baselines by name; in other modes than `fine-tuned` only those that read controls; with `weigh`
    their `control_weight` too."""
    allowed = list(CONTROL_ONLY)
    if mode == "fine-tuned":
        # One training perturbation has a mean, and no regression.
        allowed = list(BASELINES) if len(context.train) >= 2 else [*CONTROL_ONLY, "mean", "matching_mean", "additive"]
    found = {name: BASELINES[name](context) for name in allowed if names is None or name in names}
    for name, prediction in found.items() if weigh else ():
        if prediction.reads_perturbed_cells:
            prediction.control_weight = control_weight(context, BASELINES[name], prediction)
    return found


def control_weight(context: ScreenContext, method: Callable, prediction: ScreenPrediction) -> np.ndarray:
    """How far each prediction moves with the training responses where all of these move alike, `(P,)`."""
    step = np.random.default_rng(0).normal(size=context.train_delta.shape[1])
    moved = method(dataclasses.replace(context, train_delta=context.train_delta + step)).delta
    return (moved - prediction.delta) @ step / (step @ step)
