"""Pair rows -> tensors: redrawn perturbations, padded tokens, labels without what was imposed."""

import numpy as np
import scipy.sparse as sp
import torch

from data_scripts.batches.pair_dataset import PairRows, pad
from data_scripts.batches.row_generator import RowGenerator
from data_scripts.pairs.pair_options import PerturbationOptions
from data_scripts.pairs.perturbation_sampling import draw_imposed

ATTEMPTS = 4  # places drawn for each gene that may be imposed, before all candidates of a row are listed
IGNORED_LABEL = -100.0
ZERO_SHARE = 0.05  # how often a gene that no target of a batch expresses is queried, beside one that all express


class PairCollator:
    """
    Builds model inputs from pair rows.

    Args:
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        redraw (`PerturbationOptions`, *optional*): Draw the imposed genes anew in every epoch; defaults to those
            stored in the rows.
        seed (`int`, *optional*, defaults to 0): Seed of the redrawing and of the queried genes.
        n_query_genes (`int`, *optional*): Predict only so many genes, drawn for each batch: those that its targets
            express most likely, of the others a share; `label_weights` make the expected loss that of all genes.
            Defaults to all.
    """

    def __init__(
        self,
        panels: np.ndarray,
        redraw: PerturbationOptions | None = None,
        seed: int = 0,
        n_query_genes: int | None = None,
    ):
        self.panels = np.asarray(panels, dtype=bool)
        self.redraw = redraw
        self.seed = seed
        self.n_query_genes = n_query_genes
        self._all_measured = self.panels.all(1)

    def __call__(self, rows: PairRows) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict` with `input_ids`, `expression_values`, `attention_mask` `(B, N)`; `measured_mask` `(P', V)` and
            `panel_index` `(B,)` over the panels of this batch; `perturbation_ids`, `perturbation_values`,
            `perturbation_mask` `(B, K)`; `pairing_ids` `(B,)`; `labels` `(B, Q)`, -100 at genes that the target did
            not measure and at imposed genes; `query_ids` and `label_weights` `(Q,)` if only some genes are predicted.
        """
        n_genes = self.panels.shape[1]
        labels = self._labels(rows)
        if self.redraw is None:
            ids, changes, mask = pad(*rows.lists["perturbation"])
        else:
            ids, changes, mask = self._redrawn(rows)
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
            _, target_ids, _ = rows.lists["target"]
            expressed = np.bincount(target_ids, minlength=n_genes) / max(len(rows), 1)
            queries, chance = draw_queries(expressed, self.n_query_genes, generator)
            n_scored = np.count_nonzero(labels != IGNORED_LABEL)
            batch["labels"] = labels[:, queries]
            # The loss is divided by the number of scored labels; what is wanted is the mean over all of them.
            share = np.count_nonzero(batch["labels"] != IGNORED_LABEL) / max(n_scored, 1)
            batch["label_weights"] = (share / chance).astype(np.float32)
            batch["query_ids"] = queries
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def _redrawn(self, rows: PairRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Imposed genes drawn anew, as `(B, K)` arrays of ids, changes and mask; a row's draws depend on it alone."""
        cells = []
        for lengths, ids, values in (rows.lists["source"], rows.lists["target"]):
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            cells.append(sp.csr_matrix((values, ids, offsets), shape=(len(rows), self.panels.shape[1])))
        row, gene, change, _ = draw_imposed(
            *cells,
            self.panels,
            rows.panels["source_panel"],
            rows.panels["target_panel"],
            self.redraw,
            RowGenerator(self.seed, rows.epoch, rows.rows),
            ATTEMPTS * self.redraw.max_genes,
            lambda left: RowGenerator(self.seed + 1, rows.epoch, rows.rows[left]),
        )
        return pad(np.bincount(row, minlength=len(rows)), gene, change, width=self.redraw.max_genes)

    def _labels(self, rows: PairRows) -> np.ndarray:
        """Values of the targets, -100 where not measured, float32 of shape `(B, V)`."""
        lengths, ids, values = rows.lists["target"]
        panel = rows.panels["target_panel"]
        n_genes = self.panels.shape[1]
        labels = np.zeros((len(lengths), n_genes), dtype=np.float32)
        labels.ravel()[np.repeat(np.arange(len(lengths)) * n_genes, lengths) + ids] = values
        for row in np.flatnonzero(~self._all_measured[panel]).tolist():
            np.copyto(labels[row], IGNORED_LABEL, where=~self.panels[panel[row]])
        return labels


def draw_queries(expressed: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws `n` genes without replacement; returns genes and chances. Systematic sampling: a chance is in proportion
    to `expressed`, the share of the targets that express the gene, plus `ZERO_SHARE`, and at most 1."""
    size = expressed + ZERO_SHARE
    certain = np.zeros(len(size), dtype=bool)
    while True:
        left = n - np.count_nonzero(certain)
        chance = np.where(certain, 1.0, size * (left / size[~certain].sum()))
        more = (chance >= 1.0) & ~certain
        if not more.any():
            break
        certain |= more
    open_genes = np.flatnonzero(~certain)
    ends = np.cumsum(chance[open_genes])
    # One point in each interval of length 1: no gene's interval, all below 1, holds two of them.
    places = np.searchsorted(ends, (rng.random() + np.arange(left)) * (ends[-1] / max(left, 1)), side="right")
    genes = np.sort(np.concatenate([np.flatnonzero(certain), open_genes[np.minimum(places, len(open_genes) - 1)]]))
    return genes, chance[genes]
