"""How a model is fitted on a CRISPR screen."""

import dataclasses
from typing import Annotated

from data_scripts.options import Count, NotNegative, Range, Seed, check_numbers

REPLICATES = ("batch", "cell_line")
CONTROLS = ("disjoint", "shared")


@dataclasses.dataclass
class ScreenFitOptions:
    """
    How a model is fitted on a screen.

    Args:
        max_genes (`int`, *optional*, defaults to 2,000): Most variable genes *among controls* that are kept, targets
            always among them.
        gene_features (`str`, *optional*): Table of what is known of genes, e.g. annotation: two columns, gene and
            term, or one row of numbers a gene. Genes of the table may then be asked about.
        n_factors (`int`, *optional*): Factors of the control cells; chosen by held-out likelihood when absent.
        hold_targets (`float`, *optional*, defaults to 0.1): How firmly the screen's other targets are kept at the
            controls' level while one is changed: 0 not at all, 1 as firmly as a measurement. Where the panel holds the
            network's regulators, and they correlate without acting on each other, that takes most of the confounding
            away; where targets act through each other it hides what they do.
        replicates (`str`, *optional*, defaults to `"batch"`): What replicates of a perturbation differ in, `"batch"` or
            `"cell_line"`; the spread between them is the uncertainty of a response that was seen.
        controls (`str`, *optional*, defaults to `"disjoint"`): What is chosen by leaving perturbations out, and scored, is
            measured from control cells that nothing was fitted on (`"disjoint"`). `"shared"` is the form of the
            literature: one mean of all controls on both sides, whose error passes for signal; only for comparison.
        divisions (`int`, *optional*, defaults to 3): Divisions of the controls in halves, each used in both directions.
        seed (`int`, *optional*, defaults to 0): Everything random.
    """

    max_genes: Annotated[int, Range(10)] = 2_000
    gene_features: str | None = None
    n_factors: Count | None = None
    hold_targets: NotNegative = 0.1
    replicates: str = "batch"
    controls: str = "disjoint"
    divisions: Count = 3
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        for name, wanted in (("replicates", REPLICATES), ("controls", CONTROLS)):
            if getattr(self, name) not in wanted:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; wanted one of {', '.join(wanted)}.")
