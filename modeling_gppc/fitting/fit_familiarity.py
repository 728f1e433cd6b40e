"""Which training pairs are kept to tell familiar levels from others, and how near they have to be."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from modeling_gppc.fitting.factor_model import Cells
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.outputs_gppc import GppcEncoderOutput

# Log weight of a place that no reference fills.
EMPTY = -1e4
# Widths offered, in units of the spread of two posteriors, and how many references (effectively) are company enough.
REFERENCE_WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
COMPANY = 20.0
# Levels are taken for familiar four times in five before they are looked at.
FAMILIAR_LOG_ODDS = math.log(4.0)
SOURCE = ("input_ids", "expression_values", "attention_mask", "measured_mask", "panel_index")


def pair_cells(dataset: PairDataset, side: str, rows: np.ndarray, panels: np.ndarray) -> Cells:
    """The `source` or `target` cells of some pairs."""
    panel_index = dataset.table.column(f"{side}_panel").to_numpy()[rows]
    return Cells(dataset.dense_cells(side, rows, panels.shape[1]), panel_index, panels)


def encoded_batches(
    model: GppcForPerturbationPrediction, dataset: PairDataset, rows: np.ndarray, panels: np.ndarray
) -> Iterator[tuple[dict[str, torch.Tensor], GppcEncoderOutput]]:
    """Batches of pairs with their stored perturbations, and their encoded source cells."""
    collate = PairCollator(panels)
    for start in range(0, len(rows), 256):
        batch = collate(dataset[rows[start : start + 256]])
        yield batch, model.encode(**{name: batch[name] for name in SOURCE})


@torch.no_grad()
def put_references(
    model: GppcForPerturbationPrediction,
    dataset: PairDataset,
    panels: np.ndarray,
    pairs: list[np.ndarray],
    rng: np.random.Generator,
) -> None:
    """Keeps some training pairs of every pairing, drawn from its rows in `pairs`, as the single Gaussian's factors of
    both cells."""
    response = model.model.linear_response
    familiarity, root = response.familiarity, response.single_root
    familiarity.logits.fill_(EMPTY)
    covariances = []
    for pairing, rows in enumerate(pairs):
        if len(rows) > model.config.num_references:
            rows = np.sort(rng.choice(rows, model.config.num_references, replace=False))
        if not len(rows):
            continue
        factors = {}
        for side in ("source", "target"):
            cells = pair_cells(dataset, side, rows, panels)
            present, index = np.unique(cells.panel_index, return_inverse=True)
            measured, index = torch.from_numpy(panels[present]), torch.from_numpy(index)
            centred = (torch.from_numpy(cells.values) - response.gene_mean).where(measured[index], 0.0)
            factors[side] = response.encode(centred, measured, index).single
        target = factors["target"].turned(root)
        familiarity.source[pairing, : len(rows)] = factors["source"].mean
        familiarity.target[pairing, : len(rows)] = target.mean
        familiarity.logits[pairing, : len(rows)] = 0.0
        covariances.append(target.covariance.mean(0))
    if covariances:
        familiarity.covariance.copy_(torch.stack(covariances).mean(0))


@torch.inference_mode()
def choose_width(
    model: GppcForPerturbationPrediction, validation: PairDataset, panels: np.ndarray, rows: np.ndarray
) -> None:
    """Chooses how near a reference has to be: the least width at which half of the validation sources find company."""
    familiarity = model.model.linear_response.familiarity
    familiarity.prior_logit.fill_(FAMILIAR_LOG_ODDS)
    found = np.full(len(model.config.pairings), False)
    for width in REFERENCE_WIDTHS:
        familiarity.width[torch.from_numpy(~found)] = width
        company = []
        for _, encoded in encoded_batches(model, validation, rows, panels):
            weights = encoded.factors.reference_weights
            company.append(weights.mul(2).logsumexp(1).neg().exp().view(-1, len(found)))
        found |= torch.cat(company).median(0).values.numpy() >= COMPANY
