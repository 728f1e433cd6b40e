"""obs in Census form from the obs of any AnnData: columns named or found, missing ones filled."""

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

from data_scripts.cells.column_names import find_column
from data_scripts.cells.read_options import CensusReadOptions
from data_scripts.store.census_layout import TERM_COLUMNS

DEFAULTS = {"suspension_type": "cell", "tissue_type": "tissue"}
# Column of Census -> what it holds, as in `STANDARD_NAMES`.
LABELS = {"donor_id": "donor", **{name: name for name in (*TERM_COLUMNS, *DEFAULTS)}}


def find_labels(obs: pd.DataFrame, options: CensusReadOptions, where: str) -> dict[str, str]:
    """Which column of the file feeds which column of Census.

    Raises:
        ValueError: For a named column that does not exist, with close matches.
    """
    named = dataclasses.asdict(options)
    found = {
        target: find_column(obs, kind, named.get(f"{kind}_column"), where=f"obs of {where}")
        for target, kind in LABELS.items()
    }
    return {target: column for target, column in found.items() if column is not None}


def census_obs(obs: pd.DataFrame, columns: Mapping[str, str], dataset_id: str) -> pd.DataFrame:
    """The descriptive columns of Census for the cells of one file; statistics are added while X is written.

    Labels without an ontology term get `local:LABEL`, so that terms still tell labels apart; missing labels are
    `unknown`.

    Args:
        obs (`pd.DataFrame`): obs of the file.
        columns (`Mapping[str, str]`): From [`find_labels`].
        dataset_id (`str`): Data set of all these cells.
    """
    output = {"dataset_id": pd.Categorical([dataset_id] * len(obs))}
    sources = dict(columns)
    if "tissue_general" not in sources and "tissue" in sources:
        sources["tissue_general"] = sources["tissue"]
    for target in LABELS:
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
