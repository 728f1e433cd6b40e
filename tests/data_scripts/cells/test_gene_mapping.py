"""Symbols to Ensembl ids: what wins, what is refused, what stays unmapped."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts.cells.gene_mapping import (
    check_species,
    ensembl_id,
    known_genes,
    map_genes,
    read_file_genes,
    read_gene_table,
)
from data_scripts.cells.read_options import ReadOptions

STAT1, IRF1, CD4, MOUSE = "ENSG00000115415", "ENSG00000125347", "ENSG00000010610", "ENSMUSG00000026104"


def var(index, **columns):
    return pd.DataFrame(columns, index=index)


def gene_table(rows):
    """Symbols and ids, approved ones first."""
    return pd.DataFrame(rows, columns=["symbol", "id"]).assign(length=0, biotype="")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (STAT1, STAT1),
        (f"{STAT1}.12", STAT1),
        (f"{MOUSE}.3", MOUSE),
        ("STAT1", ""),
        ("AL627309.1", ""),
        (f"{STAT1}.12_PAR_Y", ""),
        ("ENSP00000354394", ""),
        ("", ""),
    ],
)
def test_ensembl_id(name, wanted):
    assert ensembl_id(name) == wanted


@pytest.mark.parametrize(
    "frame",
    [
        var([f"{STAT1}.4", IRF1], feature_name=["STAT1", "IRF1"]),
        var(["STAT1", "IRF1"], gene_ids=[STAT1, f"{IRF1}.2"]),
        var(["STAT1", "IRF1"], Ensembl_ID=[STAT1, IRF1], Symbol=["STAT1", "IRF1"]),
        var(["a", "b"], feature_id=[STAT1, IRF1], symbol=["STAT1", "IRF1"]),
    ],
    ids=["index", "column", "any case", "neither in the index"],
)
def test_ids_and_symbols_are_found_wherever_they_stand(frame):
    genes = read_file_genes(frame)
    assert genes.keys == genes.table["id"].tolist() == [STAT1, IRF1]
    assert genes.labels == ["STAT1", "IRF1"]


def test_named_columns_win_and_must_exist():
    frame = var(["a"], symbol=["WRONG"], alias=["STAT1"], ensembl_id=[IRF1], mine=[STAT1])
    genes = read_file_genes(frame, ReadOptions(symbol_column="alias", gene_column="mine"))
    assert (genes.keys, genes.labels) == ([STAT1], ["STAT1"])
    with pytest.raises(
        ValueError, match=r"`symbol_column` is 'alis', which is not a column of var.*did you mean `alias`"
    ):
        read_file_genes(frame, ReadOptions(symbol_column="alis"))
    with pytest.raises(ValueError, match="`gene_column` is 'ensembl', which is not a column"):
        read_file_genes(frame, ReadOptions(gene_column="ensembl"))


@pytest.mark.parametrize(
    ("frame", "columns", "keys"),
    [
        (var(["STAT1", "IRF1", "STAT1"]), [0, 1, 0], ["STAT1", "IRF1"]),
        (var([f"{STAT1}.1", f"GRCh38_{STAT1}.2", "CD4"]), [0, 0, 1], [STAT1, "CD4"]),
        (var(["A", "B"], ensembl_id=[CD4, CD4]), [0, 0], [CD4]),
        (var(["A", "A"], gene_ids=[CD4, STAT1]), [0, 1], [CD4, STAT1]),  # a symbol of two genes
        (var(["hg38_STAT1", "mm10___Stat1", "MM1_X", "hg38"]), [0, 1, 2, 3], ["STAT1", "Stat1", "MM1_X", "hg38"]),
    ],
)
def test_columns_of_one_gene(frame, columns, keys):
    genes = read_file_genes(frame)
    assert genes.columns.tolist() == columns
    assert genes.keys == keys
    assert bool(genes.notes) == (len(keys) < len(columns))


def test_features_that_are_no_genes_are_set_aside():
    kinds = ["Antibody Capture", "Gene Expression", "CRISPR Guide Capture", "Gene Expression", "Antibody Capture"]
    genes = read_file_genes(var(["CD4_TotalSeqB", "CD4", "sgSTAT1", "STAT1", "CD3"], feature_types=kinds))
    assert genes.columns.tolist() == [-1, 0, -1, 1, -1]
    assert genes.keys == ["CD4", "STAT1"]
    assert genes.notes == [
        "3 features of the file are no genes and are set aside: 2 Antibody Capture, 1 CRISPR Guide Capture."
    ]
    # Census keeps biotypes under that name.
    assert len(read_file_genes(var([CD4, STAT1], feature_type=["protein_coding", "lncRNA"]))) == 2


def test_no_genes_and_another_species():
    with pytest.raises(ValueError, match="has no genes"):
        read_file_genes(var([]))
    for names, organism, message in (
        ([MOUSE, STAT1], "homo_sapiens", rf"1 of 2 Ensembl ids of the file belong to mus_musculus \(e.g. `{MOUSE}`\)"),
        ([STAT1], "mus_musculus", r"`organism` is 'mus_musculus'.*belong to homo_sapiens"),
        ([STAT1], "homo_sapien", "'homo_sapien', which is not a known species; did you mean `homo_sapiens`"),
    ):
        with pytest.raises(ValueError, match=message):
            check_species(organism, read_file_genes(var(names)))
    check_species("mus_musculus", read_file_genes(var([MOUSE])))


def test_missing_ids_in_a_column_are_not_ids():
    genes = read_file_genes(var(["STAT1", "X1", "X2"], ensembl_id=[STAT1, "", None], symbol=["STAT1", "", None]))
    assert genes.table["id"].tolist() == [STAT1, "", ""]
    assert genes.labels == ["STAT1", "X1", "X2"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_gene_table_files(tmp_path, kind):
    frame = pd.DataFrame(
        {
            "symbol": ["OLD", "STAT1", "OLD", "ISGF3"],
            "ensembl_id": [IRF1, f"{STAT1}.5", CD4, STAT1],
            "priority": [5, 0, 1, 4],
            "length": [10, 4000, 300, 4000],
            "biotype": ["x", "protein_coding", "y", "protein_coding"],
        }
    )
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    table = read_gene_table(path)
    assert table.drop_duplicates("symbol").values.tolist() == [
        ["STAT1", STAT1, 4000, "protein_coding"],
        ["OLD", CD4, 300, "y"],
        ["ISGF3", STAT1, 4000, "protein_coding"],
    ]


def test_gene_table_errors(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_gene_table(tmp_path / "no.csv")
    (tmp_path / "table.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"ends in '.xlsx'; wanted .csv"):
        read_gene_table(tmp_path / "table.xlsx")
    (tmp_path / "table.csv").write_text("symbol,x\nA,B\n")
    with pytest.raises(ValueError, match=r"no column named `ensembl_id`.*it has `symbol`, `x`"):
        read_gene_table(tmp_path / "table.csv")


def test_order_of_sources():
    """The file's own id, then the table, then the other files; approved symbols before aliases."""
    table = gene_table([("STAT1", STAT1), ("IRF1", IRF1), ("ISGF3", STAT1)])
    genes = read_file_genes(var(["ISGF3", "STAT1", "IRF1", CD4, "CLONE", "NOVEL"]))
    other = read_file_genes(var([f"{MOUSE}.1", CD4], symbol=["CLONE", "IRF1"]))
    mapping = map_genes(genes, known_genes([table], [genes, other]))
    assert mapping["feature_id"].tolist() == ["ISGF3", STAT1, IRF1, CD4, MOUSE, "NOVEL"]
    assert mapping["mapped_by"].tolist() == [
        "unmapped",
        "gene_table",
        "gene_table",
        "file",
        "other_file",
        "unmapped",
    ]
    assert mapping["note"].tolist() == [f"{STAT1} is held by STAT1", "", "", "", "", ""]


def test_unmapped_keep_drop_error():
    genes = read_file_genes(var(["STAT1", "NOVEL"], ensembl_id=[STAT1, ""]))
    known = known_genes([], [genes])
    assert map_genes(genes, known)["feature_id"].tolist() == [STAT1, "NOVEL"]
    assert map_genes(genes, known, unmapped="drop")["feature_id"].tolist() == [STAT1, ""]
    with pytest.raises(ValueError, match=r"1 of 2 genes without an Ensembl id \(e.g. `NOVEL`\)"):
        map_genes(genes, known, unmapped="error")
    with pytest.raises(ValueError, match="none of the 1 genes"):
        map_genes(read_file_genes(var(["NOVEL"])), known, unmapped="drop")
    with pytest.raises(ValueError, match="`unmapped` is 'skip'"):
        map_genes(genes, known, unmapped="skip")


def test_symbols_of_other_files_keep_the_first_id():
    files = [read_file_genes(var([STAT1], symbol=["S"])), read_file_genes(var([IRF1, "X"], symbol=["S", "Y"]))]
    mapping = map_genes(read_file_genes(var(["S", "Y", IRF1])), known_genes([], files))
    assert mapping["feature_id"].tolist() == [STAT1, "Y", IRF1]
    assert mapping["feature_name"].tolist() == ["S", "Y", "S"]


@given(
    st.lists(st.sampled_from("ABCDEFGH"), unique=True, min_size=1),
    st.dictionaries(st.sampled_from("ABCDEFGH"), st.integers(0, 3)),
)
def test_ids_stay_unique_and_nothing_is_lost(names, aliases):
    """Whatever the aliases say, no two columns of a file share an id and every column keeps one."""
    table = gene_table([(symbol, f"ENSG{number:011d}") for symbol, number in aliases.items()])
    genes = read_file_genes(var(names))
    mapping = map_genes(genes, known_genes([table], [genes]))
    assert mapping["name"].tolist() == names
    assert mapping["feature_id"].is_unique
    assert (mapping["feature_id"] != "").all()
    assert set(mapping.loc[mapping["mapped_by"] == "gene_table", "feature_id"]) == {
        f"ENSG{aliases[name]:011d}" for name in names if name in aliases
    }
