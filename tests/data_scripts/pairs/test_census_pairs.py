"""The whole way from a store to pair rows, against values computed densely."""

import dataclasses
import json
import os
import shutil

import anndata
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from pair_store import DATASETS, GENES, dense_counts, make_cells, make_store

from data_scripts.batches.stream_pairs import PairStream
from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import CensusPairs, build_pairs, plan_pairs
from data_scripts.pairs.dry_run import estimate
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_plan import query_for
from data_scripts.pairs.pair_shard import CellTable, average_states
from data_scripts.store.local_census import CensusSource, write_census

RULES = [{"where": {"donor_id": "d1"}, "split": "test"}, {"by": "cell", "fractions": {"validation": 0.2}}]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("census") / "store")


def make_options(store, **changes) -> PairOptions:
    """Options in three shards, with dotted changes such as `matching__policy`."""
    mapping = {"query": {"uri": str(store)}, "splits": {"rules": RULES}, "matching": {"pairs_per_cell": 3}}
    mapping |= {"shard_cells": 40}
    for name, value in changes.items():
        *path, last = name.split("__")
        place = mapping
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return from_mapping(PairOptions, mapping)


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory) -> PairFolder:
    return build_pairs(make_options(store), tmp_path_factory.mktemp("pairs") / "out", progress=False)


def test_every_row_is_right(folder):
    counts = dense_counts()
    log_values = np.log1p(10_000 * counts / counts.sum(1, keepdims=True)).astype(np.float32)
    measured = np.zeros(counts.shape, dtype=bool)
    first = 0
    dataset = []
    for name, (n_cells, genes, _) in DATASETS.items():
        measured[first : first + n_cells, : len(genes)] = True
        dataset += [name] * n_cells
        first += n_cells
    genes = np.array([GENES.index(gene) for gene in folder.gene_ids])
    split_of = {}
    for split in folder.splits:
        for row in folder.split(split).to_pylist():
            source, target = row["source_soma_joinid"], row["target_soma_joinid"]
            assert source != target
            for side, cell in (("source", source), ("target", target)):
                np.testing.assert_array_equal(
                    genes[row[f"{side}_gene_ids"]], genes[np.flatnonzero(counts[cell, genes])]
                )
                np.testing.assert_allclose(
                    row[f"{side}_values"], log_values[cell, genes][row[f"{side}_gene_ids"]], rtol=1e-6
                )
                np.testing.assert_array_equal(folder.panels[row[f"{side}_panel"]], measured[cell, genes])
                assert row[f"{side}_library_size"] == counts[cell].sum()
                assert row[f"{side}_n_expressed"] == (counts[cell] > 0).sum()
                assert split_of.setdefault(cell, split) == split
            revealed = genes[row["perturbation_gene_ids"]]
            assert 1 <= len(revealed) <= 5 and measured[source, revealed].all() and measured[target, revealed].all()
            change = (log_values[target] - log_values[source])[revealed]
            np.testing.assert_allclose(row["perturbation_values"], change, rtol=1e-5, atol=1e-6)
            assert (np.array(row["perturbation_values"]) != 0).all()
            assert row["dataset_id"] == dataset[source] == dataset[target]
            if row["pairing"] == "same_type":
                assert row["cell_type"] == row["target_cell_type"]
            else:
                assert row["pairing"] == "same_dataset" and row["donor_id"] == row["target_donor_id"]
            assert (row["donor_id"] == "d1") == (split == "test") == (row["target_donor_id"] == "d1")


def test_gene_table_is_over_training_cells(folder):
    counts = dense_counts()
    log_values = np.log1p(10_000 * counts / counts.sum(1, keepdims=True))
    # every training cell has a partner here, so the rows name them all
    cells = np.unique(folder.split("train").column("source_soma_joinid").to_numpy())
    assert folder.manifest["report"]["splits"]["train"]["cells"] == len(cells)
    columns = folder.genes.to_pydict()
    for index, gene in enumerate(map(GENES.index, folder.gene_ids)):
        own = cells if gene < 30 else cells[cells < 70]
        assert columns["n_cells_measured"][index] == len(own)
        assert columns["n_cells_expressed"][index] == (counts[own, gene] > 0).sum()
        assert columns["n_datasets_measured"][index] == (2 if gene < 30 else 1)
        assert columns["mean"][index] == pytest.approx(log_values[own, gene].mean(), rel=1e-5)
        assert columns["variance"][index] == pytest.approx(log_values[own, gene].var(), rel=1e-4)


def test_report_adds_up(folder):
    report = folder.manifest["report"]["splits"]
    assert sum(entry["cells"] for entry in report.values()) == 120
    for name, entry in report.items():
        assert entry["cells"] == entry["cells_paired"] + sum(entry["cells_unpaired"].values())
        rows = folder.split(name)
        assert entry["pairs"] == rows.num_rows == sum(entry["pairs_per_pairing"].values())
        n_revealed = rows.column("perturbation_gene_ids").combine_chunks().value_lengths().to_numpy()
        assert entry["mean_revealed_genes"] == pytest.approx(n_revealed.mean())


def test_processes_and_interruptions_do_not_matter(store, folder, tmp_path):
    # Genes are chosen in this process: starting others for that too, as the slow tests do, takes seconds more.
    plan_pairs(make_options(store), tmp_path / "two", progress=False)
    two = build_pairs(make_options(store), tmp_path / "two", num_proc=2, progress=False)
    assert two.manifest == folder.manifest

    class Interrupted(Exception):
        pass

    import data_scripts.pairs.census_pairs as module

    def interrupt(*_):
        raise Interrupted

    original, module.finish = module.finish, interrupt
    try:
        with pytest.raises(Interrupted):
            build_pairs(make_options(store), tmp_path / "again", progress=False)
    finally:
        module.finish = original
    with pytest.raises(ValueError, match="unfinished build: run the same command again"):
        PairFolder(tmp_path / "again")
    with pytest.raises(ValueError, match=r"holds another run \(seed was 0, is 5\)"):
        build_pairs(make_options(store, seed=5), tmp_path / "again", progress=False)
    (tmp_path / "again" / "work" / "shard-00001.json").unlink()
    kept = tmp_path / "again" / "train" / "shard-00000.arrow"
    before = os.stat(kept).st_mtime_ns
    again = build_pairs(make_options(store), tmp_path / "again", progress=False)
    assert again.manifest == folder.manifest and os.stat(kept).st_mtime_ns == before
    again.verify()


def test_same_run_is_reused_and_another_is_refused(store, tmp_path):
    options = make_options(store, panel__n_genes=10)
    first = build_pairs(options, tmp_path / "out", progress=False)
    before = os.stat(tmp_path / "out" / "manifest.json").st_mtime_ns
    # the same store elsewhere is the same store
    shutil.copytree(store, tmp_path / "copy")
    moved = dataclasses.replace(options, query=dataclasses.replace(options.query, uri=str(tmp_path / "copy")))
    assert build_pairs(moved, tmp_path / "out", progress=False).manifest == first.manifest
    assert os.stat(tmp_path / "out" / "manifest.json").st_mtime_ns == before
    with pytest.raises(ValueError, match=r"panel\.n_genes was 10, is 11"):
        build_pairs(make_options(store, panel__n_genes=11), tmp_path / "out", progress=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no pairs"):
        build_pairs(options, tmp_path / "notes", progress=False)


def test_seed_changes_the_pairs_but_not_the_splits(store, folder, tmp_path):
    other = build_pairs(make_options(store, seed=1), tmp_path / "other", progress=False)
    assert other.manifest["digest"] != folder.manifest["digest"]
    for split in folder.splits:
        cells = [set(run.split(split).column("source_soma_joinid").to_pylist()) for run in (folder, other)]
        assert cells[0] == cells[1]


def test_other_layers(store, tmp_path):
    raw = build_pairs(make_options(store), tmp_path / "raw", progress=False)
    normalized = build_pairs(make_options(store, query__layer="normalized"), tmp_path / "norm", progress=False)
    ours, theirs = (run.split("train") for run in (raw, normalized))
    assert ours.column("source_gene_ids").equals(theirs.column("source_gene_ids"))
    np.testing.assert_allclose(
        *(rows.column("source_values").combine_chunks().flatten().to_numpy() for rows in (ours, theirs)), rtol=1e-4
    )


def test_pairs_with_nothing_imposed(store, tmp_path):
    pairs = build_pairs(make_options(store, perturbation__min_genes=0), tmp_path / "out", progress=False)
    lengths = pairs.split("train").column("perturbation_gene_ids").combine_chunks().value_lengths().to_pylist()
    assert 0 in lengths and max(lengths) == 5


def test_averaged_states(store, tmp_path):
    pairs = build_pairs(make_options(store, matching__pseudobulk=3), tmp_path / "out", progress=False)
    report = pairs.manifest["report"]["splits"]
    for name, entry in report.items():
        assert entry["cells"] == entry["cells_paired"] + sum(entry["cells_unpaired"].values())
        assert entry["cells_paired"] % 3 == 0 and entry["cells_unpaired"]["too_few_for_a_state"] > 0
        assert pairs.split(name).num_rows == entry["cells_paired"] // 3 * 3


def test_a_state_is_the_mean_of_its_cells():
    values = sp.csr_matrix(np.log1p([[2.0, 0, 8], [4, 0, 0], [100, 1, 1], [3, 9, 0], [5, 9, 0]]).astype(np.float32))
    columns = {"soma_joinid": [10, 11, 12, 13, 14], "split": [0] * 5, "dataset": [0] * 5, "group_0": [0, 0, 7, 1, 1]}
    columns |= {"library": [1.0, 3, 5, 7, 9], "nnz": [2, 1, 3, 2, 2]}
    cells = CellTable(pa.table(columns), 1, np.array([0]))
    states, averaged = average_states(cells, values, 2, True, np.random.default_rng(0))
    np.testing.assert_allclose(averaged.toarray(), np.log1p([[3, 0, 4], [4, 9, 0]]), rtol=1e-6)
    assert states.joinids.tolist() == [10, 13] and states.library.tolist() == [2, 8]
    _, averaged = average_states(cells, values, 2, False, np.random.default_rng(0))
    np.testing.assert_allclose(averaged.toarray()[1], values.toarray()[3:].mean(0), rtol=1e-6)


def test_as_a_datasets_builder(store, folder, tmp_path):
    builder = CensusPairs.from_options(make_options(store), cache_dir=tmp_path / "cache")
    builder.download_and_prepare()
    rows = builder.as_dataset()
    assert {name: len(rows[name]) for name in rows} == {name: folder.split(name).num_rows for name in folder.splits}
    assert rows["train"][3] == folder.split("train").slice(3, 1).to_pylist()[0]
    other = CensusPairs.from_options(make_options(store, seed=1), cache_dir=tmp_path / "cache")
    assert other.cache_dir != builder.cache_dir


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query__uri": "/nowhere"}, "`uri` /nowhere does not exist; `gppc make-census`"),
        ({"query__organism": "mus_musculus"}, "`organism` is 'mus_musculus', not in the store"),
        (
            {"query__obs_filter": "cell_typ == 'B cell'"},
            "names 'cell_typ', which is not a column; did you mean `cell_type`",
        ),
        ({"query__obs_filter": "cell_type == 'B cel'"}, "asks for cell_type 'B cel', .* did you mean `B cell`"),
        ({"query__obs_filter": "cell_type =="}, "`obs_filter` 'cell_type ==' is malformed"),
        ({"query__obs_filter": "cell_type"}, "compares nothing"),
        ({"query__obs_filter": "nnz > 100000"}, "`obs_filter` 'nnz > 100000' matches none of the store's 120 cells"),
        (
            {"query__var_filter": "feature_nam == 'x'"},
            "`var_filter` .*names 'feature_nam', .*did you mean `feature_name`",
        ),
        (
            {"query__obs_filter": "donor_id in ['d1', 'dd2']"},
            "`obs_filter` .*asks for donor_id 'dd2', .* did you mean `d2`",
        ),
        (
            {"query__layer": "raw", "query__organism": "homo_sapien"},
            "`organism` is 'homo_sapien'.*did you mean `homo_sapiens`",
        ),
        ({"query__var_filter": "feature_name == 'nothing'"}, "`var_filter` .* matches none of the store's 40 genes"),
        (
            {"matching__pairings": {"p": {"keys": ["donor"]}}},
            "`pairings.p.keys` names 'donor', .* did you mean `donor_id`",
        ),
        ({"matching__pairings": {"p": {"keys": ["soma_joinid"]}}}, "fewer than two cells in every context"),
        ({"matching__min_shared_genes": 41}, "no cell found a partner"),
        ({"panel__min_expressed": 1.0, "panel__min_measured": 1.0}, "`panel` leaves no gene"),
        (
            {"splits__rules": [{"where": {"donor_id": "d9"}, "split": "test"}]},
            "asks for donor_id 'd9', which no cell has",
        ),
        ({"splits__rules": [{"split": "test"}]}, "leave no cell for training"),
    ],
)
def test_bad_input(store, tmp_path, changes, message):
    rule = {"panel__rule": "common"}
    if "panel__min_expressed" in changes:
        changes = changes | {"query__var_filter": f"feature_id in {GENES[35:]!r}"}
    with pytest.raises(ValueError, match=message) as caught:
        build_pairs(make_options(store, **rule | changes), tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_not_a_census(tmp_path):
    with pytest.raises(ValueError, match="is not a store in Census layout"):
        build_pairs(make_options(tmp_path), tmp_path / "out", progress=False)


def test_command_line(store, tmp_path, capsys):
    from gppc.cli import main

    config = tmp_path / "pairs.yaml"
    config.write_text(json.dumps({"panel": {"n_genes": 12}, "splits": {"rules": RULES}}))
    arguments = ["build-pairs", str(tmp_path / "out"), "--config", str(config), "--query.uri", str(store)]
    assert main([*arguments, "--perturbation.max_genes", "2", "--seed", "4"]) == 0
    assert "12 genes" in capsys.readouterr().out
    options = PairFolder(tmp_path / "out").manifest["options"]
    assert options["seed"] == 4 and options["perturbation"]["max_genes"] == 2
    assert main([*arguments, "--perturbation.max_gene", "2"]) == 2
    assert "did you mean `perturbation.max_genes`" in capsys.readouterr().err


def test_dry_run(store, folder, tmp_path, capsys):
    from gppc.cli import main

    numbers = estimate(make_options(store))
    report = folder.manifest["report"]["splits"]
    assert numbers["cells"] == {name: entry["cells"] for name, entry in report.items()}
    assert numbers["datasets"] == 2 and numbers["shards"] == 3
    assert numbers["contexts"] == {"same_type": 4, "same_dataset": 5}
    assert numbers["pairs_at_most"] >= sum(entry["pairs"] for entry in report.values())
    # The sample of so small a store is all of it.
    assert numbers["genes"] == len(folder.gene_ids)
    assert main(["build-pairs", str(tmp_path / "out"), "--query.uri", str(store), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "cells             120 (train ",
        "data sets         2\n",
        "contexts          same_type 4, same_dataset 5\n",
        "with a partner    ",
        "genes             40 (from a sample)\n",
        "pairs             at most ",
        "GB as arrow\n",
        "time              about ",
    ):
        assert line in shown, line
    assert not (tmp_path / "out").exists()


def test_large_panels_are_packed(store, folder, tmp_path, monkeypatch):
    import data_scripts.pairs.pair_plan as module

    assert folder.manifest["options"]["file_format"] == "auto"
    assert all(shard["file"].endswith(".arrow") for shard in folder.manifest["splits"]["train"]["shards"])
    monkeypatch.setattr(module, "MAPPED_GENES", 39)
    assert estimate(make_options(store))["file_format"] == "parquet"
    packed = build_pairs(make_options(store), tmp_path / "out", progress=False)
    for split in folder.splits:
        assert all(shard["file"].endswith(".parquet") for shard in packed.manifest["splits"][split]["shards"])
        assert packed.split(split).equals(folder.split(split))
    forced = build_pairs(make_options(store, file_format="arrow"), tmp_path / "forced", progress=False)
    assert forced.manifest["splits"] == folder.manifest["splits"]


def test_mouse(tmp_path):
    cells = make_cells("A")
    cells.var_names = [gene.replace("ENSG", "ENSMUSG") for gene in cells.var_names]
    write_census(tmp_path / "store", [CensusSource(cells, "A")], organism="mus_musculus")
    options = make_options(tmp_path / "store", query__organism="mus_musculus", splits__rules=[])
    folder = build_pairs(options, tmp_path / "out", progress=False)
    assert folder.manifest["organism"] == "mus_musculus" and folder.gene_ids[0].startswith("ENSMUSG")
    assert folder.split("train").num_rows == 210


def test_a_relative_store_outlives_a_change_of_the_working_directory(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)

    def moving() -> anndata.AnnData:
        """Cells of a function that leaves the directory."""
        monkeypatch.chdir(elsewhere)
        return make_cells("A")

    write_census("store", [CensusSource(moving, "A")])
    assert (tmp_path / "store").is_dir() and not list(elsewhere.iterdir())
    monkeypatch.chdir(tmp_path)
    plan = plan_pairs(from_mapping(PairOptions, {"query": {"uri": "store"}}), tmp_path / "plan", progress=False)
    query = query_for(plan.options)
    monkeypatch.chdir(elsewhere)
    assert query.presence(["A"]).all() and query.matrix.shape == plan.matrix.shape
    assert list(PairStream(plan.out))
