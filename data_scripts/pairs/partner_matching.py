"""Partners for cells: another cell of the same context, found by whole groups at once."""

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from data_scripts.pairs.pair_options import MatchingOptions

# Why a cell found no partner.
NO_CONTEXT = "context_column_is_empty"
ALONE = "alone_in_context"
FEW_SHARED = "too_few_shared_genes"
REDRAWS = 8  # of a random partner with too few shared genes, before the fitting ones are listed
PROJECTION = 128  # dimensions in which `nearest` and `farthest` compare cells of larger panels


@dataclass
class Pairs:
    """
    Positions of matched cells, index of the pairing that both share, and reason -> cells that found no partner at all.
    """

    source: np.ndarray
    target: np.ndarray
    pairing: np.ndarray
    unpaired: dict[str, int] = field(default_factory=dict)


class _Context:
    """Cells of one pairing sorted by context, so that a group is a range."""

    def __init__(self, groups: np.ndarray, different: np.ndarray | None):
        # Cells that may not be partners of each other form a block: those equal in `different`, else a cell alone.
        block = np.arange(len(groups)) if different is None else different
        blocks = groups * (block.max(initial=0) + 2) + block + 1  # a code of its own for each block of each group
        self.order = np.argsort(blocks, kind="stable")
        self.start, self.size = _ranges(groups, self.order)
        self.block_start, self.block_size = _ranges(blocks, self.order)
        self.others = np.where(groups >= 0, self.size - self.block_size, 0)

    def draw(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A uniformly random other cell of the group for each of `cells`, all of which have one."""
        step = self.block_size[cells] + (rng.random(len(cells)) * self.others[cells]).astype(np.int64)
        offset = (self.block_start[cells] - self.start[cells] + step) % self.size[cells]
        return self.order[self.start[cells] + offset]

    def members(self, cell: int) -> np.ndarray:
        """All cells that may be partners of `cell`, in ascending order."""
        start, size = self.start[cell], self.size[cell]
        own = self.block_start[cell]
        kept = np.concatenate([np.arange(start, own), np.arange(own + self.block_size[cell], start + size)])
        return np.sort(self.order[kept])


def _ranges(codes: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of the run of equal codes, in an order that sorts them, that each cell belongs to."""
    start, end = (np.searchsorted(codes[order], codes, side) for side in ("left", "right"))
    return start, end - start


def match_partners(
    groups: list[np.ndarray],
    different: list[np.ndarray | None],
    panel: np.ndarray,
    shared_genes: np.ndarray,
    options: MatchingOptions,
    rng: np.random.Generator,
    values: sp.csr_matrix | None = None,
) -> Pairs:
    """Finds `pairs_per_cell` partners for every cell, ordered by draw and source.

    Each draw of a cell is given to a pairing, by weight, or else to the next that has a partner for it. `groups` holds
    for every pairing the context of each cell, negative where it is not known, `different` a code that must differ
    between partners; `panel` `(n_cells,)` and `shared_genes` `(n_panels, n_panels)` say how many genes two cells
    share; `nearest` and `farthest` compare `values`.
    """
    n_cells, n_draws = len(panel), options.pairs_per_cell
    contexts = [_Context(group, code) for group, code in zip(groups, different)]
    weights = np.array([pairing.weight for pairing in options.pairings.values()])
    bounds = np.cumsum(weights) / weights.sum()
    # Systematic draws: over a cell's partners each pairing gets its share to within one.
    position = (np.arange(n_draws)[:, None] + rng.random(n_cells)[None, :]) / n_draws
    first = np.minimum(np.searchsorted(bounds, position, side="right"), len(bounds) - 1)
    points = None if options.policy == "random" else _points(values)
    compatible = shared_genes >= options.min_shared_genes
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    has_partner = np.zeros(n_cells, dtype=bool)
    reason = np.zeros(n_cells, dtype=np.int8)  # the furthest that any draw of the cell got
    used = np.zeros((len(contexts), n_cells), dtype=np.int64)
    for draw in range(n_draws):
        target = np.full(n_cells, -1, dtype=np.int64)
        pairing = first[draw].copy()
        for attempt in range(len(contexts)):
            if attempt:
                pairing = np.where(target < 0, (pairing + 1) % len(contexts), pairing)
            for index, context in enumerate(contexts):
                cells = np.flatnonzero((target < 0) & (pairing == index))
                reason[cells] = np.maximum(reason[cells], (groups[index][cells] >= 0).astype(np.int8))
                cells = cells[context.others[cells] > 0]
                reason[cells] = 2
                if options.policy == "random":
                    target[cells] = _random(context, cells, panel, compatible, rng)
                else:
                    target[cells] = _ranked(context, cells, used[index], points, panel, compatible, options.policy)
                    used[index][cells] += 1
        cells = np.flatnonzero(target >= 0)
        has_partner[cells] = True
        found.append((cells, target[cells], pairing[cells]))
    counts = np.bincount(reason[~has_partner], minlength=3)
    unpaired = {name: int(count) for name, count in zip((NO_CONTEXT, ALONE, FEW_SHARED), counts) if count}
    source, target, pairing = (np.concatenate(parts) for parts in zip(*found))
    return Pairs(source, target, pairing, unpaired)


def _random(context, cells, panel, compatible, rng) -> np.ndarray:
    target = context.draw(cells, rng)
    if compatible.all():
        return target
    for _ in range(REDRAWS):
        bad = np.flatnonzero(~compatible[panel[cells], panel[target]])
        if not len(bad):
            return target
        target[bad] = context.draw(cells[bad], rng)
    bad = np.flatnonzero(~compatible[panel[cells], panel[target]])
    # The same cells are partners for a whole block of one panel: list them once.
    keys = np.stack([context.block_start[cells[bad]], panel[cells[bad]]])
    _, inverse = np.unique(keys, axis=1, return_inverse=True)
    by_key = np.argsort(inverse, kind="stable")
    for same in np.split(bad[by_key], np.flatnonzero(np.diff(inverse[by_key])) + 1) if len(bad) else []:
        members = context.members(cells[same[0]])
        members = members[compatible[panel[cells[same[0]]], panel[members]]]
        picks = rng.random(len(same))
        target[same] = members[(picks * len(members)).astype(np.int64)] if len(members) else -1
    return target


def _points(values: sp.csr_matrix) -> np.ndarray:
    """Cells as points whose distances are those of their values: exact for small panels, else randomly projected."""
    if values.shape[1] <= PROJECTION:
        return values.toarray().astype(np.float64)
    projection = np.random.default_rng(0).standard_normal((values.shape[1], PROJECTION)).astype(np.float32)
    return (values @ (projection / np.sqrt(PROJECTION))).astype(np.float64)


def _ranked(context, cells, used, points, panel, compatible, policy, chunk: int = 512) -> np.ndarray:
    """The nearest (farthest) fitting cell of the group that earlier draws did not take; ties go to the first cell."""
    target = np.full(len(cells), -1, dtype=np.int64)
    order = np.argsort(context.start[cells], kind="stable")
    bounds = np.flatnonzero(np.diff(context.start[cells][order])) + 1
    for same in np.split(order, bounds) if len(order) else []:
        start, size = context.start[cells[same[0]]], context.size[cells[same[0]]]
        members = np.sort(context.order[start : start + size])
        norms = (points[members] ** 2).sum(1)
        for part in np.split(same, range(chunk, len(same), chunk)):
            own = cells[part]
            distance = norms[None, :] - 2.0 * points[own] @ points[members].T + (points[own] ** 2).sum(1)[:, None]
            distance = np.round(distance, 9)  # so that equal cells tie whatever the order of the sums
            if policy == "farthest":
                distance = -distance
            blocked = context.block_start[own][:, None] == context.block_start[members][None, :]
            blocked |= ~compatible[panel[own][:, None], panel[members][None, :]]
            distance[blocked] = np.inf
            rank = np.minimum(used[own], size - 1)
            deepest = int(rank.max())
            nearest = np.argsort(distance, axis=1, kind="stable")[:, : deepest + 1] if deepest else None
            pick = nearest[np.arange(len(own)), rank] if deepest else distance.argmin(1)
            good = np.isfinite(distance[np.arange(len(own)), pick])
            target[part[good]] = members[pick[good]]
    return target
