"""The layout of a Census-like SOMA store: columns, types, tiles of X, and the calls that create and fill it.

Follows schema 2.4.0 as published by the Census builder (chanzuckerberg/cellxgene-census).
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
from scipy import sparse

from data_scripts.cells.gene_mapping import ORGANISMS

CENSUS_SCHEMA_VERSION = "2.4.0"
DATASET_SCHEMA_VERSION = "7.0.0"

# Columns of obs that describe a cell, as label and ontology term; both are dictionaries in Census.
TERM_COLUMNS = (
    "assay",
    "cell_type",
    "development_stage",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "tissue",
    "tissue_general",
)
_TERMS = [name for label in TERM_COLUMNS for name in (label, f"{label}_ontology_term_id")]
OBS_DICTIONARIES = ("dataset_id", *_TERMS, "donor_id", "suspension_type", "tissue_type")
OBS_STATISTICS = {
    "raw_sum": pa.float64(),
    "nnz": pa.int64(),
    "raw_mean_nnz": pa.float64(),
    "raw_variance_nnz": pa.float64(),
    "n_measured_vars": pa.int64(),
}
OBS_TYPES = {
    "soma_joinid": pa.int64(),
    **{name: pa.large_string() for name in OBS_DICTIONARIES},
    "is_primary_data": pa.bool_(),
    "observation_joinid": pa.large_string(),
    **OBS_STATISTICS,
}
VAR_TYPES = {
    "soma_joinid": pa.int64(),
    "feature_id": pa.large_string(),
    "feature_name": pa.large_string(),
    "feature_type": pa.large_string(),
    "feature_length": pa.int64(),
    "nnz": pa.int64(),
    "n_measured_obs": pa.int64(),
}
DATASET_TEXTS = (
    "citation",
    "collection_id",
    "collection_name",
    "collection_doi",
    "collection_doi_label",
    "dataset_id",
    "dataset_version_id",
    "dataset_title",
    "dataset_h5ad_path",
)
COUNTED_TERMS = (
    "cell_type",
    "assay",
    "tissue",
    "disease",
    "self_reported_ethnicity",
    "sex",
    "tissue_general",
)

X_TILE = 2048


# As Census has them: what a reader of cells decodes is a tile of 2,048 cells and as many genes.
X_SETTINGS = {
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": X_TILE, "filters": [{"_type": "ZstdFilter", "level": 9}]},
                "soma_dim_1": {"tile": X_TILE, "filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 9}]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 9}]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}


def frame_to_arrow(
    frame: pd.DataFrame, types: Mapping[str, pa.DataType], dictionaries: Sequence[str] = ()
) -> pa.Table:
    """Arrow form of a frame with the given column types; `dictionaries` get the narrowest index type."""
    arrays = {}
    for name, value_type in types.items():
        if name in dictionaries:
            column = frame[name].astype("category").cat.remove_unused_categories()
            values = pa.array(column.cat.categories.astype(str).tolist(), type=value_type)
            array = pa.DictionaryArray.from_arrays(pa.array(column.cat.codes.to_numpy()), values)
        else:
            array = pa.array(frame[name].to_numpy(), type=value_type)
        arrays[name] = array
    return pa.table(arrays)


def create_store(path: str | Path, organism: str) -> None:
    """Creates the empty collections of a store with one organism."""
    with tiledbsoma.Collection.create(str(path)) as root:
        root.metadata["created_on"] = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
        root.add_new_collection("census_info")
        experiment = root.add_new_collection("census_data").add_new_collection(organism, tiledbsoma.Experiment)
        experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement).add_new_collection("X")


def measurement_uri(path: str | Path, organism: str) -> str:
    """Where the RNA measurement of an organism lies."""
    return f"{path}/census_data/{organism}/ms/RNA"


def write_frame(collection_uri: str, name: str, table: pa.Table) -> None:
    """Creates a SOMA data frame in a collection and fills it, through a handle opened anew: what that of
    `add_new_dataframe` writes leaves the enumerations of dictionary columns empty (tiledbsoma 2.3.0), and filters on
    them would match no cell."""
    ids = table["soma_joinid"].to_numpy()
    with tiledbsoma.open(collection_uri, "w") as collection:
        collection.add_new_dataframe(
            name,
            schema=table.schema,
            index_column_names=["soma_joinid"],
            domain=[(int(ids.min()), int(ids.max()))],
        )
    with tiledbsoma.open(f"{collection_uri}/{name}", "w") as frame:
        frame.write(table)


def create_x_layers(path: str | Path, organism: str, layers: Sequence[str], shape: tuple[int, int]) -> None:
    """Creates empty float32 layers of X, `(n_obs, n_vars)`."""
    with tiledbsoma.open(f"{measurement_uri(path, organism)}/X", "w") as collection:
        for name in layers:
            collection.add_new_sparse_ndarray(name, type=pa.float32(), shape=shape, platform_config=X_SETTINGS).close()


def write_x(
    path: str | Path, organism: str, layers: Mapping[str, np.ndarray], block: sparse.csr_matrix, first: int
) -> None:
    """Adds a block's rows, in columns of the store, to layers of X (name -> values), starting at row `first`.

    Values are handed over in the order of the array's tiles, which TileDB writes five times as fast as any other.
    """
    rows = np.repeat(np.arange(first, first + block.shape[0], dtype=np.int64), np.diff(block.indptr))
    columns = block.indices.astype(np.int64)
    tile = rows // X_TILE * (2**31 // X_TILE) + columns // X_TILE
    order = np.argsort(tile * X_TILE**2 + rows % X_TILE * X_TILE + columns % X_TILE)
    for layer, values in layers.items():
        with tiledbsoma.open(f"{measurement_uri(path, organism)}/X/{layer}", "w") as array:
            array.write(
                pa.table({"soma_dim_0": rows[order], "soma_dim_1": columns[order], "soma_data": values[order]}),
                platform_config=tiledbsoma.options.TileDBWriteOptions(sort_coords=False),
            )


def write_presence(path: str | Path, organism: str, measured: Sequence[np.ndarray], n_vars: int) -> None:
    """Writes which genes each data set measured: for each data set, `soma_joinid` of its genes."""
    name, rows = "feature_dataset_presence_matrix", np.repeat(np.arange(len(measured)), list(map(len, measured)))
    with tiledbsoma.open(measurement_uri(path, organism), "w") as measurement:
        measurement.add_new_sparse_ndarray(name, type=pa.bool_(), shape=(len(measured), n_vars)).close()
    columns = {"soma_dim_0": rows.astype(np.int64), "soma_dim_1": np.concatenate(measured).astype(np.int64)}
    with tiledbsoma.open(f"{measurement_uri(path, organism)}/{name}", "w") as matrix:
        matrix.write(pa.table({**columns, "soma_data": np.ones(len(rows), dtype=bool)}))


def write_obs(path: str | Path, organism: str, obs: pd.DataFrame, extra: Mapping[str, pa.DataType]) -> None:
    """Writes obs; `extra` are types of columns beyond those of Census (texts become dictionaries)."""
    dictionaries = [*OBS_DICTIONARIES, *(name for name, kind in extra.items() if pa.types.is_large_string(kind))]
    types = {**OBS_TYPES, **extra}
    write_frame(f"{path}/census_data/{organism}", "obs", frame_to_arrow(obs, types, dictionaries))


def write_var(path: str | Path, organism: str, var: pd.DataFrame) -> None:
    """Writes var of the RNA measurement."""
    write_frame(measurement_uri(path, organism), "var", frame_to_arrow(var, VAR_TYPES))


def write_info(path: str | Path, organism: str, obs: pd.DataFrame, datasets: pd.DataFrame) -> None:
    """Writes census_info: summary, data sets, numbers of cells (`obs` holds all of them) and organisms."""
    uri = f"{path}/census_info"
    label, taxon, _ = ORGANISMS[organism]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    summary = {
        "census_schema_version": CENSUS_SCHEMA_VERSION,
        "census_build_date": today,
        "dataset_schema_version": DATASET_SCHEMA_VERSION,
        "total_cell_count": str(len(obs)),
        "unique_cell_count": str(int(obs["is_primary_data"].sum())),
    }
    text = pa.large_string()
    frame = pd.DataFrame({"label": list(summary), "value": list(summary.values())})
    _write_numbered(uri, "summary", frame, {"label": text, "value": text})
    frame = datasets.reindex(columns=[*DATASET_TEXTS, "dataset_total_cell_count"], fill_value="")
    types = {**dict.fromkeys(DATASET_TEXTS, text), "dataset_total_cell_count": pa.int64()}
    _write_numbered(uri, "datasets", frame, types)
    frame = pd.DataFrame({"organism_ontology_term_id": [taxon], "organism_label": [label], "organism": [organism]})
    _write_numbered(uri, "organisms", frame, dict.fromkeys(frame, text))
    types = {
        **dict.fromkeys(("organism", "category", "label", "ontology_term_id"), text),
        **{name: pa.int64() for name in ("total_cell_count", "unique_cell_count")},
    }
    _write_numbered(uri, "summary_cell_counts", _count_cells(obs, label), types, ("organism", "category"))


def _write_numbered(
    uri: str, name: str, frame: pd.DataFrame, types: Mapping, dictionaries: Sequence[str] = ()
) -> None:
    frame = frame.assign(soma_joinid=np.arange(len(frame)))
    write_frame(uri, name, frame_to_arrow(frame, {"soma_joinid": pa.int64(), **types}, dictionaries))


def _count_cells(obs: pd.DataFrame, organism_label: str) -> pd.DataFrame:
    primary, nothing = obs["is_primary_data"].to_numpy(), pd.Series("na", index=obs.index)
    parts = []
    for category in ("all", *COUNTED_TERMS, "suspension_type"):
        label = nothing if category == "all" else obs[category].astype(str)
        term = obs[f"{category}_ontology_term_id"].astype(str) if category in COUNTED_TERMS else nothing
        cells = pd.DataFrame({"category": category, "label": label, "ontology_term_id": term, "primary": primary})
        parts.append(
            cells.groupby(["category", "ontology_term_id", "label"], as_index=False)["primary"].agg(["size", "sum"])
        )
    frame = pd.concat(parts, ignore_index=True).assign(organism=organism_label)
    frame = frame.rename(columns={"size": "total_cell_count", "sum": "unique_cell_count"})
    return frame.astype({"total_cell_count": np.int64, "unique_cell_count": np.int64})
