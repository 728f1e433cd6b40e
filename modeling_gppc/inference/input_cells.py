"""What a model can use of an AnnData: which columns are genes it knows, the counts, the library sizes."""

import dataclasses
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from data_scripts.cells.gene_mapping import ENSEMBL_COLUMNS, SYMBOL_COLUMNS, find_column
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.normalization_gppc import check_raw_counts, close_matches

# Columns of obs that usually hold the counts over all genes.
LIBRARY_COLUMNS = ("n_counts_full", "raw_sum", "total_counts", "n_counts", "ncount_rna")
# Close matches are sought for so many of the unknown genes; every search compares against the whole vocabulary.
MAX_SEARCHED = 100


@dataclasses.dataclass
class InputCells:
    """
    Cells as a model reads them.

    Args:
        counts (`np.ndarray` or scipy sparse matrix): The columns of known genes, shape `(n_obs, n_known)`.
        gene_index (`np.ndarray`): Vocabulary id of each of these columns, shape `(n_known,)`.
        library_size (`np.ndarray`, *optional*): Counts over all genes, shape `(n_obs,)`; absent for log values.
        library_source (`str`): Column of obs it comes from, or `"sum"`.
        unknown (`pd.DataFrame`): Genes of the input that the model does not know: `gene`, `close_match`.
        warnings (`list[str]`): What a person should know, a line each.
    """

    counts: np.ndarray | sparse.spmatrix
    gene_index: np.ndarray
    library_size: np.ndarray | None
    library_source: str
    unknown: pd.DataFrame
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def features(self, extractor: GppcFeatureExtractor, rows: slice):
        """Model inputs of some of the cells."""
        counts = self.counts[rows]
        names = [extractor.gene_ids[index] for index in self.gene_index]
        library_size = None if self.library_size is None else self.library_size[rows]
        return extractor(counts, names, library_size=library_size)


def check_cells_path(path: str | Path) -> None:
    """Refuses a file that does not exist, with close matches among those beside it."""
    path = Path(path)
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.h5ad")] if path.parent.is_dir() else []
        raise ValueError(f"`cells` {str(path)!r} does not exist{close_matches(path.name, beside) or '.'}")


def read_cells(path: str | Path) -> anndata.AnnData:
    """Reads an `.h5ad` file.

    Raises:
        ValueError: If it is absent (with close matches) or not such a file.
    """
    check_cells_path(path)
    try:
        return anndata.read_h5ad(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`cells` {str(path)!r} is not an AnnData file (.h5ad): {reason}") from error


def input_cells(
    adata: anndata.AnnData,
    extractor: GppcFeatureExtractor,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    library_size_key: str | None = None,
) -> InputCells:
    """Checks cells and picks out what a model can use of them.

    Args:
        adata (`AnnData`): Cells with raw counts (log values if the model's normalisation is `"none"`).
        extractor ([`GppcFeatureExtractor`]): The model's.
        layer (`str`, *optional*): Layer that holds the counts, or `"raw"` for `adata.raw`; defaults to `X`.
        gene_column (`str`, *optional*): Column of var with Ensembl ids or symbols; defaults to the usual columns and
            the index, whichever the model knows.
        library_size_key (`str`, *optional*): Column of obs with the counts over all genes; defaults to a usual name
            that no cell contradicts, else the sum of what is there.

    Raises:
        ValueError: For no cells, a missing layer or column, values that are not raw counts, library sizes below a
            cell's counts, or no known gene.
    """
    if adata.n_obs == 0:
        raise ValueError("`cells` holds no cells.")
    matrix, var = _matrix(adata, layer)
    if extractor.normalization != "none":
        try:
            check_raw_counts(matrix.data if sparse.issparse(matrix) else matrix, f"layer {layer}" if layer else "X")
        except ValueError as error:
            raise ValueError(f"{error}{_layer_hint(adata, layer)}") from error
    index, names, warnings = _match_genes(var, extractor, gene_column)
    known = np.flatnonzero(index >= 0)
    library_size, source = None, "none"
    if extractor.normalization != "none":
        library_size, source = _library_size(adata.obs, matrix, library_size_key, extractor)
        if source == "sum" and extractor.normalization == "log1p" and matrix.shape[1] < 5_000:
            warnings.append(
                f"library sizes are the counts of the {matrix.shape[1]} genes in the file; if it holds only some of "
                "the measured genes, give the counts over all of them as a column of obs (`library_size_key`)."
            )
    share = len(known) / extractor.vocab_size
    if share < 0.5:
        warnings.append(f"only {len(known)} of the {extractor.vocab_size} genes of the model are among the input's.")
    counts = matrix[:, known]
    return InputCells(
        counts=counts.tocsr() if sparse.issparse(counts) else np.asarray(counts),
        gene_index=index[known],
        library_size=library_size,
        library_source=source,
        unknown=_unknown_genes([names[column] for column in np.flatnonzero(index < 0)], extractor),
        warnings=warnings,
    )


def _matrix(adata: anndata.AnnData, layer: str | None):
    if layer is None:
        matrix, var = adata.X, adata.var
    elif layer in adata.layers:
        matrix, var = adata.layers[layer], adata.var
    elif layer == "raw" and adata.raw is not None:
        matrix, var = adata.raw.X, adata.raw.var
    else:
        options = [*adata.layers, *(["raw"] if adata.raw is not None else [])]
        raise ValueError(f"`layer` is {layer!r}, which the cells do not have{close_matches(layer, options) or '.'}")
    if matrix is None:
        raise ValueError(f"`cells` has no X; name the `layer` that holds the counts{_layer_hint(adata, layer)}")
    return (matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)), var


def _layer_hint(adata: anndata.AnnData, layer: str | None) -> str:
    """Which other layers hold raw counts."""
    candidates = {name: adata.layers[name] for name in adata.layers if name != layer}
    if adata.raw is not None and layer != "raw":
        candidates["raw"] = adata.raw.X
    fitting = []
    for name, matrix in candidates.items():
        try:
            check_raw_counts(matrix.data if sparse.issparse(matrix) else matrix)
        except ValueError:
            continue
        fitting.append(f"`{name}`")
    return f" (raw counts are in layer {', '.join(fitting)})" if fitting else ""


def _match_genes(
    var: pd.DataFrame, extractor: GppcFeatureExtractor, gene_column: str | None
) -> tuple[np.ndarray, list[str], list[str]]:
    """Vocabulary id of each column (-1 where unknown), its name, and warnings."""
    if gene_column is not None:
        if gene_column not in var:
            options = list(map(str, var.columns))
            raise ValueError(
                f"`gene_column` is {gene_column!r}, which is not a column of var{close_matches(gene_column, options)}"
            )
        sources = [var[gene_column]]
    else:
        columns = [find_column(var.columns, candidates) for candidates in (ENSEMBL_COLUMNS, SYMBOL_COLUMNS)]
        # Ids are surer than whatever the index holds, the index surer than symbols.
        sources = [var[columns[0]] if columns[0] is not None else None, var.index.to_series()]
        sources.append(var[columns[1]] if columns[1] is not None else None)
        sources = [source for source in sources if source is not None]
    times = Counter(extractor.gene_symbols)
    index = np.full(len(var), -1, dtype=np.int64)
    taken: set[int] = set()
    shared, repeated = set(), []
    names = [str(name) for name in (var[gene_column] if gene_column is not None else var.index)]
    for source in sources:
        texts = ["" if pd.isna(name) else str(name) for name in source]
        # A symbol that stands for several genes of the model does not say which one was counted.
        shared.update(text for text in texts if times[text] > 1)
        found = extractor.find_genes(["" if times[text] > 1 else text for text in texts])
        for column in np.flatnonzero((index < 0) & (found >= 0)):
            gene = int(found[column])
            if gene in taken:
                repeated.append(names[column])
                continue
            taken.add(gene)
            index[column] = gene
    warnings = []
    if shared:
        warnings.append(
            f"{len(shared)} symbols stand for several genes of the model and are not used without an id: "
            f"{_examples(sorted(shared))}."
        )
    repeated = [name for name in dict.fromkeys(repeated) if name]
    if repeated:
        warnings.append(
            f"{len(repeated)} columns name a gene that another column names already; the first counts: "
            f"{_examples(repeated)}."
        )
    if not taken:
        first = next((name for source in sources for name in source if not pd.isna(name)), "")
        folded = {symbol.casefold() for symbol in [*extractor.gene_symbols, *extractor.gene_ids]}
        other_case = any(str(name).casefold() in folded for source in sources for name in source)
        raise ValueError(
            f"none of the {len(var)} genes of the cells (e.g. `{first}`) is among the {extractor.vocab_size} genes of "
            f"the model (e.g. `{extractor.gene_ids[0]}`, `{extractor.gene_symbols[0]}`; {extractor.organism}); "
            + (
                "some differ in capitals only: are the cells of another species?"
                if other_case
                else "name the column of var with Ensembl ids or symbols (`gene_column`)."
            )
        )
    return index, names, warnings


def _library_size(
    obs: pd.DataFrame, matrix, key: str | None, extractor: GppcFeatureExtractor
) -> tuple[np.ndarray | None, str]:
    """Counts over all genes of each cell and where they come from."""
    sums = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    if key is not None:
        if key not in obs:
            raise ValueError(
                f"`library_size_key` is {key!r}, which is not a column of obs{close_matches(key, map(str, obs.columns))}"
            )
        sizes = pd.to_numeric(obs[key], errors="coerce").to_numpy(dtype=np.float64)
        short = ~(sizes >= sums * (1 - 1e-6)) if extractor.normalization == "log1p" else ~(sizes > 0)
        if short.any():
            row = int(np.flatnonzero(short)[0])
            raise ValueError(
                f"`library_size_key` {key!r} is {sizes[row]:g} for cell `{obs.index[row]}`, which has {sums[row]:g} "
                "counts; wanted the counts over all genes, at least as many as the input holds."
            )
        return (np.maximum(sizes, sums) if extractor.normalization == "log1p" else sizes), key
    if extractor.normalization == "log_tpm":
        return None, "sum"
    for name in LIBRARY_COLUMNS:
        column = find_column(obs.columns, (name,))
        if column is None or obs[column].dtype.kind not in "iuf":
            continue
        sizes = obs[column].to_numpy(dtype=np.float64)
        if np.isfinite(sizes).all() and (sizes >= sums * (1 - 1e-6)).all():
            return np.maximum(sizes, sums), str(column)
    return sums, "sum"


def _unknown_genes(names: list[str], extractor: GppcFeatureExtractor) -> pd.DataFrame:
    folded = {symbol.casefold(): symbol for symbol in [*extractor.gene_ids, *extractor.gene_symbols]}
    matches = []
    for position, name in enumerate(names):
        match = folded.get(name.casefold(), "")
        if not match and position < MAX_SEARCHED and not name.startswith("ENS"):
            hint = close_matches(name, extractor.gene_symbols)
            match = hint.split("`")[1] if "did you mean" in hint else ""
        matches.append(match)
    return pd.DataFrame({"gene": names, "close_match": matches}, dtype=str)


def _examples(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (", ..." if len(names) > 5 else "")
