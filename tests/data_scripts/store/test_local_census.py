"""A local store against the AnnData it came from, through the official Census calls."""

import anndata
import cellxgene_census
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
from scipy import sparse

from data_scripts.cells import anndata_file
from data_scripts.cells.read_options import CensusReadOptions
from data_scripts.store import census_layout
from data_scripts.store.local_census import CensusSource, sources_from_file, write_census
from gppc.cli import main

HUMAN = "homo_sapiens"
GENES = [f"ENSG{number:011d}" for number in range(1, 10)]
# Data set -> positions in GENES of the genes it measured, in its own order.
MEASURED = {"first": [3, 0, 1, 2, 5], "second": [8, 1, 2, 7, 4, 3]}
UNION = [3, 0, 1, 2, 5, 8, 7, 4]
N_CELLS = {"first": 14, "second": 9}


def make_adata(name: str) -> anndata.AnnData:
    rng = np.random.default_rng(len(name))
    counts = rng.poisson(1.5, (N_CELLS[name], len(MEASURED[name]))).astype(np.float32)
    counts[3] = 0  # a cell without counts
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["B cells", "NK", "CD4+ T"], len(counts))),
            "donor": rng.choice([7, 9], len(counts)),
            "n_counts_full": counts.sum(axis=1) + 20.0,
            "score": rng.normal(size=len(counts)),
            "batch": rng.choice(["x", "y"], len(counts)),
        },
        index=[f"cell{row}" for row in range(len(counts))],
    )
    var = pd.DataFrame(
        {"symbol": [f"S{gene}" for gene in MEASURED[name]], "feature_length": [100 + g for g in MEASURED[name]]},
        index=[f"{GENES[gene]}.{gene}" for gene in MEASURED[name]],
    )
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="module")
def adatas():
    return {name: make_adata(name) for name in MEASURED}


@pytest.fixture(scope="module")
def built(tmp_path_factory, adatas):
    store = tmp_path_factory.mktemp("stores") / "two.soma"
    sources = [CensusSource(adata, name) for name, adata in adatas.items()]
    return write_census(store, iter(sources), keep_obs=["score", "batch"])


@pytest.fixture(scope="module")
def census(built):
    with cellxgene_census.open_soma(uri=str(built.store)) as opened:
        yield opened


@pytest.fixture(scope="module")
def joined(adatas):
    """Counts `(n_obs, n_vars)` of all cells over the union of genes, and what each cell's data set measured."""
    counts = np.zeros((sum(N_CELLS.values()), len(UNION)), dtype=np.float32)
    first = 0
    for name, adata in adatas.items():
        columns = [UNION.index(gene) for gene in MEASURED[name]]
        counts[first : first + adata.n_obs, columns] = adata.X.toarray()
        first += adata.n_obs
    return counts


def test_layout_has_every_part(census):
    assert set(census) == {"census_info", "census_data"}
    assert set(census["census_info"]) == {"summary", "datasets", "summary_cell_counts", "organisms"}
    experiment = census["census_data"][HUMAN]
    assert isinstance(experiment, tiledbsoma.Experiment)
    assert set(experiment.ms["RNA"]) == {"var", "X", "feature_dataset_presence_matrix"}
    assert set(experiment.ms["RNA"].X) == {"raw", "normalized"}
    obs, var = experiment.obs.schema, experiment.ms["RNA"].var.schema
    for name, value_type in census_layout.OBS_TYPES.items():
        kind = obs.field(name).type
        assert (kind.value_type if name in census_layout.OBS_DICTIONARIES else kind) == value_type, name
    assert {field.name: field.type for field in var} == census_layout.VAR_TYPES


def test_get_obs(census, adatas):
    obs = cellxgene_census.get_obs(census, HUMAN)
    assert obs["soma_joinid"].tolist() == list(range(sum(N_CELLS.values())))
    assert obs["dataset_id"].tolist() == ["first"] * 14 + ["second"] * 9
    for column, source in (("cell_type", "cell_type"), ("donor_id", "donor"), ("batch", "batch")):
        assert obs[column].astype(str).tolist() == [str(v) for a in adatas.values() for v in a.obs[source]]
    assert obs["score"].tolist() == [value for adata in adatas.values() for value in adata.obs["score"]]
    assert (obs["cell_type_ontology_term_id"].astype(str) == "local:" + obs["cell_type"].astype(str)).all()
    assert set(obs["tissue"]) == set(obs["assay_ontology_term_id"]) == {"unknown"}
    assert set(obs["suspension_type"]) == {"cell"}
    assert obs["is_primary_data"].all()
    assert obs["observation_joinid"].is_unique
    assert obs["n_measured_vars"].tolist() == [5] * 14 + [6] * 9


def test_obs_statistics(census, joined, adatas):
    obs = cellxgene_census.get_obs(census, HUMAN)
    assert obs["raw_sum"].tolist() == [value for adata in adatas.values() for value in adata.obs["n_counts_full"]]
    expressed = [row[row > 0] for row in joined]
    assert obs["nnz"].tolist() == [len(values) for values in expressed]
    np.testing.assert_allclose(obs["raw_mean_nnz"], [v.mean() if len(v) else 0 for v in expressed])
    np.testing.assert_allclose(obs["raw_variance_nnz"], [v.var(ddof=1) if len(v) > 1 else 0 for v in expressed])


def test_get_var(census, joined):
    var = cellxgene_census.get_var(census, HUMAN)
    assert var["soma_joinid"].tolist() == list(range(len(UNION)))
    assert var["feature_id"].tolist() == [GENES[gene] for gene in UNION]
    assert var["feature_name"].tolist() == [f"S{gene}" for gene in UNION]
    assert var["feature_length"].tolist() == [100 + gene for gene in UNION]
    assert var["nnz"].tolist() == (joined > 0).sum(axis=0).tolist()
    wanted = [sum(N_CELLS[name] for name in MEASURED if gene in MEASURED[name]) for gene in UNION]
    assert var["n_measured_obs"].tolist() == wanted


def test_get_anndata_raw(census, joined):
    adata = cellxgene_census.get_anndata(census, HUMAN, X_name="raw")
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.toarray(), joined)


def test_get_anndata_normalized(census, joined, adatas):
    adata = cellxgene_census.get_anndata(census, HUMAN, X_name="normalized")
    library = np.concatenate([source.obs["n_counts_full"] for source in adatas.values()])
    np.testing.assert_allclose(adata.X.toarray(), joined / library[:, None], rtol=1e-6)


def test_get_presence_matrix(census):
    presence = cellxgene_census.get_presence_matrix(census, HUMAN).toarray()
    wanted = [[gene in measured for gene in UNION] for measured in MEASURED.values()]
    np.testing.assert_array_equal(presence.astype(bool), wanted)


@pytest.mark.parametrize(
    ("value_filter", "wanted"),
    [
        ("cell_type == 'NK'", lambda obs: obs["cell_type"] == "NK"),
        ("cell_type in ['NK', 'B cells']", lambda obs: obs["cell_type"].isin(["NK", "B cells"])),
        ("cell_type_ontology_term_id == 'local:NK'", lambda obs: obs["cell_type"] == "NK"),
        ("dataset_id == 'second' and donor_id == '9'", lambda obs: (obs["at"] == "second") & (obs["donor"] == 9)),
        ("batch != 'x'", lambda obs: obs["batch"] != "x"),
        ("is_primary_data == True and tissue == 'unknown'", lambda obs: obs["donor"] > 0),
        ("cell_type == 'no such type'", lambda obs: obs["donor"] < 0),
    ],
)
def test_filters_on_dictionary_columns_match_cells(census, adatas, value_filter, wanted):
    frame = pd.concat([adata.obs.assign(at=name) for name, adata in adatas.items()], ignore_index=True)
    frame["cell_type"] = frame["cell_type"].astype(str)
    found = cellxgene_census.get_obs(census, HUMAN, value_filter=value_filter)["soma_joinid"]
    assert sorted(found) == np.flatnonzero(wanted(frame)).tolist()


def test_axis_query(census, joined, adatas):
    with census["census_data"][HUMAN].axis_query(
        "RNA",
        obs_query=tiledbsoma.AxisQuery(value_filter="dataset_id == 'second'"),
        var_query=tiledbsoma.AxisQuery(value_filter=f"feature_id in ['{GENES[1]}', '{GENES[8]}']"),
    ) as query:
        assert (query.n_obs, query.n_vars) == (9, 2)
        adata = query.to_anndata(X_name="raw", column_names={"var": ["feature_id"]})
    assert adata.var["feature_id"].tolist() == [GENES[1], GENES[8]]
    np.testing.assert_array_equal(adata.X.toarray(), joined[14:][:, [UNION.index(1), UNION.index(8)]])


def test_highly_variable_genes(tmp_path):
    """Against scanpy on the same counts; one gene stands out."""
    import scanpy
    from cellxgene_census.experimental.pp import get_highly_variable_genes

    rng = np.random.default_rng(5)
    counts = rng.poisson(rng.gamma(2, 2, 30), (200, 30)).astype(np.float32)
    counts[:, 4] = rng.negative_binomial(0.3, 0.05, 200)
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(30)]))
    report = write_census(tmp_path / "s", [CensusSource(adata, "one")])
    with cellxgene_census.open_soma(uri=str(report.store)) as census:
        found = get_highly_variable_genes(census, organism=HUMAN, n_top_genes=3, span=0.9)
    wanted = scanpy.pp.highly_variable_genes(adata, n_top_genes=3, flavor="seurat_v3", span=0.9, inplace=False)
    np.testing.assert_allclose(found["variances_norm"], wanted["variances_norm"], rtol=1e-5)
    assert found["highly_variable"].tolist() == wanted["highly_variable"].tolist()
    assert found["highly_variable"].iloc[4]


def test_census_info(census):
    info = {name: census["census_info"][name].read().concat().to_pandas() for name in census["census_info"]}
    summary = info["summary"].set_index("label")["value"]
    assert summary["census_schema_version"].startswith("2.")
    assert summary["total_cell_count"] == "23"
    assert info["datasets"]["dataset_id"].tolist() == ["first", "second"]
    assert info["datasets"]["dataset_total_cell_count"].tolist() == [14, 9]
    assert info["organisms"]["organism"].tolist() == [HUMAN]
    counts = info["summary_cell_counts"]
    for category in ("all", "cell_type", "tissue", "suspension_type"):
        assert counts.loc[counts["category"] == category, "total_cell_count"].sum() == 23
    obs = cellxgene_census.get_obs(census, HUMAN)
    types = counts[counts["category"] == "cell_type"].set_index("label")["total_cell_count"].to_dict()
    assert types == obs["cell_type"].astype(str).value_counts().to_dict()


def test_report(built, tmp_path):
    assert (built.n_obs, built.n_vars) == (23, 8)
    assert built.datasets["n_vars"].tolist() == [5, 6]
    assert set(built.datasets["library_from"]) == {"n_counts_full"}
    assert built.unmapped.empty
    table = pd.read_csv(built.write_genes(tmp_path / "genes.csv"))
    assert table["feature_id"].tolist() == [GENES[gene] for measured in MEASURED.values() for gene in measured]
    assert "first: 14 cells, 5 genes" in built.summary()


def read_x(store, layer="raw"):
    with cellxgene_census.open_soma(uri=str(store)) as census:
        adata = cellxgene_census.get_anndata(census, HUMAN, X_name=layer)
    return adata.X.toarray(), adata


def test_symbols_join_genes_across_files(tmp_path):
    """A file with symbols only meets the ids of another, the table's, and a name that nobody knows."""
    both = anndata.AnnData(np.ones((2, 2), np.float32), var=pd.DataFrame({"symbol": ["A", "B"]}, index=GENES[:2]))
    names = anndata.AnnData(np.full((1, 4), 2, np.float32), var=pd.DataFrame(index=["B", "C", "A", "N"]))
    table = tmp_path / "table.csv"
    table.write_text(f"symbol,ensembl_id\nC,{GENES[2]}\n")
    sources = [CensusSource(both, "both"), CensusSource(names, "names")]
    report = write_census(tmp_path / "keep", sources, gene_table=table)
    values, adata = read_x(report.store)
    assert adata.var["feature_id"].tolist() == [*GENES[:3], "N"]
    assert values.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [2, 2, 2, 2]]
    assert report.unmapped["name"].tolist() == ["N"]
    assert "1 names without Ensembl id, kept under their names, e.g. N" in report.summary()
    dropped = write_census(tmp_path / "drop", sources, gene_table=[table], unmapped="drop")
    values, adata = read_x(dropped.store, "normalized")
    assert adata.var["feature_id"].tolist() == GENES[:3]
    # A dropped gene's counts stay part of the library.
    assert values[2].tolist() == [0.25, 0.25, 0.25]
    with pytest.raises(ValueError, match=r"holds 1 of 4 genes without an Ensembl id \(e.g. `N`\)"):
        write_census(tmp_path / "error", sources, gene_table=table, unmapped="error")
    assert not (tmp_path / "error").exists()


def test_log_values_come_back_bit_by_bit(tmp_path):
    values = np.random.default_rng(1).normal(size=(50, 9)).astype(np.float32)
    adata = anndata.AnnData(values, var=pd.DataFrame(index=GENES))
    log = CensusReadOptions(value_kind="log")
    report = write_census(tmp_path / "log", [CensusSource(adata, "linear", options=log)])
    with cellxgene_census.open_soma(uri=str(report.store)) as census:
        assert set(census["census_data"][HUMAN].ms["RNA"].X) == {"log_values"}
    found, adata = read_x(report.store, "log_values")
    assert found.tobytes() == values.tobytes()
    assert set(adata.obs["raw_sum"]) == {1.0}
    values[3, 3] = np.nan
    with pytest.raises(ValueError, match="`X` holds nan; log values are finite"):
        write_census(tmp_path / "nan", [CensusSource(anndata.AnnData(values), "linear", options=log)])


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "integers"])
@pytest.mark.parametrize("lazy", [False, True])
def test_every_form_of_matrix_gives_the_same_store(tmp_path, monkeypatch, form, lazy):
    """In memory and in files, in blocks of a few cells."""
    counts = np.random.default_rng(2).poisson(0.7, (31, 9))
    forms = {
        "csr": sparse.csr_matrix(counts.astype(np.float32)),
        "csc": sparse.csc_matrix(counts.astype(np.float64)),
        "dense": counts.astype(np.float32),
        "integers": sparse.csr_array(counts.astype(np.int64)),
    }
    monkeypatch.setattr(anndata_file, "VALUES_PER_BLOCK", 40)
    adata = anndata.AnnData(forms[form], var=pd.DataFrame(index=GENES))
    if lazy:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        source = CensusSource(tmp_path / "cells.h5ad", "one")
    else:
        source = CensusSource(lambda: adata, "one")
    values, found = read_x(write_census(tmp_path / "store", [source]).store)
    np.testing.assert_array_equal(values, counts)
    np.testing.assert_allclose(found.obs["raw_sum"], counts.sum(axis=1))


def test_parts_of_one_data_set(tmp_path, adatas):
    first = adatas["first"]
    parts = [CensusSource(first[:6], "first"), CensusSource(lambda: first[6:].copy(), "first")]
    report = write_census(tmp_path / "s", [*parts, CensusSource(adatas["second"], "second")])
    values, _ = read_x(report.store)
    np.testing.assert_array_equal(values[:14, :5], first.X.toarray())
    assert report.datasets["n_obs"].tolist() == [14, 9]
    with pytest.raises(ValueError, match="'first' stands for several sources"):
        write_census(tmp_path / "t", [parts[0], CensusSource(adatas["second"], "second"), parts[1]])
    with pytest.raises(ValueError, match="'first' stands for several sources"):
        write_census(tmp_path / "t", [parts[0], CensusSource(adatas["second"], "first")])


def bad(**changes) -> anndata.AnnData:
    adata = make_adata("first")
    if "value" in changes:
        adata.X[1, 1] = changes["value"]
    if "cells" in changes:
        adata = adata[: changes["cells"]]
    return adata


@pytest.mark.parametrize(
    ("adata", "options", "message"),
    [
        (bad(value=1.5), {}, "data set 'bad' mixes raw and log values: 1 cells hold non-integer values"),
        (bad(value=-1), {}, "data set 'bad': `X` holds negative values"),
        (bad(value=np.nan), {}, "NaN or infinite"),
        (bad(cells=0), {}, "data set 'bad' has no cells"),
        (bad(), {"cell_type_column": "celltypes"}, "`cell_type_column` is 'celltypes'.*did you mean `cell_type`"),
        (bad(), {"donor_column": "who"}, "`donor_column` is 'who', which is not a column of obs"),
        (bad(), {"library_size_column": "n_count"}, "`library_size_column` is 'n_count'.*`n_counts_full`"),
        (
            bad(),
            {"library_size_column": "score"},
            "`library_size_column` 'score' of data set 'bad' is .* for cell `cell",
        ),
        (bad(), {"layer": "counts"}, "`layer` is 'counts', which data set 'bad' does not have"),
    ],
)
def test_bad_cells_are_refused_before_anything_is_written(tmp_path, adatas, adata, options, message):
    sources = [
        CensusSource(adatas["second"], "good"),
        CensusSource(adata, "bad", options=CensusReadOptions(**options)),
    ]
    with pytest.raises(ValueError, match=message):
        write_census(tmp_path / "store", sources)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"organism": "human"}, "`organism` is 'human', which is not a known species"),
        ({"organism": "mus_musculus"}, "`organism` is 'mus_musculus', but 5 of 5 Ensembl ids"),
        ({"unmapped": "forget"}, "`unmapped` is 'forget'"),
        ({"gene_table": "no.csv"}, "`gene_table` no.csv does not exist"),
        ({"keep_obs": ["batches"]}, "`keep_obs` names 'batches'.*did you mean `batch`"),
        ({"keep_obs": ["cell_type"]}, "`keep_obs` names 'cell_type', which is a column of every store"),
    ],
)
def test_bad_options(tmp_path, adatas, options, message):
    with pytest.raises(ValueError, match=message):
        write_census(tmp_path / "store", [CensusSource(adatas["first"], "first")], **options)
    with pytest.raises(ValueError, match="`sources` is empty"):
        write_census(tmp_path / "store", [])
    assert list(tmp_path.iterdir()) == []


def test_what_a_source_must_have(tmp_path):
    with pytest.raises(ValueError, match="`dataset_id` is empty"):
        CensusSource(make_adata("first"), "")
    make_adata("first").write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"cell.h5ad' does not exist; did you mean `cells.h5ad`"):
        CensusSource(tmp_path / "cell.h5ad", "x")
    (tmp_path / "broken.h5ad").write_bytes(b"no h5")
    with pytest.raises(ValueError, match=r"broken.h5ad' is not a readable AnnData"):
        write_census(tmp_path / "store", [CensusSource(tmp_path / "broken.h5ad", "x")])


def test_existing_store_is_replaced_only_when_asked(tmp_path, adatas):
    store = tmp_path / "store"
    write_census(store, [CensusSource(adatas["first"], "first")])
    with pytest.raises(ValueError, match="exists already"):
        write_census(store, [CensusSource(adatas["second"], "second")])
    write_census(store, [CensusSource(adatas["second"], "second")], overwrite=True)
    assert read_x(store)[0].shape == (9, 6)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="is not a Census-like store"):
        write_census(tmp_path / "folder", [CensusSource(adatas["first"], "first")], overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "store"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, adatas, monkeypatch, interruption):
    store = tmp_path / "store"
    write_census(store, [CensusSource(adatas["first"], "first")])

    def stop(*arguments):
        raise interruption

    monkeypatch.setattr(census_layout, "write_presence", stop)
    with pytest.raises(interruption):
        write_census(store, [CensusSource(adatas["second"], "second")], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert read_x(store)[0].shape == (14, 5)


def test_library_size_is_found_only_where_no_cell_contradicts_it(tmp_path):
    adata = make_adata("first")
    adata.obs["n_counts"] = 3.0  # fewer than some cells hold
    del adata.obs["n_counts_full"]
    _, found = read_x(write_census(tmp_path / "s", [CensusSource(adata, "first")]).store)
    np.testing.assert_array_equal(found.obs["raw_sum"], np.asarray(adata.X.sum(axis=1)).ravel())


def test_terms_and_labels(tmp_path):
    """Terms are taken with the label they belong to; missing labels are unknown."""
    adata = anndata.AnnData(np.ones((3, 2), np.float32), var=pd.DataFrame(index=GENES[:2]))
    adata.obs["cell_type"] = pd.Categorical(["B cell", "T cell", None])
    adata.obs["cell_type_ontology_term_id"] = ["CL:0000236", "CL:0000084", "unknown"]
    adata.obs["organ"] = ["blood", "blood", "lung"]
    adata.obs["mine"] = ["b", "t", "t"]
    _, found = read_x(write_census(tmp_path / "a", [CensusSource(adata, "d")]).store)
    assert found.obs["cell_type"].tolist() == ["B cell", "T cell", "unknown"]
    assert found.obs["cell_type_ontology_term_id"].tolist() == ["CL:0000236", "CL:0000084", "unknown"]
    assert found.obs["tissue_general"].tolist() == found.obs["tissue"].tolist() == ["blood", "blood", "lung"]
    assert found.obs["tissue_ontology_term_id"].tolist() == ["local:blood", "local:blood", "local:lung"]
    _, found = read_x(
        write_census(
            tmp_path / "b", [CensusSource(adata, "d", options=CensusReadOptions(cell_type_column="mine"))]
        ).store
    )
    assert found.obs["cell_type_ontology_term_id"].tolist() == ["local:b", "local:t", "local:t"]


def test_many_labels(tmp_path):
    """More labels than a byte can number."""
    adata = anndata.AnnData(np.ones((300, 2), np.float32), var=pd.DataFrame(index=GENES[:2]))
    adata.obs["donor"] = [f"donor {row}" for row in range(300)]
    report = write_census(tmp_path / "s", [CensusSource(adata, "d")])
    with cellxgene_census.open_soma(uri=str(report.store)) as census:
        for row in (0, 127, 128, 299):
            found = cellxgene_census.get_obs(census, HUMAN, value_filter=f"donor_id == 'donor {row}'")
            assert found["soma_joinid"].tolist() == [row]


def test_data_sets_of_a_file(tmp_path, adatas):
    adata = adatas["first"].copy()
    adata.obs["dataset"] = "named"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert [source.dataset_id for source in sources_from_file(tmp_path / "cells.h5ad")] == ["named"]
    sources = sources_from_file(tmp_path / "cells.h5ad", dataset_column="batch")
    report = write_census(tmp_path / "s", sources)
    values, _ = read_x(report.store)
    order = np.concatenate([np.flatnonzero(adata.obs["batch"] == source.dataset_id) for source in sources])
    np.testing.assert_array_equal(values, adata.X.toarray()[order])
    with pytest.raises(ValueError, match="`dataset_column` is 'batc', which is not a column"):
        sources_from_file(tmp_path / "cells.h5ad", dataset_column="batc")


def test_command(tmp_path, adatas, capsys):
    files = []
    for name, adata in adatas.items():
        files.append(str(tmp_path / f"{name}.h5ad"))
        adata.write_h5ad(files[-1])
    store = tmp_path / "store"
    (tmp_path / "lengths.csv").write_text(f"symbol,ensembl_id,length\nS3,{GENES[3]},5\n")
    flags = ["--donor-column", "batch", "--keep-obs", "score", "--gene-table", str(tmp_path / "lengths.csv")]
    assert main(["make-census", str(store), *files, *flags]) == 0
    output = capsys.readouterr().out
    assert "23 cells x 8 genes, 2 data sets" in output
    assert "donor from batch" in output
    assert len(pd.read_csv(tmp_path / "store.genes.csv")) == 11
    assert set(read_x(store)[1].obs["donor_id"]) == {"x", "y"}
    for arguments, message in (
        ([str(store), *files], "exists already"),
        ([str(tmp_path / "t"), files[0], files[0]], "is given twice"),
        ([str(tmp_path / "t"), "none.h5ad"], "file 'none.h5ad' does not exist"),
        ([str(tmp_path / "t"), *files, "--organism", "mouse"], "`organism` is 'mouse'"),
    ):
        assert main(["make-census", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("gppc make-census: error:") and message in error
    assert not (tmp_path / "t").exists()


@pytest.mark.real_data
@pytest.mark.slow
def test_all_real_files_in_one_store(tmp_path, real_data):
    files = sorted((real_data / "singlecell").glob("*.h5ad"))
    assert len(files) == 6
    sources = [source for path in files for source in sources_from_file(path)]
    report = write_census(
        tmp_path / "store", sources, gene_table=real_data / "genes" / "symbol_to_ensembl.parquet", organism=HUMAN
    )
    assert report.n_obs == 16_005
    assert report.datasets["n_vars"].tolist() == [2_511, 13_714, 15_530, 14_049, 13_398, 21_952]
    with cellxgene_census.open_soma(uri=str(report.store)) as census:
        var = cellxgene_census.get_var(census, HUMAN)
        assert var["feature_id"].is_unique
        first = 0
        for path, row in zip(files, report.datasets.itertuples()):
            adata = anndata.read_h5ad(path)
            ids = list(range(first, first + 200))
            part = cellxgene_census.get_anndata(census, HUMAN, obs_coords=ids, X_name="raw")
            assert part.obs["cell_type"].astype(str).tolist() == adata.obs["cell_type"].astype(str).tolist()[:200]
            genes = report.genes[report.genes["dataset_id"] == row.dataset_id]
            columns = pd.Index(var["feature_id"]).get_indexer(genes["feature_id"])
            np.testing.assert_array_equal(part.X[:, columns].toarray(), adata.X[:200].toarray())
            assert part.X.sum() == adata.X[:200].sum()
            first += adata.n_obs
        cells = cellxgene_census.get_obs(census, HUMAN, value_filter="donor_id == '1015'")
        assert len(cells) == 2_257
