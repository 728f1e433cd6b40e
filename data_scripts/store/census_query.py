"""A query on the public Census or on a store of one's own: opened and checked before anything long starts."""

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
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
    """An open store with the cells a query selects: `obs` of those cells in ascending `soma_joinid`, `var` of every
    gene of the store (`soma_joinid` 0 to n_vars - 1), which of them `var_filter` keeps, and the `source`: `uri` or
    resolved `census_version`, and `digest`."""

    options: QueryOptions
    census: tiledbsoma.Collection
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
        columns = ["soma_joinid", "dataset_id"]
        datasets = self.census["census_info"]["datasets"].read(column_names=columns).concat().to_pandas()
        row_of = dict(zip(datasets["dataset_id"].astype(str), datasets["soma_joinid"].astype(int)))
        matrix = self.experiment.ms[MEASUREMENT][PRESENCE]
        entries = matrix.read().coos(matrix.shape).concat().to_scipy().tocsr()
        return entries[[row_of[name] for name in dataset_ids], : len(self.var)].toarray().astype(bool)


def open_experiment(options: QueryOptions) -> tuple[tiledbsoma.Collection, tiledbsoma.Experiment, dict]:
    """Opens a query's store: the Census, the organism's experiment and a `dict` that says where they are. Raises
    `ValueError` for a store that is absent, not in Census layout or without the organism or layer."""
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
        source = {"census_version": resolved, "digest": resolved}
        census = cellxgene_census.open_soma(census_version=resolved, tiledb_config=TILEDB_CONFIG)
    else:
        source = {"uri": options.uri, "digest": store_digest(options.uri)}
        if "://" not in options.uri and not Path(options.uri).is_dir():
            raise ValueError(
                f"`uri` {options.uri} does not exist; `gppc make-census` writes a store from AnnData files."
            )
        try:
            census = cellxgene_census.open_soma(uri=absolute_uri(options.uri), tiledb_config=TILEDB_CONFIG)
            found = sorted(census.keys())
        except (tiledbsoma.SOMAError, OSError, TypeError, KeyError) as error:
            raise ValueError(f"`uri` {options.uri} is not a store in Census layout ({_one_line(error)}).") from error
        if not {"census_data", "census_info"} <= set(found):
            raise ValueError(
                f"`uri` {options.uri} is not a store in Census layout: it holds {', '.join(found) or 'nothing'}, wanted "
                "census_data, census_info."
            )
    experiments = census["census_data"]
    if options.organism not in experiments:
        hint = close_matches(options.organism, experiments.keys())
        raise ValueError(f"`organism` is {options.organism!r}, not in the store{hint}")
    experiment = experiments[options.organism]
    layers = experiment.ms[MEASUREMENT].X
    if options.layer not in layers:
        raise ValueError(
            f"`layer` is {options.layer!r}, not in the store{close_matches(options.layer, layers.keys())}"
        )
    return census, experiment, source


def absolute_uri(uri: str) -> str:
    """A store's address that holds when the process changes its working directory: SOMA opens parts when asked for."""
    return uri if "://" in uri else str(Path(uri).absolute())


def open_query(options: QueryOptions, columns: dict[str, str], optional_columns: list[str] = ()) -> CellQuery:
    """Opens the store and reads the labels of the selected cells: the `columns` of obs (-> the option that asks for
    them), and the optional ones that obs has. Raises `ValueError` if the store, a filter or a column does not exist,
    or no cell is selected."""
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
    if PRESENCE not in experiment.ms[MEASUREMENT]:
        raise ValueError(f"the store lacks ms['{MEASUREMENT}']['{PRESENCE}'], which says what was measured.")
    return CellQuery(options, census, experiment, obs, var, selected, source)


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
        leaves = list(ast.walk(node))
        column = next((leaf.id for leaf in leaves if isinstance(leaf, ast.Name) and leaf.id in columns), None)
        # Only of dictionary columns the values are known without reading the column.
        if column is None or not pa.types.is_dictionary(frame.schema.field(column).type):
            continue
        known = frame.get_enumeration_values([column])[column].to_pylist()
        for value in (leaf.value for leaf in leaves if isinstance(leaf, ast.Constant)):
            if value not in known:
                raise ValueError(
                    f"`{name}` {text!r} asks for {column} {value!r}, which the store does not hold"
                    f"{close_matches(str(value), known)}"
                )


def _read(frame: tiledbsoma.DataFrame, value_filter: str | None, columns: list[str] | None, name: str) -> pd.DataFrame:
    try:
        table = frame.read(value_filter=value_filter, column_names=columns).concat()
    except (tiledbsoma.SOMAError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{name}` {value_filter!r} cannot be read: {_one_line(error)}") from error
    return table.to_pandas().sort_values("soma_joinid", ignore_index=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def store_digest(uri: str) -> str:
    """Digest of a store's content without reading it: TileDB never changes a written fragment and gives each a unique
    name, so names and sizes of files say what a local store holds. Of a remote one the address is taken."""
    content = uri
    if "://" not in uri:
        files = [path for path in Path(uri).rglob("*") if path.is_file()]
        entries = sorted((f"/{path.relative_to(uri)}", path.stat().st_size) for path in files)
        content = "".join(f"{name}|{size}\n" for name, size in entries)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
