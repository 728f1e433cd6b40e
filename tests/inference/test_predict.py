"""predict_anndata and `gppc predict`: equal to the model called by hand, complete, strict before long work."""

import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse
from tiny_model import GENES, SYMBOLS, response_by_hand, tiny_extractor, tiny_model, tiny_pipeline
from tiny_screens import make_adata

from data_scripts.cells.screens import read_screen
from gppc import cli
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.fitting.fit_controls import fit_controls
from modeling_gppc.fitting.fit_screen import fit_screen
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions
from modeling_gppc.inference.loading import load_model
from modeling_gppc.inference.predict import predict_anndata, predict_file
from modeling_gppc.normalization_gppc import normalize_counts

N_CELLS = 7
# What the cells name: nine genes of the model by symbol, one by id, two that it does not know.
NAMES = [*SYMBOLS[:9], GENES[9], "irf1", "CST4"]
MEASURED = np.arange(12) < 10


def make_cells(n_cells=N_CELLS, seed=0):
    counts = np.random.default_rng(seed).poisson(1.0, size=(n_cells, len(NAMES)))
    counts[:, 1] += 1  # IRF1 is expressed in every cell
    obs = pd.DataFrame(
        {"n_counts_full": counts.sum(axis=1) + 100.0, "cell_type": pd.Categorical(["T"] * n_cells)},
        index=[f"cell{row}" for row in range(n_cells)],
    )
    return anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=NAMES))


def values_of(cells):
    """Log values over the vocabulary, by hand."""
    values = np.zeros((cells.n_obs, 12))
    values[:, :10] = np.log1p(1e4 * cells.X.toarray()[:, :10] / cells.obs["n_counts_full"].to_numpy()[:, None])
    return values


def by_hand(cells, changes, model=None):
    """Levels after a mapping gene -> change of log value, `(n, V)` array or number, with `change`, `variance` and
    `direction` of [`response_by_hand`], each `(n, V)`."""
    model = tiny_model() if model is None else model
    values = values_of(cells)
    delta = {gene: np.broadcast_to(change, len(values)) for gene, change in changes.items()}
    rows = [
        response_by_hand(model, {gene: change[row] for gene, change in delta.items()}) for row in range(len(values))
    ]
    output = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        encoded = model.encode(
            torch.arange(12).expand(len(values), -1),
            torch.tensor(values, dtype=torch.float32),
            measured_mask=torch.from_numpy(MEASURED).expand(len(values), -1),
        )
        # Where the gene was not measured the model suggests its level.
        before = np.where(MEASURED, values, model.levels(encoded).numpy())
    return output | {"levels": before + output["change"]}


def predict(cells, *perturbations, model=None, **options):
    model = tiny_model() if model is None else model
    return predict_anndata((model, tiny_extractor()), cells, list(perturbations), **options)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


CHANGES = {
    "STAT1=ko": lambda v: {0: -v[:, 0]},
    "IRF1=kd:0.8": lambda v: {1: np.log1p(0.2 * np.expm1(v[:, 1])) - v[:, 1]},
    "IRF1=x3": lambda v: {1: np.log1p(3 * np.expm1(v[:, 1])) - v[:, 1]},
    "CD3D=level:2": lambda v: {2: 2 - v[:, 2]},
    "CD3D=-0.5": lambda v: {2: -0.5},
    f"STAT1=ko+{GENES[3]}=delta:1.5": lambda v: {0: -v[:, 0], 3: 1.5},
    "control": lambda v: {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", CHANGES)
def test_equals_the_model(text):
    cells = make_cells()
    output = predict(cells, text)
    changes = CHANGES[text](values_of(cells))
    wanted = by_hand(cells, changes)
    np.testing.assert_allclose(output.X, wanted["levels"], atol=1e-5)
    np.testing.assert_allclose(output.layers["delta"], wanted["change"], atol=1e-6)
    np.testing.assert_allclose(output.layers["std"], np.sqrt(wanted["variance"]), atol=1e-6)
    np.testing.assert_allclose(output.layers["direction"], wanted["direction"], atol=1e-6)
    np.testing.assert_allclose(output.varm["mean_delta"][:, 0], output.layers["delta"].mean(axis=0), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_is_imposed_is_read_out():
    output = predict(make_cells(), "STAT1=ko", "CD3D=level:2", "CST3=ko", "CST3=level:1.5")
    wanted = {
        "STAT1=ko": ("STAT1", 0),
        "CD3D=level:2": ("CD3D", 2),
        "CST3=ko": ("CST3", 0),
        "CST3=level:1.5": ("CST3", 1.5),
    }
    for text, (symbol, level) in wanted.items():
        rows = output[output.obs["perturbation"] == text, output.var["gene_symbol"] == symbol]
        np.testing.assert_allclose(rows.X, level, atol=1e-6, err_msg=text)
        assert (rows.layers["std"] == 0).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 3, 7, 20, 1000])
def test_batches_change_nothing(batch_size):
    cells, texts = make_cells(), ["STAT1=ko", "IRF1=x3+CD3D=ko", "control", "MS4A1=level:3"]
    together = predict(cells, *texts, batch_size=batch_size)
    assert together.shape == (28, 12)
    for place, text in enumerate(texts):
        alone = predict(cells, text)
        part = together[place * N_CELLS : (place + 1) * N_CELLS]
        assert (part.obs["perturbation"] == text).all()
        assert part.obs["source_cell"].tolist() == alone.obs_names.tolist() == cells.obs_names.tolist()
        for name in (None, *alone.layers):
            left, right = (item.X if name is None else item.layers[name] for item in (part, alone))
            np.testing.assert_allclose(left, right, atol=1e-5, err_msg=f"{text} {name}")
        np.testing.assert_allclose(together.varm["mean_delta"][:, place], alone.varm["mean_delta"][:, 0], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_every_cell_is_encoded_once(monkeypatch):
    model, encoded = tiny_model(), []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda *args, **inputs: encoded.append(len(inputs["input_ids"])) or encode(*args, **inputs)
    )
    predict(make_cells(), *[f"{symbol}=level:1" for symbol in SYMBOLS], model=model, batch_size=4)
    assert encoded == [4, 3]


def test_control_changes_nothing():
    output = predict(make_cells(), "control")
    assert np.abs(output.layers["delta"]).max() < 1e-6
    assert np.abs(output.X).max() > 0


@pytest.mark.filterwarnings("ignore")
def test_some_genes():
    cells = make_cells()
    whole = predict(cells, "STAT1=ko")
    part = predict(cells, "STAT1=ko", genes=["LYZ", "STAT1", GENES[2]])
    assert part.var["gene_symbol"].tolist() == ["LYZ", "STAT1", "CD3D"]
    np.testing.assert_allclose(part.X, whole[:, part.var_names].X, atol=1e-6)
    for name in ("delta", "std", "direction"):
        np.testing.assert_allclose(part.layers[name], whole[:, part.var_names].layers[name], atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_the_output_says_of_its_origin():
    cells = make_cells()
    cells.obs["perturbation"] = "none"
    output = predict(cells, "STAT1=ko", "CST3=ko")
    assert output.obs["input_perturbation"].tolist() == ["none"] * 14
    assert output.obs["cell_type"].tolist() == ["T"] * 14
    assert output.obs_names.is_unique
    assert output.var_names.tolist() == GENES
    assert output.var["measured"].tolist() == MEASURED.tolist()
    uns = output.uns["gppc"]
    assert uns["perturbations"].tolist() == ["STAT1=ko", "CST3=ko"]
    assert uns["unknown_genes"].values.tolist() == [["irf1", "IRF1"], ["CST4", "CST3"]]
    assert (uns["library_size"], uns["normalization"]) == ("n_counts_full", "log1p")
    expressed = int((cells.X.toarray()[:, 0] > 0).sum())
    assert uns["perturbed_genes"].values.tolist() == [
        [GENES[0], "STAT1", True, expressed],
        [GENES[11], "CST3", False, 0],
    ]


def test_unexpressed_and_unmeasured_perturbed_genes_are_warned_of():
    cells = make_cells()
    absent = int((cells.X.toarray()[:, 0] == 0).sum())
    with pytest.warns(UserWarning, match=f"`STAT1` is not expressed in {absent} of 7 cells"):
        predict(cells, "STAT1=ko")
    with pytest.warns(UserWarning, match="`CST3` is perturbed but not measured"):
        predict(cells, "CST3=x2")


@pytest.mark.filterwarnings("ignore")
def test_the_library_size_is_over_all_genes():
    cells = make_cells()
    cells.obs["depth"] = cells.obs.pop("n_counts_full")
    named = predict(cells, "IRF1=ko", library_size_column="depth")
    cells.obs["n_counts_full"] = cells.obs["depth"]
    np.testing.assert_array_equal(named.X, predict(cells, "IRF1=ko").X)
    del cells.obs["n_counts_full"], cells.obs["depth"]
    summed = predict(cells, "IRF1=ko")
    assert summed.uns["gppc"]["library_size"] == "sum"
    cells.obs["depth"] = np.asarray(cells.X.sum(axis=1)).ravel()
    np.testing.assert_array_equal(summed.X, predict(cells, "IRF1=ko", library_size_column="depth").X)
    assert np.abs(summed.X - named.X).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_ids_symbols_layers_and_dense_counts_say_the_same():
    cells = make_cells()
    wanted = predict(cells, "IRF1=ko").X
    by_id = cells.copy()
    by_id.var_names = [*(f"{gene}.3" for gene in GENES[:10]), "x", "y"]
    np.testing.assert_array_equal(predict(by_id, "IRF1=ko").X, wanted)
    by_column = cells.copy()
    by_column.var["gene_symbol"], by_column.var_names = NAMES, [f"g{column}" for column in range(12)]
    np.testing.assert_array_equal(predict(by_column, "IRF1=ko").X, wanted)
    by_column.var["label"] = by_column.var.pop("gene_symbol")
    np.testing.assert_array_equal(predict(by_column, "IRF1=ko", gene_column="label").X, wanted)
    layered = anndata.AnnData(cells.X.toarray() / 7, obs=cells.obs, var=cells.var)
    layered.layers["counts"] = cells.X.toarray().astype(int)
    np.testing.assert_array_equal(predict(layered, "IRF1=ko", layer="counts").X, wanted)
    kept = anndata.AnnData(cells.X[:, :3] / 7, obs=cells.obs, var=cells.var[:3])
    kept.raw = cells
    np.testing.assert_array_equal(predict(kept, "IRF1=ko", layer="raw").X, wanted)
    shuffled = cells[:, np.random.default_rng(0).permutation(12)]
    np.testing.assert_allclose(predict(shuffled, "IRF1=ko").X, wanted, atol=1e-6)


@pytest.mark.filterwarnings("ignore:only|library")
def test_columns_of_one_gene():
    """Those that the file calls one gene are added up; of two names that are one gene to the model, the id counts."""
    cells = make_cells()
    cells.var["ensembl_id"] = [*GENES[:10], "", GENES[2]]
    with pytest.warns(
        UserWarning, match="1 genes of `cells` stand in several columns, whose counts are added up: CD3D"
    ):
        added = predict(cells, "IRF1=x2")
    by_hand = make_cells()[:, :11].copy()
    by_hand.X[:, 2] += cells.X[:, 11]
    np.testing.assert_array_equal(added.X, predict(by_hand, "IRF1=x2").X)
    named = make_cells()
    named.var_names = [*NAMES[:11], GENES[2]]
    with pytest.warns(UserWarning, match="name a gene that another column names already; the first counts: `CD3D`"):
        predict(named, "IRF1=x2")


def test_a_symbol_of_two_genes_needs_an_id():
    symbols = [*SYMBOLS[:11], "STAT1"]
    extractor = GppcFeatureExtractor(GENES, symbols)
    cells = make_cells()
    with pytest.warns(UserWarning, match="1 symbols stand for several genes of the model .* `STAT1`"):
        output = predict_anndata((tiny_model(), extractor), cells, "IRF1=x2")
    assert output.var["measured"].tolist() == [False, *MEASURED[1:]]
    with pytest.raises(ValueError, match=f"`STAT1` stands for several genes of the model: {GENES[0]}, {GENES[11]}"):
        predict_anndata((tiny_model(), extractor), cells, "STAT1=ko")


@pytest.mark.filterwarnings("ignore")
def test_log_values_need_no_counts():
    extractor = GppcFeatureExtractor(GENES, SYMBOLS, normalization="none")
    cells = anndata.AnnData(values_of(make_cells()).astype(np.float32)[:, :10], var=pd.DataFrame(index=SYMBOLS[:10]))
    output = predict_anndata((tiny_model(), extractor), cells, "STAT1=ko")
    np.testing.assert_allclose(output.X, predict(make_cells(), "STAT1=ko").X, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`G1` is not expressed")
def test_technical_covariates_are_taken_out_as_they_were_in_fitting():
    """Depth, detected genes and mitochondrial share: the answer is the model's to the cells that the fit saw."""
    adata, generator = make_adata(), np.random.default_rng(0)
    adata.X = generator.poisson(3.0, adata.shape).astype(np.float32)
    del adata.obs["batch"]
    adata.obs["n_counts_full"] = adata.X.sum(axis=1) + generator.integers(100, 5_000, adata.n_obs)
    adata.obs["n_genes_full"] = generator.integers(20, 400, adata.n_obs)
    adata.obs["percent_mito"] = generator.random(adata.n_obs)
    screen = read_screen(adata)
    model, extractor = fit_screen(screen, ["G0", "G1"], ScreenFitOptions(n_factors=3))
    assert extractor.covariate_names == ["log library size", "log expressed genes", "mitochondrial share"]
    cells, texts = screen.cells_of("control")[:9], ["G0=ko", "G7=x2", "G1=ko+G2=ko"]
    covariates = fit_controls(screen, 3).covariates
    values = covariates.residuals(screen.values[cells], screen.covariates[cells]).astype(np.float32)
    encoded = model.encode(**extractor.from_values(values, np.ones(values.shape, dtype=bool)))
    output = predict_anndata((model, extractor), adata[cells], texts, batch_size=4)
    for text in texts:
        wanted = model.respond(encoded, **extractor.perturbation_features(text, values))
        found = output[output.obs["perturbation"] == text]
        np.testing.assert_allclose(found.X, wanted.expression, atol=1e-4)
        np.testing.assert_allclose(found.layers["delta"], wanted.change, atol=1e-4)
    bare = adata[cells].copy()
    del bare.obs["percent_mito"]
    with pytest.warns(UserWarning, match="of which obs lacks mitochondrial share; taken to be at the mean"):
        predict_anndata((model, extractor), bare, texts)
    bare.obs["percent_mito"] = np.nan
    with pytest.raises(
        ValueError, match="obs column `percent_mito` of `cells` is `nan` for cell `c0`; wanted a number"
    ):
        predict_anndata((model, extractor), bare, texts)


# --- files and the command -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_file_holds_what_the_function_returns(model_folder, tmp_path):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    out, texts = tmp_path / "deep" / "out.h5ad", ["STAT1=ko", "CST3=level:1"]
    arguments = [str(model_folder), str(tmp_path / "cells.h5ad"), "--out", str(out), "--quiet", "--batch-size", "3"]
    assert cli.main(["predict", *arguments, "--perturb", texts[0], "--perturb", texts[1]]) == 0
    written, wanted = anndata.read_h5ad(out), predict_anndata(model_folder, make_cells(), texts)
    np.testing.assert_allclose(written.X, wanted.X, atol=1e-5)
    assert set(written.layers) == set(wanted.layers)
    for name in wanted.layers:
        np.testing.assert_allclose(written.layers[name], wanted.layers[name], atol=1e-5)
    np.testing.assert_allclose(written.varm["mean_delta"], wanted.varm["mean_delta"], atol=1e-5)
    pd.testing.assert_frame_equal(written.obs, wanted.obs)
    pd.testing.assert_frame_equal(written.var, wanted.var)
    assert set(written.uns["gppc"]) == {*wanted.uns["gppc"], "cells"}
    assert written.uns["gppc"]["model"] == str(model_folder)
    assert [path.name for path in out.parent.iterdir()] == ["out.h5ad"]


@pytest.mark.filterwarnings("ignore")
def test_the_summary_names_the_genes_that_respond_most(model_folder, tmp_path, capsys):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    arguments = [str(model_folder), str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "o.h5ad")]
    assert cli.main(["predict", *arguments, "--perturb", "IRF1=x3"]) == 0
    delta = anndata.read_h5ad(tmp_path / "o.h5ad").varm["mean_delta"][:, 0]
    delta[1] = 0  # the perturbed gene itself is not news
    top = np.abs(delta).argmax()
    shown = capsys.readouterr().out
    assert f"IRF1=x3: {SYMBOLS[top]} {delta[top]:+.3f}, " in shown
    assert "7 cells x 12 genes x 1 perturbations" in shown
    assert "irf1 (IRF1?)" in shown


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_prediction_leaves_nothing(model_folder, tmp_path, monkeypatch):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "out.h5ad").write_bytes(b"earlier")

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_gppc.modeling_gppc.GppcForPerturbationPrediction.respond", fail)
    with pytest.raises(KeyboardInterrupt):
        predict_file(
            model_folder, tmp_path / "cells.h5ad", "IRF1=ko", tmp_path / "out.h5ad", overwrite=True, progress=False
        )
    assert (tmp_path / "out.h5ad").read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "out.h5ad"]


def command(folder, tmp_path, **changed):
    given = {"model": folder, "cells": tmp_path / "cells.h5ad", "perturb": "STAT1=ko", "out": tmp_path / "out.h5ad"}
    given.update(changed)
    model, cells = given.pop("model"), given.pop("cells")
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["predict", str(model), str(cells), *flags]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "tinny"}, r"`model` '.*tinny' does not exist.*did you mean `tiny`"),
        ({"model": "empty"}, r"has no `config.json`"),
        ({"cells": "cell.h5ad"}, r"`cells` .* does not exist; did you mean `cells.h5ad`"),
        ({"cells": "note.h5ad"}, r"is not a readable AnnData"),
        ({"perturb": "STAT1"}, r"`perturbation` 'STAT1' is not `GENE=ACTION`"),
        ({"perturb": "STAT1=kd:2"}, r"lies between 0 and 1"),
        ({"perturb": "STAT2=ko"}, r"gene `STAT2` is not among .*did you mean `STAT1`"),
        ({"perturb": "STAT1=ko+STAT1=x2"}, r"names a gene twice"),
        ({"cells": "logs.h5ad"}, r"X` holds non-integer values.*Raw counts are in layer `counts`"),
        ({"cells": "nan.h5ad"}, r"NaN or infinite"),
        ({"cells": "negative.h5ad"}, r"negative values"),
        ({"cells": "mouse.h5ad"}, r"none of the 12 genes .*another species"),
        ({"cells": "other.h5ad"}, r"none of the 12 genes .*`gene_column`"),
        ({"cells": "none.h5ad"}, r"`cells` has no cells"),
        ({"out": "taken.h5ad"}, r"taken.h5ad' exists; .*overwrite"),
        ({"out": "out.csv"}, r"ends in .h5ad"),
        ({"layer": "count", "cells": "logs.h5ad"}, r"`layer` is 'count'.*did you mean `counts`"),
        ({"gene_column": "symbl"}, r"`gene_column` is 'symbl'"),
        ({"library_size_column": "n_counts"}, r"`library_size_column` is 'n_counts'.*did you mean `n_counts_full`"),
        ({"library_size_column": "too_small"}, r"`library_size_column` 'too_small' of `cells` is 1 for cell `cell0`"),
        ({"genes": "LYZZ"}, r"gene `LYZZ` is not among"),
        ({"batch_size": 0}, r"`batch_size` is 0"),
    ],
)
def test_bad_input_ends_in_one_line(model_folder, tmp_path, changed, message, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "note.h5ad").write_text("not HDF5")
    (tmp_path / "taken.h5ad").write_bytes(b"")
    cells = make_cells()
    cells.obs["too_small"] = 1
    cells.write_h5ad(tmp_path / "cells.h5ad")
    counts = cells.X.copy()
    cells.X = counts.multiply(0.5).tocsr()
    cells.layers["counts"] = counts
    cells.write_h5ad(tmp_path / "logs.h5ad")
    for name, value in (("nan", np.nan), ("negative", -1.0)):
        spoilt = make_cells()
        spoilt.X.data[3] = value
        spoilt.write_h5ad(tmp_path / f"{name}.h5ad")
    renamed = make_cells()
    renamed.var_names = [str(name).capitalize() for name in SYMBOLS]
    renamed.write_h5ad(tmp_path / "mouse.h5ad")
    renamed.var_names = [f"probe{column}" for column in range(12)]
    renamed.write_h5ad(tmp_path / "other.h5ad")
    make_cells()[:0].write_h5ad(tmp_path / "none.h5ad")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in ("model", "cells", "out"):
        if name in changed:
            changed = {**changed, name: tmp_path / changed[name]}
    assert cli.main(command(model_folder, tmp_path, **changed)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gppc predict: error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_loading_refuses_what_is_not_a_gppc_model(model_folder, tmp_path):
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is of type 'bert'; wanted a GPPC model"):
        load_model(other)
    (other / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged `config.json`"):
        load_model(other)
    (other / "config.json").write_text('{"model_type": "gppc"}')
    with pytest.raises(ValueError, match="has no weights"):
        load_model(other)
    with pytest.raises(ValueError, match="is a file"):
        load_model(other / "config.json")


def copy_of(model_folder, tmp_path):
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


@pytest.mark.parametrize("absent", ["readout.gene_vectors", "model.linear_response.loadings"])
def test_damaged_weights_are_refused(model_folder, tmp_path, absent):
    folder = copy_of(model_folder, tmp_path)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensors[name] for name in tensors if name != absent}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights .e.g. `{absent}`"):
        load_model(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be loaded: "):
        load_model(folder)


def test_a_feature_extractor_of_another_model_is_refused(model_folder, tmp_path):
    folder = copy_of(model_folder, tmp_path)
    GppcFeatureExtractor(GENES[:5]).save_pretrained(folder)
    with pytest.raises(ValueError, match="has 12 genes but its feature extractor names 5"):
        load_model(folder)


def test_a_model_that_is_nowhere_is_refused_in_one_line():
    with pytest.raises(ValueError, match="`model` 'nobody/nothing' cannot be loaded: ") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_the_installed_classes_are_used(model_folder):
    model, extractor = load_model(model_folder, "cpu")
    assert type(model).__module__ == "modeling_gppc.modeling_gppc"
    assert type(extractor) is GppcFeatureExtractor
    assert not model.training
    assert torch.equal(model.readout.gene_vectors, tiny_model().readout.gene_vectors)


def test_normalisation_is_the_one_of_training():
    cells = make_cells()
    values = normalize_counts(cells.X.toarray()[:, :10], cells.obs["n_counts_full"].to_numpy()[:, None])
    np.testing.assert_allclose(values, values_of(cells)[:, :10], rtol=1e-6)
