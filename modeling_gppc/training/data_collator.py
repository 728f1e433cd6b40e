"""Pair rows -> tensors: redrawn perturbations, padded tokens, labels without what was revealed."""

import numpy as np
import torch

from data_scripts.pair_options import PerturbationOptions
from data_scripts.perturbation_sampling import sample_perturbations
from modeling_gppc.training.pair_dataset import PairRows, pad, scatter
from modeling_gppc.training.row_generator import RowGenerator

IGNORED_LABEL = -100.0


class PairCollator:
    """
    Builds model inputs from pair rows.

    Args:
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        redraw (`PerturbationOptions`, *optional*): Draw the revealed genes anew in every epoch; defaults to those
            stored in the rows.
        allowed (`np.ndarray` of bool, *optional*): Genes that may be revealed, shape `(V,)`.
        seed (`int`, *optional*, defaults to 0): Seed of the redrawing and of the queried genes.
        n_query_genes (`int`, *optional*): Predict only so many genes, drawn uniformly for each batch, so that the cost
            of the read-out does not grow with the vocabulary; the expected loss is the same. Defaults to all.
    """

    def __init__(
        self,
        panels: np.ndarray,
        redraw: PerturbationOptions | None = None,
        allowed: np.ndarray | None = None,
        seed: int = 0,
        n_query_genes: int | None = None,
    ):
        self.panels = np.asarray(panels, dtype=bool)
        self.redraw = redraw
        self.allowed = allowed
        self.seed = seed
        self.n_query_genes = n_query_genes

    def __call__(self, rows: PairRows | list[PairRows]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict` with `input_ids`, `expression_values`, `attention_mask` `(B, N)`; `measured_mask` `(P', V)` and
            `panel_index` `(B,)` over the panels of this batch; `perturbation_ids`, `perturbation_values`,
            `perturbation_mask` `(B, K)`; `pairing_ids` `(B,)`; `labels` `(B, Q)`, -100 at genes that the target did
            not measure and at revealed genes; `query_ids` `(Q,)` if only some genes are predicted.
        """
        if isinstance(rows, list):
            if len(rows) != 1:
                raise ValueError(
                    f"`rows` holds {len(rows)} batches; wanted one: the data set hands out whole batches."
                )
            rows = rows[0]
        n_genes = self.panels.shape[1]
        target = scatter(*rows.lists["target"], n_genes)
        target_measured = self.panels[rows.panels["target_panel"]]
        if self.redraw is None:
            ids, changes, mask = pad(*rows.lists["perturbation"])
        else:
            source = scatter(*rows.lists["source"], n_genes)
            both = target_measured & self.panels[rows.panels["source_panel"]]
            generator = RowGenerator(self.seed, rows.epoch, rows.rows)
            ids, changes, mask = sample_perturbations(source, target, both, generator, self.redraw, self.allowed)
        labels = np.where(target_measured, target, np.float32(IGNORED_LABEL))
        row, column = np.nonzero(mask)
        labels[row, ids[row, column]] = IGNORED_LABEL
        input_ids, values, attention_mask = pad(*rows.lists["source"])
        panels, panel_index = np.unique(rows.panels["source_panel"], return_inverse=True)
        batch = {
            "input_ids": input_ids,
            "expression_values": values,
            "attention_mask": attention_mask,
            "measured_mask": self.panels[panels],
            "panel_index": panel_index.astype(np.int64),
            "perturbation_ids": ids,
            "perturbation_values": changes,
            "perturbation_mask": mask,
            "pairing_ids": rows.pairing_ids,
            "labels": labels,
        }
        if self.n_query_genes is not None and self.n_query_genes < n_genes:
            generator = np.random.default_rng([self.seed, rows.epoch, int(rows.rows.sum())])
            queries = np.sort(generator.choice(n_genes, self.n_query_genes, replace=False))
            batch["query_ids"] = queries
            batch["labels"] = labels[:, queries]
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
