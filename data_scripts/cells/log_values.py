"""Log values of many cells in little memory."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse


class LogValues:
    """
    Log values of cells, kept sparse and read as dense rows; a selection of cells or genes shares the values of all.

    Args:
        matrix (`np.ndarray` or `scipy.sparse` matrix): Values of all cells and genes.
        rows (`np.ndarray`, *optional*): The cells, as rows of `matrix`; all when absent.
        columns (`np.ndarray`, *optional*): The genes, as columns of `matrix`; all when absent.

    Example:

    ```python
    values = LogValues(np.eye(3))
    values[np.array([0, 2])].mean(axis=0)  # array([0.5, 0., 0.5], dtype=float32)
    ```
    """

    def __init__(
        self,
        matrix: np.ndarray | scipy.sparse.spmatrix,
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ):
        self.matrix = scipy.sparse.csr_matrix(matrix, dtype=np.float32)
        self.rows = np.arange(self.matrix.shape[0]) if rows is None else rows
        self.columns = columns

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self.rows), self.matrix.shape[1] if self.columns is None else len(self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, cells) -> np.ndarray:
        """Dense values of some cells (rows, a mask or a slice), float32 of shape `(n, V)`."""
        values = self.matrix[self.rows[cells]].toarray()
        return values if self.columns is None else values[:, self.columns]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.float32, copy=False)

    def of_cells(self, cells: np.ndarray) -> "LogValues":
        """Some of the cells."""
        return LogValues(self.matrix, self.rows[cells], self.columns)

    def of_genes(self, genes: np.ndarray) -> "LogValues":
        """Some of the genes."""
        return LogValues(self.matrix, self.rows, genes if self.columns is None else self.columns[genes])

    def gene_blocks(self, at_once: int = 200) -> Iterator[scipy.sparse.csc_matrix]:
        """Yields the values of some genes at a time, by gene, shape `(n, at most at_once)`."""
        columns = np.arange(self.shape[1]) if self.columns is None else self.columns
        for start in range(0, len(columns), at_once):
            yield self.matrix[:, columns[start : start + at_once]][self.rows].tocsc()

    def expressed_share(self) -> np.ndarray:
        """Share of the cells in which each gene is not zero, `(V,)`."""
        counts = np.zeros(self.matrix.shape[1])
        for start in range(0, len(self), 4_096):
            block = self.matrix[self.rows[start : start + 4_096]]
            counts += np.bincount(block.indices[block.data != 0], minlength=len(counts))
        return (counts if self.columns is None else counts[self.columns]) / max(len(self), 1)
