"""obs in Census form from the obs of any AnnData: columns named or found, missing ones filled, library sizes checked."""

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from data_scripts.cells.gene_mapping import find_column, named_column
from data_scripts.store.census_layout import TERM_COLUMNS

# Names under which files usually carry a column, most specific first; case is ignored.
STANDARD_NAMES = {
    "cell_type": (
        "cell_type",
        "celltype",
        "cell_types",
        "cell type",
        "cell.type",
        "cell_type_label",
        "author_cell_type",
        "bulk_labels",
        "cell_line",
        "louvain",
        "leiden",
    ),
    "donor_id": ("donor_id", "donor", "individual", "ind", "patient_id", "patient", "subject", "replicate"),
    "assay": ("assay", "technology", "platform"),
    "tissue": ("tissue", "organ"),
    "tissue_general": ("tissue_general",),
    "sex": ("sex", "gender"),
    "disease": ("disease",),
    "development_stage": ("development_stage",),
    "self_reported_ethnicity": ("self_reported_ethnicity",),
    "suspension_type": ("suspension_type",),
    "tissue_type": ("tissue_type",),
}
DEFAULTS = {"suspension_type": "cell", "tissue_type": "tissue"}
# Counts over all genes, used only where no cell has more counts than that.
LIBRARY_NAMES = ("n_counts_full", "n_counts", "total_counts", "ncount_rna", "raw_sum")


def find_obs_columns(obs: pd.DataFrame, keys: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Which column of the file feeds which column of Census.

    Args:
        obs (`pd.DataFrame`): obs of the file.
        keys (`Mapping[str, str | None]`): Census column -> column named by the caller, or None to look for one.
        where (`str`): The file, for messages.

    Raises:
        ValueError: For a named column that does not exist, with close matches.
    """
    found = {}
    for target, candidates in STANDARD_NAMES.items():
        key = keys.get(target)
        if key is not None:
            option = f"{target.removesuffix('_id')}_key"
            found[target] = named_column(obs.columns, key, option, f"obs of {where}")
        else:
            column = find_column(obs.columns, candidates)
            if column is not None:
                found[target] = column
    return found


def census_obs(obs: pd.DataFrame, columns: Mapping[str, str], dataset_id: str) -> pd.DataFrame:
    """The descriptive columns of Census for the cells of one file; statistics are added while X is written.

    Labels without an ontology term get `local:LABEL`, so that terms still tell labels apart; missing labels are
    `unknown`.

    Args:
        obs (`pd.DataFrame`): obs of the file.
        columns (`Mapping[str, str]`): From [`find_obs_columns`].
        dataset_id (`str`): Data set of all these cells.
    """
    output = {"dataset_id": pd.Categorical([dataset_id] * len(obs))}
    sources = dict(columns)
    if "tissue_general" not in sources and "tissue" in sources:
        sources["tissue_general"] = sources["tissue"]
    for target in STANDARD_NAMES:
        column = sources.get(target)
        output[target] = _labels(
            obs[column] if column is not None else None, len(obs), DEFAULTS.get(target, "unknown")
        )
        if target in TERM_COLUMNS:
            terms = f"{column}_ontology_term_id"
            # Terms in the file belong to the label column of the same name only.
            if column is not None and terms in obs:
                output[f"{target}_ontology_term_id"] = _labels(obs[terms], len(obs), "unknown")
            else:
                output[f"{target}_ontology_term_id"] = _local_terms(output[target])
    primary = obs["is_primary_data"] if "is_primary_data" in obs else pd.Series(True, index=obs.index)
    output["is_primary_data"] = (
        primary.fillna(True).astype(bool).to_numpy() if primary.dtype.kind in "bO" else np.ones(len(obs), dtype=bool)
    )
    output["observation_joinid"] = [_joinid(dataset_id, name) for name in obs.index]
    return pd.DataFrame(output)


def _labels(column: pd.Series | None, length: int, default: str) -> pd.Categorical:
    if column is None:
        return pd.Categorical([default] * length)
    texts = (
        column.astype(object).where(column.notna(), "unknown").astype(str).replace({"": "unknown", "nan": "unknown"})
    )
    return pd.Categorical(texts.to_numpy())


def _local_terms(labels: pd.Categorical) -> pd.Categorical:
    named = [label if label in ("unknown", "na") else f"local:{label}" for label in labels.categories]
    return labels.rename_categories(named)


def _joinid(dataset_id: str, name: str) -> str:
    return hashlib.blake2b(f"{dataset_id}\0{name}".encode(), digest_size=6).hexdigest()


def library_sizes(obs: pd.DataFrame, sums: np.ndarray, key: str | None, where: str) -> tuple[np.ndarray, str]:
    """Counts over all genes of each cell, and where they come from.

    Args:
        obs (`pd.DataFrame`): obs of the file.
        sums (`np.ndarray`): Counts that the file holds for each cell, shape `(n_obs,)`.
        key (`str`, *optional*): Column that holds them; without it a usual name is taken if no cell contradicts it.
        where (`str`): The file, for messages.

    Returns:
        `np.ndarray` of float64, shape `(n_obs,)`, and the column's name or `"sum"`.

    Raises:
        ValueError: For a named column that is absent, not numeric, or smaller than the counts of a cell.
    """
    if key is not None:
        column = named_column(obs.columns, key, "library_size_key", f"obs of {where}")
        sizes = pd.to_numeric(obs[column], errors="coerce").to_numpy(dtype=np.float64)
        short = ~(sizes >= sums * (1 - 1e-6))
        if short.any():
            row = int(np.flatnonzero(short)[0])
            raise ValueError(
                f"`library_size_key` {key!r} of {where} is {sizes[row]:g} for cell `{obs.index[row]}`, which has "
                f"{sums[row]:g} counts; wanted the counts over all genes, at least as many as the file holds."
            )
        return np.maximum(sizes, sums), column
    for name in LIBRARY_NAMES:
        column = find_column(obs.columns, (name,))
        if column is None or obs[column].dtype.kind not in "iuf":
            continue
        sizes = obs[column].to_numpy(dtype=np.float64)
        if np.isfinite(sizes).all() and (sizes >= sums * (1 - 1e-6)).all():
            return np.maximum(sizes, sums), column
    return sums.astype(np.float64), "sum"
