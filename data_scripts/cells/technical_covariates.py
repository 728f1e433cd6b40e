"""Technical covariates of cells: read in one way where a model is fitted and where it predicts."""

import numpy as np
import pandas as pd

from data_scripts.cells.column_names import find_column, numbers


def technical_covariates(obs: pd.DataFrame, library_size: np.ndarray | None, where: str) -> dict[str, np.ndarray]:
    """What is known of each cell's whole transcriptome, by name: `log library size`, `log expressed genes` and
    `mitochondrial share`, as far as obs has them; `ValueError` for a column that is not a finite number for every
    cell.

    Without `library_size`, the counts over *all* genes of each cell, expressed genes are not taken either: on a
    targeted panel both are themselves responses.
    """

    def column(kind: str) -> np.ndarray | None:
        name = find_column(obs, kind)
        if name is None:
            return None
        values = numbers(obs[name])
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"obs column `{name}` of {where} is `{obs[name].iloc[row]}` for cell `{obs.index[row]}`; wanted a number "
                "for every cell: repair or drop the column."
            )
        return values

    expressed = None if library_size is None else column("n_expressed")
    found = {
        "log library size": None if library_size is None else np.log(np.maximum(library_size, 1.0)),
        "log expressed genes": None if expressed is None else np.log(np.maximum(expressed, 1.0)),
        "mitochondrial share": column("p_mito"),
    }
    return {name: values for name, values in found.items() if values is not None}
