"""Options of reading an AnnData, the same with the same names in every command."""

import dataclasses
from typing import Literal

from modeling_gppc.normalization_gppc import VALUE_KINDS


@dataclasses.dataclass
class ReadOptions:
    """
    Where the values are, and the columns that do not have one of their usual names.

    Args:
        layer (`str`, *optional*): Layer with the values, or `raw` for `adata.raw`; else `X`.
        value_kind (`str`, *optional*, defaults to `"counts"`): `counts` (whole numbers), `estimated_counts` (with
            fractions) or `log` (normalised log values already). Never guessed.
        gene_column (`str`, *optional*): Column of var that identifies genes, by Ensembl id or symbol; else the index.
        symbol_column (`str`, *optional*): Column of var with gene symbols.
        library_size_column (`str`, *optional*): Column of obs with the counts over all genes, for files that hold only
            some of them; else one of a usual name that no cell contradicts, else the sum of what is there.
    """

    layer: str | None = None
    value_kind: Literal["counts", "estimated_counts", "log"] = "counts"
    gene_column: str | None = None
    symbol_column: str | None = None
    library_size_column: str | None = None

    def __post_init__(self):
        if self.value_kind not in VALUE_KINDS:
            raise ValueError(f"`value_kind` is {self.value_kind!r}; wanted one of {', '.join(VALUE_KINDS)}.")


@dataclasses.dataclass
class CensusReadOptions(ReadOptions):
    """
    Where the values and the labels for a store are, and the columns that do not have one of their usual names.

    Args:
        cell_type_column, donor_column, assay_column, tissue_column, sex_column, disease_column,
            development_stage_column (`str`, *optional*): Column of obs with this label of the cells; `unknown` where
            there is none.
    """

    cell_type_column: str | None = None
    donor_column: str | None = None
    assay_column: str | None = None
    tissue_column: str | None = None
    sex_column: str | None = None
    disease_column: str | None = None
    development_stage_column: str | None = None
