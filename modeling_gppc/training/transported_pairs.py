"""Training pairs that were never measured: a cell with the response of a cell like it, carried over."""

import copy

import numpy as np
import scipy.sparse as sp
import torch

from data_scripts.pair_options import PerturbationOptions
from data_scripts.perturbation_sampling import sample_from_changes
from modeling_gppc.linear_response_gppc import GppcLinearResponse
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.training.arguments import TrainingOptions
from modeling_gppc.training.data_collator import IGNORED_LABEL, PairCollator
from modeling_gppc.training.pair_dataset import PairDataset, PairRows, pad, scatter
from modeling_gppc.training.row_generator import RowGenerator

# Pairs whose response may be carried over, and how many of them are looked at for each row.
DONORS = 20_000
CANDIDATES = 256
# Draws of rows that are transported do not repeat those of their revealed genes.
SEED_OFFSET = 7_919


class TransportedPairs:
    """
    Pairs whose response is carried over to other cells of the same pairing.

    The target of a donor pair (A', B') becomes one of the cell A: B = B' - E[B' | A'] + E[B | A], both expectations from
    the linear response with nothing imposed. A donor is likely in proportion to `exp(-d^2 / 2 width)`, d the distance
    between the factors of A and A' in units of what is typical for two cells. The network then sees a type of cell
    with responses that only other types showed, most of all those like it, and what it learns about large changes is
    not bound to the types that had them.

    Args:
        response ([`GppcLinearResponse`]): Fitted in closed form; copied.
        dataset ([`PairDataset`]): Training pairs.
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`.
        options ([`PerturbationOptions`]): How many genes are revealed and which.
        allowed (`np.ndarray` of bool, *optional*): Genes that may be revealed, shape `(V,)`.
        width (`float`, *optional*, defaults to 0.1): How far away a donor may be.
        seed (`int`, *optional*, defaults to 0): Of the choice of donors.
    """

    def __init__(
        self,
        response: GppcLinearResponse,
        dataset: PairDataset,
        panels: np.ndarray,
        options: PerturbationOptions,
        allowed: np.ndarray | None = None,
        width: float = 0.1,
        seed: int = 0,
    ):
        self.response = copy.deepcopy(response).cpu()
        self.dataset, self.panels, self.options, self.width, self.seed = dataset, panels, options, width, seed
        self.source_panel = dataset.table.column("source_panel").to_numpy()
        self.target_panel = dataset.table.column("target_panel").to_numpy()
        self.allowed = np.ones(panels.shape[1], dtype=bool) if allowed is None else allowed
        rng = np.random.default_rng(seed)
        self.scale = self.response.loadings.norm(dim=0).numpy()
        self.donors: list[np.ndarray] = []
        self.place: list[np.ndarray] = []
        self.typical = 1e-12
        for pairing in range(len(self.response.coupling)):
            rows = np.flatnonzero(dataset.pairing_ids == pairing)
            rows = np.sort(rng.choice(rows, min(len(rows), DONORS), replace=False))
            places = [
                self._expected(*self._cells(rows[start : start + 2_048]))[0] for start in range(0, len(rows), 2_048)
            ]
            place = np.concatenate(places) if places else np.zeros((0, len(self.scale)), np.float32)
            self.donors.append(rows)
            self.place.append(place)
            if len(rows):
                other = place[rng.permutation(len(place))]
                self.typical = max(self.typical, float(np.median(((place - other) ** 2).sum(axis=1))))

    def _cells(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values of the sources over the vocabulary, their panels and their pairings."""
        values = self.dataset.dense_cells("source", rows, self.panels.shape[1])
        return values, self.source_panel[rows], self.dataset.pairing_ids[rows]

    @torch.inference_mode()
    def _expected(self, values: np.ndarray, panel: np.ndarray, pairing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where cells lie in the space of the scaled factors, and the factors expected in their pairing, `(n, r)`."""
        response, n = self.response, len(values)
        used, index = np.unique(panel, return_inverse=True)
        measured = torch.from_numpy(self.panels[panel])
        centred = torch.where(measured, torch.from_numpy(values) - response.gene_mean, torch.zeros(()))
        logits, mean, residual, covariance = response.encode(
            centred, torch.from_numpy(self.panels[used]), torch.from_numpy(index.ravel())
        )
        nothing = torch.zeros(n, 0)
        _, expected, _ = response.condition(
            logits, residual, covariance, torch.from_numpy(pairing), nothing.long(), nothing, nothing
        )
        return mean.numpy() * self.scale, expected.numpy()

    def __call__(self, rows: PairRows, values: np.ndarray, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """
        Args:
            rows ([`PairRows`]): A batch.
            values (`np.ndarray`): Values of its sources over the vocabulary, shape `(B, V)`.
            chosen (`np.ndarray`): Positions in the batch of the rows that get another cell's response, shape `(n,)`.

        Returns:
            `labels` `(n, V)`, -100 where not measured or revealed, and revealed genes `ids`, `changes`, `mask` `(n, K)`.
        """
        pairing, panel = rows.pairing_ids[chosen], rows.panels["source_panel"][chosen]
        place, expected = self._expected(values[chosen], panel, pairing)
        donors = self._choose(rows, chosen, place)
        before, donor_panel, _ = self._cells(donors)
        after = self.dataset.dense_cells("target", donors, self.panels.shape[1])
        target_measured = self.panels[self.target_panel[donors]]
        shift = (expected - self._expected(before, donor_panel, pairing)[1]) @ self.response.loadings.numpy().T
        target = after + shift.astype(np.float32)
        # Genes that the donor pair shows to differ; where the two cells agree, nothing says that they respond.
        usable = target_measured & self.panels[donor_panel] & self.panels[panel] & self.allowed
        changes = sp.csr_matrix(np.where(usable, after - before, 0))
        generator = RowGenerator(self.seed + 3 * SEED_OFFSET, rows.epoch, rows.rows[chosen])
        offsets, ids, _ = sample_from_changes(changes, generator, self.options)
        lengths = np.diff(offsets)
        row = np.repeat(np.arange(len(chosen)), lengths)
        revealed = target[row, ids] - values[chosen][row, ids]
        ids, changes, mask = pad(lengths, ids, revealed.astype(np.float32), width=self.options.max_genes)
        labels = np.where(target_measured, target, np.float32(IGNORED_LABEL))
        row, column = np.nonzero(mask)
        labels[row, ids[row, column]] = IGNORED_LABEL
        return {"labels": labels, "ids": ids, "changes": changes, "mask": mask}

    def _choose(self, rows: PairRows, chosen: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Rows of the data set whose responses are carried over to cells at `place`, shape `(n,)`."""
        generator = RowGenerator(self.seed + SEED_OFFSET, rows.epoch, rows.rows[chosen])
        picks, choice = generator.random((len(chosen), CANDIDATES)), generator.random(len(chosen))
        pairing = rows.pairing_ids[chosen]
        donors = np.empty(len(chosen), dtype=np.int64)
        for which in np.unique(pairing):
            part = np.flatnonzero(pairing == which)
            candidates = (picks[part] * len(self.donors[which])).astype(np.int64)
            distance = ((self.place[which][candidates] - place[part, None]) ** 2).sum(axis=2)
            energy = distance / (2 * self.width * self.typical)
            weights = np.exp(energy.min(axis=1, keepdims=True) - energy).cumsum(axis=1)
            nth = (weights < choice[part, None] * weights[:, -1:]).sum(axis=1)
            donors[part] = self.donors[which][candidates[np.arange(len(part)), nth]]
        return donors


def transporting(
    collate: PairCollator, model: GppcForPerturbationPrediction, dataset: PairDataset, options: TrainingOptions
):
    """The collator of training rows: with transported pairs among them if `options` ask for any.

    Args:
        collate ([`PairCollator`]): Redraws the revealed genes; one that does not is returned as it is.
        model ([`GppcForPerturbationPrediction`]): After its closed-form start.
        dataset ([`PairDataset`]): Training pairs.
        options ([`TrainingOptions`]): Share and width.
    """
    if options.transported_share == 0 or model.model is None or collate.redraw is None:
        return collate
    transport = TransportedPairs(
        model.model.linear_response,
        dataset,
        collate.panels,
        collate.redraw,
        collate.allowed,
        width=options.transported_width,
        seed=collate.seed,
    )
    return TransportCollator(collate, transport, options.transported_share)


class TransportCollator:
    """
    A collator that replaces the target of some rows by a transported one.

    Which rows, and by what, depends on the seed, the epoch and the row alone, as everything a row draws.

    Args:
        collate ([`PairCollator`]): Builds the batch; redraws the revealed genes.
        transport ([`TransportedPairs`]): Where responses come from.
        share (`float`): Share of the rows.
    """

    def __init__(self, collate: PairCollator, transport: TransportedPairs, share: float):
        self.collate, self.transport, self.share = collate, transport, share

    def __call__(self, rows: PairRows | list[PairRows]) -> dict[str, torch.Tensor]:
        """As [`PairCollator`]."""
        batch = self.collate(rows)
        rows = rows[0] if isinstance(rows, list) else rows
        drawn = RowGenerator(self.transport.seed + 2 * SEED_OFFSET, rows.epoch, rows.rows).random(len(rows))
        chosen = np.flatnonzero(drawn < self.share)
        if not len(chosen):
            return batch
        values = scatter(*rows.lists["source"], self.transport.panels.shape[1])
        replaced = self.transport(rows, values, chosen)
        index = torch.from_numpy(chosen)
        labels = torch.from_numpy(replaced["labels"])
        batch["labels"][index] = labels if "query_ids" not in batch else labels[:, batch["query_ids"]]
        for name, key in (("ids", "ids"), ("changes", "values"), ("mask", "mask")):
            batch[f"perturbation_{key}"][index] = torch.from_numpy(replaced[name]).to(
                batch[f"perturbation_{key}"].dtype
            )
        return batch
