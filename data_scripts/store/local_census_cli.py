"""`gppc make-census`: AnnData files into a local store in Census layout."""

import dataclasses
from pathlib import Path
from typing import Literal

from data_scripts.command_line import POSITIONAL


@dataclasses.dataclass
class CensusOptions:
    """
    Files and the store that they are written into.

    Args:
        store (`str`): Folder of the new store.
        files (`list[str]`): AnnData files of raw counts (.h5ad).
        organism (`str`, *optional*, defaults to `"homo_sapiens"`): Census name of the species.
        gene_table (`list[str]`, *optional*): Tables (csv, tsv or parquet) with symbols and Ensembl ids, lengths and
            biotypes if they have them.
        unmapped (`str`, *optional*, defaults to `"keep"`): What happens to genes without Ensembl id: keep them under
            their names, drop them, or stop.
        dataset_key (`str`, *optional*): Column of obs that splits a file into data sets.
        keep_obs (`list[str]`, *optional*): Further columns of obs to carry along.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a store of that name.
    """

    store: str = dataclasses.field(metadata=POSITIONAL)
    files: list[str] = dataclasses.field(metadata=POSITIONAL)
    organism: str = "homo_sapiens"
    gene_table: list[str] = dataclasses.field(default_factory=list)
    unmapped: Literal["keep", "drop", "error"] = "keep"
    dataset_key: str | None = None
    keep_obs: list[str] = dataclasses.field(default_factory=list)
    overwrite: bool = False

    def __post_init__(self):
        seen = set()
        for path in map(Path, self.files):
            if path.resolve() in seen:
                raise ValueError(f"file {path} is given twice; give every file once.")
            seen.add(path.resolve())


@dataclasses.dataclass
class FileOptions:
    """
    Where the files hold what is read; columns are found by their usual names where they are not named.

    Args:
        counts (`str`, *optional*, defaults to `"X"`): Where the counts are: X, raw, or a layer.
        cell_type_key, donor_key, assay_key, tissue_key, sex_key, disease_key, development_stage_key (`str`,
            *optional*): Column of obs with this label of the cells; `unknown` where there is none.
        library_size_key (`str`, *optional*): Column of obs with the counts over all genes.
        symbol_key (`str`, *optional*): Column of var with gene symbols.
        ensembl_key (`str`, *optional*): Column of var with Ensembl ids.
    """

    counts: str = "X"
    cell_type_key: str | None = None
    donor_key: str | None = None
    assay_key: str | None = None
    tissue_key: str | None = None
    sex_key: str | None = None
    disease_key: str | None = None
    development_stage_key: str | None = None
    library_size_key: str | None = None
    symbol_key: str | None = None
    ensembl_key: str | None = None


OPTIONS = (CensusOptions, FileOptions)


def run(options: CensusOptions, columns: FileOptions) -> None:
    """Writes the store and `STORE.genes.csv` beside it, and prints what happened."""
    # Imported here: these libraries take seconds to import, and help texts should not wait for them.
    from data_scripts.store.local_census import sources_from_file, write_census

    sources = [
        source
        for path in options.files
        for source in sources_from_file(path, options.dataset_key, **dataclasses.asdict(columns))
    ]
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
