"""Closed-form start: the factor model of the training cells, put into the model's linear response."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from data_scripts.batches.pair_dataset import PairDataset
from modeling_gppc.fitting.factor_mixture import (
    FactorMixture,
    fit_factor_mixture,
    fit_mixture_coupling,
    fit_within_groups,
)
from modeling_gppc.fitting.factor_model import Cells, FactorModel, fit_factor_model
from modeling_gppc.fitting.fit_familiarity import choose_width, encoded_batches, pair_cells, put_references
from modeling_gppc.linear_response_gppc import GppcLinearResponse
from modeling_gppc.modeling_gppc import IGNORED_LABEL, GppcForPerturbationPrediction

# Dense cells in memory at a time: 64 million values are 256 MB.
BLOCK_VALUES = 64_000_000
# Log probability of what never happens; finite, so that sums over it stay finite.
UNUSED = -1e4
EVIDENCE_SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1)
SCALE_PAIRS = 1_536
# Of the single Gaussian in the average. Not tuned: halves.
SINGLE_SHARE = 0.5
# What cells of one state have in common.
HELD = ["dataset_id", "donor_id", "cell_type"]
PERTURBATION = ("perturbation_ids", "perturbation_values", "perturbation_mask", "pairing_ids")


@dataclasses.dataclass
class SourceCells:
    """Source cells of some pairs, of which `block` are made dense at a time."""

    dataset: PairDataset
    rows: np.ndarray
    panels: np.ndarray
    block: int

    def blocks(self) -> Iterator[Cells]:
        """The cells, some at a time."""
        for start in range(0, len(self.rows), self.block):
            yield pair_cells(self.dataset, "source", self.rows[start : start + self.block], self.panels)


def initialize_linear_response(
    model: GppcForPerturbationPrediction,
    dataset: PairDataset,
    validation: PairDataset,
    panels: np.ndarray,
    max_cells: int = 20_000,
    n_iterations: int = 30,
    seed: int = 0,
) -> None:
    """Fits gene means, loadings, noise, cell states and couplings of pairings on the training pairs, in closed form,
    in place.

    Cell states are kept only where they pay: their response is averaged with that of the single conditional Gaussian
    if this raises the squared error on the validation pairs of no pairing. `max_cells` cells, and pairs of each
    pairing, are read.
    """
    device, config, response = model.device, model.config, model.model.linear_response
    model.cpu()  # where the cells are; a Trainer may have moved the model already
    rng = np.random.default_rng(seed)
    _, rows = np.unique(dataset.table.column("source_soma_joinid").to_numpy(), return_index=True)
    rows = np.sort(_sample(rows, max_cells, rng))
    block = max(1, BLOCK_VALUES // config.vocab_size)
    factors = min(config.num_factors, config.vocab_size - 1, max(len(rows) - 1, 1))
    fitted = fit_factor_model(SourceCells(dataset, rows, panels, block), factors, n_iterations, seed)
    few = np.sort(_sample(rows, block, rng))
    cells = pair_cells(dataset, "source", few, panels)
    pairs = [
        np.sort(_sample(np.flatnonzero(dataset.pairing_ids == pairing), min(max_cells, block), rng))
        for pairing in range(len(config.pairings))
    ]
    held_out = _sample(np.arange(len(validation)), SCALE_PAIRS, rng)

    def put_states(n_components: int) -> np.ndarray:
        mixture = fit_factor_mixture(fitted, cells, n_components, seed)
        _put_mixture(response, mixture, fitted)
        for pairing, chosen in enumerate(pairs):
            if len(chosen):
                source, target = (pair_cells(dataset, side, chosen, panels) for side in ("source", "target"))
                _put_coupling(response, pairing, mixture, source, target)
                if n_components > 1:
                    every = max(1, len(chosen) // SCALE_PAIRS)
                    _choose_evidence_scale(model, dataset, panels, pairing, chosen[::every])
        return linear_errors(model, validation, panels, held_out)

    errors = put_states(1)
    if config.num_components > 1:
        state = {name: tensor.clone() for name, tensor in response.state_dict().items()}
        if (put_states(config.num_components) > errors).any():
            response.load_state_dict(state)
    _put_within(response, dataset, few, cells)
    if config.num_references > 0:
        put_references(model, dataset, panels, pairs, rng)
        choose_width(model, validation, panels, held_out)
    model.to(device)


def _put(buffer: torch.Tensor, values: np.ndarray, rest: float = 0.0) -> None:
    """Fills the first rows and columns of a buffer; what the data did not need holds `rest`."""
    buffer.fill_(rest)[tuple(slice(length) for length in values.shape)] = torch.as_tensor(values).to(buffer)


@torch.no_grad()
def _put_mixture(response: GppcLinearResponse, mixture: FactorMixture, single: FactorModel) -> None:
    """Cell states and, beside several of them, the single Gaussian in terms of their factors."""
    states = response.states
    _put(response.gene_mean, mixture.model.mean)
    _put(response.noise, mixture.model.noise)
    _put(response.loadings, mixture.model.loadings)
    _put(states.component_means, mixture.means)
    # Components that the data did not need are never entered.
    _put(states.component_logits, np.log(mixture.weights), UNUSED)
    states.transition_logits.zero_()
    states.coupling.zero_()
    if len(mixture.weights) == 1:
        # One state is the single Gaussian itself.
        response.single_root.copy_(torch.eye(len(response.single_root)))
        response.single_share.zero_()
        response.single.coupling.zero_()
    else:
        _put(response.single_root, np.linalg.lstsq(mixture.model.loadings, single.loadings, rcond=None)[0])
        response.single_share.fill_(SINGLE_SHARE)


@torch.no_grad()
def _put_coupling(
    response: GppcLinearResponse, pairing: int, mixture: FactorMixture, source: Cells, target: Cells
) -> None:
    """How partners follow from cells: of the states and, where there is one only, of the single Gaussian."""
    transition, coupling = fit_mixture_coupling(mixture, source, target)
    _put(response.states.coupling[pairing], coupling)
    if len(mixture.weights) == 1:
        response.single.coupling[pairing] = response.states.coupling[pairing]
    _put(response.states.transition_logits[pairing], np.log(transition), UNUSED)


@torch.no_grad()
def _put_within(response: GppcLinearResponse, dataset: PairDataset, rows: np.ndarray, cells: Cells) -> None:
    """How factors vary among cells of one data set, donor and cell type; within an unsupervised state, where no two types
    are named."""
    labels = dataset.table.select(HELD).take(rows).to_pandas()
    within = np.eye(response.loadings.shape[1])
    if labels["cell_type"].nunique() > 1:
        groups = labels.groupby(HELD, dropna=False).ngroup().to_numpy()
        fitted = (tensor.double().numpy() for tensor in (response.gene_mean, response.loadings, response.noise))
        within = fit_within_groups(FactorModel(*fitted), cells, groups)
    response.within_root.copy_(torch.as_tensor(np.linalg.cholesky(within)))


def _choose_evidence_scale(
    model: GppcForPerturbationPrediction, dataset: PairDataset, panels: np.ndarray, pairing: int, rows: np.ndarray
) -> None:
    """Sets how far the imposed levels are trusted to tell the target's cell state, by squared error on `rows`."""
    scales = model.model.linear_response.states.evidence_scale
    errors = []
    for scale in EVIDENCE_SCALES:
        scales[pairing] = scale
        errors.append(linear_errors(model, dataset, panels, rows).sum())
    scales[pairing] = EVIDENCE_SCALES[int(np.argmin(errors))]


@torch.inference_mode()
def linear_errors(
    model: GppcForPerturbationPrediction, dataset: PairDataset, panels: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Squared error of the linear response on some pairs, summed over the scored genes of each pairing, `(P,)`."""
    response = model.model.linear_response
    totals = np.zeros(len(model.config.pairings))
    for batch, encoded in encoded_batches(model, dataset, rows, panels):
        perturbation = model.model.perturbation(encoded, **{name: batch[name] for name in PERTURBATION})
        expected = response.expected(response.condition(encoded.factors, perturbation).factors)
        error = (expected - batch["labels"]).where(batch["labels"] != IGNORED_LABEL, 0).square().sum(1)
        totals += np.bincount(batch["pairing_ids"], weights=error.double(), minlength=len(totals))
    return totals


def keep_network_if_it_pays(model: GppcForPerturbationPrediction, log_history: list[dict]) -> bool:
    """Switches the network off, in the model's configuration, where the best checkpoint's validation error (`eval_mse`
    of the trainer's log) is not below the linear response's; returns whether it is kept."""
    evaluations = [entry for entry in log_history if "eval_linear_mse" in entry]
    if model.config.use_network and evaluations:
        best = min(evaluations, key=lambda entry: entry["eval_mse"])
        model.config.use_network = best["eval_mse"] < best["eval_linear_mse"]
    return model.config.use_network


def _sample(values: np.ndarray, at_most: int, rng: np.random.Generator) -> np.ndarray:
    return values if len(values) <= at_most else rng.choice(values, at_most, replace=False)
