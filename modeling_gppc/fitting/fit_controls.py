"""What the control cells of a screen say: factors, technical covariates, how far populations of them drift."""

import dataclasses

import numpy as np

from data_scripts.cells.screen_cells import TechnicalCovariates
from data_scripts.cells.screens import CONTROL, Screen
from modeling_gppc.fitting.factor_model import Cells, FactorModel, choose_rank, fit_factor_model, fit_pair_coupling
from modeling_gppc.linear_response_gppc import USUAL_DRIFT

ITERATIONS = 200
PAIRS_PER_CELL = 4


@dataclasses.dataclass
class ControlFit:
    """
    Closed-form fit of the control cells.

    Args:
        factors ([`FactorModel`]): Of the values without what technical covariates explain.
        coupling (`np.ndarray`): Cov of the factors of two cells of one batch, shape `(r, r)`.
        covariates ([`TechnicalCovariates`]): What was taken out.
        drift (`float`): See [`batch_drift`].
    """

    factors: FactorModel
    coupling: np.ndarray
    covariates: TechnicalCovariates
    drift: float


def fit_controls(screen: Screen, n_factors: int | None = None, seed: int = 0) -> ControlFit:
    """
    Fits the control cells of a screen; no perturbed cell is read.

    Args:
        screen (`Screen`): The screen.
        n_factors (`int`, *optional*): Chosen by held-out likelihood when absent.
        seed (`int`, *optional*, defaults to 0): Of the held-out parts, the starting point and the pairs.
    """
    cells = screen.cells_of(CONTROL)
    covariates = TechnicalCovariates.fit(screen, cells)
    values = covariates.residuals(screen.values[cells], screen.covariates[cells])
    panel, zeros = np.ones((1, values.shape[1]), dtype=bool), np.zeros(len(values), dtype=int)
    n_factors = n_factors or choose_rank(values, seed)
    factors = fit_factor_model(Cells(values, zeros, panel), n_factors, ITERATIONS, seed)
    pairs = _pairs(screen.batch[cells], np.random.default_rng(seed))
    coupling = fit_pair_coupling(factors, *(Cells(values[rows], zeros[rows], panel) for rows in pairs))
    return ControlFit(factors, coupling, covariates, batch_drift(screen))


def _pairs(batch: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of different cells of the same batch."""
    order = np.argsort(batch, kind="stable")
    _, start, count = np.unique(batch[order], return_index=True, return_counts=True)
    position = generator.integers(0, len(order), PAIRS_PER_CELL * len(order))
    group = np.searchsorted(start, position, side="right") - 1
    shift = 1 + (generator.random(len(position)) * np.maximum(count[group] - 1, 1)).astype(int)
    return order[position], order[start[group] + (position - start[group] + shift) % count[group]]


def batch_drift(screen: Screen, min_cells: int = 30) -> float:
    """Distance of pseudobulks of control cells of one batch from that of all controls, beyond sampling error.

    How far a population moves is seen among the controls themselves. A predicted response levels off there, and true
    responses are expected to lie so far from predicted ones.

    Returns:
        `float`: Root mean square over batches and genes, in units of the gene's standard deviation among controls.
    """
    controls = screen.cells_of(CONTROL)
    values, batch = screen.values[controls].astype(np.float64), screen.batch[controls]
    names, counts = np.unique(batch, return_counts=True)
    names, counts = names[counts >= min_cells], counts[counts >= min_cells]
    deviation = values.std(axis=0)
    varied = deviation > 1e-3
    if len(names) < 2 or not varied.any():
        return USUAL_DRIFT
    inside = np.isin(batch, names)
    centre = values[inside].mean(axis=0)
    squares = []
    for name, count in zip(names, counts):
        cells = values[batch == name]
        # A batch is part of the whole it is compared with.
        error = cells.var(axis=0, ddof=1) / count * (1 - count / inside.sum())
        squares.append(((cells.mean(axis=0) - centre) ** 2 - error)[varied] / deviation[varied] ** 2)
    return float(np.sqrt(max(np.mean(squares), 1e-6)))
