"""A GPPC model as a predictor of pairs: dense pairs in, means and variances out."""

from collections.abc import Callable

import numpy as np
import torch

from modeling_gppc.evaluation.pair_arrays import PairArrays


def model_predictor(
    model, batch_size: int = 256
) -> Callable[[PairArrays], np.ndarray | tuple[np.ndarray, np.ndarray]]:
    """A function that returns means, and variances where the model has them, of every gene of targets, each `(n, V)`;
    puts the model into evaluation mode."""
    model.eval()

    @torch.inference_mode()
    def predict(pairs: PairArrays) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        means, variances = [], []
        for batch in pairs.batches(batch_size):
            output = model(**_inputs(model, batch))
            means.append(output.logits.float().cpu().numpy())
            if output.logvar is not None:
                variances.append(output.logvar.float().exp().cpu().numpy())
        return (np.concatenate(means), np.concatenate(variances)) if variances else np.concatenate(means)

    return predict


def _inputs(model, pairs: PairArrays) -> dict[str, torch.Tensor]:
    """Model inputs of some pairs, on the model's device."""
    panels, panel_index = np.unique(pairs.source_panel, return_inverse=True)
    expressed = pairs.source != 0
    width = max(int(expressed.sum(axis=1).max(initial=0)), 1)
    order = np.argsort(~expressed, axis=1, kind="stable")[:, :width]
    attention = np.take_along_axis(expressed, order, axis=1)
    pairings = list(model.config.pairings)
    names = [name if name in pairings else model.config.default_pairing for name in pairs.pairing]
    arrays = {
        "input_ids": np.where(attention, order, 0),
        "expression_values": np.where(attention, np.take_along_axis(pairs.source, order, axis=1), 0),
        "attention_mask": attention.astype(np.int64),
        "measured_mask": pairs.panels[panels],
        "panel_index": panel_index,
        "perturbation_ids": pairs.revealed_ids.astype(np.int64),
        "perturbation_values": pairs.revealed_changes.astype(np.float32),
        "perturbation_mask": pairs.revealed_mask.astype(np.int64),
        "pairing_ids": np.array([pairings.index(name) for name in names], dtype=np.int64),
    }
    device = next(model.parameters()).device
    return {name: torch.as_tensor(array, device=device) for name, array in arrays.items()}
