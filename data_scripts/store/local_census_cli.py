"""`gppc make-census`: AnnData files into a local store in Census layout."""

import dataclasses
from pathlib import Path
from typing import Literal

from data_scripts.cells.read_options import CensusReadOptions
from data_scripts.command_line import POSITIONAL


@dataclasses.dataclass
class CensusOptions:
    """
    Files and the store that they are written into.

    Args:
        store (`str`): Folder of the new store.
        files (`list[str]`): Cells: .h5ad, .zarr, or .h5 of 10x Genomics.
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Census name of the species.
        gene_table (`list[str]`, *optional*): Tables (csv, tsv or parquet) with symbols and Ensembl ids, lengths and
            biotypes if they have them.
        unmapped (`str`, *optional*, defaults to `"keep"`): What happens to genes without Ensembl id: keep them under
            their names, drop them, or stop.
        dataset_column (`str`, *optional*): Column of obs that splits a file into data sets.
        keep_obs (`list[str]`, *optional*): Further columns of obs to carry along.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a store of that name.
    """

    store: str = dataclasses.field(metadata=POSITIONAL)
    files: list[str] = dataclasses.field(metadata=POSITIONAL)
    organism: str = "homo_sapiens"
    gene_table: list[str] = dataclasses.field(default_factory=list)
    unmapped: Literal["keep", "drop", "error"] = "keep"
    dataset_column: str | None = None
    keep_obs: list[str] = dataclasses.field(default_factory=list)
    overwrite: bool = False

    def __post_init__(self):
        seen = set()
        for path in map(Path, self.files):
            if path.resolve() in seen:
                raise ValueError(f"file {path} is given twice; give every file once.")
            seen.add(path.resolve())


OPTIONS = (CensusOptions, CensusReadOptions)


def run(options: CensusOptions, reading: CensusReadOptions) -> None:
    """Writes the store and `STORE.genes.csv` beside it, and prints what happened."""
    # Imported here: these libraries take seconds to import, and help texts should not wait for them.
    from data_scripts.store.local_census import sources_from_file, write_census

    sources = [source for path in options.files for source in sources_from_file(path, reading, options.dataset_column)]
    report = write_census(
        options.store,
        sources,
        organism=options.organism,
        gene_table=options.gene_table,
        unmapped=options.unmapped,
        keep_obs=options.keep_obs,
        overwrite=options.overwrite,
        progress=True,
    )
    table = report.write_genes(report.store.with_name(f"{report.store.name}.genes.csv"))
    print(report.summary())
    print(f"  every gene of every data set, and how it was mapped: {table}")
