"""The genes of a file, and Ensembl ids for those it names by symbol: tables, other files, and what stays unmapped."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_scripts.cells.column_names import STANDARD_NAMES, find_column, numbers, texts
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
GENE = "gene expression"  # what 10x Genomics calls features that are genes
_ENSEMBL = re.compile(r"(ENS[A-Z]*G)\d{6,}")


def ensembl_id(name: str) -> str:
    """The bare Ensembl gene id (`GRCh38_ENSG00000141510.18` -> `ENSG00000141510`); empty for anything else."""
    name = bare_gene_name(name)
    return name if _ENSEMBL.fullmatch(name) else ""


def read_gene_table(path: str | Path) -> pd.DataFrame:
    """Reads a table (`.csv`, `.tsv`, `.txt` with tabs, `.parquet`) of symbols and Ensembl ids: `symbol`, `id`,
    `length` (bases; 0 where unknown) and `biotype`, the row that wins first.

    Columns are found by their usual names (`symbol`, `ensembl_id`, `gene_name`, `gene_id`, ...). `priority` is
    optional: where a symbol stands on several rows, the lowest wins, then the first. Raises `ValueError` for an absent
    file, one of another kind, or one that lacks symbols or ids.
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
    priority = find_column(frame, "priority")
    if priority is not None:
        frame = frame.iloc[np.argsort(numbers(frame[priority]), kind="stable")]
    for kind in ("symbol", "gene"):
        if find_column(frame, kind) is None:
            raise ValueError(
                f"`gene_table` {path} has no column named {' or '.join(f'`{x}`' for x in STANDARD_NAMES[kind][:3])}; "
                f"it has {', '.join(f'`{name}`' for name in frame.columns)}."
            )
    table = _columns(frame, ("symbol", "gene", "length", "biotype")).rename(columns={"gene": "id"})
    table["id"] = table["id"].map(ensembl_id)
    return table[(table["id"] != "") & (table["symbol"] != "")]


def _columns(frame: pd.DataFrame, kinds: Iterable[str], where: str = "", **named: str | None) -> pd.DataFrame:
    """Columns of some kinds as text, empty where they have none; `length` as whole numbers."""
    output = pd.DataFrame(index=range(len(frame)))
    for kind in kinds:
        column = find_column(frame, kind, named.get(kind), where=where)
        output[kind] = "" if column is None else texts(frame[column])
    output["length"] = np.nan_to_num(numbers(output["length"])).astype(np.int64)
    return output


@dataclass
class FileGenes:
    """
    The genes of one file.

    Args:
        table (`pd.DataFrame`): Every gene once, in the order of its first column: `name` (without version and genome),
            `id` (Ensembl id that the file itself gives), `symbol` (else the name, unless that is an id), `key` (what
            tells genes apart: id, else name), `length` in bases and `biotype`; empty or 0 where unknown.
        columns (`np.ndarray`): Gene of each column of the file, -1 where a column is no gene, shape `(n_vars,)`.
        notes (`list[str]`): What a person should know, a line each.
    """

    table: pd.DataFrame
    columns: np.ndarray
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def keys(self) -> list[str]:
        """Ensembl id of each gene where there is one, else its name."""
        return self.table["key"].tolist()

    @property
    def labels(self) -> list[str]:
        """Symbol of each gene where there is one, else its key."""
        return _first(self.table["symbol"], self.table["key"]).tolist()

    @property
    def repeated(self) -> list[str]:
        """Names of the genes that stand in several columns."""
        times = np.bincount(self.columns[self.columns >= 0], minlength=len(self))
        return self.table["name"][times > 1].tolist()


def _first(column: pd.Series, *others: pd.Series) -> pd.Series:
    """The first value that is there."""
    for other in others:
        column = column.where(column.astype(bool), other)
    return column


def read_file_genes(var: pd.DataFrame, options: ReadOptions | None = None, where: str = "the file") -> FileGenes:
    """Reads which gene each column counts; ids may stand in the index of var, in a column, or in both. Columns that
    name the same gene, by its Ensembl id or else by its name, are one gene; those whose `feature_types` is not gene
    expression (antibodies, guides, peaks) are none. Raises `ValueError` for no genes, or a named column that is
    absent."""
    options = options or ReadOptions()
    kinds = ("gene", "symbol", "feature_types", "length", "biotype")
    table = _columns(var, kinds, f"var of {where}", gene=options.gene_column, symbol=options.symbol_column)
    table["name"] = texts(var.index)
    for column in ("name", "gene", "symbol"):
        table[column] = table[column].map(bare_gene_name)
    if options.gene_column is not None:
        table["name"] = _first(table["gene"], table["name"])
    named_by_id = table["name"].map(ensembl_id)
    table["id"] = _first(table["gene"].map(ensembl_id), named_by_id)
    table["symbol"] = _first(table["symbol"], table["name"].where(named_by_id == "", ""))
    table["key"] = _first(table["id"], table["name"])
    features = table["feature_types"].str.casefold()
    # Elsewhere a column of that name holds biotypes, or is empty for features that were added later.
    is_gene = features.isin([GENE, ""]) if (features == GENE).any() else features.notna()
    columns = np.full(len(var), -1)
    columns[is_gene] = pd.factorize(table["key"][is_gene])[0]
    if not is_gene.any():
        raise ValueError(f"{where} has no genes; wanted at least one column of counts.")
    genes = FileGenes(table[is_gene].drop_duplicates("key", ignore_index=True), columns)
    others = table["feature_types"][~is_gene].value_counts()
    if len(others):
        listed = ", ".join(f"{times} {kind}" for kind, times in others.items())
        genes.notes.append(f"{others.sum()} features of {where} are no genes and are set aside: {listed}.")
    if genes.repeated:
        genes.notes.append(
            f"{len(genes.repeated)} genes of {where} stand in several columns, whose counts are added up: "
            f"{', '.join(genes.repeated[:5])}{', ...' if len(genes.repeated) > 5 else ''}."
        )
    return genes


def check_species(organism: str, genes: FileGenes | None = None, where: str = "the file") -> None:
    """Raises `ValueError` for a species that Census does not know, and for Ensembl ids of another one."""
    if organism not in ORGANISMS:
        raise ValueError(
            f"`organism` is {organism!r}, which is not a known species{close_matches(organism, ORGANISMS)}"
        )
    known = [] if genes is None else [identifier for identifier in genes.table["id"] if identifier]
    prefixes = [_ENSEMBL.fullmatch(identifier).group(1) for identifier in known]
    foreign = [place for place, prefix in enumerate(prefixes) if prefix != ORGANISMS[organism][2]]
    if foreign:
        found = prefixes[foreign[0]]
        species = next((name for name, entry in ORGANISMS.items() if entry[2] == found), "another species")
        raise ValueError(
            f"`organism` is {organism!r}, but {len(foreign)} of {len(known)} Ensembl ids of {where} belong to {species} "
            f"(e.g. `{known[foreign[0]]}`); wanted ids that start with {ORGANISMS[organism][2]}: give the right species "
            "or drop those genes."
        )


def known_genes(tables: Iterable[pd.DataFrame], files: Iterable[FileGenes]) -> pd.DataFrame:
    """What tables and files say of genes, the surest first; a column `source` tells `gene_table` from `other_file`.

    Tables are believed in their order; files that give both symbol and id of a gene say something to the others.
    """
    said = pd.concat([genes.table for genes in files])
    said = said[(said["symbol"] != "") & (said["id"] != "")].assign(source="other_file")
    return pd.concat([*(table.assign(source="gene_table") for table in tables), said], join="inner", ignore_index=True)


def map_genes(
    genes: FileGenes, known: pd.DataFrame, *, unmapped: str = "keep", where: str = "the file"
) -> pd.DataFrame:
    """Gives every gene of a file its `feature_id`: the id that the file gives, else that of its symbol in `known`.

    Two genes never share an id: a symbol whose id another gene of the file holds already (an alias, most often) stays
    unmapped, so no counts are added up that the file kept apart. Of unmapped genes, `keep` uses the name as id, `drop`
    leaves the gene out (its counts stay part of the library size), `error` raises.

    Returns:
        `pd.DataFrame`, one row a gene: `name`, `feature_id` (empty where dropped), `feature_name`, `feature_type`,
        `feature_length`, `mapped_by` (`file`, `gene_table`, `other_file`, `unmapped`) and `note`.

    Raises:
        ValueError: For unmapped genes with `unmapped="error"`, or if no gene is left.
    """
    if unmapped not in UNMAPPED:
        raise ValueError(f"`unmapped` is {unmapped!r}; wanted one of {', '.join(UNMAPPED)}.")
    by_id = known.drop_duplicates("id").set_index("id")  # an id's first symbol is its approved one
    names, symbols, ids = (genes.table[column].tolist() for column in ("name", "symbol", "id"))
    how, notes = ["file" if identifier else "unmapped" for identifier in ids], [""] * len(ids)
    holder = {identifier: name for identifier, name in zip(ids, names) if identifier}
    for source, said in known.drop_duplicates(["source", "symbol"]).groupby("source", sort=False):
        id_of, approved = dict(zip(said["symbol"], said["id"])), by_id["symbol"].reindex(said["id"])
        is_alias = dict(zip(said["symbol"], approved.to_numpy() != said["symbol"].to_numpy()))
        waiting = [row for row, identifier in enumerate(ids) if not identifier and symbols[row] in id_of]
        # Approved symbols come before aliases, so that an alias never takes the id from the gene it belongs to.
        for row in sorted(waiting, key=lambda row: is_alias[symbols[row]]):
            identifier = id_of[symbols[row]]
            if identifier in holder:
                notes[row] = f"{identifier} is held by {holder[identifier]}"
            else:
                ids[row], how[row], notes[row], holder[identifier] = identifier, source, "", names[row]
    missing = [row for row, identifier in enumerate(ids) if not identifier]
    if missing and unmapped == "error":
        examples = ", ".join(f"`{names[row]}`" for row in missing[:5])
        raise ValueError(
            f"{where} holds {len(missing)} of {len(ids)} genes without an Ensembl id (e.g. {examples}); give a "
            "`gene_table` that names them, or choose unmapped keep or drop."
        )
    if len(missing) == len(ids) and unmapped == "drop":
        raise ValueError(f"none of the {len(ids)} genes of {where} could be mapped; give a `gene_table` or keep them.")
    for row in missing:
        ids[row] = names[row] if unmapped == "keep" else ""
    table = genes.table
    symbol, biotype, length = (
        by_id[column].reindex(ids, fill_value=unknown).reset_index(drop=True)
        for column, unknown in (("symbol", ""), ("biotype", ""), ("length", 0))
    )
    return pd.DataFrame(
        {
            "name": names,
            "feature_id": ids,
            "feature_name": _first(table["symbol"], symbol, table["name"]),
            "feature_type": _first(table["biotype"], biotype),
            "feature_length": _first(table["length"], length).astype(np.int64),
            "mapped_by": how,
            "note": notes,
        }
    )
