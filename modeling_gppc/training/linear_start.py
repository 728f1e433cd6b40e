"""Closed-form start: the factor model of the training cells, put into the model's linear response."""

from collections.abc import Iterator

import numpy as np
import torch

from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.training.factor_model import fit_factor_model, fit_pair_coupling
from modeling_gppc.training.pair_dataset import PairDataset

# Dense cells in memory at a time: 64 million values are 256 MB.
BLOCK_VALUES = 64_000_000


def initialize_linear_response(
    model: GppcForPerturbationPrediction,
    dataset: PairDataset,
    panels: np.ndarray,
    max_cells: int = 20_000,
    n_iterations: int = 30,
    seed: int = 0,
) -> None:
    """
    Fits gene means, loadings, noise and the coupling of every pairing on the training pairs, in closed form.

    Args:
        model ([`GppcForPerturbationPrediction`]): Changed in place.
        dataset ([`PairDataset`]): Training pairs.
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        max_cells (`int`, *optional*, defaults to 20,000): Cells, and pairs of each pairing, that are read.
        n_iterations (`int`, *optional*, defaults to 30): Passes over the cells.
        seed (`int`, *optional*, defaults to 0): Chooses them.
    """
    config = model.config
    n_genes = config.vocab_size
    rng = np.random.default_rng(seed)
    source_panel = dataset.table.column("source_panel").to_numpy()
    target_panel = dataset.table.column("target_panel").to_numpy()
    _, rows = np.unique(dataset.table.column("source_soma_joinid").to_numpy(), return_index=True)
    rows = np.sort(_sample(rows, max_cells, rng))
    block = max(1, BLOCK_VALUES // n_genes)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            yield dataset.dense_cells("source", part, n_genes), source_panel[part]

    factors = min(config.num_factors, n_genes - 1, max(len(rows) - 1, 1))
    fitted = fit_factor_model(blocks, None, panels, n_factors=factors, n_iterations=n_iterations, seed=seed)
    couplings = []
    for pairing in range(len(config.pairings)):
        chosen = np.sort(_sample(np.flatnonzero(dataset.pairing_ids == pairing), min(max_cells, block), rng))
        if not len(chosen):
            couplings.append(np.zeros((factors, factors)))
            continue
        coupling = fit_pair_coupling(
            fitted,
            dataset.dense_cells("source", chosen, n_genes),
            source_panel[chosen],
            dataset.dense_cells("target", chosen, n_genes),
            target_panel[chosen],
            panels,
        )
        couplings.append(coupling.matrix)
    response = model.model.linear_response
    with torch.no_grad():
        response.gene_mean.copy_(torch.from_numpy(fitted.mean))
        response.noise.copy_(torch.from_numpy(fitted.noise))
        response.loadings.zero_()
        response.loadings[:, :factors] = torch.from_numpy(fitted.loadings).to(response.loadings)
        response.coupling.zero_()
        for pairing, matrix in enumerate(couplings):
            response.coupling[pairing, :factors, :factors] = torch.from_numpy(matrix).to(response.coupling)


def _sample(values: np.ndarray, at_most: int, rng: np.random.Generator) -> np.ndarray:
    return values if len(values) <= at_most else rng.choice(values, at_most, replace=False)
