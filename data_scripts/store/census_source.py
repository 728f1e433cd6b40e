"""Where the cells of a store come from: AnnData in memory, files, or functions that load them when needed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import numpy as np

from data_scripts.cells.anndata_file import CellFile, check_path, open_cells
from data_scripts.cells.column_names import find_column, texts
from data_scripts.cells.read_options import CensusReadOptions


@dataclass
class CensusSource:
    """
    One data set, or one part of it, on its way into a store.

    A function is called when the cells are needed: once to check them, once to write them, so that only one source is in
    memory at a time. Consecutive sources with the same `dataset_id` and the same genes are parts of one data set.

    Args:
        cells (`AnnData`, `str`, `Path` or `Callable[[], AnnData]`): Cells in memory, a file (see [`open_cells`] for its
            formats), or a function that returns the same cells at every call.
        dataset_id (`str`): Name of the data set.
        rows (`np.ndarray`, *optional*): Only these cells, a mask of shape `(n_obs,)`.
        options ([`CensusReadOptions`], *optional*): What is where.
    """

    cells: anndata.AnnData | str | Path | Callable[[], anndata.AnnData]
    dataset_id: str
    rows: np.ndarray | None = None
    options: CensusReadOptions = field(default_factory=CensusReadOptions)

    def __post_init__(self):
        if self.is_file:
            check_path(self.cells)
        if not self.dataset_id:
            raise ValueError("`dataset_id` is empty; every data set needs a name.")

    @contextlib.contextmanager
    def open(self) -> Iterator[CellFile]:
        """The cells; a file is opened without reading its counts, and closed afterwards."""
        source = self.cells if self.is_file or isinstance(self.cells, anndata.AnnData) else self.cells()
        with open_cells(source, self.options, self.where) as cells:
            yield cells if self.rows is None else cells.subset(self.rows)

    @property
    def is_file(self) -> bool:
        """Whether the cells lie in a file."""
        return isinstance(self.cells, (str, Path))

    @property
    def where(self) -> str:
        """What messages call the source."""
        return f"file {self.cells}" if self.is_file else f"data set {self.dataset_id!r}"


def sources_from_file(
    path: str | Path, options: CensusReadOptions | None = None, dataset_column: str | None = None
) -> list[CensusSource]:
    """The data sets of one file, split by the column `dataset_column` of obs, each with every gene of the file.
    Without one the file is one data set, named by `dataset_id` or `dataset` of obs if that holds one value, else by
    the file. Raises `ValueError` for an unreadable file or an absent column."""
    path, options = Path(path), options or CensusReadOptions()
    whole = CensusSource(path, path.stem, options=options)
    with whole.open() as cells:
        column = find_column(cells.obs, "dataset", dataset_column, where=f"obs of {whole.where}")
        labels = np.array([] if column is None else [text or "unknown" for text in texts(cells.obs[column])])
    names = list(dict.fromkeys(labels.tolist()))
    if dataset_column is None and len(names) != 1:
        return [whole]
    return [CensusSource(path, name, labels == name, options) for name in names]
