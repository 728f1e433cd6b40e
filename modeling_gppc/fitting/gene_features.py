"""What is known of genes beyond a screen, as vectors: annotation terms, or numbers from a table."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from modeling_gppc.normalization_gppc import close_matches

GENE_COLUMNS = ("gene", "symbol", "gene_symbol", "gene_name", "gene_id", "ensembl_id")


@dataclasses.dataclass
class GeneFeatures:
    """One vector a gene: names as the table has them, each once, and a matrix `(len(genes), F)`."""

    genes: list[str]
    matrix: scipy.sparse.csr_matrix

    def rows(self, names: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Vectors of genes by name, case ignored; zero where the table does not know one. Shape `(len(names), F)`."""
        position = {gene.casefold(): row for row, gene in enumerate(self.genes)}
        found = np.array([position.get(str(name).casefold(), -1) for name in names], dtype=int)
        known = scipy.sparse.diags((found >= 0).astype(float))
        return (known @ self.matrix[np.maximum(found, 0)]).tocsr()

    def table(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Vectors of those genes that are known, by the given name, on the numbers that vary among them."""
        names = sorted(set(map(str, names)))
        rows = self.rows(names)
        rows = rows[:, np.flatnonzero(np.asarray(np.abs(rows).sum(axis=0)).ravel())].toarray()
        return {name: row for name, row in zip(names, rows) if row.any()}


def read_gene_features(path: str | Path, genes: Iterable[str]) -> GeneFeatures:
    """Features of genes from a `.parquet`, `.csv` or `.tsv` table whose gene column is called `gene`, `symbol`,
    `gene_id`, ...

    Of two text columns, gene and term, every term becomes a number: log(number of genes / genes with the term) where
    the gene has it. Columns of numbers, one row a gene, are taken as they are. `genes` are the perturbed genes as the
    screen calls them. Raises `ValueError` for an absent file, a table without such columns, or one that has none of
    the genes.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`gene_features` {path} is not a file; wanted .parquet, .csv or .tsv.")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep=None, engine="python")
    column = next((name for name in GENE_COLUMNS if name in table), None)
    if column is None:
        raise ValueError(
            f"`gene_features` {path.name} has none of the columns {', '.join(GENE_COLUMNS)}"
            f"{close_matches('gene', list(table.columns))}."
        )
    table = table[table[column].notna()]
    # One gene may be spelt in two cases; the first spelling names it.
    codes, folded = pd.factorize(table[column].astype(str).str.casefold())
    names = table[column].astype(str).to_numpy()[np.unique(codes, return_index=True)[1]].tolist()
    wanted = {str(gene).casefold() for gene in genes}
    if not wanted & set(folded):
        raise ValueError(
            f"`gene_features` {path.name} holds none of the {len(wanted)} perturbed genes"
            f"{close_matches(next(iter(sorted(wanted)), ''), folded[:5_000].tolist())}; names are symbols or ids as the "
            "screen's labels have them."
        )
    rest = table.drop(columns=column)
    numbers = rest.select_dtypes("number")
    if numbers.shape[1]:
        last = pd.Series(range(len(codes))).groupby(codes).last()
        return GeneFeatures(names, scipy.sparse.csr_matrix(numbers.fillna(0.0).to_numpy(dtype=float)[last]))
    pairs = pd.DataFrame({"gene": codes, "term": pd.factorize(rest.iloc[:, 0].astype(str))[0]}).drop_duplicates()
    genes_with = np.bincount(pairs["term"])
    weight = np.log(len(names) / genes_with)
    shape = (len(names), len(genes_with))
    entries = (weight[pairs["term"]], (pairs["gene"], pairs["term"]))
    return GeneFeatures(names, scipy.sparse.csr_matrix(entries, shape=shape))
