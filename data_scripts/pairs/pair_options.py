"""Options of `gppc build-pairs`: what to read, which genes, which partners, how many imposed genes, which split."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from data_scripts.options import Count, CountOrZero, Positive, Range, Seed, Share, check_numbers
from data_scripts.pairs.schema import SPLITS
from data_scripts.store.query_options import QueryOptions
from modeling_gppc.normalization_gppc import close_matches


def _check(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {value!r}; wanted {wanted}.")


@dataclass(frozen=True)
class PanelOptions:
    """
    Which genes become the vocabulary; statistics are over the training cells.

    Args:
        rule (`str`, *optional*, defaults to `"common"`): `common` (often measured and expressed), `variable` (highly
            variable within data sets), `all` or `file`.
        n_genes (`int`, *optional*): Keep only so many genes, those with the highest score of the rule.
        min_measured (`float`, *optional*, defaults to 0): Least share of cells that measure the gene.
        min_expressed (`float`, *optional*, defaults to 0): Least share, among the cells that measure it, that express
            it. A gene that no cell measures or expresses is left out by every rule but `all` and `file`.
        dataset_weighting (`str`, *optional*, defaults to `"equal"`): Weight of a data set in a gene's score: `equal`,
            or `cells` (its number of cells).
        file (`str`, *optional*): For `file`: a gene id or symbol a line.
    """

    rule: Literal["common", "variable", "all", "file"] = "common"
    n_genes: Count | None = None
    min_measured: Share = 0.0
    min_expressed: Share = 0.0
    dataset_weighting: Literal["equal", "cells"] = "equal"
    file: str | None = None

    def __post_init__(self):
        check_numbers(self)
        if (self.rule == "file") != (self.file is not None):
            raise ValueError(f"`file` is {self.file!r} with `rule` {self.rule!r}; a file is given with `rule: file`.")
        if self.n_genes is not None and self.rule in ("all", "file"):
            raise ValueError(
                f"`n_genes` is {self.n_genes} with `rule` {self.rule!r}; it ranks `common` or `variable`."
            )


@dataclass(frozen=True)
class PairingOptions:
    """
    One context that two cells share.

    Args:
        keys (`list[str]`): Columns of obs that are equal in both cells.
        weight (`float`, *optional*, defaults to 1): Share of the pairs, relative to the other pairings.
        different (`list[str]`, *optional*): Columns of obs of which at least one differs between the cells.
    """

    keys: list[str]
    weight: Positive = 1.0
    different: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_numbers(self)
        both = sorted(set(self.keys) & set(self.different))
        if both:
            raise ValueError(f"`different` names {both[0]!r}, which `keys` holds equal; name it once.")


def default_pairings() -> dict[str, PairingOptions]:
    """Half the pairs teach what the source's state is worth, half what the imposed genes are worth."""
    return {
        "same_type": PairingOptions(keys=["dataset_id", "cell_type"]),
        "same_dataset": PairingOptions(keys=["dataset_id", "donor_id"]),
    }


@dataclass(frozen=True)
class MatchingOptions:
    """
    How a cell finds its partners.

    Args:
        pairings (`dict[str, PairingOptions]`, *optional*): Name -> context; default `same_type` and `same_dataset`.
        pairs_per_cell (`int`, *optional*, defaults to 1): Partners drawn for each cell, shared among the pairings.
        policy (`str`, *optional*, defaults to `"random"`): Which cell of the context: `random`, `nearest` or
            `farthest` by expression.
        min_shared_genes (`int`, *optional*, defaults to 1): Least number of panel genes measured in both cells.
        pseudobulk (`int`, *optional*, defaults to 1): Cells averaged on each side; 1 is single cells.
    """

    pairings: dict[str, PairingOptions] = field(default_factory=default_pairings)
    pairs_per_cell: Count = 1
    policy: Literal["random", "nearest", "farthest"] = "random"
    min_shared_genes: Count = 1
    pseudobulk: Count = 1

    def __post_init__(self):
        check_numbers(self)
        _check(len(self.pairings) > 0, "pairings", self.pairings, "at least one pairing")


@dataclass(frozen=True)
class PerturbationOptions:
    """
    How many genes of a pair are imposed: a uniformly random number of those that differ between its cells.

    Args:
        min_genes (`int`, *optional*, defaults to 1): 0 allows pairs with nothing imposed.
        max_genes (`int`, *optional*, defaults to 5): At most so many.
    """

    min_genes: CountOrZero = 1
    max_genes: Count = 5

    def __post_init__(self):
        check_numbers(self)
        _check(
            self.max_genes >= self.min_genes, "max_genes", self.max_genes, f"at least `min_genes` ({self.min_genes})"
        )


@dataclass(frozen=True)
class SplitRule:
    """
    One rule; a cell takes the split of the first rule that gives it one, `train` where none does.

    Args:
        where (`dict`, *optional*): Column of obs -> value or list of values; cells that match all; default every cell.
        split (`str`, *optional*): Split of all these cells, or:
        by (`str`, *optional*): Column of obs (or `cell`) whose values are shared out by a stable hash, and
        fractions (`dict[str, float]`, *optional*): Split -> share of the values; the rest goes on to the next rule.
    """

    where: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    by: str | None = None
    fractions: dict[str, Share] = field(default_factory=dict)

    def __post_init__(self):
        check_numbers(self)
        if (self.split is None) == (self.by is None):
            raise ValueError(f"`rules` entry has `split` {self.split!r} and `by` {self.by!r}; give one of them.")
        if (self.by is None) != (not self.fractions):
            raise ValueError(f"`fractions` is {self.fractions!r} with `by` {self.by!r}; give both or neither.")
        for name in [self.split] if self.split is not None else list(self.fractions):
            if name not in SPLITS:
                raise ValueError(
                    f"`rules` names split {name!r}; wanted {', '.join(SPLITS)}{close_matches(name, SPLITS)}"
                )
        _check(sum(self.fractions.values()) <= 1 + 1e-9, "fractions", self.fractions, "shares that sum to at most 1")


@dataclass(frozen=True)
class SplitOptions:
    """
    Which cells are for training, validation and test.

    Args:
        rules (`list[SplitRule]`, *optional*): In order. Without any, whole donors are held out where there are enough,
            else single cells: see `default_rules` in `splits.py`.
        seed (`int`, *optional*, defaults to 0): Part of every hash.
    """

    rules: list[SplitRule] | None = None
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)


@dataclass(frozen=True)
class PairOptions:
    """
    Everything `gppc build-pairs` needs to know, as written in a YAML file.

    Args:
        query, panel, matching, perturbation, splits: See the classes.
        seed (`int`, *optional*, defaults to 0): Seed of matching and perturbation sampling.
        shard_cells (`int`, *optional*, defaults to 16,384): Cells in a shard, which is also the waiting room in which
            partners are sought.
        file_format (`str`, *optional*, defaults to `"auto"`): `arrow` (memory-mapped), `parquet` (small; decoded once
            into a cache for training) or `auto`: parquet for panels of more than 4,096 genes.
    """

    query: QueryOptions = field(default_factory=QueryOptions)
    panel: PanelOptions = field(default_factory=PanelOptions)
    matching: MatchingOptions = field(default_factory=MatchingOptions)
    perturbation: PerturbationOptions = field(default_factory=PerturbationOptions)
    splits: SplitOptions = field(default_factory=SplitOptions)
    seed: Seed = 0
    shard_cells: Annotated[int, Range(2)] = 16_384
    file_format: Literal["auto", "arrow", "parquet"] = "auto"

    def __post_init__(self):
        check_numbers(self)
