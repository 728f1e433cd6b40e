"""From the options of a run to a pairs folder: nothing is made twice, everything is made in the run's folder."""

import dataclasses
from pathlib import Path

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.splits import guard_splits
from modeling_gppc.training.arguments import DataOptions

# Census and SOMA libraries are imported where cells are read: a run on finished pairs needs none of them.


def check_files(data: DataOptions, pairs: PairOptions) -> None:
    """Raises `ValueError` for a missing file, two files of one name, or a list of genes that names none."""
    for option, files in (("screen", [data.screen] if data.screen else []), ("files", data.files or [])):
        for file in files:
            if not Path(file).exists():
                raise ValueError(f"`data.{option}` {file} does not exist.")
    names = [Path(file).stem for file in data.files or []]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`data.files` holds two files named {name!r}; their names tell data sets apart.")
    if pairs.panel.file is not None:
        from data_scripts.pairs.gene_selection import read_gene_list

        read_gene_list(pairs.panel.file)


def prepare_pairs(
    data: DataOptions,
    pairs: PairOptions,
    out: str | Path,
    *,
    train_rows: int | None = None,
    progress: bool = True,
) -> PairFolder:
    """Opens the pairs of a run, after writing `cells` and `pairs` into its folder `out` where that is to do; beside
    a stream only about `train_rows` training rows."""
    if data.pairs is not None:
        return open_pairs(data.pairs)
    out = Path(out)
    from data_scripts.pairs.census_pairs import build_pairs

    if pairs.query.uri is None and pairs.query.census_version is None:
        store = out / "cells"
        if not store.exists():
            out.mkdir(parents=True, exist_ok=True)
            write_store(store, data, pairs.query.organism, progress)
        kind = data.file_options.value_kind if data.files else "counts"
        if data.synthetic is not None and data.synthetic.form == "linear":
            kind = "log"
        layers = {
            "counts": {},
            "estimated_counts": {"layer": "normalized"},
            "log": {"layer": "log_values", "normalization": "none"},
        }
        pairs = dataclasses.replace(pairs, query=dataclasses.replace(pairs.query, uri=str(store), **layers[kind]))
    return build_pairs(pairs, out / "pairs", num_proc=data.num_proc, progress=progress, train_rows=train_rows)


def open_pairs(path: str | Path) -> PairFolder:
    """Opens finished pairs; raises `ValueError` if it is no such folder, or two of its splits share a cell."""
    folder = PairFolder(path)
    try:
        guard_splits({name: folder.split(name) for name in folder.splits})
    except ValueError as error:
        raise ValueError(
            f"`data.pairs` {path}: {error} Scores on such pairs say nothing; split them by cell."
        ) from error
    return folder


def write_store(store: Path, data: DataOptions, organism: str, progress: bool) -> None:
    """Writes the example's, the files' or the synthetic cells into a local store."""
    from data_scripts.store.local_census import CensusSource, write_census

    if data.synthetic is not None:
        from data_scripts.synthetic.network_store import write_synthetic

        write_synthetic(store, data.synthetic, progress=progress)
        return
    if data.example is not None:
        from data_scripts.cells.example_cells import library_cells_pbmc68k

        sources = [CensusSource(library_cells_pbmc68k(), data.example)]
    else:
        sources = [CensusSource(file, Path(file).stem, options=data.file_options) for file in data.files]
    write_census(store, sources, organism=organism, progress=progress)
