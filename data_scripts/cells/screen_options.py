"""Options of reading a CRISPR screen."""

import dataclasses

from data_scripts.cells.read_options import ReadOptions


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
    target_sum: float = 10_000.0
    label_genes: dict[str, str] = dataclasses.field(default_factory=dict)
    guide_efficiency: dict[str, float] = dataclasses.field(default_factory=dict)
    min_cells: int = 10
    max_cells: int | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.min_cells < 2:
            raise ValueError(
                f"`min_cells` is {self.min_cells}; a mean of fewer than 2 cells has no error: wanted >= 2."
            )
        for gene, share in self.guide_efficiency.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`guide_efficiency` of `{gene}` is {share}; wanted a share between 0 and 1.")
