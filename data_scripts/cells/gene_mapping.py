"""Ensembl ids for genes named by symbol: tables, columns of the files themselves, and what could not be mapped."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from modeling_gppc.normalization_gppc import close_matches

# Census name -> (label, NCBI taxonomy id, prefix of its Ensembl gene ids).
ORGANISMS = {
    "homo_sapiens": ("Homo sapiens", "NCBITaxon:9606", "ENSG"),
    "mus_musculus": ("Mus musculus", "NCBITaxon:10090", "ENSMUSG"),
    "macaca_mulatta": ("Macaca mulatta", "NCBITaxon:9544", "ENSMMUG"),
    "callithrix_jacchus": ("Callithrix jacchus", "NCBITaxon:9483", "ENSCJAG"),
    "pan_troglodytes": ("Pan troglodytes", "NCBITaxon:9598", "ENSPTRG"),
}
UNMAPPED = ("keep", "drop", "error")

ENSEMBL_COLUMNS = ("ensembl_id", "gene_ids", "feature_id", "gene_id", "ensembl", "ensembl_gene_id", "ensemblid")
SYMBOL_COLUMNS = ("symbol", "feature_name", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "hgnc_symbol")
LENGTH_COLUMNS = ("feature_length", "length")
TYPE_COLUMNS = ("feature_type", "biotype", "gene_type", "gene_biotype")

_ENSEMBL = re.compile(r"(ENS[A-Z]*G\d{6,})(\.\d+)?")


def strip_version(name: str) -> str | None:
    """The Ensembl gene id without version (`ENSG00000141510.18` -> `ENSG00000141510`); None for anything else."""
    match = _ENSEMBL.fullmatch(name)
    return match.group(1) if match else None


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


def find_column(columns: Iterable[str], candidates: Sequence[str]) -> str | None:
    """First of `candidates` among the columns, ignoring case; None if there is none."""
    folded = {}
    for column in columns:
        folded.setdefault(str(column).casefold(), column)
    return next((folded[name.casefold()] for name in candidates if name.casefold() in folded), None)


def named_column(columns: Iterable[str], name: str, option: str, where: str) -> str:
    """Returns `name` if it is a column.

    Raises:
        ValueError: Naming the option, the place and close matches.
    """
    columns = [str(column) for column in columns]
    if name not in columns:
        raise ValueError(f"`{option}` is {name!r}, which is not a column of {where}{close_matches(name, columns)}")
    return name


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
    symbol, ensembl = find_column(frame, SYMBOL_COLUMNS), find_column(frame, ENSEMBL_COLUMNS)
    for column, wanted in ((symbol, SYMBOL_COLUMNS), (ensembl, ENSEMBL_COLUMNS)):
        if column is None:
            raise ValueError(
                f"{where} has no column named {' or '.join(f'`{name}`' for name in wanted[:3])}; "
                f"it has {', '.join(f'`{name}`' for name in frame.columns)}."
            )
    priority = find_column(frame, ("priority",))
    if priority is not None:
        frame = frame.assign(**{priority: pd.to_numeric(frame[priority])}).sort_values(priority, kind="stable")
    table = GeneTable()
    identifiers = [strip_version(str(name)) for name in frame[ensembl]]
    for name, identifier in zip(frame[symbol], identifiers):
        if identifier is not None and isinstance(name, str) and name:
            table.ids.setdefault(name, identifier)
            table.names.setdefault(identifier, name)
    for columns, target, cast in ((LENGTH_COLUMNS, table.lengths, int), (TYPE_COLUMNS, table.types, str)):
        column = find_column(frame, columns)
        if column is not None:
            for identifier, value in zip(identifiers, frame[column]):
                if identifier is not None and pd.notna(value):
                    target.setdefault(identifier, cast(value))
    return table


@dataclass
class FileGenes:
    """
    The genes of one file as the file names them.

    Args:
        names (`list[str]`): `var_names`, unique.
        ids (`list[str | None]`): Ensembl id the file itself gives for each column, without version.
        symbols (`list[str]`): Symbol the file gives; the name itself where there is none.
        lengths (`list[int]`): Bases; 0 where unknown.
        types (`list[str]`): Biotype; empty where unknown.
    """

    names: list[str]
    ids: list[str | None]
    symbols: list[str]
    lengths: list[int]
    types: list[str]


def read_file_genes(
    var: pd.DataFrame,
    *,
    organism: str = "homo_sapiens",
    symbol_key: str | None = None,
    ensembl_key: str | None = None,
    where: str = "the file",
) -> FileGenes:
    """Finds names, Ensembl ids and symbols in a `var` table; ids may stand in the index, in a column, or in both.

    Raises:
        ValueError: For no genes, duplicated genes, a named column that is absent, or ids of another species.
    """
    names = [str(name) for name in var.index]
    if not names:
        raise ValueError(f"{where} has no genes; wanted at least one column of counts.")
    _refuse_duplicates(names, names, where, "make the names unique or use Ensembl ids as `var_names`")
    columns = list(var.columns)
    symbol = named_column(columns, symbol_key, "symbol_key", f"var of {where}") if symbol_key else None
    ensembl = named_column(columns, ensembl_key, "ensembl_key", f"var of {where}") if ensembl_key else None
    symbol = symbol or find_column(columns, SYMBOL_COLUMNS)
    ensembl = ensembl or find_column(columns, ENSEMBL_COLUMNS)
    given = [""] * len(names) if ensembl is None else _texts(var[ensembl])
    ids = [strip_version(column) or strip_version(name) for column, name in zip(given, names)]
    known = [(identifier, name) for identifier, name in zip(ids, names) if identifier is not None]
    _refuse_duplicates(
        [identifier for identifier, _ in known],
        [name for _, name in known],
        where,
        "sum or drop the columns that stand for one gene",
    )
    prefix = ORGANISMS[check_organism(organism)][2]
    foreign = [identifier for identifier, _ in known if re.match(r"ENS[A-Z]*G", identifier).group(0) != prefix]
    if foreign:
        found = re.match(r"ENS[A-Z]*G", foreign[0]).group(0)
        species = next((name for name, entry in ORGANISMS.items() if entry[2] == found), "another species")
        raise ValueError(
            f"`organism` is {organism!r}, but {len(foreign)} of {len(known)} Ensembl ids of {where} belong to {species} "
            f"(e.g. `{foreign[0]}`); wanted ids that start with {prefix}: give the right species or drop those genes."
        )
    symbols = [""] * len(names) if symbol is None else _texts(var[symbol])
    symbols = [text or ("" if strip_version(name) else name) for text, name in zip(symbols, names)]
    lengths = find_column(columns, LENGTH_COLUMNS)
    types = find_column(columns, TYPE_COLUMNS)
    return FileGenes(
        names=names,
        ids=ids,
        symbols=symbols,
        lengths=[0] * len(names)
        if lengths is None
        else pd.to_numeric(var[lengths], errors="coerce").fillna(0).astype(np.int64).tolist(),
        types=[""] * len(names) if types is None else _texts(var[types]),
    )


def _texts(column: pd.Series) -> list[str]:
    return ["" if pd.isna(value) else str(value) for value in column]


def _refuse_duplicates(keys: Sequence[str], names: Sequence[str], where: str, fix: str) -> None:
    positions: dict[str, list[str]] = {}
    for key, name in zip(keys, names):
        positions.setdefault(key, []).append(name)
    repeated = {key: found for key, found in positions.items() if len(found) > 1}
    if repeated:
        key, found = next(iter(repeated.items()))
        called = "" if set(found) == {key} else f" (columns {', '.join(f'`{name}`' for name in found)})"
        raise ValueError(
            f"{where} holds duplicated genes: `{key}` stands {len(found)} times{called}, "
            f"{len(repeated)} genes in all; {fix}."
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
