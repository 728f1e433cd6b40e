"""Ensembl ids for genes named by symbol: tables, columns of the files themselves, and what could not be mapped."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_scripts.cells.column_names import STANDARD_NAMES, find_column, texts
from data_scripts.cells.read_options import ReadOptions
from modeling_gppc.normalization_gppc import bare_gene_name, close_matches

# Census name -> (label, NCBI taxonomy id, prefix of its Ensembl gene ids).
ORGANISMS = {
    "homo_sapiens": ("Homo sapiens", "NCBITaxon:9606", "ENSG"),
    "mus_musculus": ("Mus musculus", "NCBITaxon:10090", "ENSMUSG"),
    "macaca_mulatta": ("Macaca mulatta", "NCBITaxon:9544", "ENSMMUG"),
    "callithrix_jacchus": ("Callithrix jacchus", "NCBITaxon:9483", "ENSCJAG"),
    "pan_troglodytes": ("Pan troglodytes", "NCBITaxon:9598", "ENSPTRG"),
}
UNMAPPED = ("keep", "drop", "error")

_ENSEMBL = re.compile(r"(ENS[A-Z]*G)\d{6,}")


def strip_version(name: str) -> str | None:
    """The Ensembl gene id without version and genome (`GRCh38_ENSG00000141510.18` -> `ENSG00000141510`); None for
    anything else."""
    name = bare_gene_name(name)
    return name if _ENSEMBL.fullmatch(name) else None


def check_organism(organism: str) -> str:
    """Returns `organism` if Census knows it.

    Raises:
        ValueError: For an unknown species, with close matches.
    """
    if organism not in ORGANISMS:
        raise ValueError(
            f"`organism` is {organism!r}, which is not a known species{close_matches(organism, ORGANISMS)}"
        )
    return organism


@dataclass
class GeneTable:
    """
    What is known about genes besides the files themselves.

    Args:
        ids (`dict[str, str]`): Symbol (or alias) -> Ensembl id.
        names (`dict[str, str]`): Ensembl id -> approved symbol.
        lengths (`dict[str, int]`): Ensembl id -> length in bases.
        types (`dict[str, str]`): Ensembl id -> biotype.
    """

    ids: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    def add(self, other: "GeneTable") -> None:
        """Adds what `other` knows and this table does not."""
        for name in ("ids", "names", "lengths", "types"):
            setattr(self, name, {**getattr(other, name), **getattr(self, name)})


def read_gene_table(path: str | Path) -> GeneTable:
    """Reads a table of symbols and Ensembl ids.

    Columns are found by their usual names (`symbol`, `ensembl_id`, `gene_name`, `gene_id`, ...). Optional columns:
    `priority` (where a symbol stands on several rows, the lowest wins, then the first), `length`, `biotype`.

    Args:
        path (`str` or `Path`): `.csv`, `.tsv`, `.txt` (tabs) or `.parquet`.

    Raises:
        ValueError: If the file is absent, of another kind, or lacks one of the two columns.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`gene_table` {path} does not exist; give a csv, tsv or parquet file of symbols and ids.")
    kind = path.suffix.lower()
    if kind == ".parquet":
        frame = pd.read_parquet(path)
    elif kind in (".csv", ".tsv", ".txt"):
        frame = pd.read_csv(path, sep="," if kind == ".csv" else "\t", dtype=str)
    else:
        raise ValueError(f"`gene_table` {path} ends in {kind!r}; wanted .csv, .tsv, .txt or .parquet.")
    return gene_table_from_frame(frame, where=f"`gene_table` {path}")


def gene_table_from_frame(frame: pd.DataFrame, where: str = "`gene_table`") -> GeneTable:
    """Builds a [`GeneTable`] from a frame; see [`read_gene_table`]."""
    symbol, ensembl = find_column(frame, "symbol"), find_column(frame, "gene")
    for column, kind in ((symbol, "symbol"), (ensembl, "gene")):
        if column is None:
            raise ValueError(
                f"{where} has no column named {' or '.join(f'`{name}`' for name in STANDARD_NAMES[kind][:3])}; "
                f"it has {', '.join(f'`{name}`' for name in frame.columns)}."
            )
    priority = find_column(frame, "priority")
    if priority is not None:
        frame = frame.assign(**{priority: pd.to_numeric(frame[priority])}).sort_values(priority, kind="stable")
    table = GeneTable()
    identifiers = [strip_version(str(name)) for name in frame[ensembl]]
    for name, identifier in zip(frame[symbol], identifiers):
        if identifier is not None and isinstance(name, str) and name:
            table.ids.setdefault(name, identifier)
            table.names.setdefault(identifier, name)
    for kind, target, cast in (("length", table.lengths, int), ("biotype", table.types, str)):
        column = find_column(frame, kind)
        if column is not None:
            for identifier, value in zip(identifiers, frame[column]):
                if identifier is not None and pd.notna(value):
                    target.setdefault(identifier, cast(value))
    return table


@dataclass
class FileGenes:
    """
    The genes of one file: every gene once, in the order of its first column.

    Args:
        names (`list[str]`): As the file names them, without version and genome.
        ids (`list[str | None]`): Ensembl id that the file itself gives.
        symbols (`list[str]`): Symbol that the file gives; else the name, or nothing where the name is an id.
        lengths (`list[int]`): Bases; 0 where unknown.
        types (`list[str]`): Biotype; empty where unknown.
        columns (`np.ndarray`): Gene of each column of the file, -1 where a column is no gene, shape `(n_vars,)`.
        notes (`list[str]`): What a person should know, a line each.
    """

    names: list[str]
    ids: list[str | None]
    symbols: list[str]
    lengths: list[int]
    types: list[str]
    columns: np.ndarray
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keys(self) -> list[str]:
        """What tells genes apart: the Ensembl id where there is one, else the name."""
        return [identifier or name for identifier, name in zip(self.ids, self.names)]

    @property
    def labels(self) -> list[str]:
        """Names for people: the symbol where there is one, else the key."""
        return [symbol or key for symbol, key in zip(self.symbols, self.keys)]

    @property
    def repeated(self) -> list[str]:
        """Names of the genes that stand in several columns."""
        times = np.bincount(self.columns[self.columns >= 0], minlength=len(self))
        return [self.names[gene] for gene in np.flatnonzero(times > 1)]


def read_file_genes(var: pd.DataFrame, options: ReadOptions | None = None, where: str = "the file") -> FileGenes:
    """Reads which gene each column counts; ids may stand in the index, in a column, or in both.

    Columns that name the same gene, by its Ensembl id or else by its name, are one gene. Columns whose `feature_types`
    is not gene expression (antibodies, guides, peaks) are none.

    Args:
        var (`pd.DataFrame`): Of the file.
        options ([`ReadOptions`], *optional*): Names the columns with ids and symbols where they are not usual ones.
        where (`str`, *optional*): The file, for messages.

    Raises:
        ValueError: For no genes, or a named column that is absent.
    """
    options = options or ReadOptions()
    column = {
        kind: find_column(var, kind, named, where=f"var of {where}")
        for kind, named in (("gene", options.gene_column), ("symbol", options.symbol_column))
    } | {kind: find_column(var, kind) for kind in ("feature_types", "biotype", "length")}
    nothing = [""] * len(var)
    table = {kind: nothing if name is None else texts(var[name]) for kind, name in column.items()}
    index = [bare_gene_name(name) for name in texts(var.index)]
    given = [bare_gene_name(name) for name in table["gene"]]
    names = index if options.gene_column is None else [name or other for name, other in zip(given, index)]
    ids = [strip_version(text) or strip_version(name) for text, name in zip(given, names)]
    symbols = [bare_gene_name(text) for text in table["symbol"]]
    kinds = [kind.casefold() for kind in table["feature_types"]]
    # Elsewhere a column of that name holds biotypes, or is empty for features that were added later.
    is_gene = [kind in ("gene expression", "") for kind in kinds] if "gene expression" in kinds else [True] * len(var)
    position: dict[str, int] = {}
    columns, first = np.full(len(var), -1), []
    for row in np.flatnonzero(is_gene):
        gene = position.setdefault(ids[row] or names[row], len(position))
        columns[row] = gene
        if gene == len(first):
            first.append(row)
    if not first:
        raise ValueError(f"{where} has no genes; wanted at least one column of counts.")
    lengths = pd.to_numeric(pd.Series(table["length"], dtype=object), errors="coerce").fillna(0).astype(np.int64)
    genes = FileGenes(
        names=[names[row] for row in first],
        ids=[ids[row] for row in first],
        symbols=[symbols[row] or ("" if strip_version(names[row]) else names[row]) for row in first],
        lengths=[int(lengths[row]) for row in first],
        types=[table["biotype"][row] for row in first],
        columns=columns,
    )
    others = Counter(table["feature_types"][row] for row in np.flatnonzero(columns < 0))
    if others:
        listed = ", ".join(f"{times} {kind}" for kind, times in others.most_common())
        genes.notes.append(f"{others.total()} features of {where} are no genes and are set aside: {listed}.")
    if genes.repeated:
        genes.notes.append(
            f"{len(genes.repeated)} genes of {where} stand in several columns, whose counts are added up: "
            f"{', '.join(genes.repeated[:5])}{', ...' if len(genes.repeated) > 5 else ''}."
        )
    return genes


def check_species(genes: FileGenes, organism: str, where: str) -> None:
    """Checks that Ensembl ids are those of a species.

    Raises:
        ValueError: For an unknown species or ids of another one.
    """
    prefix = ORGANISMS[check_organism(organism)][2]
    known = [identifier for identifier in genes.ids if identifier is not None]
    foreign = [identifier for identifier in known if _ENSEMBL.fullmatch(identifier).group(1) != prefix]
    if foreign:
        found = _ENSEMBL.fullmatch(foreign[0]).group(1)
        species = next((name for name, entry in ORGANISMS.items() if entry[2] == found), "another species")
        raise ValueError(
            f"`organism` is {organism!r}, but {len(foreign)} of {len(known)} Ensembl ids of {where} belong to {species} "
            f"(e.g. `{foreign[0]}`); wanted ids that start with {prefix}: give the right species or drop those genes."
        )


def shared_symbols(files: Iterable[FileGenes]) -> dict[str, str]:
    """Symbol -> Ensembl id from the files that give both; a symbol with two ids keeps the first."""
    found: dict[str, str] = {}
    for genes in files:
        for identifier, symbol in zip(genes.ids, genes.symbols):
            if identifier is not None and symbol:
                found.setdefault(symbol, identifier)
    return found


def map_genes(
    genes: FileGenes,
    table: GeneTable | None = None,
    shared: Mapping[str, str] | None = None,
    *,
    unmapped: str = "keep",
    where: str = "the file",
) -> pd.DataFrame:
    """Gives every column of a file its `feature_id`.

    In this order: the id the file gives, the gene table, the other files of the call (`shared`). Two columns never
    share an id: a symbol whose id another column of the file holds already (an alias, most often) stays unmapped, so
    no counts are added up that the file kept apart.

    Args:
        genes (`FileGenes`): From [`read_file_genes`].
        table (`GeneTable`, *optional*): From [`read_gene_table`].
        shared (`Mapping[str, str]`, *optional*): From [`shared_symbols`].
        unmapped (`str`, *optional*, defaults to `"keep"`): `keep` uses the name as id, `drop` leaves the column out
            (its counts stay part of the library size), `error` raises.

    Returns:
        `pd.DataFrame`, one row a column of the file: `name`, `feature_id` (empty where dropped), `feature_name`,
        `feature_type`, `feature_length`, `mapped_by` (`file`, `gene_table`, `other_file`, `unmapped`) and `note`.

    Raises:
        ValueError: For unmapped genes with `unmapped="error"`, or if no gene is left.
    """
    if unmapped not in UNMAPPED:
        raise ValueError(f"`unmapped` is {unmapped!r}; wanted one of {', '.join(UNMAPPED)}.")
    table = table or GeneTable()
    ids = list(genes.ids)
    how = ["file" if identifier is not None else "unmapped" for identifier in ids]
    notes = [""] * len(ids)
    holder = {identifier: name for identifier, name in zip(ids, genes.names) if identifier is not None}
    # Approved symbols come before aliases, so that an alias never takes the id from the gene it belongs to.
    for source, mapping in (("gene_table", table.ids), ("other_file", shared or {})):
        waiting = [index for index, identifier in enumerate(ids) if identifier is None]
        waiting.sort(key=lambda index: table.names.get(mapping.get(genes.symbols[index], "")) != genes.symbols[index])
        for index in waiting:
            identifier = mapping.get(genes.symbols[index])
            if identifier is None:
                continue
            if identifier in holder:
                notes[index] = f"{identifier} is held by {holder[identifier]}"
                continue
            ids[index], how[index], notes[index] = identifier, source, ""
            holder[identifier] = genes.names[index]
    missing = [index for index, identifier in enumerate(ids) if identifier is None]
    if missing and unmapped == "error":
        examples = ", ".join(f"`{genes.names[index]}`" for index in missing[:5])
        raise ValueError(
            f"{where} holds {len(missing)} of {len(ids)} genes without an Ensembl id (e.g. {examples}); give a "
            "`gene_table` that names them, or choose unmapped keep or drop."
        )
    if len(missing) == len(ids) and unmapped == "drop":
        raise ValueError(f"none of the {len(ids)} genes of {where} could be mapped; give a `gene_table` or keep them.")
    for index in missing:
        ids[index] = genes.names[index] if unmapped == "keep" else ""
    return pd.DataFrame(
        {
            "name": genes.names,
            "feature_id": ids,
            "feature_name": [
                symbol or table.names.get(identifier, name)
                for symbol, identifier, name in zip(genes.symbols, ids, genes.names)
            ],
            "feature_type": [kind or table.types.get(identifier, "") for kind, identifier in zip(genes.types, ids)],
            "feature_length": [
                length or table.lengths.get(identifier, 0) for length, identifier in zip(genes.lengths, ids)
            ],
            "mapped_by": how,
            "note": notes,
        }
    )
