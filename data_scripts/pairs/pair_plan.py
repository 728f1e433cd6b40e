"""The plan of a build: every cell's shard, split and context, decided before any expression value is read."""

import dataclasses
import hashlib
import json
import threading
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from data_scripts.files import write_arrays, write_json
from data_scripts.options import differences, from_mapping
from data_scripts.pairs.gene_selection import gene_lengths_of, read_gene_list
from data_scripts.pairs.pair_folder import MANIFEST, write_table_atomically
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_shard import CellTable
from data_scripts.pairs.schema import CONTEXT_COLUMNS, SCHEMA_VERSION, SPLITS
from data_scripts.pairs.splits import assign_splits, default_rules, describe_rules
from data_scripts.store.cell_stream import tile_boundary
from data_scripts.store.census_query import CellQuery, absolute_uri, open_experiment, open_query

BUILD_VERSION = 2  # raised whenever the same options would give other rows
# Panels up to this size are written as they are mapped; rows of larger ones are packed to a quarter.
MAPPED_GENES = 4_096
WORK = "work"
PLAN = "plan.json"


def file_format(options: PairOptions, n_genes: int) -> str:
    """`arrow` or `parquet`; `auto` depends on the size of the panel."""
    if options.file_format != "auto":
        return options.file_format
    return "parquet" if n_genes > MAPPED_GENES else "arrow"


def vocabulary_of(genes: np.ndarray, n_vars: int) -> np.ndarray:
    """Vocabulary id of every gene of the store, -1 where left out; int32 of shape `(n_vars,)`."""
    ids = np.full(n_vars, -1, dtype=np.int32)
    ids[genes] = np.arange(len(genes), dtype=np.int32)
    return ids


def panels_of(measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sets of measured genes, `(n_panels, n_genes)`, and each data set's index among them, int32."""
    panels, index = np.unique(measured, axis=0, return_inverse=True)
    return panels, index.reshape(-1).astype(np.int32)


def digest_of(content) -> str:
    """Digest of anything JSON can hold, independent of the order of its keys."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def plan_identity(options: PairOptions, source: dict) -> dict:
    """Everything the rows depend on: code, schema, store, options and the lists they name."""
    content = dataclasses.asdict(options)
    content["query"].pop("uri")  # the store is known by its content, wherever it lies
    content["query"].pop("census_version")
    names = None if options.panel.file is None else read_gene_list(options.panel.file)
    # Order matters among rules and pairings; as lists they keep it in the sorted JSON.
    content["matching"]["pairings"] = list(content["matching"]["pairings"].items())
    return {
        "build_version": BUILD_VERSION,
        "schema_version": SCHEMA_VERSION,
        "store": source["digest"],
        "panel_genes": None if names is None else digest_of(names),
        "options": content,
    }


def check_folder(path: Path, identity: dict) -> str:
    """What an output folder holds: `"new"`, `"unfinished"` or `"finished"`; anything else is a `ValueError`."""
    for file, state in ((path / MANIFEST, "finished"), (path / WORK / PLAN, "unfinished")):
        if not file.is_file():
            continue
        try:
            old = json.loads(file.read_text())["identity"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"`out` {path} holds something else ({file.name} is not a build's); choose another."
            ) from error
        if digest_of(old) == digest_of(identity):
            return state
        found = differences(old, json.loads(json.dumps(identity)))
        shown = [f"{name.removeprefix('options.')} was {before!r}, is {after!r}" for name, before, after in found]
        raise ValueError(
            f"`out` {path} holds another run ({'; '.join(shown[:3])}); choose another folder or delete it."
        )
    if path.exists() and (not path.is_dir() or any(entry.name not in (".lock", WORK) for entry in path.iterdir())):
        raise ValueError(f"`out` {path} is not empty and holds no pairs; choose another folder.")
    return "new"


def needed_columns(options: PairOptions) -> dict[str, str]:
    """Columns of obs that a build reads -> the option that asks for them."""
    columns = dict.fromkeys(CONTEXT_COLUMNS, "obs")
    if options.query.layer == "raw":
        columns |= {"raw_sum": "layer", "nnz": "layer"}
    for name, pairing in options.matching.pairings.items():
        columns |= {column: f"pairings.{name}.keys" for column in pairing.keys if column not in columns}
        columns |= {column: f"pairings.{name}.different" for column in pairing.different if column not in columns}
    for rule in options.splits.rules or ():
        columns |= {name: "splits.rules" for name in (*rule.where, rule.by) if name not in (None, "cell", *columns)}
    return columns


def query_for(options: PairOptions) -> CellQuery:
    """Opens the query with every column that the plan needs."""
    return open_query(options.query, needed_columns(options), ["observation_joinid", "raw_sum", "nnz"])


def context_codes(obs: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """One code for each combination of values, -1 where any is missing, int64 of shape `(n_obs,)`."""
    if not columns:
        return np.zeros(len(obs), dtype=np.int64)
    return obs.groupby(columns, sort=False, observed=True).ngroup().to_numpy(dtype=np.int64)


def cell_table(query: CellQuery, options: PairOptions) -> pa.Table:
    """Labels of every selected cell, in ascending `soma_joinid`.

    Raises `ValueError` if no context holds two cells, or library sizes are missing.
    """
    obs = query.obs
    n = len(obs)
    split = assign_splits(obs, options.splits)
    zeros = np.zeros(n)
    library = obs["raw_sum"].to_numpy(dtype=np.float64) if "raw_sum" in obs else zeros
    n_expressed = obs["nnz"].to_numpy(dtype=np.int64) if "nnz" in obs else zeros - 1
    if options.query.layer == "raw":
        bad = np.flatnonzero(~(library > 0) & (n_expressed > 0))
        if len(bad):
            raise ValueError(
                f"obs.raw_sum of cell {obs['soma_joinid'].iloc[bad[0]]} is {library[bad[0]]:g} though it expresses "
                f"{n_expressed[bad[0]]} genes ({len(bad)} such cells); counts cannot be scaled: repair the store."
            )
    columns = {
        "soma_joinid": pa.array(obs["soma_joinid"].to_numpy(dtype=np.int64)),
        "split": pa.array(split),
        "dataset": pa.array(pd.factorize(obs["dataset_id"])[0].astype(np.int32)),
        "library": pa.array(library),
        "nnz": pa.array(n_expressed.astype(np.int32)),
    }
    largest = 0
    for index, pairing in enumerate(options.matching.pairings.values()):
        codes = context_codes(obs, pairing.keys)
        together = codes[codes >= 0] * len(SPLITS) + split[codes >= 0]
        largest = max(largest, int(np.bincount(together).max(initial=0)))
        columns[f"group_{index}"] = pa.array(codes)
        if pairing.different:
            columns[f"different_{index}"] = pa.array(context_codes(obs, pairing.different))
    if largest < 2:
        keys = "; ".join(f"{name}: {', '.join(entry.keys)}" for name, entry in options.matching.pairings.items())
        raise ValueError(f"`pairings` ({keys}) leave fewer than two cells in every context; use fewer keys.")
    for name in CONTEXT_COLUMNS:
        labels = obs[name].astype("category").astype(str).astype("category")
        columns[name] = pa.array(labels).cast(pa.dictionary(pa.int32(), pa.string()))
    return pa.table(columns)


def shard_bounds(joinids: np.ndarray, shard_cells: int) -> np.ndarray:
    """First cell of every shard, and the end: even shares that begin with a tile of the store if one begins near."""
    n_cells = len(joinids)
    n_shards = max(1, round(n_cells / shard_cells))
    even = np.arange(n_shards + 1, dtype=np.int64) * n_cells // n_shards
    inner = [tile_boundary(joinids, int(wanted), int(wanted) - shard_cells // 4) for wanted in even[1:-1]]
    return np.array([0, *inner, n_cells], dtype=np.int64)


class PairPlan:
    """
    A plan on disk, prepared by [`PairPlan.create`], which every process that works on the build opens for itself.
    """

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.work = self.out / WORK
        self.content = json.loads((self.work / PLAN).read_text())
        self.options = from_mapping(PairOptions, self.content["options"], "options")
        self.n_shards = len(self.content["bounds"]) - 1
        self.reading = threading.Lock()  # held while a shard is read: threads take turns, so memory is bounded

    @classmethod
    def create(cls, out: str | Path, query: CellQuery, options: PairOptions, identity: dict) -> "PairPlan":
        """Writes the plan of a query to `out`/work; the plan file last."""
        work = Path(out) / WORK
        if options.query.normalization == "log_tpm":
            gene_lengths_of(query.var)
        cells = cell_table(query, options)
        dataset_ids = list(dict.fromkeys(query.obs["dataset_id"].astype(str)))
        # One record batch: a shard is then a slice of it.
        write_table_atomically(cells.combine_chunks().to_batches(), cells.schema, work / "cells.arrow")
        write_arrays(query.presence(dataset_ids), work / "measured.npy")
        write_arrays(query.var_selected, work / "selected.npy")
        written = dataclasses.asdict(options)
        if options.query.uri is not None:
            written["query"]["uri"] = absolute_uri(options.query.uri)
        if "census_version" in query.source:
            written["query"]["census_version"] = query.source["census_version"]  # the alias may move meanwhile
        split_by = "the given rules"
        if options.splits.rules is None:
            rules = default_rules(query.obs, options.splits.seed)
            written["splits"]["rules"] = [dataclasses.asdict(rule) for rule in rules]
            split_by = describe_rules(rules)
        content = {
            "identity": identity,
            "options": written,
            "split_by": split_by,
            "source": query.source,
            "bounds": shard_bounds(query.obs["soma_joinid"].to_numpy(), options.shard_cells).tolist(),
        }
        write_json(content, work / PLAN)
        return cls(out)

    @cached_property
    def cells(self) -> pa.Table:
        """Labels of all cells, memory-mapped."""
        return pa.ipc.open_stream(pa.memory_map(str(self.work / "cells.arrow"), "r")).read_all()

    @cached_property
    def measured(self) -> np.ndarray:
        """Genes each data set measured, bool of shape `(n_datasets, n_vars)`."""
        return np.load(self.work / "measured.npy")

    @cached_property
    def experiment(self):
        """The organism's experiment, opened for this process."""
        self._census, experiment, _ = open_experiment(self.options.query)
        return experiment

    @cached_property
    def var(self) -> pd.DataFrame:
        """Every gene of the store in ascending `soma_joinid`."""
        frame = self.experiment.ms["RNA"].var.read().concat().to_pandas()
        return frame.sort_values("soma_joinid", ignore_index=True)

    @property
    def matrix(self):
        """The layer that is read."""
        return self.experiment.ms["RNA"].X[self.options.query.layer]

    @cached_property
    def gene_lengths(self) -> np.ndarray | None:
        """Lengths for `log_tpm`, else `None`."""
        return gene_lengths_of(self.var) if self.options.query.normalization == "log_tpm" else None

    @cached_property
    def genes(self) -> np.ndarray:
        """Chosen genes (`soma_joinid`, ascending); their order is the vocabulary's."""
        return np.load(self.work / "genes.npy")

    @cached_property
    def training_cells(self) -> np.ndarray:
        """Cells of the training split in each data set, int64 of shape `(n_datasets,)`."""
        training = self.cells.column("split").to_numpy() == SPLITS.index("train")
        return np.bincount(self.cells.column("dataset").to_numpy()[training], minlength=len(self.measured))

    @cached_property
    def vocabulary(self) -> np.ndarray:
        """See [`vocabulary_of`]."""
        return vocabulary_of(self.genes, self.measured.shape[1])

    @cached_property
    def _panels(self) -> tuple[np.ndarray, np.ndarray]:
        return panels_of(self.measured[:, self.genes])

    @property
    def panels(self) -> np.ndarray:
        """Distinct sets of measured genes, bool of shape `(n_panels, n_genes)`."""
        return self._panels[0]

    def shard_cells(self, index: int) -> CellTable:
        """Labels of the cells of a shard."""
        first, last = self.content["bounds"][index : index + 2]
        table = self.cells.slice(first, last - first)
        has_genes = (self.work / "genes.npy").is_file()
        return CellTable(table, len(self.options.matching.pairings), self._panels[1] if has_genes else None)
