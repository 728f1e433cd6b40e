"""Synthetic cells as a local store in Census layout, with the network that made them beside it."""

import shutil
import tempfile
from pathlib import Path

import anndata
import pandas as pd
import scipy.sparse as sp
from tqdm import tqdm

from data_scripts.cells.read_options import CensusReadOptions
from data_scripts.store.local_census import CensusReport, CensusSource, write_census
from data_scripts.synthetic.network import GeneNetwork, SyntheticConfig, make_network
from data_scripts.synthetic.network_cells import dataset_sizes, iterate_cells, make_var

# Cells of a part: what is in memory at a time.
PART_CHUNKS = 10
VALUE_KINDS = {"linear": "log", "count": "counts"}


def network_path(store: str | Path) -> Path:
    """Where the network of a store lies: beside it, as `STORE.network.safetensors`; see [`load_network`]."""
    store = Path(store)
    return store.with_name(f"{store.name}.network.safetensors")


def write_synthetic(
    store: str | Path,
    config: SyntheticConfig | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[CensusReport, GeneNetwork]:
    """Makes a network, draws its cells and writes them as a local store; memory does not grow with the cells.

    The linear form writes float32 log values to `X["log_values"]`, the count form integer counts to `X["raw"]`. The
    cells wait in temporary files beside the store while it is written. The network, which is returned with the store's
    report, is saved as `STORE.network.safetensors`. Raises `ValueError` if the store exists already and `overwrite` is
    not given.
    """
    store = Path(store)
    if store.exists() and not overwrite:
        raise ValueError(f"`store` {store} exists already; choose another name or ask to overwrite it.")
    network = make_network(config or SyntheticConfig())
    store.parent.mkdir(parents=True, exist_ok=True)
    # Before the store: a kill in between must not leave cells whose truth is lost.
    network.save(network_path(store))
    parts = Path(tempfile.mkdtemp(prefix=f".{store.name}.cells-", dir=store.parent))
    try:
        sources = _write_parts(network, parts, progress)
        report = write_census(store, sources, overwrite=overwrite, progress=progress)
    except BaseException:
        network_path(store).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return report, network


def _write_parts(network: GeneNetwork, folder: Path, progress: bool) -> list[CensusSource]:
    """Draws the cells into files of at most `PART_CHUNKS` chunks."""
    sources, options = [], CensusReadOptions(value_kind=VALUE_KINDS[network.config.form])
    with tqdm(total=network.config.n_cells, desc="drawing cells", unit="cell", disable=not progress) as bar:
        for dataset, size in enumerate(dataset_sizes(network).tolist()):
            var = make_var(network, network.measured[dataset])
            values, tables, drawn = [], [], 0
            for chunk, obs in iterate_cells(network, dataset):
                values.append(chunk)
                tables.append(obs)
                drawn += len(obs)
                bar.update(len(obs))
                if len(values) == PART_CHUNKS or drawn == size:
                    path = folder / f"dataset{dataset + 1}-{len(sources):05d}.h5ad"
                    anndata.AnnData(sp.vstack(values, format="csr"), obs=pd.concat(tables), var=var).write_h5ad(path)
                    sources.append(CensusSource(path, f"dataset{dataset + 1}", options=options))
                    values, tables = [], []
    return sources
