"""Pair rows as dense arrays: what floors are fitted on and every method is scored on."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from data_scripts.batches.pair_dataset import PairDataset, pad, scatter


@dataclasses.dataclass
class PairArrays:
    """Pairs of cells as dense arrays; every field has one entry a pair.

    Args:
        source, target (`np.ndarray`): Normalised values, zero where not measured, float32 of shape `(n, V)`.
        source_panel, target_panel (`np.ndarray`): Rows of `panels`, shape `(n,)`.
        panels (`np.ndarray` of bool): Measured-gene sets, shape `(P, V)`; shared by all pairs.
        revealed_ids, revealed_changes, revealed_mask (`np.ndarray`): Imposed genes, the change of their log value
            from source to target and whether the entry is real; shape `(n, K)`.
        pairing, cell_type, target_cell_type, dataset, donor (`np.ndarray` of str): Shape `(n,)`; `cell_type` and
            `donor` are the source's.
        source_id, target_id (`np.ndarray`): Join ids of the cells, shape `(n,)`.
    """

    source: np.ndarray
    target: np.ndarray
    source_panel: np.ndarray
    target_panel: np.ndarray
    panels: np.ndarray
    revealed_ids: np.ndarray
    revealed_changes: np.ndarray
    revealed_mask: np.ndarray
    pairing: np.ndarray
    cell_type: np.ndarray
    target_cell_type: np.ndarray
    dataset: np.ndarray
    donor: np.ndarray
    source_id: np.ndarray
    target_id: np.ndarray

    @classmethod
    def from_table(cls, table: pa.Table, panels: np.ndarray) -> "PairArrays":
        """Reads rows in `PAIR_SCHEMA`; the result takes 8 bytes a gene and row."""
        names = text_column(table, "pairing")
        flat = PairDataset(table, np.unique(names).tolist()).__getitems__(np.arange(table.num_rows))
        source_panel, target_panel = flat.panels["source_panel"], flat.panels["target_panel"]
        lengths, *_ = revealed = flat.lists["perturbation"]
        ids, changes, mask = pad(*revealed, width=int(lengths.max(initial=0)))
        source, target = (scatter(*flat.lists[side], panels.shape[1]) for side in ("source", "target"))
        # What stands at an unmeasured gene is no measurement: it must not reach any floor.
        source[~panels[source_panel]] = 0.0
        target[~panels[target_panel]] = 0.0
        return cls(
            source=source,
            target=target,
            source_panel=source_panel,
            target_panel=target_panel,
            panels=panels,
            revealed_ids=ids,
            revealed_changes=changes,
            revealed_mask=mask.astype(bool),
            pairing=names,
            cell_type=text_column(table, "cell_type"),
            target_cell_type=text_column(table, "target_cell_type"),
            dataset=text_column(table, "dataset_id"),
            donor=text_column(table, "donor_id"),
            source_id=table.column("source_soma_joinid").to_numpy(),
            target_id=table.column("target_soma_joinid").to_numpy(),
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def n_genes(self) -> int:
        """V, the width of the dense arrays."""
        return self.panels.shape[1]

    @property
    def source_measured(self) -> np.ndarray:
        """Bool of shape `(n, V)`."""
        return self.panels[self.source_panel]

    @property
    def target_measured(self) -> np.ndarray:
        """Bool of shape `(n, V)`."""
        return self.panels[self.target_panel]

    @property
    def revealed_levels(self) -> np.ndarray:
        """Log values of the imposed genes in the target, b_S = a_S + delta_S, shape `(n, K)`; zero where padded."""
        levels = np.take_along_axis(self.source, self.revealed_ids, axis=1) + self.revealed_changes
        return np.where(self.revealed_mask, levels, 0.0)

    @property
    def scored(self) -> np.ndarray:
        """Genes that count: measured in the target and not imposed; bool of shape `(n, V)`."""
        scored = self.target_measured
        rows, columns = np.nonzero(self.revealed_mask)
        scored[rows, self.revealed_ids[rows, columns]] = False
        return scored

    def select(self, index: np.ndarray | slice) -> "PairArrays":
        """Some of the pairs; a slice copies nothing."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PairArrays(**{name: value if name == "panels" else value[index] for name, value in fields.items()})

    def without_revealed(self) -> "PairArrays":
        """The same pairs with nothing imposed: what E[B | A] is predicted from."""
        names = ("revealed_ids", "revealed_changes", "revealed_mask")
        return dataclasses.replace(self, **{name: getattr(self, name)[:, :0] for name in names})

    def batches(self, size: int) -> Iterator["PairArrays"]:
        """Consecutive pairs, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.select(slice(start, start + size))


def sample_rows(n_rows: int, at_most: int, seed: int) -> np.ndarray:
    """Ascending row numbers: all of them, or `at_most` drawn without replacement."""
    if n_rows <= at_most:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, at_most, replace=False))


def text_column(table: pa.Table, name: str) -> np.ndarray:
    """A column of text, missing entries as empty text."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    return np.asarray(column.fill_null("").to_pylist(), dtype=str)
