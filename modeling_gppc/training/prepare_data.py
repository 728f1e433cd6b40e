"""From the options of a run to a pairs folder: nothing is made twice, everything is made in the run's folder."""

import dataclasses
from pathlib import Path

from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.splits import guard_splits
from modeling_gppc.training.arguments import RunOptions
from modeling_gppc.training.stream_rows import sample_rows_of

# Census and SOMA libraries are imported where cells are read: a run on finished pairs needs none of them.


def prepare_pairs(options: RunOptions, progress: bool = True) -> PairFolder:
    """Opens the pairs of a run, after writing a local store and building the pairs where that is still to do.

    Args:
        options (`RunOptions`): The run; `data` says where cells come from.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Raises:
        ValueError: For missing files, bad counts, a query without cells and so on, before long work.
    """
    if options.data.pairs is not None:
        return open_pairs(options.data.pairs)
    from data_scripts.pairs.census_pairs import build_pairs

    folder = Path(options.output_dir)
    pairs = options.pairs
    if pairs.query.uri is None and pairs.query.census_version is None:
        store = folder / "cells"
        if not store.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_store(store, options, progress)
        query = dataclasses.replace(pairs.query, uri=str(store))
        if options.data.synthetic is not None and options.data.synthetic.form == "linear":
            query = dataclasses.replace(query, layer="log_values", normalization="none")
        pairs = dataclasses.replace(pairs, query=query)
    return build_pairs(
        pairs,
        folder / "pairs",
        num_proc=options.data.num_proc,
        progress=progress,
        train_rows=sample_rows_of(options),
    )


def open_pairs(path: str | Path) -> PairFolder:
    """Opens finished pairs, whoever wrote them.

    Raises:
        ValueError: If it is no such folder, or two of its splits share a cell.
    """
    folder = PairFolder(path)
    try:
        guard_splits({name: folder.split(name) for name in folder.splits}, [])
    except ValueError as error:
        raise ValueError(
            f"`data.pairs` {path}: {error} Scores on such pairs say nothing; split them by cell."
        ) from error
    return folder


def write_store(store: Path, options: RunOptions, progress: bool) -> None:
    """Writes the cells of `options.data` into a local store."""
    from data_scripts.store.local_census import CensusSource, write_census

    data = options.data
    if data.synthetic is not None:
        from data_scripts.synthetic.network_store import write_synthetic

        write_synthetic(store, data.synthetic, progress=progress)
        return
    if data.example is not None:
        from data_scripts.cells.example_cells import library_cells_pbmc68k

        sources = [CensusSource(adata=library_cells_pbmc68k(), dataset_id=data.example)]
    else:
        names = [Path(file).stem for file in data.files]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"`data.files` holds two files named {repeated[0]!r}; their names tell data sets apart.")
        keys = {name: getattr(data, name) for name in ("library_size_key", "cell_type_key", "donor_key")}
        sources = [CensusSource(path=file, dataset_id=name, **keys) for file, name in zip(data.files, names)]
    write_census(store, sources, organism=options.pairs.query.organism, progress=progress)
