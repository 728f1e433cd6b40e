"""What is known of genes beyond a screen, as vectors: annotation terms, or numbers from a table."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from modeling_gppc.normalization_gppc import close_matches

GENE_COLUMNS = ("gene", "symbol", "gene_symbol", "gene_name", "gene_id", "ensembl_id")


def read_gene_features(path: str | Path, genes: Iterable[str]) -> dict[str, np.ndarray]:
    """
    Features of some genes from a table.

    A table of two text columns, gene and term, gives one number a term: log(number of genes / genes with the term) where
    the gene has it, so that rare terms say most. A table with one row a gene and columns of numbers gives those numbers.

    Args:
        path (`str` or `Path`): `.parquet`, `.csv` or `.tsv`; the gene's column is called `gene`, `symbol`, `gene_id`, ...
        genes (`Iterable[str]`): Names as the screen calls the perturbed genes; case does not matter.

    Returns:
        `dict[str, np.ndarray]`: By the given name; genes that the table does not know are absent.

    Raises:
        ValueError: For a table without such columns, or one that knows none of the genes.
    """
    path = Path(path)
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep=None, engine="python")
    column = next((name for name in GENE_COLUMNS if name in table), None)
    if column is None:
        raise ValueError(
            f"`gene_features` {path.name} has none of the columns {', '.join(GENE_COLUMNS)}"
            f"{close_matches('gene', list(table.columns))}."
        )
    names = table[column].astype(str).str.casefold()
    rest = table.drop(columns=column)
    numbers = rest.select_dtypes("number")
    wanted = {str(gene).casefold(): str(gene) for gene in genes}
    rows = names.isin(wanted)
    if not rows.any():
        raise ValueError(
            f"`gene_features` {path.name} knows none of the {len(wanted)} perturbed genes"
            f"{close_matches(next(iter(wanted), ''), names.unique()[:5_000].tolist())}; names are symbols or ids as the "
            "screen's labels have them."
        )
    if numbers.shape[1]:
        values = numbers[rows].fillna(0.0).to_numpy(dtype=float)
        return {wanted[name]: vector for name, vector in zip(names[rows], values)}
    terms = rest.iloc[:, 0].astype(str)
    pairs = pd.DataFrame({"gene": names, "term": terms}).drop_duplicates()
    genes_with = pairs["term"].value_counts()
    pairs = pairs[pairs["gene"].isin(wanted)]
    position = {term: index for index, term in enumerate(sorted(pairs["term"].unique()))}
    weight = np.log(names.nunique() / genes_with)
    output = {wanted[name]: np.zeros(len(position)) for name in pairs["gene"].unique()}
    for name, term in pairs.itertuples(index=False):
        output[wanted[name]][position[term]] = weight[term]
    return output
