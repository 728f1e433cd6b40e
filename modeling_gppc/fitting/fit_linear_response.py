"""Closed-form start: the factor model of the training cells, put into the model's linear response."""

from collections.abc import Iterator

import numpy as np
import torch

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from modeling_gppc.fitting.factor_mixture import FactorMixture, fit_factor_mixture, fit_mixture_coupling
from modeling_gppc.fitting.factor_model import FactorModel, fit_factor_model
from modeling_gppc.fitting.fit_familiarity import SOURCE, choose_width, put_references
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
PERTURBATION = ("perturbation_ids", "perturbation_values", "perturbation_mask", "pairing_ids")


def initialize_linear_response(
    model: GppcForPerturbationPrediction,
    dataset: PairDataset,
    validation: PairDataset,
    panels: np.ndarray,
    max_cells: int = 20_000,
    n_iterations: int = 30,
    seed: int = 0,
) -> None:
    """
    Fits gene means, loadings, noise, cell states and the coupling of every pairing on the training pairs; no gradient.

    Cell states are kept only where they pay: the single conditional Gaussian is fitted first. The average of its
    response and that of the states is taken if it raises the squared error on the validation pairs of no pairing.

    Args:
        model ([`GppcForPerturbationPrediction`]): Changed in place.
        dataset ([`PairDataset`]): Training pairs.
        validation ([`PairDataset`]): Validation pairs.
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        max_cells (`int`, *optional*, defaults to 20,000): Cells, and pairs of each pairing, that are read.
        n_iterations (`int`, *optional*, defaults to 30): Passes over the cells.
        seed (`int`, *optional*, defaults to 0): Chooses them.
    """
    config = model.config
    n_genes = config.vocab_size
    rng = np.random.default_rng(seed)
    source_panel = dataset.table.column("source_panel").to_numpy()
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
    cells = dataset.dense_cells("source", few, n_genes), source_panel[few]
    pairs = [
        np.sort(_sample(np.flatnonzero(dataset.pairing_ids == pairing), min(max_cells, block), rng))
        for pairing in range(len(config.pairings))
    ]
    held_out = _sample(np.arange(len(validation)), SCALE_PAIRS, rng)
    response = model.model.linear_response

    def put_states(n_components: int) -> np.ndarray:
        mixture = fit_factor_mixture(fitted, *cells, panels, n_components=n_components, seed=seed)
        _put_mixture(response, mixture)
        if n_components > 1:
            _put_single(response, fitted, mixture)
        for pairing, chosen in enumerate(pairs):
            if len(chosen):
                _put_coupling(response, pairing, mixture, dataset, panels, chosen)
                if n_components > 1:
                    few = chosen[:: max(1, len(chosen) // SCALE_PAIRS)]
                    choose_evidence_scale(model, dataset, panels, pairing, few)
        return linear_errors(model, validation, panels, held_out)

    errors = put_states(1)
    if config.num_components > 1:
        state = {name: tensor.clone() for name, tensor in response.state_dict().items()}
        if (put_states(config.num_components) > errors).any():
            response.load_state_dict(state)
    if config.num_references > 0:
        put_references(model, dataset, panels, pairs, rng)
        choose_width(model, validation, panels, held_out)


@torch.no_grad()
def _put_mixture(response: GppcLinearResponse, mixture: FactorMixture) -> None:
    components, factors = mixture.means.shape
    states = response.states
    response.gene_mean.copy_(_tensor(mixture.model.mean, response))
    response.noise.copy_(_tensor(mixture.model.noise, response))
    response.loadings.zero_()[:, :factors] = _tensor(mixture.model.loadings, response)
    states.component_means.zero_()[:components, :factors] = _tensor(mixture.means, response)
    # Components that the data did not need are never entered.
    states.component_logits.fill_(UNUSED)[:components] = _tensor(np.log(mixture.weights), response)
    states.transition_logits.zero_()
    states.coupling.zero_()
    # One state is the single Gaussian itself.
    response.single_root.copy_(torch.eye(len(response.single_root)))
    response.single_share.zero_()
    if components == 1:
        response.single.coupling.zero_()


@torch.no_grad()
def _put_single(response: GppcLinearResponse, model: FactorModel, mixture: FactorMixture) -> None:
    """The single Gaussian beside the states: its factors in terms of theirs; its coupling is there already."""
    response.single_root.zero_()
    root = np.linalg.lstsq(mixture.model.loadings, model.loadings, rcond=None)[0]
    response.single_root[: len(root), : len(root)] = _tensor(root, response)
    response.single_share.fill_(SINGLE_SHARE)


@torch.no_grad()
def _put_coupling(
    response: GppcLinearResponse,
    pairing: int,
    mixture: FactorMixture,
    dataset: PairDataset,
    panels: np.ndarray,
    rows: np.ndarray,
) -> None:
    n_genes = panels.shape[1]
    transition, coupling = fit_mixture_coupling(
        mixture,
        dataset.dense_cells("source", rows, n_genes),
        dataset.table.column("source_panel").to_numpy()[rows],
        dataset.dense_cells("target", rows, n_genes),
        dataset.table.column("target_panel").to_numpy()[rows],
        panels,
    )
    components, factors = mixture.means.shape
    states = response.states
    states.coupling[pairing, :factors, :factors] = _tensor(coupling, response)
    if components == 1:
        response.single.coupling[pairing] = states.coupling[pairing]
    states.transition_logits[pairing].fill_(UNUSED)
    states.transition_logits[pairing, :components, :components] = _tensor(np.log(transition), response)


def choose_evidence_scale(
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
    collate = PairCollator(panels)
    response = model.model.linear_response
    totals = np.zeros(len(model.config.pairings))
    for start in range(0, len(rows), 256):
        batch = collate(dataset[rows[start : start + 256]])
        labels = batch["labels"]
        encoded = model.encode(**{name: batch[name] for name in SOURCE})
        perturbation = model.model.perturbation(encoded, **{name: batch[name] for name in PERTURBATION})
        expected = response.expected(response.condition(encoded.factors, perturbation).factors)
        error = torch.where(labels != IGNORED_LABEL, expected - labels, torch.zeros(())).square().sum(1)
        totals += np.bincount(batch["pairing_ids"], weights=error.double(), minlength=len(totals))
    return totals


def keep_network_if_it_pays(model: GppcForPerturbationPrediction, log_history: list[dict]) -> bool:
    """Switches the network off where the best checkpoint's validation error is not below the linear one's.

    Args:
        model ([`GppcForPerturbationPrediction`]): The best checkpoint's; its configuration is changed in place.
        log_history (`list[dict]`): The trainer's log, with `eval_mse` and `eval_linear_mse` of every evaluation.

    Returns:
        `bool`: Whether the network is kept.
    """
    evaluations = [entry for entry in log_history if "eval_linear_mse" in entry]
    if not model.config.use_network or not evaluations:
        return model.config.use_network
    best = min(evaluations, key=lambda entry: entry["eval_mse"])
    model.config.use_network = best["eval_mse"] < best["eval_linear_mse"]
    return model.config.use_network


def _tensor(array: np.ndarray, response) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(response.loadings)


def _sample(values: np.ndarray, at_most: int, rng: np.random.Generator) -> np.ndarray:
    return values if len(values) <= at_most else rng.choice(values, at_most, replace=False)
