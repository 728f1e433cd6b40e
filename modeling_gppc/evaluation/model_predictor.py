"""A GPPC model as a predictor of pairs: dense pairs in, means and variances out."""

import numpy as np
import torch

from modeling_gppc.evaluation.pair_arrays import PairArrays


class ModelPredictor:
    """
    Calls a model on batches of pairs.

    Args:
        model ([`GppcForPerturbationPrediction`]): The model; put into evaluation mode.
        batch_size (`int`, *optional*, defaults to 256): Pairs a call.
    """

    def __init__(self, model, batch_size: int = 256):
        self.model = model.eval()
        self.batch_size = batch_size
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def __call__(self, pairs: PairArrays) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Means, and variances where the model has them, of every gene of the targets, each `(n, V)`."""
        means, variances = [], []
        for batch in pairs.batches(self.batch_size):
            output = self.model(**self.inputs(batch))
            means.append(output.logits.float().cpu().numpy())
            if output.logvar is not None:
                variances.append(output.logvar.float().exp().cpu().numpy())
        if not variances:
            return np.concatenate(means)
        return np.concatenate(means), np.concatenate(variances)

    def inputs(self, pairs: PairArrays) -> dict[str, torch.Tensor]:
        """Model inputs of some pairs, on the model's device."""
        panels, panel_index = np.unique(pairs.source_panel, return_inverse=True)
        expressed = pairs.source != 0
        width = max(int(expressed.sum(axis=1).max(initial=0)), 1)
        order = np.argsort(~expressed, axis=1, kind="stable")[:, :width]
        attention = np.take_along_axis(expressed, order, axis=1)
        pairings = list(self.model.config.pairings)
        names = [name if name in pairings else self.model.config.default_pairing for name in pairs.pairing]
        arrays = {
            "input_ids": np.where(attention, order, 0),
            "expression_values": np.where(attention, np.take_along_axis(pairs.source, order, axis=1), 0),
            "attention_mask": attention.astype(np.int64),
            "measured_mask": pairs.panels[panels],
            "panel_index": panel_index.ravel(),
            "perturbation_ids": pairs.revealed_ids.astype(np.int64),
            "perturbation_values": pairs.revealed_changes.astype(np.float32),
            "perturbation_mask": pairs.revealed_mask.astype(np.int64),
            "pairing_ids": np.array([pairings.index(name) for name in names], dtype=np.int64),
        }
        return {name: torch.as_tensor(array, device=self.device) for name, array in arrays.items()}
