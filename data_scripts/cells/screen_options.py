"""Options of reading a CRISPR screen."""

import dataclasses
from typing import Annotated

from data_scripts.cells.read_options import ReadOptions
from data_scripts.options import Count, Positive, Range, Seed, Share, check_numbers


@dataclasses.dataclass
class ScreenOptions(ReadOptions):
    """
    How to read a screen.

    Args:
        perturbation_column (`str`, *optional*): Column of obs with the label of each cell.
        batch_column (`str`, *optional*): Column of obs with batches.
        cell_line_column (`str`, *optional*): Column of obs with cell lines.
        control_labels (`list[str]`, *optional*): Labels of control cells; found by their usual words when absent.
        target_sum (`float`, *optional*, defaults to 10,000): See `normalize_counts`.
        label_genes (`dict[str, str]`, *optional*): Gene (or `A+B`) that a label stands for, e.g. for enhancers or
            cytokines.
        guide_efficiency (`dict[str, float]`, *optional*): Share of a target's expression that its guides remove, stated
            by the user. It is used only where the change cannot be measured.
        min_cells (`int`, *optional*, defaults to 10): Perturbations with fewer cells are set aside.
        max_cells (`int`, *optional*): At most so many cells a label, drawn with `seed`.
        seed (`int`, *optional*, defaults to 0): Of that draw.
    """

    perturbation_column: str | None = None
    batch_column: str | None = None
    cell_line_column: str | None = None
    control_labels: list[str] | None = None
    target_sum: Positive = 10_000.0
    label_genes: dict[str, str] = dataclasses.field(default_factory=dict)
    guide_efficiency: dict[str, Share] = dataclasses.field(default_factory=dict)
    min_cells: Annotated[int, Range(2)] = 10  # a mean of fewer has no error
    max_cells: Count | None = None
    seed: Seed = 0

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self)
