"""Options of reading a CRISPR screen, and the column names that the usual collections use."""

import dataclasses
from collections.abc import Sequence

from modeling_gppc.normalization_gppc import close_matches

# Names by which the usual collections (scPerturb, pertpy, cell-eval, GEARS, Census) call their columns, best first.
STANDARD_COLUMNS = {
    "perturbation": (
        "perturbation",
        "perturbation_name",
        "target_gene",
        "target",
        "gene",
        "gene_target",
        "condition",
        "guide_target",
        "sgRNA_target",
        "gene_name",
        "treatment",
    ),
    "batch": ("batch", "batch_var", "gem_group", "gemgroup", "replicate", "sample", "lane", "donor_id"),
    "cell_line": ("cell_line", "cell_type", "celltype", "cellline"),
    "modality": ("perturbation_type", "modality", "crispr_type"),
    "library_size": ("n_counts_full", "total_counts_full", "ncounts_full"),
    "n_expressed": ("n_genes_full", "ngenes_full"),
    "p_mito": ("p_mito", "percent_mito", "pct_counts_mt", "percent.mt"),
}


@dataclasses.dataclass
class ScreenOptions:
    """How to read a screen.

    Args:
        perturbation_column, batch_column, cell_line_column, library_size_column (`str`, *optional*): Columns of `obs`;
            found by their standard names when absent.
        symbol_column (`str`, *optional*): Column of `var` with symbols; `symbol`, `gene_symbol`, `gene_name` or
            `feature_name` is taken when absent, else the index.
        control_labels (`list[str]`, *optional*): Labels of control cells; found by their usual words when absent.
        layer (`str`, *optional*): Layer with the values; `X` when absent.
        value_kind (`str`, *optional*, defaults to `"counts"`): `"counts"`, or `"log"` for values that are normalised
            log values already. Never guessed.
        target_sum (`float`, *optional*, defaults to 10,000): See `normalize_counts`.
        label_genes (`dict[str, str]`, *optional*): Perturbation label -> gene (or `A+B`) that it stands for, e.g. for
            enhancers or cytokines.
        guide_efficiency (`dict[str, float]`, *optional*): Share of a target's expression that its guides remove,
            stated by the user; used only where the change cannot be measured.
        min_cells (`int`, *optional*, defaults to 10): Perturbations with fewer cells are set aside.
        max_cells (`int`, *optional*): At most so many cells a label, drawn with `seed`.
        seed (`int`, *optional*, defaults to 0): Of that draw.
    """

    perturbation_column: str | None = None
    batch_column: str | None = None
    cell_line_column: str | None = None
    library_size_column: str | None = None
    symbol_column: str | None = None
    control_labels: list[str] | None = None
    layer: str | None = None
    value_kind: str = "counts"
    target_sum: float = 10_000.0
    label_genes: dict[str, str] = dataclasses.field(default_factory=dict)
    guide_efficiency: dict[str, float] = dataclasses.field(default_factory=dict)
    min_cells: int = 10
    max_cells: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.value_kind not in ("counts", "log"):
            raise ValueError(f"`value_kind` is {self.value_kind!r}; wanted 'counts' or 'log'.")
        if self.min_cells < 2:
            raise ValueError(
                f"`min_cells` is {self.min_cells}; a mean of fewer than 2 cells has no error: wanted >= 2."
            )
        for gene, share in self.guide_efficiency.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`guide_efficiency` of `{gene}` is {share}; wanted a share between 0 and 1.")


def find_column(names: Sequence[str], kind: str, given: str | None, required: bool = False) -> str | None:
    """Column of a kind: the one given, or the first of its standard names that is there (case does not matter).

    Raises:
        ValueError: If the given column, or a required one, is not there.
    """
    names = [str(name) for name in names]
    if given is not None:
        if given not in names:
            raise ValueError(f"`{kind}_column` {given!r} is not a column of obs{close_matches(given, names)}.")
        return given
    folded = {name.casefold(): name for name in reversed(names)}
    for standard in STANDARD_COLUMNS[kind]:
        if standard.casefold() in folded:
            return folded[standard.casefold()]
    if required:
        wanted = ", ".join(STANDARD_COLUMNS[kind][:6])
        raise ValueError(f"`{kind}_column` is not given and obs has none of {wanted}{close_matches(wanted, names)}.")
    return None
