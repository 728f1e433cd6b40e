"""The one reader of AnnData: opens cells, says which genes they are, checks their values, finds their library sizes."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from data_scripts.cells.column_names import STANDARD_NAMES, find_column, numbers
from data_scripts.cells.gene_mapping import FileGenes, read_file_genes
from data_scripts.cells.log_values import LogValues
from data_scripts.cells.read_options import ReadOptions
from modeling_gppc.normalization_gppc import check_raw_counts, close_matches, normalize_counts

FORMATS = (".h5ad", ".zarr", ".h5")
# Stored values of a block of cells, about. Memory is a few times this; a store has a fragment for every block.
VALUES_PER_BLOCK = 4_000_000
# A file of fewer genes is taken for a part of those that were measured.
FEW_GENES = 5_000
# Log values lie below about 20; what is above this are counts.
LARGEST_LOG_VALUE = 50
# Share of a cell's counts by which a rounded library size may fall short of them.
ROUNDING = 1e-6


@dataclasses.dataclass
class LibrarySizes:
    """Counts over all genes of each cell, whether or not the file holds them; 1 for log values whose counts are not
    known. `source` is a column of obs, `"sum"` of the genes in the file or `"none"`; `is_complete`: all genes are
    counted rather than those of a panel."""

    sizes: np.ndarray
    source: str
    is_complete: bool


@dataclasses.dataclass
class CellFile:
    """Cells of an open AnnData. Its matrix (`X`, layers and `raw` in `matrices`) stays where it lies and is read in
    blocks, of the ascending `rows`; `where` is what messages call the file, `notes` are what a person should know."""

    obs: pd.DataFrame
    genes: FileGenes
    options: ReadOptions
    where: str
    matrices: dict
    rows: np.ndarray
    notes: list[str]

    def subset(self, cells: np.ndarray) -> "CellFile":
        """Some of the cells, given as ascending rows or as a mask."""
        return dataclasses.replace(self, obs=self.obs.iloc[cells], rows=self.rows[cells])

    def blocks(self, genes: np.ndarray | None = None) -> Iterator[tuple[int, sparse.csr_matrix]]:
        """Yields `(first cell, CSR block)`, one column a gene, or only `genes` in their order.

        Columns of one gene are added up.
        """
        for first, block in self._cut():
            block = self._by_gene(block)
            yield first, block if genes is None else block[:, genes]

    def log_values(self, sizes: np.ndarray, target_sum: float = 10_000.0) -> LogValues:
        """Normalised values of all cells and genes, shape `(n_obs, n_genes)`, given library sizes."""
        how = "none" if self.options.value_kind == "log" else "log1p"
        parts = []
        for first, block in self.blocks():
            part = block.tocsr()
            of_cell = np.repeat(sizes[first : first + part.shape[0]], np.diff(part.indptr))
            part.data = normalize_counts(part.data, of_cell, normalization=how, target_sum=target_sum)
            parts.append(part)
        return LogValues(sparse.vstack(parts, format="csr"))

    def check(self) -> LibrarySizes:
        """Reads every value once, and the library sizes. Raises `ValueError` for no cells, two cells of one name,
        values that are not of the declared kind, or library sizes that cannot be."""
        names = self.obs.index
        if not len(names):
            raise ValueError(f"{self.where} has no cells; wanted at least one.")
        if names.has_duplicates:
            repeated = names[names.duplicated()].unique()
            raise ValueError(
                f"{self.where} has {len(repeated)} duplicate barcodes (e.g. `{repeated[0]}`); the same cell could be in "
                "training and test: make them unique, e.g. with the batch's name."
            )
        if self.options.value_kind == "log" and self.genes.repeated:
            raise ValueError(
                f"{self.where} holds gene `{self.genes.repeated[0]}` in several columns of log values, which do not add "
                "up; drop one, or give the counts."
            )
        sums, sums_of_all = np.zeros(len(names)), np.zeros(len(names))
        for first, block in self._cut():
            genes = self._by_gene(block)
            self._check_values(genes, first)
            cells = slice(first, first + block.shape[0])
            sums[cells] = np.asarray(genes.sum(axis=1, dtype=np.float64)).ravel()
            sums_of_all[cells] = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
        return self._library_sizes(sums, sums_of_all)

    def _cut(self) -> Iterator[tuple[int, sparse.csr_matrix]]:
        matrix = RowBlocks(self.matrices[self.options.layer or "X"])
        for start, stop in matrix.spans():
            first, last = np.searchsorted(self.rows, (start, stop))
            if first < last:
                block = matrix.cut(start, stop)
                inside = self.rows[first:last] - start
                yield int(first), block if len(inside) == block.shape[0] else block[inside]

    def _by_gene(self, block: sparse.csr_matrix) -> sparse.csr_matrix:
        columns = self.genes.columns
        if np.array_equal(columns, np.arange(len(self.genes))):
            return block
        kept = np.flatnonzero(columns >= 0)
        to_genes = (np.ones(len(kept)), (kept, columns[kept]))
        return block @ sparse.csr_matrix(to_genes, shape=(len(columns), len(self.genes)))

    def _check_values(self, block: sparse.csr_matrix, n_before: int) -> None:
        kind, layer, values = self.options.value_kind, self.options.layer or "X", block.data
        if kind == "log":
            if not np.abs(values).max(initial=0) <= LARGEST_LOG_VALUE:  # NaN neither
                raise ValueError(
                    f"{self.where}: `value_kind` is 'log' but `{layer}` holds {np.abs(values).max():g}; log values are "
                    "finite and stay below about 20: counts are larger."
                )
            return
        try:
            check_raw_counts(values, layer, estimated=kind == "estimated_counts")
        except ValueError as error:
            broken = np.flatnonzero(np.rint(values) != values)
            n_broken = len(np.unique(np.searchsorted(block.indptr, broken, side="right")))
            n_whole = n_before + block.shape[0] - n_broken
            if n_broken and n_whole > 0.01 * n_broken and np.isfinite(values).all():
                raise ValueError(
                    f"{self.where} mixes raw and log values: {n_broken} cells hold non-integer values (e.g. "
                    f"{values[broken[0]]:g}) and {n_whole} hold counts; give one kind.{self._hint()}"
                ) from error
            raise ValueError(f"{self.where}: {error}{self._hint()}") from error

    def _hint(self) -> str:
        """Which other layers hold raw counts, by their first cells, or else how other values are declared."""
        fitting = []
        for name, matrix in self.matrices.items():
            if name != (self.options.layer or "X"):
                rows = RowBlocks(matrix)
                try:
                    check_raw_counts(rows.cut(*next(rows.spans())).data)
                except ValueError:
                    continue
                fitting.append(f"`{name}`")
        if fitting:
            return f" Raw counts are in layer {', '.join(fitting)}."
        return " If they are estimated counts or log values, say so with `value_kind`."

    def _library_sizes(self, sums: np.ndarray, sums_of_all: np.ndarray) -> LibrarySizes:
        """The one rule: the column that is named, which must be right; else one with a usual name, if it says more than
        the values and no cell contradicts it; else what is there."""
        named, counted = self.options.library_size_column, self.options.value_kind != "log"
        least = sums * (1 - ROUNDING) if counted else np.full(len(sums), np.finfo(float).tiny)
        if named is not None:
            find_column(self.obs, "library_size", named, where=f"obs of {self.where}")
            candidates = [named]
        else:
            order = [name.casefold() for name in STANDARD_NAMES["library_size"]]
            candidates = [name for name in self.obs if str(name).casefold() in order]
            candidates.sort(key=lambda name: order.index(name.casefold()))
        for column in candidates:
            sizes = numbers(self.obs[column])
            wrong = np.flatnonzero(~(np.isfinite(sizes) & (sizes >= least)))
            if len(wrong):
                found = f"is {sizes[wrong[0]]:g} for cell `{self.obs.index[wrong[0]]}`"
                if counted:
                    found += f", which has {sums[wrong[0]]:g} counts"
                if named is not None:
                    raise ValueError(
                        f"`library_size_column` {column!r} of {self.where} {found}; wanted the counts over all genes, a "
                        "number at least as large as the counts in the file."
                    )
                self.notes.append(f"obs column `{column}` of {self.where} {found}; it is not used as library size.")
                continue
            # A sum over the file's own columns, antibodies perhaps among them, says nothing that the values do not.
            own = any(np.allclose(sizes, total, rtol=ROUNDING, atol=0) for total in (sums, sums_of_all))
            if named is not None or not counted or not own:
                return LibrarySizes(np.maximum(sizes, sums) if counted else sizes, column, True)
        if not counted:
            return LibrarySizes(np.ones(len(sums)), "none", False)
        if len(self.genes) < FEW_GENES:
            self.notes.append(
                f"library sizes are the counts of the {len(self.genes)} genes in the file; if it holds only some of the "
                "measured genes, give the counts over all of them as a column of obs (`library_size_column`)."
            )
        return LibrarySizes(sums, "sum", len(self.genes) >= FEW_GENES)


def check_path(path: str | Path, where: str = "file") -> Path:
    """Raises `ValueError` for a path where nothing is, with close matches among the files beside it."""
    path = Path(path)
    if not path.exists():
        folder = path.parent
        beside = [entry.name for entry in folder.iterdir() if entry.suffix in FORMATS] if folder.is_dir() else []
        raise ValueError(f"{where} {str(path)!r} does not exist{close_matches(path.name, beside) or '.'}")
    return path


@contextlib.contextmanager
def open_cells(
    source: str | Path | anndata.AnnData, options: ReadOptions | None = None, where: str = "`cells`"
) -> Iterator[CellFile]:
    """Opens cells without reading their values.

    Args:
        source (`str`, `Path` or `AnnData`): An `.h5ad` file, a `.zarr` folder, an `.h5` file of 10x Genomics, or cells
            in memory.
        where (`str`, *optional*): What messages call the cells.

    Raises:
        ValueError: For a source that is absent or unreadable, a missing layer or column, or no genes.

    Example: `with open_cells("cells.h5ad") as cells: library = cells.check()`, then `cells.blocks()`.
    """
    options = options or ReadOptions()
    with contextlib.ExitStack() as stack:
        adata = source if isinstance(source, anndata.AnnData) else _open(check_path(source, where), stack, where)
        if isinstance(adata, anndata.AnnData):
            obs, var, matrices = adata.obs, adata.var, {"X": adata.X, **adata.layers}
            raw = None if adata.raw is None else (adata.raw.X, adata.raw.var)
        else:
            obs, var, matrices, raw = adata
        if raw is not None and "raw" not in matrices:
            matrices["raw"] = raw[0]
            var = raw[1] if options.layer == "raw" else var
        matrices = {name: matrix for name, matrix in matrices.items() if matrix is not None}
        if options.layer is None and "X" not in matrices:
            raise ValueError(f"{where} has no X; name the `layer` that holds the counts{close_matches('', matrices)}")
        if options.layer is not None and options.layer not in matrices:
            raise ValueError(
                f"`layer` is {options.layer!r}, which {where} does not have"
                f"{close_matches(options.layer, matrices) or '.'}"
            )
        genes = read_file_genes(var, options, where)
        obs = obs.set_axis(obs.index.astype(str))
        yield CellFile(obs, genes, options, where, matrices, np.arange(len(obs)), list(genes.notes))


def _open(path: Path, stack: contextlib.ExitStack, where: str):
    """obs, var, matrices that stay in the file, and raw; or an AnnData in memory for the formats of others."""
    try:
        if path.is_dir():
            group = zarr.open_group(path, mode="r")
        else:
            group = stack.enter_context(h5py.File(path))
            if "obs" not in group and ("matrix" in group or any("barcodes" in part for part in group.values())):
                # Imported here: scanpy takes seconds to import, and only this format needs it.
                import scanpy

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # repeated symbols: ids are read
                    return scanpy.read_10x_h5(path, gex_only=False)
        if "encoding-type" not in group["obs"].attrs:  # written before anndata 0.7
            return (anndata.read_zarr if path.is_dir() else anndata.read_h5ad)(path)
        obs, var = (anndata.io.read_elem(group[name]) for name in ("obs", "var"))
        matrices = {"X": group["X"]} if "X" in group else {}
        if "layers" in group:
            matrices |= {name: group["layers"][name] for name in group["layers"]}
        raw = (group["raw/X"], anndata.io.read_elem(group["raw/var"])) if "raw/X" in group else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where} {str(path)!r} is not a readable AnnData (.h5ad, .zarr) or 10x file (.h5): {reason}"
        ) from error
    return obs, var, matrices, raw


class RowBlocks:
    """Rows of a matrix as CSR blocks, whether it is sparse or dense, in memory, in a backed AnnData or in HDF5 or
    zarr."""

    def __init__(self, matrix):
        if isinstance(matrix, (anndata.abc.CSRDataset, anndata.abc.CSCDataset)):
            matrix = matrix.group
        if isinstance(matrix, (h5py.Group, zarr.Group)):
            kind, self.shape = matrix.attrs["encoding-type"], tuple(matrix.attrs["shape"])
            parts = [matrix["data"], matrix["indices"], matrix["indptr"][:]]
            if kind == "csc_matrix":
                matrix = sparse.csc_matrix((parts[0][:], parts[1][:], parts[2]), shape=self.shape)
        else:
            self.shape, parts = matrix.shape, None
        if sparse.issparse(matrix):
            # Rows of a column-wise matrix can only be cut after turning it round as a whole.
            if matrix.format != "csr":
                matrix = (matrix.astype(np.float32) if matrix.dtype == np.float16 else matrix).tocsr()
            parts = [matrix.data, matrix.indices, matrix.indptr]
        self.matrix, self.parts = matrix, parts

    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each block."""
        n_obs, per_row = self.shape
        if self.parts is not None:
            per_row = int(self.parts[2][-1]) // max(n_obs, 1)
        step = max(VALUES_PER_BLOCK // max(per_row, 1), 1)
        for start in range(0, n_obs, step):
            yield start, min(start + step, n_obs)

    def cut(self, start: int, stop: int) -> sparse.csr_matrix:
        """Some rows, as a copy in canonical order."""
        if self.parts is None:
            return sparse.csr_matrix(_widened(np.asarray(self.matrix[start:stop])))
        data, indices, indptr = self.parts
        inside = slice(int(indptr[start]), int(indptr[stop]))
        entries = (
            _widened(np.array(data[inside])),
            np.array(indices[inside]),
            indptr[start : stop + 1] - inside.start,
        )
        block = sparse.csr_matrix(entries, shape=(stop - start, self.shape[1]))
        block.sum_duplicates()
        return block


def _widened(values: np.ndarray) -> np.ndarray:
    """Half precision as single: scipy has no half, and a sum of it would be rounded."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
