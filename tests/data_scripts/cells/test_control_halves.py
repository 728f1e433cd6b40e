"""Control cells in halves: all of them, none twice, batches and cell lines alike on both sides."""

import numpy as np
import pytest
from tiny_screens import make_adata

from data_scripts.cells.control_halves import control_halves, with_controls
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import read_screen


def a_screen(controls=101, **columns):
    adata = make_adata(("control", "G0", "G1"), n=20, controls=controls)
    for name, values in columns.items():
        adata.obs[name] = values
    return read_screen(adata, ScreenOptions(value_kind="log"))


def test_halves_are_disjoint_whole_and_alike():
    lines = np.where(np.arange(141) % 3 == 0, "x", "y")
    screen = a_screen(cell_line=lines)
    halves = control_halves(screen, divisions=3, seed=1)
    assert len(halves) == 6
    group = np.char.add(screen.batch, screen.cell_line)
    for first, second in halves:
        assert not set(first) & set(second)
        assert sorted([*first, *second]) == np.flatnonzero(screen.is_control).tolist()
        for name in np.unique(group[screen.is_control]):
            assert abs((group[first] == name).sum() - (group[second] == name).sum()) <= 1
    # Both directions of each division, and divisions that differ.
    assert [tuple(a) for a, _ in halves[::2]] == [tuple(b) for _, b in halves[1::2]]
    assert len({tuple(a) for a, _ in halves}) == 6
    assert all(
        np.array_equal(a, b) for one, two in zip(halves, control_halves(screen, 3, 1)) for a, b in zip(one, two)
    )


def test_a_screen_with_some_controls_keeps_its_perturbed_cells():
    screen = a_screen()
    first, _ = control_halves(screen, 1)[0]
    part = with_controls(screen, first)
    assert part.is_control.sum() == len(first) and (~part.is_control).sum() == 40
    assert set(part.barcodes[part.is_control]) == set(screen.barcodes[first])


def test_too_few_controls_are_refused():
    with pytest.raises(ValueError, match="15 control cells; wanted at least 20"):
        control_halves(a_screen(controls=15))
