"""Predictions of other tools: folds that are written, files that are scored, files that are refused."""

import json
import re
from pathlib import Path

import anndata
import numpy as np
import pytest
from tiny_screens import make_adata

from gppc.cli import main
from modeling_gppc.evaluation.peer_predictions import read_predictions

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
TERMS = "gene\tterm\n" + "".join(f"G{i}\t{t}\n" for i in range(6) for t in ("all", "even" if i % 2 else "odd", i // 3))


def run_example(folder) -> str:
    """Runs the code block of the docs in a folder with its files, and returns it."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text().partition("## Another tool")[2], re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(block, {})
    return block


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """The example of the docs, run on a screen with batches of other levels: folder and command."""
    folder = tmp_path_factory.mktemp("outside")
    adata = make_adata(n=40, controls=120)
    adata.obs["batch"] = np.where(np.random.default_rng(0).random(adata.n_obs) < 0.3, "b1", "b2")
    adata.X = adata.X + 0.4 * (adata.obs["batch"] == "b1").to_numpy()[:, None]
    adata.write_h5ad(folder / "screen.h5ad")
    (folder / "terms.tsv").write_text(TERMS)
    base = ["evaluate", "--screen", str(folder / "screen.h5ad"), "--value-kind", "log", "--mode", "fine-tuned"]
    base += ["--quiet", "--gene_features", str(folder / "terms.tsv")]
    base += ["--folds", "3", "--divisions", "2", "--nothing", "false"]
    assert main([*base, "--out", str(folder / "first"), "--write_folds", str(folder / "folds.json")]) == 0
    run_example(folder)
    return folder, base


@pytest.fixture(scope="module")
def scored(outside):
    folder, base = outside
    words = ["--out", str(folder / "second"), "--predictions", f"outside={folder / 'ridge.h5ad'}"]
    assert main([*base, *words]) == 0
    return [json.loads((folder / name / "evaluation.json").read_text()) for name in ("first", "second")]


def test_the_example_is_the_built_in_ridge(outside, scored):
    first, second = scored
    block = run_example(outside[0])
    assert len([line for line in block.splitlines() if line and not line.startswith("import")]) <= 20
    ridge, own = second["methods"]["ridge"], second["methods"]["outside"]
    assert ridge["pearson_delta"] == pytest.approx(first["methods"]["ridge"]["pearson_delta"], abs=1e-12)
    compared = {name: value for name, value in own.items() if isinstance(value, float)}
    assert len(compared) > 15 and own["reads_perturbed_cells"]
    for name, value in compared.items():
        assert value == pytest.approx(ridge[name], abs=1e-6), name
    assert own["pearson_delta_ci95"] == pytest.approx(ridge["pearson_delta_ci95"], abs=1e-6)
    comparisons = second["comparisons"]
    assert comparisons["outside"]["difference"] == pytest.approx(comparisons["ridge"]["difference"], abs=1e-6)
    assert second["options"]["predictions"] == {"outside": "ridge.h5ad"}
    assert any("outside: what shuffled labels score is not known" in note for note in second["notes"])


def test_shuffled_labels_are_those_of_the_folds_file(outside, tmp_path):
    folder, base = outside
    for name in ("screen.h5ad", "terms.tsv"):
        (tmp_path / name).symlink_to(folder / name)
    base = [*base, "--shuffle_labels", "true", "--divisions", "1"]
    assert main([*base, "--out", str(tmp_path / "first"), "--write_folds", str(tmp_path / "folds.json")]) == 0
    run_example(tmp_path)
    words = ["--out", str(tmp_path / "second"), "--predictions", f"outside={tmp_path / 'ridge.h5ad'}"]
    assert main([*base, *words]) == 0
    summary = json.loads((tmp_path / "second" / "evaluation.json").read_text())
    own, ridge = (summary["methods"][name]["pearson_delta"] for name in ("outside", "ridge"))
    assert own == pytest.approx(ridge, abs=1e-6) and abs(own) < 0.3
    assert any("Labels are shuffled: outside" in note for note in summary["notes"])


def test_folds_file_names_what_may_be_read(outside):
    folds = json.loads((outside[0] / "folds.json").read_text())
    adata = anndata.read_h5ad(outside[0] / "screen.h5ad")
    assert [division["division"] for division in folds["divisions"]] == [0, 1, 2, 3]
    first, second = (set(division["controls"]) for division in folds["divisions"][:2])
    assert not first & second and first | second == set(adata.obs_names[adata.obs["perturbation"] == "control"])
    assert folds["divisions"][0]["scored_genes"] == [f"G{i}" for i in range(6, 30)]
    assert sorted(label for fold in folds["folds"] for label in fold["test"]) == [f"G{i}" for i in range(6)]
    for label, cells in folds["cells"].items():
        assert cells == adata.obs_names[adata.obs["perturbation"] == label].tolist()


def changed(change):
    """A broken copy of the example's file."""

    def write(folder):
        adata = anndata.read_h5ad(folder / "ridge.h5ad")
        adata = change(adata)
        adata.write_h5ad(folder / "broken.h5ad")

    return write


def edit(attribute, place, value):
    def change(adata):
        getattr(adata, attribute)[place] = value
        return adata

    return change


def at(column, value):
    def change(adata):
        adata.obs[column] = adata.obs[column].astype(str)
        adata.obs.iloc[0, adata.obs.columns.get_loc(column)] = value
        return adata

    return change


def with_variance(adata):
    adata.layers["variance"] = -np.ones(adata.shape)
    return adata


def twice(adata):
    adata.var_names = ["G1", *adata.var_names[1:]]
    return adata


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x", lambda a: a[1:].copy(), r"lacks 1 of 24 rows, e\.g\. target 'G\d' of division 0"),
        (
            "x",
            lambda a: a[(a.obs["division"] < 2).to_numpy()].copy(),
            r"lacks 12 of 24 rows, .*; of divisions \[2, 3\] all",
        ),
        ("x", lambda a: a[:, :-2].copy(), "lacks 2 of 24 scored genes of division 0, e.g. G28, G29"),
        ("x", at("division", "7"), r"row 0: target 'G\d' of division 7 is not in the folds"),
        ("x", at("target", "G9"), "row 0: target 'G9' of division 0 is not in the folds"),
        ("x", lambda a: anndata.concat([a, a[:1]], uns_merge="same"), "division 0 is there twice"),
        ("x", edit("X", (3, 10), np.nan), "1 values of X at scored genes of division 0 are not finite"),
        ("x", with_variance, "144 values of variance at scored genes of division 0 are not finite or negative"),
        ("x", edit("uns", "folds", "abc"), "was made for other folds"),
        ("x", twice, "var_names hold 'G1' twice"),
        ("x", lambda a: anndata.AnnData(a.X, a.obs[["target"]], a.var), r"has no column obs\['division'\]"),
        ("x", lambda a: anndata.AnnData(obs=a.obs, var=a.var), "has no X"),
        ("ridge", lambda a: a, "'ridge' is the name of a built-in method"),
        ("gppc", lambda a: a, "'gppc' is the name of a built-in method"),
        ("my tool", lambda a: a, "holds other characters"),
    ],
)
def test_bad_files_are_refused(outside, name, change, words):
    folder, _ = outside
    changed(change)(folder)
    folds = json.loads((folder / "folds.json").read_text())
    with pytest.raises(ValueError, match=words):
        read_predictions({name: folder / "broken.h5ad"}, folds)


def test_unknown_genes_are_counted_and_symbols_found(outside):
    folder, _ = outside
    adata = anndata.read_h5ad(folder / "ridge.h5ad")
    adata.var_names = [name.replace("G29", "ENSG29").replace("G0", "nowhere") for name in adata.var_names]
    del adata.uns["folds"]
    adata.layers["variance"] = np.full(adata.shape, 0.5)
    adata.write_h5ad(folder / "symbols.h5ad")
    folds = json.loads((folder / "folds.json").read_text())
    for division in folds["divisions"]:
        division["symbols"][29] = "ENSG29"
    found, notes = read_predictions({"x": folder / "symbols.h5ad"}, folds)
    assert "x: 1 of 30 genes are unknown or not read." in notes and any("does not say which folds" in n for n in notes)
    row = np.flatnonzero((adata.obs["target"] == "G3") & (adata.obs["division"] == 2))[0]
    assert found[2]["x"].delta[3, 1:] == pytest.approx(adata.X[row, 1:]) and not found[2]["x"].delta[:, 0].any()
    assert (found[2]["x"].variance[:, 1:] == 0.5).all()


def test_options_are_checked(outside, tmp_path, capsys):
    folder, base = outside
    (tmp_path / "not.h5ad").write_text("no AnnData")
    for words, message in (
        (["--mode", "in-context", "--predictions", f"x={folder / 'ridge.h5ad'}"], "only 'fine-tuned' trains on some"),
        (["--hold_out", "batch", "--write_folds", "f.json"], "give `write_folds` and `predictions` without it"),
        (["--predictions", f"x={tmp_path / 'none.h5ad'}"], "is not a file"),
        (["--predictions", f"x={tmp_path / 'not.h5ad'}"], "cannot be read as AnnData"),
        (["--shuffle_labels", "true", "--predictions", f"x={folder / 'ridge.h5ad'}"], "made for other folds"),
    ):
        assert main([*base, "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1, error
