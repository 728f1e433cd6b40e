"""A query on the public Census or on a store of one's own: opened and checked before anything long starts."""

import ast
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import tiledbsoma

from data_scripts.store.freed_memory import keep_freed_memory
from data_scripts.store.query_options import QueryOptions
from modeling_gppc.normalization_gppc import close_matches

# Small buffers are filled, copied and filled again, and few tiles are decoded ahead: most time of a reader that takes
# more goes into fresh memory.
TILEDB_CONFIG = {"soma.init_buffer_bytes": 4 * 1024**2, "sm.mem.total_budget": 128 * 1024**2}
MEASUREMENT = "RNA"
PRESENCE = "feature_dataset_presence_matrix"


@dataclass
class CellQuery:
    """
    An open store with the cells a query selects.

    Attributes:
        options (`QueryOptions`): The query.
        experiment (`tiledbsoma.Experiment`): The organism's experiment, open for reading.
        obs (`pd.DataFrame`): Selected cells in ascending `soma_joinid`, with the columns asked for.
        var (`pd.DataFrame`): Every gene of the store in ascending `soma_joinid`, which are 0 to n_vars - 1.
        var_selected (`np.ndarray`): Genes that `var_filter` keeps, bool of shape `(n_vars,)`.
        source (`dict`): What the rows come from: `uri` or `census_version` (resolved), and `digest` of the store.
    """

    options: QueryOptions
    experiment: tiledbsoma.Experiment
    obs: pd.DataFrame
    var: pd.DataFrame
    var_selected: np.ndarray
    source: dict

    @property
    def matrix(self) -> tiledbsoma.SparseNDArray:
        """The layer the query reads, `(n_obs of the store, n_vars)`."""
        return self.experiment.ms[MEASUREMENT].X[self.options.layer]

    def presence(self, dataset_ids: list[str]) -> np.ndarray:
        """Which genes each data set measured, bool of shape `(len(dataset_ids), n_vars)`."""
        return self._presence[[self._dataset_rows[name] for name in dataset_ids]].toarray()


def open_experiment(options: QueryOptions) -> tuple[tiledbsoma.Collection, tiledbsoma.Experiment, dict]:
    """Opens the store of a query: the Census collection, the organism's experiment and a `dict` that says where they
    are.

    Raises:
        ValueError: If the store does not exist, is not in Census layout or lacks the organism or layer.
    """
    import cellxgene_census

    keep_freed_memory()
    if options.uri is None:
        version = options.census_version or "stable"
        try:
            resolved = cellxgene_census.get_census_version_description(version)["release_build"]
        except ValueError as error:
            raise ValueError(f"`census_version` is {version!r}: {' '.join(str(error).split())}") from error
        except OSError as error:
            raise ValueError(
                f"`census_version` {version!r} cannot be looked up ({' '.join(str(error).split())}); give `uri`, the "
                "address of a store, or try again with a network."
            ) from error
        source = {"census_version": resolved}
        census = cellxgene_census.open_soma(census_version=resolved, tiledb_config=TILEDB_CONFIG)
    else:
        uri = str(options.uri)
        if "://" not in uri and not Path(uri).is_dir():
            raise ValueError(f"`uri` {uri} does not exist; `gppc make-census` writes a store from AnnData files.")
        source = {"uri": uri}
        try:
            census = cellxgene_census.open_soma(uri=uri, tiledb_config=TILEDB_CONFIG)
        except (tiledbsoma.SOMAError, OSError, TypeError, KeyError) as error:
            raise ValueError(f"`uri` {uri} is not a store in Census layout ({_one_line(error)}).") from error
    name = options.uri or source.get("census_version")
    if "census_data" not in census or "census_info" not in census:
        found = ", ".join(sorted(census.keys())) or "nothing"
        raise ValueError(
            f"`uri` {name} is not a store in Census layout: it holds {found}, wanted census_data, census_info."
        )
    organisms = list(census["census_data"].keys())
    if options.organism not in organisms:
        raise ValueError(
            f"`organism` is {options.organism!r}, not in the store{close_matches(options.organism, organisms)}"
        )
    experiment = census["census_data"][options.organism]
    layers = list(experiment.ms[MEASUREMENT].X.keys())
    if options.layer not in layers:
        raise ValueError(f"`layer` is {options.layer!r}, not in the store{close_matches(options.layer, layers)}")
    source["digest"] = store_digest(options.uri) if options.uri is not None else source["census_version"]
    return census, experiment, source


def open_query(options: QueryOptions, columns: dict[str, str], optional_columns: list[str] = ()) -> CellQuery:
    """Opens the store and reads the labels of the selected cells.

    Args:
        options (`QueryOptions`): The query.
        columns (`dict[str, str]`): Columns of obs to read besides `soma_joinid` -> the option that asks for them.
        optional_columns (`list[str]`, *optional*): Columns to read where obs has them.

    Raises:
        ValueError: If the store, a filter or a column does not exist, or no cell is selected.
    """
    census, experiment, source = open_experiment(options)
    known = list(experiment.obs.keys())
    for name, asked_by in columns.items():
        if name not in known:
            raise ValueError(f"`{asked_by}` names {name!r}, which is not a column of obs{close_matches(name, known)}")
    check_filter(options.obs_filter, experiment.obs, "obs_filter")
    check_filter(options.var_filter, experiment.ms[MEASUREMENT].var, "var_filter")
    wanted = list(dict.fromkeys(["soma_joinid", *columns, *(name for name in optional_columns if name in known)]))
    obs = _read(experiment.obs, options.obs_filter, wanted, "obs_filter")
    if not len(obs):
        raise ValueError(
            f"`obs_filter` {options.obs_filter!r} matches none of the store's {experiment.obs.count} cells."
        )
    var = _read(experiment.ms[MEASUREMENT].var, None, None, "var_filter")
    selected = np.ones(len(var), dtype=bool)
    if options.var_filter is not None:
        kept = _read(experiment.ms[MEASUREMENT].var, options.var_filter, ["soma_joinid"], "var_filter")
        selected = np.isin(var["soma_joinid"].to_numpy(), kept["soma_joinid"].to_numpy())
        if not selected.any():
            raise ValueError(f"`var_filter` {options.var_filter!r} matches none of the store's {len(var)} genes.")
    query = CellQuery(options, experiment, obs, var, selected, source)
    query._census = census  # keeps the parent open
    if PRESENCE not in experiment.ms[MEASUREMENT]:
        raise ValueError(f"the store lacks ms['{MEASUREMENT}']['{PRESENCE}'], which says what was measured.")
    matrix = experiment.ms[MEASUREMENT][PRESENCE]
    datasets = census["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
    query._dataset_rows = dict(zip(datasets["dataset_id"].astype(str), datasets["soma_joinid"].astype(int)))
    entries = matrix.read().tables().concat()
    rows, cols = (entries.column(name).to_numpy() for name in ("soma_dim_0", "soma_dim_1"))
    present = entries.column("soma_data").to_numpy().astype(bool)
    query._presence = sp.csr_matrix((present, (rows, cols)), shape=matrix.shape)[:, : len(var)]
    return query


def check_filter(text: str | None, frame: tiledbsoma.DataFrame, name: str) -> None:
    """Checks a SOMA value filter against the columns and known values of a data frame, before it is run."""
    if text is None:
        return
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"`{name}` {text!r} is malformed: {error.msg} at character {error.offset}.") from error
    columns = list(frame.keys())
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in (*columns, "attr", "val"):
            raise ValueError(
                f"`{name}` {text!r} names {node.id!r}, which is not a column{close_matches(node.id, columns)}"
            )
    if not any(isinstance(node, ast.Compare) for node in ast.walk(tree)):
        raise ValueError(f"`{name}` {text!r} compares nothing; wanted e.g. \"tissue == 'blood'\".")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], (ast.Eq, ast.In)):
            continue
        sides = [node.left, *node.comparators]
        column = next((side.id for side in sides if isinstance(side, ast.Name)), None)
        values = [leaf.value for side in sides for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)]
        if column is None:
            continue
        known = _known_values(frame, column)
        for value in values:
            if known is not None and value not in known:
                raise ValueError(
                    f"`{name}` {text!r} asks for {column} {value!r}, which the store does not hold"
                    f"{close_matches(str(value), known)}"
                )


def _known_values(frame: tiledbsoma.DataFrame, column: str) -> list | None:
    """The values of a dictionary column, `None` for other columns."""
    field = frame.schema.field(column)
    if not hasattr(field.type, "value_type") or not hasattr(field.type, "index_type"):
        return None
    return frame.get_enumeration_values([column])[column].to_pylist()


def _read(frame: tiledbsoma.DataFrame, value_filter: str | None, columns: list[str] | None, name: str) -> pd.DataFrame:
    try:
        table = frame.read(value_filter=value_filter, column_names=columns).concat()
    except (tiledbsoma.SOMAError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{name}` {value_filter!r} cannot be read: {_one_line(error)}") from error
    return table.to_pandas().sort_values("soma_joinid", ignore_index=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def store_digest(uri: str) -> str:
    """Digest of a store's content without reading it.

    TileDB never changes a written fragment and gives each a unique name, so names and sizes of the files of a local
    store say what it holds; of a remote store the address is all that is cheap to know.
    """
    digest = hashlib.blake2b(digest_size=16)
    if "://" in str(uri):
        digest.update(str(uri).encode())
        return digest.hexdigest()
    root = str(Path(uri))
    entries = []
    for folder, _, files in os.walk(root):
        inside = folder[len(root) :]
        entries += [(f"{inside}/{file}", os.stat(f"{folder}/{file}").st_size) for file in files]
    for name, size in sorted(entries):
        digest.update(f"{name}|{size}\n".encode())
    return digest.hexdigest()
