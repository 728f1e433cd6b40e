"""PerturbationPredictionPipeline: equal to the model's own predictions, strict about its input."""

import anndata
import numpy as np
import pytest
import scipy.sparse
from tiny_model import GENES, SYMBOLS, response_by_hand, tiny_extractor, tiny_model, tiny_pipeline, write_model_folder
from transformers import pipeline

from modeling_gppc.inference.predict import predict_anndata
from modeling_gppc.pipeline_gppc import FIGURES

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(1.5, size=(4, len(GENES)))


@pytest.fixture(scope="module")
def predict():
    return tiny_pipeline()


def by_hand(counts, perturbation, library_size=None, **options):
    model, extractor = tiny_model(**options), tiny_extractor()
    values = np.log1p(counts[None] / (counts.sum() if library_size is None else library_size[0]) * 1e4)
    change = extractor.perturbation_features(perturbation, values, return_tensors="np")
    genes, changes, real = (part[0] for part in change.values())
    wanted = response_by_hand(model, {int(gene): float(one) for gene, one, ok in zip(genes, changes, real) if ok})
    return values[0] + wanted["change"], wanted["change"], np.sqrt(wanted["variance"]), wanted["direction"]


def assert_equal(result, wanted):
    for name, values in zip(FIGURES, wanted):
        np.testing.assert_allclose(result[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("perturbation", ["STAT1=ko", "STAT1=kd:0.8+IRF1=x3", "CD3D=level:2", {"LYZ": -1.5}, ""])
def test_equals_the_model(predict, perturbation):
    result = predict({"counts": COUNTS[0], "perturbation": perturbation})
    assert_equal(result, by_hand(COUNTS[0], perturbation))
    assert result["gene_ids"] == GENES
    assert result["gene_symbols"] == SYMBOLS
    assert result["expression"].shape == result["std"].shape == (12,)


def test_library_size_matters(predict):
    given = {"counts": COUNTS[0], "perturbation": "STAT1=level:3"}
    result = predict({**given, "library_size": 5000})
    assert_equal(result, by_hand(COUNTS[0], "STAT1=level:3", library_size=np.array([5000.0])))
    assert np.abs(result["expression"] - predict(given)["expression"]).max() > 1e-3


def test_no_perturbation_changes_nothing(predict):
    result = predict({"counts": COUNTS[0], "perturbation": "control"})
    assert np.abs(result["change"]).max() == 0
    assert np.abs(result["expression"]).max() > 0


def test_the_imposed_gene_changes_by_what_was_imposed(predict):
    result = predict({"counts": COUNTS[0], "perturbation": {"STAT1": -0.75}})
    assert result["change"][0] == pytest.approx(-0.75, abs=1e-5)
    assert result["std"][0] == 0


@pytest.mark.filterwarnings("ignore:library sizes|`(STAT1|IRF1)` is not expressed|`LYZ` is perturbed")
def test_equals_gppc_predict(predict):
    specs = ["STAT1=ko", "IRF1=x2+CD3D=level:1", "LYZ=kd:0.5"]
    kept = [0, 1, 2, 3, 5, 7, 8]  # LYZ is not measured
    adata = anndata.AnnData(COUNTS[:, kept].astype(np.float32))
    adata.var_names = [SYMBOLS[gene] for gene in kept]
    wanted = predict_anndata((predict.model, predict.feature_extractor), adata, specs)
    for position, spec in enumerate(specs):
        given = {"counts": COUNTS[:, kept], "gene_ids": adata.var_names, "perturbation": spec}
        rows = slice(position * 4, position * 4 + 4)
        for row, result in enumerate(predict(given)):
            np.testing.assert_allclose(result["expression"], wanted.X[rows][row], atol=1e-6)
            np.testing.assert_allclose(result["change"], wanted.layers["delta"][rows][row], atol=1e-6)
            np.testing.assert_allclose(result["std"], wanted.layers["std"][rows][row], atol=1e-6)
            np.testing.assert_allclose(result["direction"], wanted.layers["direction"][rows][row], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_cells_and_inputs_in_any_grouping(predict, batch_size):
    specs = ["STAT1=ko", "IRF1=x2", "", "LYZ=ko+CST3=x2"]
    together = predict({"counts": COUNTS, "perturbation": specs}, batch_size=batch_size)
    one_by_one = predict(
        [{"counts": row, "perturbation": spec} for row, spec in zip(COUNTS, specs)], batch_size=batch_size
    )
    assert len(together) == len(one_by_one) == 4
    for left, right, row, spec in zip(together, one_by_one, COUNTS, specs):
        assert_equal(left, by_hand(row, spec))
        assert_equal(right, by_hand(row, spec))


def test_one_cell_and_many_perturbations(predict):
    specs = ["STAT1=ko", "IRF1=x2", ""]
    results = predict({"counts": COUNTS[1], "perturbation": specs}, batch_size=2)
    for result, spec in zip(results, specs, strict=True):
        assert_equal(result, by_hand(COUNTS[1], spec))


def test_other_columns_order_and_sparse_counts(predict):
    order = [11, 3, 0, 5]
    counts = scipy.sparse.csr_matrix(np.concatenate([COUNTS[:2, order], [[7], [0]]], axis=1))
    names = [SYMBOLS[11], GENES[3], SYMBOLS[0], f"{GENES[5]}.2", "not_a_gene_of_the_model"]
    results = predict({"counts": counts, "gene_ids": names, "perturbation": "STAT1=ko"})
    full = np.zeros((2, 12), dtype=int)
    full[:, order] = COUNTS[:2, order]
    measured = np.isin(np.arange(12), order)
    again = predict(
        {
            "counts": full,
            "measured": measured,
            "library_size": full.sum(axis=1) + [7, 0],
            "perturbation": "STAT1=ko",
        }
    )
    for left, right in zip(results, again, strict=True):
        assert_equal(left, [right[name] for name in FIGURES])


def test_records_of_the_largest_changes(predict):
    given = {"counts": COUNTS[0], "perturbation": "STAT1=level:4"}
    result = predict(given)
    records = predict(given, top_k=3)
    largest = np.argsort(-np.abs(result["change"]))[:3]
    assert [record["gene_id"] for record in records] == [GENES[gene] for gene in largest]
    assert [record["change"] for record in records] == result["change"][largest].tolist()
    assert set(records[0]) == {"gene_id", "gene_symbol", *FIGURES}


def test_an_empty_list_gives_an_empty_list(predict):
    assert predict([]) == []


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"count": COUNTS[0]}, {}, "`count` is not an input; did you mean `counts`"),
        ({"perturbation": "STAT1=ko"}, {}, "`counts` is missing"),
        ([COUNTS[0]], {}, "wanted a mapping"),
        ({"counts": COUNTS[0], "perturbation": "STAT2=ko"}, {}, "`STAT2` is not among .* did you mean `STAT1`"),
        ({"counts": COUNTS, "perturbation": ["STAT1=ko"] * 3}, {}, "3 entries; wanted one, or 4"),
        ({"counts": COUNTS[0] + 0.5}, {}, "non-integer"),
        ({"counts": COUNTS[0]}, {"top_k": 0}, "`top_k` is 0"),
        ({"counts": COUNTS[0]}, {"batch_size": 0}, "`batch_size` is 0"),
        ({"counts": COUNTS[0]}, {"topk": 2}, "`topk` is not an option; did you mean `top_k`"),
    ],
)
def test_bad_input_is_refused(predict, given, options, message):
    with pytest.raises(ValueError, match=message):
        predict(given, **options)


def test_saved_and_loaded_it_predicts_the_same(tmp_path, predict):
    folder = write_model_folder(tmp_path / "model")
    loaded = pipeline("perturbation-prediction", model=str(folder), trust_remote_code=True, device="cpu")
    assert type(loaded).__module__.startswith("transformers_modules")
    given = {"counts": COUNTS[0], "perturbation": "STAT1=kd:0.5"}
    wanted = predict(given)
    assert_equal(loaded(given), [wanted[name] for name in FIGURES])
