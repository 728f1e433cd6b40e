"""Options of the synthetic cells."""

from dataclasses import dataclass
from typing import Annotated

from data_scripts.options import Count, NotNegative, Positive, Range, Seed, Share, check_numbers
from modeling_gppc.normalization_gppc import close_matches

FORMS = ("linear", "count")


@dataclass(frozen=True)
class SyntheticConfig:
    """
    What the network and its cells look like.

    Args:
        form (`str`, *optional*, defaults to `"linear"`): `linear` (Gaussian log values) or `count` (molecules).
        n_genes (`int`, *optional*, defaults to 200): Regulators included.
        n_regulators (`int`, *optional*, defaults to 10): Size of the latent cell state.
        n_cell_types (`int`, *optional*, defaults to 32): Types occur in every donor.
        n_donors (`int`, *optional*, defaults to 150): Over all data sets; every donor belongs to one data set.
        n_datasets (`int`, *optional*, defaults to 3): Data sets measure different genes.
        n_cells (`int`, *optional*, defaults to 12,000): Over all data sets.
        measured_share (`float`, *optional*, defaults to 0.8): Share of the targets each data set measures.
        regulator_measured_share (`float`, *optional*, defaults to 0.95): Share of the regulators each measures.
        type_scale, donor_scale, dataset_scale, within_scale (`float`, *optional*): Standard deviation a regulator
            owes to its cell type, donor, data set, and to variation within a type.
        target_scale (`float`, *optional*, defaults to 1.5): Standard deviation that regulation gives a target.
        noise_scale (`float`, *optional*, defaults to 0.8): Gene noise of the linear form, independent between genes.
        coupling (`float`, *optional*, defaults to 0.4): Strength of regulators on later regulators.
        switching_share (`float`, *optional*, defaults to 0.4): Share of count-form targets that follow a switch
            (product of two thresholds); the others follow Hill curves.
        library_mean (`float`, *optional*): Mean molecules of a cell; by default 1,000 for 300 genes, growing with the
            number of genes so that about 1,600 of 20,000 are expressed.
        library_spread (`float`, *optional*, defaults to 0.35): Standard deviation of the log library size.
        rate_spread (`float`, *optional*, defaults to 1.2): Standard deviation of the genes' base log rates.
        dispersion (`float`, *optional*, defaults to 0.1): Negative binomial; variance = mean + dispersion x mean^2.
        dropout (`float`, *optional*, defaults to 0.1): Share of the expressed entries that are lost.
        seed (`int`, *optional*, defaults to 0): Same seed, same network and same cells.

    Raises:
        ValueError: Naming the field, the value and what is wanted.
    """

    form: str = "linear"
    n_genes: Annotated[int, Range(3)] = 200
    n_regulators: Annotated[int, Range(2)] = 10
    n_cell_types: Count = 32
    n_donors: Count = 150
    n_datasets: Count = 3
    n_cells: Annotated[int, Range(2)] = 12_000
    measured_share: Annotated[float, Range(0, 1, above=True)] = 0.8
    regulator_measured_share: Annotated[float, Range(0, 1, above=True)] = 0.95
    type_scale: NotNegative = 1.0
    donor_scale: NotNegative = 0.6
    dataset_scale: NotNegative = 0.05
    within_scale: Positive = 0.7
    target_scale: Positive = 1.5
    noise_scale: Positive = 0.8
    coupling: float = 0.4
    switching_share: Share = 0.4
    library_mean: Positive | None = None
    library_spread: NotNegative = 0.35
    rate_spread: NotNegative = 1.2
    dispersion: NotNegative = 0.1
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.1
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        if self.form not in FORMS:
            raise ValueError(
                f"`form` is {self.form!r}; wanted one of {', '.join(FORMS)}{close_matches(self.form, FORMS)}"
            )
        if self.n_regulators >= self.n_genes:
            raise ValueError(
                f"`n_regulators` is {self.n_regulators}; wanted fewer than the {self.n_genes} of `n_genes`, "
                "which counts regulators and targets."
            )
        if self.n_donors < self.n_datasets:
            raise ValueError(
                f"`n_donors` is {self.n_donors}; wanted at least the {self.n_datasets} of `n_datasets`, "
                "because a donor belongs to one data set."
            )

    @property
    def mean_library(self) -> float:
        """Mean molecules of a cell, the default resolved."""
        return self.library_mean or 1_000.0 * (self.n_genes / 300.0) ** 0.255
