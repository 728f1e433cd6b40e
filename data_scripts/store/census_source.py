"""Where the cells of a store come from: AnnData in memory, files, or functions that load them when needed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from data_scripts.cells.gene_mapping import find_column, named_column
from data_scripts.store.census_layout import VALUES_PER_WRITE
from modeling_gppc.normalization_gppc import close_matches

DATASET_NAMES = ("dataset_id", "dataset")


@dataclass
class CensusSource:
    """
    One data set, or one part of it, on its way into a store.

    A source gives its cells as an AnnData (in memory or backed), as a file, or by a function that is called when they
    are needed: once to check them, once to write them, so that only one source is in memory at a time. Consecutive
    sources with the same `dataset_id` and the same genes are parts of one data set.

    Args:
        adata (`AnnData`, *optional*): The cells.
        dataset_id (`str`): Name of the data set.
        load (`Callable[[], AnnData]`, *optional*): Returns the cells, the same ones at every call.
        path (`str` or `Path`, *optional*): An `.h5ad` file.
        counts (`str`, *optional*, defaults to `"X"`): Where the counts are: `X`, `raw` (`adata.raw`) or a layer.
        cell_type_key, donor_key, assay_key, tissue_key, sex_key, disease_key, development_stage_key (`str`,
            *optional*): Columns of obs; found by their usual names where not given, else filled with `unknown`.
        library_size_key (`str`, *optional*): Column of obs with the counts over all genes, for files that hold only
            some genes; `n_counts_full` and the like are found where no cell contradicts them.
        symbol_key, ensembl_key (`str`, *optional*): Columns of var; found by their usual names where not given.
        title (`str`, *optional*): Title of the data set for people.
    """

    adata: anndata.AnnData | None = None
    dataset_id: str = ""
    load: Callable[[], anndata.AnnData] | None = None
    path: str | Path | None = None
    counts: str = "X"
    cell_type_key: str | None = None
    donor_key: str | None = None
    assay_key: str | None = None
    tissue_key: str | None = None
    sex_key: str | None = None
    disease_key: str | None = None
    development_stage_key: str | None = None
    library_size_key: str | None = None
    symbol_key: str | None = None
    ensembl_key: str | None = None
    title: str = ""

    def __post_init__(self):
        if sum(given is not None for given in (self.adata, self.load, self.path)) != 1:
            raise ValueError("`CensusSource` takes exactly one of `adata`, `load` and `path`.")
        if self.path is not None and not Path(self.path).is_file():
            folder = Path(self.path).parent
            near = [entry.name for entry in folder.glob("*.h5ad")] if folder.is_dir() else []
            raise ValueError(f"file {self.path} does not exist{close_matches(Path(self.path).name, near)}")
        if not self.dataset_id:
            raise ValueError("`dataset_id` is empty; every data set needs a name.")

    @contextlib.contextmanager
    def cells(self) -> Iterator[anndata.AnnData]:
        """The cells; a file is opened without reading its counts, and closed afterwards."""
        if self.path is None:
            yield self.adata if self.adata is not None else self.load()
            return
        adata = open_file(self.path)
        try:
            yield adata
        finally:
            adata.file.close()

    def var(self, adata: anndata.AnnData) -> pd.DataFrame:
        """var of the counts."""
        return adata.raw.var if self.counts == "raw" and adata.raw is not None else adata.var

    def matrix(self, adata: anndata.AnnData):
        """The counts, `(n_obs, n_vars)`, as they lie (sparse or dense, in memory or in the file).

        Raises:
            ValueError: If `counts` names nothing.
        """
        if self.counts == "X":
            matrix = adata.X
        elif self.counts == "raw":
            matrix = adata.raw.X if adata.raw is not None else None
        else:
            matrix = adata.layers.get(self.counts)
        if matrix is None:
            raise ValueError(
                f"`counts` is {self.counts!r}, which {self.where} does not have"
                f"{close_matches(self.counts, ['X', 'raw', *adata.layers])}"
            )
        return matrix

    @property
    def where(self) -> str:
        """What messages call the source."""
        return f"data set {self.dataset_id!r}" if self.path is None else f"file {self.path}"

    def obs_keys(self) -> dict[str, str | None]:
        """Census column -> column named for it."""
        return {
            "cell_type": self.cell_type_key,
            "donor_id": self.donor_key,
            "assay": self.assay_key,
            "tissue": self.tissue_key,
            "sex": self.sex_key,
            "disease": self.disease_key,
            "development_stage": self.development_stage_key,
        }


def open_file(path: str | Path) -> anndata.AnnData:
    """Opens an `.h5ad` file without reading its counts.

    Raises:
        ValueError: If it is not a readable h5ad file.
    """
    try:
        return anndata.read_h5ad(path, backed="r")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"file {path} is not a readable h5ad: {' '.join(str(error).split())}") from error


def sources_from_file(path: str | Path, dataset_key: str | None = None, **options) -> list[CensusSource]:
    """The data sets of one `.h5ad` file.

    Args:
        path (`str` or `Path`): The file.
        dataset_key (`str`, *optional*): Column of obs that names the data set of each cell; the file is split by it,
            and each part counts as having measured every gene of the file. Without it the file is one data set, named
            by `dataset_id` or `dataset` of obs if that holds one value, else by the file.
        **options: Further arguments of [`CensusSource`].

    Raises:
        ValueError: If the file is absent or unreadable, or the column does not exist.
    """
    path = Path(path)
    whole = CensusSource(path=path, dataset_id=path.stem, **options)
    with whole.cells() as adata:
        obs = adata.obs
        if dataset_key is None:
            column = find_column(obs.columns, DATASET_NAMES)
        else:
            column = named_column(obs.columns, dataset_key, "dataset_key", f"obs of {whole.where}")
        labels = None if column is None else obs[column].astype(str).to_numpy()
    names = [] if labels is None else list(dict.fromkeys(labels))
    if len(names) == 1:
        return [CensusSource(path=path, dataset_id=names[0], **options)]
    if dataset_key is None:
        return [whole]

    def part(name: str) -> Callable[[], anndata.AnnData]:
        def load() -> anndata.AnnData:
            adata = open_file(path)
            try:
                return adata[labels == name].to_memory()
            finally:
                adata.file.close()

        return load

    return [CensusSource(load=part(name), dataset_id=name, **options) for name in names]


def row_blocks(matrix, values_per_block: int = VALUES_PER_WRITE) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yields `(first row, CSR float32 block)` of a matrix in memory or in a backed file, without densifying it.

    Args:
        matrix: scipy sparse, numpy, or what a backed AnnData holds; `(n_obs, n_vars)`.
        values_per_block (`int`, *optional*): Stored values that a block may hold, about.
    """
    n_obs, n_vars = matrix.shape
    backed = not (sparse.issparse(matrix) or isinstance(matrix, np.ndarray))
    kind = getattr(matrix, "format", None)
    if kind is not None and kind != "csr":
        # Rows of a column-wise matrix can only be cut after turning it round as a whole.
        matrix = (matrix.to_memory() if backed else matrix).tocsr()
        backed = False
    if kind is None:
        per_row = n_vars
    else:
        stored = matrix.nnz if not backed else int(matrix.group["indptr"][-1])
        per_row = max(stored // max(n_obs, 1), 1)
    step = max(values_per_block // max(per_row, 1), 1)
    for start in range(0, n_obs, step):
        block = matrix[start : start + step]
        block = sparse.csr_matrix(block)
        yield start, block
