"""Closed-form start: the factor model of the training cells, put into the model's linear response."""

from collections.abc import Iterator

import numpy as np
import torch

from modeling_gppc.modeling_gppc import IGNORED_LABEL, GppcForPerturbationPrediction
from modeling_gppc.training.data_collator import PairCollator
from modeling_gppc.training.factor_mixture import fit_factor_mixture, fit_mixture_coupling
from modeling_gppc.training.factor_model import fit_factor_model
from modeling_gppc.training.pair_dataset import PairDataset

# Dense cells in memory at a time: 64 million values are 256 MB.
BLOCK_VALUES = 64_000_000
# Log probability of what never happens; finite, so that sums over it stay finite.
UNUSED = -1e4
EVIDENCE_SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1)
SCALE_PAIRS = 1_536


def initialize_linear_response(
    model: GppcForPerturbationPrediction,
    dataset: PairDataset,
    panels: np.ndarray,
    max_cells: int = 20_000,
    n_iterations: int = 30,
    seed: int = 0,
) -> None:
    """
    Fits gene means, loadings, noise, cell states and the coupling of every pairing on the training pairs; no gradient.

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
    few = np.sort(_sample(rows, block, rng))
    mixture = fit_factor_mixture(
        fitted,
        dataset.dense_cells("source", few, n_genes),
        source_panel[few],
        panels,
        n_components=config.num_components,
        seed=seed,
    )
    components = len(mixture.weights)
    response = model.model.linear_response
    with torch.no_grad():
        response.gene_mean.copy_(torch.from_numpy(mixture.model.mean))
        response.noise.copy_(torch.from_numpy(mixture.model.noise))
        response.loadings[:, :factors] = _tensor(mixture.model.loadings, response)
        response.component_means[:components, :factors] = _tensor(mixture.means, response)
        # Components that the data did not need are never entered.
        response.component_logits.fill_(UNUSED)[:components] = _tensor(np.log(mixture.weights), response)
        response.transition_logits.fill_(UNUSED)
    for pairing in range(len(config.pairings)):
        chosen = np.sort(_sample(np.flatnonzero(dataset.pairing_ids == pairing), min(max_cells, block), rng))
        if not len(chosen):
            response.transition_logits[pairing].zero_()
            continue
        transition, coupling = fit_mixture_coupling(
            mixture,
            dataset.dense_cells("source", chosen, n_genes),
            source_panel[chosen],
            dataset.dense_cells("target", chosen, n_genes),
            target_panel[chosen],
            panels,
        )
        with torch.no_grad():
            response.coupling[pairing, :factors, :factors] = _tensor(coupling, response)
            response.transition_logits[pairing, :components, :components] = _tensor(np.log(transition), response)
        choose_evidence_scale(model, dataset, panels, pairing, chosen[:SCALE_PAIRS])


@torch.inference_mode()
def choose_evidence_scale(
    model: GppcForPerturbationPrediction, dataset: PairDataset, panels: np.ndarray, pairing: int, rows: np.ndarray
) -> None:
    """Sets how far the imposed levels are trusted to tell the target's cell state, by squared error on `rows`."""
    response = model.model.linear_response
    if response.component_means.shape[0] == 1:
        return
    collate = PairCollator(panels)
    model.eval()
    errors = []
    for scale in EVIDENCE_SCALES:
        response.evidence_scale[pairing] = scale
        total = 0.0
        for start in range(0, len(rows), 256):
            batch = collate(dataset[rows[start : start + 256]])
            labels = batch.pop("labels")
            expected = model(**batch).linear_response
            total += float(torch.where(labels != IGNORED_LABEL, expected - labels, torch.zeros(())).square().sum())
        errors.append(total)
    response.evidence_scale[pairing] = EVIDENCE_SCALES[int(np.argmin(errors))]


def _tensor(array: np.ndarray, response) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(response.loadings)


def _sample(values: np.ndarray, at_most: int, rng: np.random.Generator) -> np.ndarray:
    return values if len(values) <= at_most else rng.choice(values, at_most, replace=False)
