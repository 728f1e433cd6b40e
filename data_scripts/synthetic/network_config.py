"""Options of the synthetic cells."""

from dataclasses import dataclass

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
    n_genes: int = 200
    n_regulators: int = 10
    n_cell_types: int = 32
    n_donors: int = 150
    n_datasets: int = 3
    n_cells: int = 12_000
    measured_share: float = 0.8
    regulator_measured_share: float = 0.95
    type_scale: float = 1.0
    donor_scale: float = 0.6
    dataset_scale: float = 0.05
    within_scale: float = 0.7
    target_scale: float = 1.5
    noise_scale: float = 0.8
    coupling: float = 0.4
    switching_share: float = 0.4
    library_mean: float | None = None
    library_spread: float = 0.35
    rate_spread: float = 1.2
    dispersion: float = 0.1
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(
                f"`form` is {self.form!r}; wanted one of {', '.join(FORMS)}{close_matches(self.form, FORMS)}"
            )
        minimum = {"n_genes": 3, "n_regulators": 2, "n_cell_types": 1, "n_donors": 1, "n_datasets": 1, "n_cells": 2}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted at least {least}.")
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
        for name in ("measured_share", "regulator_measured_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted a share above 0 and up to 1.")
        if not 0 <= self.switching_share <= 1:
            raise ValueError(f"`switching_share` is {self.switching_share}; wanted a share between 0 and 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}; wanted a share from 0 to below 1.")
        for name in ("within_scale", "target_scale", "noise_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted a standard deviation above 0.")
        for name in ("type_scale", "donor_scale", "dataset_scale", "library_spread", "rate_spread", "dispersion"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; wanted 0 or more.")
        if self.library_mean is not None and not self.library_mean > 0:
            raise ValueError(f"`library_mean` is {self.library_mean}; wanted a number of molecules above 0.")

    @property
    def mean_library(self) -> float:
        """Mean molecules of a cell, the default resolved."""
        return self.library_mean or 1_000.0 * (self.n_genes / 300.0) ** 0.255
