"""Names under which AnnData files carry their columns of obs and var: one table for every command."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from modeling_gppc.normalization_gppc import close_matches

# What a column holds: its usual names (Census, scanpy, Seurat, scPerturb, pertpy, cell-eval, GEARS), most specific first;
# case is ignored. An option that names a column is called like its entry here, with `_column` behind it.
_TABLE = """
dataset: dataset_id, dataset
cell_type: cell_type, celltype, cell_types, cell type, cell.type, cell_type_label, author_cell_type, bulk_labels, cell_line, louvain, leiden
cell_line: cell_line, cell_type, celltype, cellline
donor: donor_id, donor, individual, ind, patient_id, patient, subject, replicate
batch: batch, batch_var, gem_group, gemgroup, replicate, sample, lane, donor_id
assay: assay, technology, platform
tissue: tissue, organ
tissue_general: tissue_general
tissue_type: tissue_type
sex: sex, gender
disease: disease
development_stage: development_stage
self_reported_ethnicity: self_reported_ethnicity
suspension_type: suspension_type
perturbation: perturbation, perturbation_name, target_gene, target, gene, gene_target, condition, guide_target, sgRNA_target, gene_name, treatment
modality: perturbation_type, modality, crispr_type
library_size: n_counts_full, total_counts_full, ncounts_full, raw_sum, total_counts, n_counts, nCount_RNA, nUMI
n_expressed: n_genes_full, ngenes_full
p_mito: p_mito, percent_mito, pct_counts_mt, percent.mt
gene: ensembl_id, gene_ids, feature_id, gene_id, ensembl, ensembl_gene_id, ensemblid
symbol: symbol, feature_name, gene_symbol, gene_symbols, gene_name, gene_names, hgnc_symbol
feature_types: feature_types, feature_type
biotype: feature_type, biotype, gene_type, gene_biotype
length: feature_length, length
priority: priority
"""
STANDARD_NAMES = {
    kind: names.split(", ") for kind, names in (line.split(": ") for line in _TABLE.strip().splitlines())
}


def find_column(
    columns: Iterable[str], kind: str, named: str | None = None, *, where: str = "obs", required: bool = False
) -> str | None:
    """Column of a kind: the one that was `named`, else the first of the kind's usual names that is there.

    Args:
        columns (`Iterable[str]`): Of obs or var.
        kind (`str`): Key of [`STANDARD_NAMES`]; the option that names the column is `{kind}_column`.
        where (`str`, *optional*, defaults to `"obs"`): The table, for messages.

    Raises:
        ValueError: If the named column, or a required one, is not there; with close matches.
    """
    columns = [str(column) for column in columns]
    if named is not None and named not in columns:
        raise ValueError(
            f"`{kind}_column` is {named!r}, which is not a column of {where}{close_matches(named, columns)}"
        )
    folded = {column.casefold(): column for column in reversed(columns)}
    found = named or next((folded[x.casefold()] for x in STANDARD_NAMES[kind] if x.casefold() in folded), None)
    if required and found is None:
        wanted = ", ".join(STANDARD_NAMES[kind][:6])
        raise ValueError(
            f"`{kind}_column` is not given and {where} has none of {wanted}{close_matches(wanted, columns)}"
        )
    return found


def numbers(column: pd.Series) -> np.ndarray:
    """A column as float64; NaN where it holds no number."""
    if not pd.api.types.is_numeric_dtype(column):
        column = pd.to_numeric(column.astype(object), errors="coerce")
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def texts(column: pd.Series | pd.Index) -> list[str]:
    """A column as text; empty where a value is missing."""
    return ["" if pd.isna(value) else str(value) for value in column]
