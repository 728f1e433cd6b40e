"""obs in Census form from the obs of any AnnData: columns named or found, missing ones filled."""

import dataclasses
import hashlib

import pandas as pd

from data_scripts.cells.column_names import find_column, texts
from data_scripts.cells.read_options import CensusReadOptions
from data_scripts.store.census_layout import TERM_COLUMNS

DEFAULTS = {"suspension_type": "cell", "tissue_type": "tissue"}
# Column of Census -> what it holds, as in `STANDARD_NAMES`.
LABELS = {"donor_id": "donor", **{name: name for name in (*TERM_COLUMNS, *DEFAULTS)}}


def census_obs(
    obs: pd.DataFrame, options: CensusReadOptions, dataset_id: str, where: str
) -> tuple[pd.DataFrame, dict[str, str | None]]:
    """The descriptive columns of Census for the cells of one file, and the column that each label comes from.

    Labels without an ontology term get `local:LABEL`, so that terms still tell labels apart; missing labels are
    `unknown`. Raises `ValueError` for a named column that does not exist, with close matches.
    """
    named = dataclasses.asdict(options)
    sources = {
        target: find_column(obs, kind, named.get(f"{kind}_column"), where=f"obs of {where}")
        for target, kind in LABELS.items()
    }
    sources["tissue_general"] = sources["tissue_general"] or sources["tissue"]
    output = {"dataset_id": [dataset_id] * len(obs)}
    for target, column in sources.items():
        output[target] = _labels(obs, column, DEFAULTS.get(target, "unknown"))
        if target in TERM_COLUMNS:
            # Terms in the file belong to the label column of the same name only.
            terms, local = f"{column}_ontology_term_id", output[target]
            local = local.rename_categories([x if x in ("unknown", "na") else f"local:{x}" for x in local.categories])
            output[f"{target}_ontology_term_id"] = _labels(obs, terms, "unknown") if terms in obs else local
    primary = obs["is_primary_data"] if "is_primary_data" in obs else pd.Series(True, index=obs.index)
    output["is_primary_data"] = primary.fillna(True).astype(bool).to_numpy() if primary.dtype.kind in "bO" else True
    output["observation_joinid"] = [
        hashlib.blake2b(f"{dataset_id}\0{name}".encode(), digest_size=6).hexdigest() for name in obs.index
    ]
    return pd.DataFrame(output), sources


def _labels(obs: pd.DataFrame, column: str | None, default: str) -> pd.Categorical:
    if column is None:
        return pd.Categorical([default] * len(obs))
    return pd.Categorical(["unknown" if text in ("", "nan") else text for text in texts(obs[column])])
