"""Pair rows from a screen: control cells beside perturbed ones, or control cells beside each other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_scripts.cells.screens import CONTROL, Screen
from data_scripts.pairs.pair_folder import PairFolder, write_pair_folder
from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA
from modeling_gppc.normalization_gppc import close_matches

# Names of the contexts that the two cells of a pair share.
SCREEN_PAIRING, CONTROL_PAIRING = "screen", "same_type"


def match_controls(screen: Screen, cells: np.ndarray, seed: int) -> np.ndarray:
    """A control cell of the same batch and cell line for every cell, never the cell itself; -1 where there is none."""
    generator = np.random.default_rng(seed)
    group = np.char.add(np.char.add(screen.batch, "\x1f"), screen.cell_line)
    controls = np.flatnonzero(screen.is_control)
    partner = np.full(len(cells), -1)
    for name in np.unique(group[cells]):
        rows, pool = np.flatnonzero(group[cells] == name), controls[group[controls] == name]
        if len(pool) < 2:
            continue
        partner[rows] = pool[generator.integers(0, len(pool), len(rows))]
        own = partner[rows] == cells[rows]
        position = np.searchsorted(pool, partner[rows][own])
        partner[rows[own]] = pool[(position + 1) % len(pool)]
    return partner


def screen_pair_table(
    screen: Screen,
    labels: Sequence[str],
    *,
    pairs_per_cell: int = 1,
    max_revealed: int = 5,
    seed: int = 0,
    join_ids: np.ndarray | None = None,
) -> pa.Table:
    """Pairs whose target carries one of `labels` and whose source is a control of the same batch and cell line.

    For a perturbation the revealed genes are its measured targets, with the change from this source to this target.
    For `control`, up to `max_revealed` genes that differ between the two control cells. `join_ids` `(n_obs,)` tells
    cells apart in tables of several parts of a screen; rows of the screen when absent.

    Raises:
        ValueError: If a label is not in the screen, or no cell has a control to be paired with.
    """
    known = [CONTROL, *screen.perturbations]
    for label in labels:
        if label not in known:
            raise ValueError(f"`labels` names `{label}`, which is not in the screen{close_matches(label, known)}.")
    generator = np.random.default_rng(seed)
    targets = np.repeat(np.flatnonzero(np.isin(screen.label, list(labels))), pairs_per_cell)
    sources = match_controls(screen, targets, seed)
    targets, sources = targets[sources >= 0], sources[sources >= 0]
    if not len(targets):
        raise ValueError("`screen` has no cell with a control of its own batch and cell line; name the batch column.")
    values = screen.values
    join_ids = np.arange(len(values)) if join_ids is None else join_ids
    revealed = []
    for source, target in zip(sources, targets):
        label = screen.label[target]
        if label == CONTROL:
            differing = np.flatnonzero(values[source] != values[target])
            size = min(int(generator.integers(1, max_revealed + 1)), len(differing))
            genes = np.sort(generator.choice(differing, size, replace=False))
        else:
            genes = screen.perturbations[label].gene_index
            genes = np.sort(genes[genes >= 0])
        revealed.append(genes.astype(np.int32))
    lengths = [len(genes) for genes in revealed]
    rows = np.repeat(np.arange(len(targets)), lengths)
    flat = np.concatenate(revealed) if revealed else np.zeros(0, np.int32)
    changes = values[targets[rows], flat] - values[sources[rows], flat]
    columns = {
        "source_gene_ids": _expressed(values, sources)[0],
        "source_values": _expressed(values, sources)[1],
        "target_gene_ids": _expressed(values, targets)[0],
        "target_values": _expressed(values, targets)[1],
        "source_panel": np.zeros(len(targets), np.int32),
        "target_panel": np.zeros(len(targets), np.int32),
        "perturbation_gene_ids": _lists(lengths, flat, pa.int32()),
        "perturbation_values": _lists(lengths, changes, pa.float32()),
        "pairing": np.where(screen.label[targets] == CONTROL, CONTROL_PAIRING, SCREEN_PAIRING),
        "cell_type": screen.cell_line[sources],
        "target_cell_type": screen.cell_line[targets],
        "dataset_id": np.full(len(targets), screen.name),
        "donor_id": screen.batch[sources],
        "target_donor_id": screen.batch[targets],
        "source_library_size": screen.library_size[sources].astype(np.float32),
        "target_library_size": screen.library_size[targets].astype(np.float32),
        "source_n_expressed": (values[sources] != 0).sum(axis=1).astype(np.int32),
        "target_n_expressed": (values[targets] != 0).sum(axis=1).astype(np.int32),
        "source_soma_joinid": join_ids[sources].astype(np.int64),
        "target_soma_joinid": join_ids[targets].astype(np.int64),
        "is_control": screen.label[targets] == CONTROL,
    }
    arrays = []
    for field in PAIR_SCHEMA:
        value = columns.get(field.name)
        arrays.append(pa.nulls(len(targets), field.type) if value is None else pa.array(value, type=field.type))
    return pa.table(arrays, schema=PAIR_SCHEMA)


def _lists(lengths: Sequence[int], flat: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind))


def _expressed(values: np.ndarray, cells: np.ndarray) -> tuple[pa.Array, pa.Array]:
    rows, genes = np.nonzero(values[cells])
    lengths = np.bincount(rows, minlength=len(cells))
    return _lists(lengths, genes, pa.int32()), _lists(lengths, values[cells][rows, genes], pa.float32())


def write_screen_pairs(path: str | Path, screen: Screen, splits: dict[str, Sequence[str]], **options) -> PairFolder:
    """Writes pairs of a screen as a pairs folder: split name -> labels (`control` for pairs of controls)."""
    return write_split_pairs(path, {name: (screen, labels) for name, labels in splits.items()}, **options)


def write_split_pairs(
    path: str | Path,
    parts: dict[str, tuple[Screen, Sequence[str]]],
    *,
    provenance: dict | None = None,
    pairings: Sequence[str] = (CONTROL_PAIRING, SCREEN_PAIRING),
    **options,
) -> PairFolder:
    """Writes a pairs folder whose splits hold different cells of one screen.

    Args:
        path (`str` or `Path`): The folder.
        parts (`dict[str, tuple[Screen, Sequence[str]]]`): Split name -> its cells and the labels that its targets
            carry. The table of genes describes the cells of `train` alone.
        pairings (`Sequence[str]`, *optional*): Contexts that pairs may share; both by default.
        provenance (`dict`, *optional*): What was read of the screen; `screen` in the manifest, its name when absent.
        **options: Of [`screen_pair_table`].
    """
    screen = parts["train"][0]
    values = screen.values
    genes = pa.table(
        [
            pa.array(screen.gene_ids),
            pa.array(screen.gene_symbols),
            pa.array(np.full(values.shape[1], np.nan), type=pa.float32()),
            pa.array(np.full(values.shape[1], len(values)), type=pa.int64()),
            pa.array((values != 0).sum(axis=0), type=pa.int64()),
            pa.array(np.ones(values.shape[1], dtype=np.int64)),
            pa.array(values.mean(axis=0), type=pa.float32()),
            pa.array(values.var(axis=0), type=pa.float32()),
        ],
        schema=GENE_SCHEMA,
    )
    # A cell has one id in every part, so that splits that share one are seen to.
    names = np.unique(np.concatenate([cells.barcodes for cells, _ in parts.values()]))
    tables = {
        name: screen_pair_table(cells, labels, join_ids=np.searchsorted(names, cells.barcodes), **options)
        for name, (cells, labels) in parts.items()
    }
    return write_pair_folder(
        path,
        tables,
        genes,
        np.ones((1, values.shape[1]), dtype=bool),
        pairings=pairings,
        screen=provenance or screen.name,
    )
