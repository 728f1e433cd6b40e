"""`gppc make-census`: AnnData files into a local store in Census layout."""

import argparse
from pathlib import Path

from data_scripts.cells.gene_mapping import ORGANISMS, UNMAPPED
from data_scripts.cells.read_options import add_flags, options_from_flags
from data_scripts.store.census_obs import CensusOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; columns that are not named are found by their usual names."""
    parser.add_argument("store", metavar="STORE", type=Path, help="folder of the new store")
    parser.add_argument(
        "files", metavar="FILE", type=Path, nargs="+", help="cells: .h5ad, .zarr, or .h5 of 10x Genomics"
    )
    parser.add_argument(
        "--organism", default="homo_sapiens", metavar="NAME", help=f"one of {', '.join(ORGANISMS)} (%(default)s)"
    )
    parser.add_argument(
        "--gene-table",
        type=Path,
        action="append",
        metavar="FILE",
        help="csv, tsv or parquet with symbols and Ensembl ids (lengths and biotypes if it has them); may be repeated",
    )
    parser.add_argument(
        "--unmapped",
        choices=UNMAPPED,
        default="keep",
        help="genes without Ensembl id: keep them under their names, drop them, or stop (%(default)s)",
    )
    parser.add_argument("--dataset-column", metavar="COLUMN", help="obs column that splits a file into data sets")
    add_flags(parser, CensusOptions)
    parser.add_argument(
        "--keep-obs", nargs="+", default=[], metavar="COLUMN", help="further obs columns to carry along"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store of that name")


def run(arguments: argparse.Namespace) -> int:
    """Writes the store and `STORE.genes.csv` beside it, and prints what happened."""
    # Imported here: these libraries take seconds to import, and `gppc --help` should not wait for them.
    from .local_census import sources_from_file, write_census

    seen = set()
    for path in arguments.files:
        if path.resolve() in seen:
            raise ValueError(f"file {path} is given twice; give every file once.")
        seen.add(path.resolve())
    options = options_from_flags(CensusOptions, vars(arguments))
    sources = [
        source
        for path in arguments.files
        for source in sources_from_file(path, options, dataset_column=arguments.dataset_column)
    ]
    report = write_census(
        arguments.store,
        sources,
        organism=arguments.organism,
        gene_table=arguments.gene_table,
        unmapped=arguments.unmapped,
        keep_obs=arguments.keep_obs,
        overwrite=arguments.overwrite,
        progress=True,
    )
    table = report.write_genes(report.store.with_name(f"{report.store.name}.genes.csv"))
    print(report.summary())
    print(f"  every gene of every data set, and how it was mapped: {table}")
    return 0
