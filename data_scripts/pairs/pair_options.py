"""Options of `gppc build-pairs`: what to read, which genes, which partners, what is revealed, which split."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from data_scripts.options import Count, CountOrZero, NotNegative, Positive, Range, Seed, Share, check_numbers
from data_scripts.pairs.schema import SPLITS
from modeling_gppc.normalization_gppc import close_matches


def _check(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` is {value!r}; wanted {wanted}.")


@dataclass(frozen=True)
class QueryOptions:
    """
    Which cells to read and how to normalise them.

    Args:
        uri (`str`, *optional*): A store in Census layout: a folder or an S3 address.
        census_version (`str`, *optional*): Release of the public Census (`stable`, `latest` or a date); without `uri`.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Census name of the species.
        obs_filter (`str`, *optional*, defaults to `"is_primary_data == True"`): Cells; SOMA value filter.
        var_filter (`str`, *optional*): Genes that may enter the panel; SOMA value filter.
        layer (`str`, *optional*, defaults to `"raw"`): `raw` (counts), `normalized` (fractions that sum to 1) or
            `log_values` (values used as they are; `normalization` is then `none`).
        normalization (`str`, *optional*, defaults to `"log1p"`): See `normalize_counts`.
        target_sum (`float`, *optional*, defaults to 10,000): What a cell's values sum to before the logarithm.
    """

    uri: str | None = None
    census_version: str | None = None
    organism: str = "homo_sapiens"
    obs_filter: str | None = "is_primary_data == True"
    var_filter: str | None = None
    layer: Literal["raw", "normalized", "log_values"] = "raw"
    normalization: Literal["log1p", "log_tpm", "none"] = "log1p"
    target_sum: Positive = 10_000.0

    def __post_init__(self):
        if self.uri is not None and self.census_version is not None:
            raise ValueError(
                f"`uri` is {self.uri!r} and `census_version` is {self.census_version!r}; give one of them: a store of "
                "your own or a release of the public Census."
            )
        check_numbers(self)
        if (self.layer == "log_values") != (self.normalization == "none"):
            raise ValueError(
                f"`normalization` is {self.normalization!r} with `layer` {self.layer!r}; log values are used as they "
                "are: set both `layer: log_values` and `normalization: none`, or neither."
            )
        if self.layer == "normalized" and self.normalization == "log_tpm":
            raise ValueError(
                "`normalization` is 'log_tpm' with `layer` 'normalized'; that layer is divided by gene length where "
                "it applies: use `layer: raw`, or `normalization: log1p`."
            )


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
    """Half the pairs teach what the source's state is worth, half what the revealed genes are worth."""
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
        both_directions (`bool`, *optional*, defaults to `False`): Also write every pair from target to source.
        pseudobulk (`int`, *optional*, defaults to 1): Cells averaged on each side; 1 is single cells.
    """

    pairings: dict[str, PairingOptions] = field(default_factory=default_pairings)
    pairs_per_cell: Count = 1
    policy: Literal["random", "nearest", "farthest"] = "random"
    min_shared_genes: Count = 1
    both_directions: bool = False
    pseudobulk: Count = 1

    def __post_init__(self):
        check_numbers(self)
        _check(len(self.pairings) > 0, "pairings", self.pairings, "at least one pairing")


@dataclass(frozen=True)
class PerturbationOptions:
    """
    How many genes are revealed and which.

    Args:
        distribution (`str`, *optional*, defaults to `"uniform"`): Number of genes: `uniform` between the two bounds,
            `geometric` from `min_genes` on (mean `mean_genes`, cut at `max_genes`) or `fixed` at `max_genes`.
        min_genes (`int`, *optional*, defaults to 1): 0 allows pairs with nothing revealed.
        max_genes (`int`, *optional*, defaults to 5): At most so many.
        mean_genes (`float`, *optional*, defaults to 2): For `geometric`.
        weighting (`str`, *optional*, defaults to `"uniform"`): Genes differing between the cells are drawn `uniform`
            or in proportion to their absolute `change`.
        genes (`list[str]`, *optional*): Only these (ids or symbols), e.g. regulators.
        genes_file (`str`, *optional*): The same from a file, a gene a line.
    """

    distribution: Literal["uniform", "geometric", "fixed"] = "uniform"
    min_genes: CountOrZero = 1
    max_genes: Count = 5
    mean_genes: NotNegative = 2.0
    weighting: Literal["uniform", "change"] = "uniform"
    genes: list[str] | None = None
    genes_file: str | None = None

    def __post_init__(self):
        check_numbers(self)
        _check(
            self.max_genes >= self.min_genes, "max_genes", self.max_genes, f"at least `min_genes` ({self.min_genes})"
        )
        if self.distribution == "geometric":
            wanted = f"a number above `min_genes` ({self.min_genes})"
            _check(self.mean_genes > self.min_genes, "mean_genes", self.mean_genes, wanted)
        if self.genes is not None and self.genes_file is not None:
            raise ValueError("`genes` and `genes_file` are both given; give one of them.")


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
        held_out_genes (`dict[str, float]`, *optional*): Split -> share of genes (by stable hash) that are revealed in
            pairs of that split only.
        seed (`int`, *optional*, defaults to 0): Part of every hash.
    """

    rules: list[SplitRule] | None = None
    held_out_genes: dict[str, Annotated[float, Range(0, 1, below=True)]] = field(default_factory=dict)
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        for name in self.held_out_genes:
            _check(name in SPLITS[1:], "held_out_genes", name, "the split `validation` or `test`")


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
