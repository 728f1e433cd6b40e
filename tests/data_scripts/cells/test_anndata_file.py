"""One file, every command: the same genes, library sizes and log values from a store, a screen and a prediction."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
from scipy import sparse

from data_scripts.cells import anndata_file
from data_scripts.cells.anndata_file import FEW_GENES, open_cells
from data_scripts.cells.read_options import CensusReadOptions, ReadOptions
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import read_screen
from data_scripts.pairs.pair_options import QueryOptions
from data_scripts.store.cell_stream import CellStream, read_values
from data_scripts.store.local_census import CensusSource, write_census
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.inference.input_cells import input_cells
from modeling_gppc.normalization_gppc import normalize_counts

N_CELLS, N_GENES = 24, 6
IDS = [f"ENSG{number:011d}" for number in range(1, N_GENES + 1)]
SYMBOLS = [f"S{number}" for number in range(N_GENES)]
COUNTS = np.random.default_rng(0).poisson(3.0, (N_CELLS, N_GENES)) + 1
COUNTS[5] *= 700  # beyond what half precision counts, one by one or in sum
SUMS = COUNTS.sum(axis=1).astype(float)
FULL = SUMS + 5_000
ANTIBODIES = np.random.default_rng(1).poisson(40.0, (N_CELLS, 2))


def cells(matrix=None, names=IDS, var=None, **obs) -> anndata.AnnData:
    """Cells of a screen; whatever is not given is what every case shares."""
    matrix = sparse.csr_matrix(COUNTS.astype(np.float32)) if matrix is None else matrix
    table = pd.DataFrame({"perturbation": ["control", "S0"] * (N_CELLS // 2), **obs})
    table.index = [f"cell{row}" for row in range(N_CELLS)]
    adata = anndata.AnnData(matrix, obs=table)
    adata.var_names = names
    for name, values in (var or {}).items():
        adata.var[name] = values
    return adata


def in_half_precision(other: np.ndarray) -> sparse.csr_matrix:
    """Half precision, which scipy makes only when it is handed over."""
    whole = sparse.csr_matrix(other.astype(np.float32))
    return sparse.csr_matrix((whole.data.astype(np.float16), whole.indices, whole.indptr), shape=whole.shape)


def in_layer(**options) -> anndata.AnnData:
    adata = cells(np.log1p(COUNTS / SUMS[:, None]).astype(np.float32))
    adata.layers["counts"] = COUNTS
    return adata


def in_raw() -> anndata.AnnData:
    adata = cells(np.log1p(COUNTS[:, :2] / SUMS[:, None]).astype(np.float32), names=IDS[:2])
    adata.raw = cells(n_counts_full=FULL)
    return adata


# Half of the counts of gene 2 in a column of its own, behind the others.
APART = np.concatenate([COUNTS, COUNTS[:, 2:3] // 2], axis=1)
APART[:, 2] -= APART[:, -1]
WITH_ANTIBODIES = np.concatenate([ANTIBODIES[:, :1], COUNTS, ANTIBODIES[:, 1:]], axis=1)
KINDS = ["Antibody Capture", *["Gene Expression"] * N_GENES, "Antibody Capture"]
TAGS = ["CD3_tag", *IDS, "CD4_tag"]
ALL_SUMS = WITH_ANTIBODIES.sum(axis=1)

# name -> (cells, options, library sizes, where these come from)
CASES = {
    "nothing said": (cells(), {}, SUMS, "sum"),
    "subset with total_counts": (cells(total_counts=FULL), {}, FULL, "total_counts"),
    "subset with n_counts": (cells(n_counts=FULL), {}, FULL, "n_counts"),
    "Seurat's nCount_RNA": (cells(nCount_RNA=FULL.astype(int)), {}, FULL, "nCount_RNA"),
    "raw_sum of Census": (cells(raw_sum=FULL), {}, FULL, "raw_sum"),
    "n_counts_full comes first": (cells(total_counts=SUMS + 1, N_Counts_Full=FULL), {}, FULL, "N_Counts_Full"),
    "library sizes as text": (cells(total_counts=[f"{size:g}" for size in FULL]), {}, FULL, "total_counts"),
    "total_counts of these genes": (cells(total_counts=SUMS), {}, SUMS, "sum"),
    "one cell contradicts": (cells(total_counts=np.where(np.arange(N_CELLS) == 3, 2, FULL)), {}, SUMS, "sum"),
    "one cell is missing": (cells(n_counts=np.where(np.arange(N_CELLS) == 3, np.nan, FULL)), {}, SUMS, "sum"),
    "the next column is right": (cells(n_counts_full="x", n_counts=FULL), {}, FULL, "n_counts"),
    "a named column": (cells(depth=FULL, n_counts=SUMS + 1), {"library_size_column": "depth"}, FULL, "depth"),
    "ids with versions": (cells(names=[f"{gene}.{n}" for n, gene in enumerate(IDS)]), {}, SUMS, "sum"),
    "ids with a genome": (cells(names=[f"GRCh38_{gene}" for gene in IDS]), {}, SUMS, "sum"),
    "symbols, ids in a column": (cells(names=SYMBOLS, var={"gene_ids": IDS}), {}, SUMS, "sum"),
    "one symbol of two ids": (cells(names=["S", "S", *SYMBOLS[2:]], var={"gene_ids": IDS}), {}, SUMS, "sum"),
    "a named column of ids": (cells(names=SYMBOLS, var={"mine": IDS}), {"gene_column": "mine"}, SUMS, "sum"),
    "two versions of one id": (cells(APART, [*(f"{gene}.1" for gene in IDS), f"hg38_{IDS[2]}.2"]), {}, SUMS, "sum"),
    "antibodies": (cells(WITH_ANTIBODIES, TAGS, {"feature_types": KINDS}), {}, SUMS, "sum"),
    "antibodies in total_counts": (
        cells(WITH_ANTIBODIES, TAGS, {"feature_types": KINDS}, total_counts=ALL_SUMS),
        {},
        SUMS,
        "sum",
    ),
    "float16": (cells(COUNTS.astype(np.float16)), {}, SUMS, "sum"),
    "float16, sparse": (cells(in_half_precision(COUNTS)), {}, SUMS, "sum"),
    "float16, by columns": (cells(in_half_precision(COUNTS.T).T), {}, SUMS, "sum"),
    "integers": (cells(COUNTS), {}, SUMS, "sum"),
    "by columns": (cells(sparse.csc_matrix(COUNTS.astype(np.float64))), {}, SUMS, "sum"),
    "a layer": (in_layer(), {"layer": "counts"}, SUMS, "sum"),
    "raw": (in_raw(), {"layer": "raw"}, SUMS, "sum"),
}
# float16 holds whole numbers to 2,048 exactly; what it held was rounded before it was read.
HALVED = COUNTS.astype(np.float16).astype(np.int64)


@pytest.fixture(autouse=True)
def blocks_of_some_cells(monkeypatch):
    monkeypatch.setattr(anndata_file, "VALUES_PER_BLOCK", 40)


def read_store(path, source, **options):
    """Genes, library sizes, log values and where the sizes come from: `make-census`, then streamed back."""
    kind = options.get("value_kind", "counts")
    reading = CensusReadOptions(**options)
    layer = {"counts": "raw", "estimated_counts": "normalized", "log": "log_values"}[kind]
    query = QueryOptions(layer=layer, normalization="none" if kind == "log" else "log1p")
    report = write_census(path, [CensusSource(source, "one", options=reading)])
    with tiledbsoma.open(f"{path}/census_data/homo_sapiens") as experiment:
        sizes = experiment.obs.read().concat()["raw_sum"].to_numpy()
        genes = experiment.ms["RNA"].var.read().concat()["feature_id"].to_pylist()
        stream = CellStream(experiment.ms["RNA"].X[layer], query, np.arange(len(sizes)))
        values = read_values(stream, sizes, None, np.arange(len(genes), dtype=np.int32)).toarray()
    return genes, sizes, values, report.datasets["library_from"][0]


def read_as_screen(path, source, **options):
    screen = read_screen(source, ScreenOptions(**options))
    return screen.gene_ids, screen.library_size, screen.values, None


def read_to_predict(path, source, **options):
    extractor = GppcFeatureExtractor(IDS, SYMBOLS)
    inputs = input_cells(source, extractor, ReadOptions(**options))
    features = inputs.features(extractor, slice(None))
    values = np.zeros((len(inputs), N_GENES), dtype=np.float32)
    rows, places = np.nonzero(features["attention_mask"].numpy())
    ids = features["input_ids"].numpy()[rows, places]
    values[rows, ids] = features["expression_values"].numpy()[rows, places]
    return [IDS[gene] for gene in inputs.gene_index], inputs.library_size, values, inputs.library_source


COMMANDS = {"make-census": read_store, "evaluate": read_as_screen, "predict": read_to_predict}


def check(command, path, source, counts, sizes, source_of_sizes, options):
    genes, found_sizes, values, found_source = COMMANDS[command](path / "store", source, **options)
    assert genes == IDS
    assert found_source in (None, source_of_sizes)
    np.testing.assert_array_equal(found_sizes, sizes)
    np.testing.assert_array_equal(values, normalize_counts(counts, sizes[:, None]))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CASES)
def test_every_command_reads_the_same(tmp_path, case, command):
    adata, options, sizes, source = CASES[case]
    counts = HALVED if "float16" in case else COUNTS
    sizes = HALVED.sum(axis=1).astype(float) if "float16" in case else sizes
    check(command, tmp_path, adata, counts, sizes, source, options)


FORMS = [
    (case, form) for case in ("antibodies", "by columns", "a layer", "raw", "float16") for form in ("h5ad", "backed")
]
FORMS += [
    ("float16, sparse", "h5ad"),
    ("float16, sparse", "zarr"),
    ("float16, by columns", "h5ad"),
    ("by columns", "zarr"),
    ("raw", "zarr"),
]


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("case", "form"), FORMS)
def test_every_format_reads_the_same(tmp_path, case, form, command):
    adata, options, sizes, source = CASES[case]
    path = tmp_path / f"cells.{form}"
    (adata.write_zarr if form == "zarr" else adata.write_h5ad)(path)
    given = anndata.read_h5ad(path, backed="r") if form == "backed" else path
    counts = HALVED if "float16" in case else COUNTS
    sizes = HALVED.sum(axis=1).astype(float) if "float16" in case else sizes
    check(command, tmp_path, given, counts, sizes, source, options)


@pytest.mark.parametrize("command", ["make-census", "predict"])
def test_a_file_of_10x_genomics(tmp_path, command):
    """As Cell Ranger leaves it: antibodies among the genes, one symbol of two genes."""
    matrix = sparse.csr_matrix(WITH_ANTIBODIES.astype(np.int32))
    features = {"id": TAGS, "name": ["CD3", "S", "S", *SYMBOLS[2:], "CD4"], "feature_type": KINDS}
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array([f"cell{row}" for row in range(N_CELLS)], dtype="S")
        for name, part in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            group[name] = part
        group["shape"] = np.array(matrix.shape[::-1], dtype=np.int32)
        for name, texts in {**features, "genome": ["GRCh38"] * len(KINDS)}.items():
            group[f"features/{name}"] = np.array(texts, dtype="S")
    check(command, tmp_path, tmp_path / "cells.h5", COUNTS, SUMS, "sum", {})


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["estimated_counts", "log"])
def test_other_kinds_of_values_by_declaration(tmp_path, kind, command):
    parts = COUNTS * 0.3
    logs = normalize_counts(parts, FULL[:, None])
    adata = cells((parts if kind == "estimated_counts" else logs).astype(np.float32), n_counts_full=FULL)
    genes, _, values, _ = COMMANDS[command](tmp_path / "store", adata, value_kind=kind)
    assert genes == IDS
    np.testing.assert_allclose(values, logs, rtol=1e-6 if kind == "estimated_counts" else 0)


def spoilt(change=None, **obs):
    adata = cells(np.array(COUNTS, dtype=np.float32), **obs)
    if change is not None:
        change(adata)
    return adata


def one_value(value):
    return lambda adata: adata.X.__setitem__((4, 2), value)


def some_logs(adata):
    adata.X[3:6] = np.log1p(adata.X[3:6])


def all_logs(adata):
    adata.layers["molecules"] = adata.X.copy()
    adata.X = np.log1p(adata.X)


DEPTH = {"library_size_column": "depth"}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("adata", "options", "message"),
    [
        (spoilt()[:0], {}, "has no cells"),
        (spoilt()[:, :0], {}, "has no genes"),
        (spoilt(lambda a: setattr(a, "X", None)), {}, "has no X; name the `layer` that holds the counts"),
        (spoilt(), {"layer": "counts"}, "`layer` is 'counts', which .* does not have"),
        (
            spoilt(lambda a: setattr(a, "obs_names", ["cell1", *a.obs_names[1:]])),
            {},
            "1 duplicate barcodes .e.g. `cell1`",
        ),
        (spoilt(one_value(np.nan)), {}, "`X` holds NaN or infinite"),
        (spoilt(one_value(np.inf)), {}, "`X` holds NaN or infinite"),
        (spoilt(one_value(-1)), {}, "`X` holds negative"),
        (spoilt(one_value(0.5)), {}, r"mixes raw and log values: 1 cells hold non-integer values \(e.g. 0.5\)"),
        (spoilt(some_logs), {}, "mixes raw and log values: 3 cells"),
        (spoilt(all_logs), {}, "`X` holds non-integer values.*Raw counts are in layer `molecules`"),
        (spoilt(), {"value_kind": "log"}, "'log' but `X` holds .*; log values are finite and stay below about 20"),
        (spoilt(one_value(-1)), {"value_kind": "estimated_counts"}, "`X` holds negative"),
        (spoilt(), DEPTH, "`library_size_column` is 'depth', which is not a column of obs"),
        (spoilt(depth=FULL - 5_001), DEPTH, "'depth' of .* is .* for cell `cell0`, which has .* counts"),
        (spoilt(depth=np.where(np.arange(N_CELLS) == 7, np.inf, FULL)), DEPTH, "is inf for cell `cell7`"),
        (spoilt(depth=np.where(np.arange(N_CELLS) == 7, np.nan, FULL)), DEPTH, "is nan for cell `cell7`"),
        (spoilt(depth="deep"), DEPTH, "is nan for cell `cell0`.*; wanted the counts over all genes, a number"),
        (spoilt(), {"gene_column": "ids"}, "`gene_column` is 'ids', which is not a column of var"),
        (spoilt(), {"symbol_column": "names"}, "`symbol_column` is 'names', which is not a column of var"),
        (spoilt(), {"value_kind": "raw"}, "`value_kind` is 'raw'; wanted one of counts, estimated_counts, log"),
    ],
)
def test_every_command_refuses_the_same_with_one_line(tmp_path, adata, options, message, command):
    with pytest.raises(ValueError, match=message) as error:
        COMMANDS[command](tmp_path / "store", adata, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def test_log_values_of_one_gene_do_not_add_up():
    with (
        open_cells(cells(np.log1p(APART), [*IDS, IDS[2]]), ReadOptions(value_kind="log")) as opened,
        pytest.raises(ValueError, match=f"gene `{IDS[2]}` in several columns of log values"),
    ):
        opened.check()


def test_what_is_read_otherwise_than_it_stands_is_said(tmp_path):
    adata = cells(
        np.concatenate([WITH_ANTIBODIES, COUNTS[:, :1]], axis=1),
        [*TAGS, f"{IDS[0]}.2"],
        {"feature_types": [*KINDS, "Gene Expression"]},
        total_counts=1,
    )
    wanted = [
        "2 features of W are no genes and are set aside: 2 Antibody Capture.",
        f"1 genes of W stand in several columns, whose counts are added up: {IDS[0]}.",
        f"obs column `total_counts` of W is 1 for cell `cell0`, which has {SUMS[0] + COUNTS[0, 0]:g} counts; it is not "
        "used as library size.",
        "library sizes are the counts of the 6 genes in the file; if it holds only some of the measured genes, give the "
        "counts over all of them as a column of obs (`library_size_column`).",
    ]
    report = write_census(tmp_path / "store", [CensusSource(adata, "one")])
    assert report.datasets["notes"][0] == [line.replace(" W ", " data set 'one' ") for line in wanted]
    assert all(line in report.summary() for line in report.datasets["notes"][0])
    screen = read_screen(adata)
    assert screen.notes[:-1] == [line.replace(" W ", " `screen` ") for line in wanted]
    assert all(line in screen.summary() for line in screen.notes)
    warned = input_cells(adata, GppcFeatureExtractor(IDS, SYMBOLS)).warnings
    assert warned == [line.replace(" W ", " `cells` ") for line in wanted]


@pytest.mark.parametrize(
    ("n_genes", "obs", "options", "complete"),
    [
        (6, {}, {}, False),  # a targeted panel: its depth is itself a response
        (6, {"total_counts": SUMS}, {}, False),
        (6, {"total_counts": FULL}, {}, True),
        (6, {"depth": SUMS}, {"library_size_column": "depth"}, True),  # said by the user
        (FEW_GENES, {}, {}, True),
    ],
)
def test_whether_library_sizes_count_all_genes(n_genes, obs, options, complete):
    matrix = sparse.hstack([COUNTS, sparse.csr_matrix((N_CELLS, n_genes - N_GENES), dtype=int)], format="csr")
    with open_cells(cells(matrix, [f"G{gene}" for gene in range(n_genes)], **obs), ReadOptions(**options)) as opened:
        assert opened.check().is_complete == complete


def test_some_cells_and_some_genes(tmp_path):
    cells().write_h5ad(tmp_path / "cells.h5ad")
    chosen = np.arange(N_CELLS) % 3 == 1
    with open_cells(tmp_path / "cells.h5ad") as opened:
        part = opened.subset(chosen).subset(np.array([0, 2, 5]))
        blocks = [block.toarray() for _, block in part.blocks(np.array([4, 0]))]
        assert part.obs.index.tolist() == ["cell1", "cell7", "cell16"]
    np.testing.assert_array_equal(np.concatenate(blocks), COUNTS[[1, 7, 16]][:, [4, 0]])


def test_cells_in_memory_are_left_as_they_are():
    messy = sparse.csr_matrix(([2.0, 1.0, 3.0], [4, 1, 1], [0, 3, *[3] * (N_CELLS - 1)]), shape=(N_CELLS, N_GENES))
    adata = cells(messy.copy())
    with open_cells(adata) as opened:
        assert opened.check().sizes[0] == 6
        assert next(opened.blocks())[1].toarray()[0].tolist() == [0, 4, 0, 0, 2, 0]
    assert adata.X.data.tolist() == messy.data.tolist() and adata.X.indices.tolist() == messy.indices.tolist()


def test_what_is_no_file_of_cells(tmp_path):
    (tmp_path / "cells.h5ad").write_text("no HDF5")
    (tmp_path / "folder").mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for name in ("cells.h5ad", "folder", "other.h5"):
        with (
            pytest.raises(ValueError, match=f"`cells` .*{name}' is not a readable AnnData"),
            open_cells(tmp_path / name),
        ):
            pass
    with pytest.raises(ValueError, match=r"cell.h5ad' does not exist; did you mean `cells.h5ad`"):
        open_cells(tmp_path / "cell.h5ad").__enter__()
