"""GppcFeatureExtractor: one normalisation, three gene states, perturbation texts, gene names, saving."""

import anndata
import numpy as np
import pytest
import scanpy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from tiny_model import GENES, SYMBOLS
from transformers import AutoFeatureExtractor

from modeling_gppc import GppcFeatureExtractor
from modeling_gppc.normalization_gppc import change_of_log_value, check_raw_counts, close_matches, normalize_counts

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(1.5, size=(5, 12))


def extractor(**options):
    return GppcFeatureExtractor(GENES, SYMBOLS, **options)


def dense(features):
    """Values over the vocabulary from tokens."""
    values = np.zeros((len(features["input_ids"]), 12))
    for row, mask in enumerate(np.asarray(features["attention_mask"]).astype(bool)):
        values[row, np.asarray(features["input_ids"])[row, mask]] = np.asarray(features["expression_values"])[
            row, mask
        ]
    return values


# --- Normalisation ---------------------------------------------------------------------------------------------------


def test_log1p_by_hand():
    counts = np.array([[1, 0, 3], [0, 0, 0]])
    wanted = [[np.log(1 + 1e4 / 8), 0, np.log(1 + 3e4 / 8)], [0, 0, 0]]
    output = normalize_counts(counts, np.array([[8.0], [0.0]]))
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, wanted, rtol=1e-6)
    np.testing.assert_allclose(normalize_counts(counts[0], 8, target_sum=8), np.log([2, 1, 4]), rtol=1e-6)


def test_log1p_equals_scanpy():
    cells = anndata.AnnData(COUNTS.astype(np.float32))
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    np.testing.assert_allclose(normalize_counts(COUNTS, COUNTS.sum(axis=1, keepdims=True)), cells.X, rtol=1e-5)
    np.testing.assert_allclose(dense(extractor()(COUNTS)), cells.X, rtol=1e-5)


def test_log_tpm_by_hand():
    counts, lengths = np.array([[2, 3, 0]]), np.array([1000.0, 3000.0, 500.0])
    rates = np.array([2.0, 1.0, 0.0])
    output = normalize_counts(counts, rates.sum(), normalization="log_tpm", target_sum=1e6, gene_lengths=lengths)
    np.testing.assert_allclose(output, np.log1p(rates / 3 * 1e6)[None], rtol=1e-6)
    tpm = GppcFeatureExtractor(GENES[:3], normalization="log_tpm", target_sum=1e6, gene_lengths=lengths.tolist())
    features = tpm(counts)
    np.testing.assert_allclose(features["expression_values"][0], output[0, :2], rtol=1e-6)


def test_none_changes_nothing():
    values = RNG.normal(size=(2, 3))
    np.testing.assert_array_equal(normalize_counts(values, 5.0, normalization="none"), values.astype(np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "log2"}, "`normalization` is 'log2'; wanted one of log1p, log_tpm, none"),
        ({"normalization": "log_tpm"}, "`gene_lengths` is missing"),
    ],
)
def test_unknown_normalisations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        normalize_counts(COUNTS, 1.0, **options)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(0, 5000))
def test_normalisation_is_undone_by_its_inverse(counts, rest):
    library = sum(counts) + rest + 1
    values = normalize_counts(np.array(counts), library)
    again = np.expm1(values.astype(np.float64)) * library / 1e4
    # A log value v is rounded by half an epsilon of v, which scales 1 + c / library * 1e4 by as much.
    rounding = values * np.finfo(np.float32).eps / 2 * (np.array(counts) + library / 1e4)
    assert (np.abs(again - counts) <= 1.01 * rounding).all()


@pytest.mark.parametrize("values", [np.array([[0, 3], [2, 1]]), np.array([1.0, 2.0]), np.array([True]), np.array([])])
def test_raw_counts_pass(values):
    check_raw_counts(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, np.nan], "`counts` holds NaN or infinite"),
        ([1.0, np.inf], "`counts` holds NaN or infinite"),
        ([1.0, -2.0], r"negative values \(smallest -2\)"),
        ([0.0, 1.5, 2.0], r"non-integer values \(e.g. 1.5, largest 2\)"),
    ],
)
def test_what_is_not_raw_counts_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check_raw_counts(np.array(values))
    if not np.isnan(values).any():
        cell = np.zeros((1, 12))
        cell[0, : len(values)] = values
        with pytest.raises(ValueError, match=message):
            extractor()(cell)


# --- Cells -----------------------------------------------------------------------------------------------------------


def test_three_states_of_a_gene():
    counts = np.array([[4, 0, 2, 0], [0, 0, 0, 0]])
    features = extractor()(counts, [GENES[3], "STAT1", "IRF1", "unknown"], library_size=np.array([10.0, 0.0]))
    assert features["input_ids"].tolist() == [[1, 3], [0, 0]]  # ascending, expressed genes only
    assert features["attention_mask"].tolist() == [[1, 1], [0, 0]]
    np.testing.assert_allclose(features["expression_values"], [[np.log(2001), np.log(4001)], [0, 0]], rtol=1e-6)
    assert features["measured_mask"].tolist() == [[gene in (0, 1, 3) for gene in range(12)]] * 2


def test_entries_that_were_not_measured_count_for_nothing():
    measured = RNG.random((5, 12)) < 0.6
    spoilt = np.where(measured, COUNTS, 999)
    features = extractor()(spoilt, measured=measured)
    wanted = extractor()(np.where(measured, COUNTS, 0), measured=measured)
    for name in features:
        assert (features[name] == wanted[name]).all(), name
    assert features["measured_mask"].tolist() == measured.tolist()
    library = np.where(measured, COUNTS, 0).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(dense(features), np.log1p(np.where(measured, COUNTS, 0) / library * 1e4), rtol=1e-5)


def test_unknown_columns_count_towards_the_library():
    features = extractor()(np.array([[3, 5]]), ["STAT1", "unknown"])
    np.testing.assert_allclose(features["expression_values"], [[np.log1p(3 / 8 * 1e4)]], rtol=1e-6)


def test_sparse_and_numpy_outputs():
    left, right = extractor()(sparse.csr_matrix(COUNTS), return_tensors="np"), extractor()(COUNTS)
    assert isinstance(left["input_ids"], np.ndarray)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name].numpy())


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"counts": np.ones(12)}, "has 1 dimensions; wanted 2"),
        ({"gene_ids": GENES[:3]}, "`gene_ids` has 3 names; wanted 12"),
        ({"gene_ids": [f"probe{column}" for column in range(12)]}, "none of the 12 genes .e.g. `probe0`."),
        ({"gene_ids": [*GENES[:11], "STAT1"]}, f"names `{GENES[0]}` more than once"),
        ({"library_size": np.ones(4)}, r"`library_size` has shape \(4,\); wanted \(5,\)"),
        ({"library_size": COUNTS.sum(axis=1) - 1.0}, "`library_size` of cell 0 is .* less than the"),
    ],
)
def test_bad_cells_are_refused(given_, message):
    with pytest.raises(ValueError, match=message):
        extractor()(**{"counts": COUNTS, **given_})


def test_nan_is_refused_without_normalisation():
    with pytest.raises(ValueError, match="NaN or infinite"):
        extractor(normalization="none")(np.full((1, 12), np.nan))


# --- Gene names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (GENES[4], 4),
        (f"{GENES[4]}.17", 4),
        ("LYZ", 4),
        ("lyz", -1),
        ("LYZ.1", -1),
        ("", -1),
        ("ENSG99999999999", -1),
    ],
)
def test_genes_by_id_version_and_symbol(name, wanted):
    assert extractor().find_genes([name]).tolist() == [wanted]


def test_an_id_that_ends_in_a_number_is_not_cut():
    found = GppcFeatureExtractor(["RP11-206L10.2", "ENSG00000000001.5"]).find_genes(
        ["RP11-206L10.2", "RP11-206L10", "ENSG00000000001.5"]
    )
    assert found.tolist() == [0, -1, 1]
    assert GppcFeatureExtractor(["LYZ", "RP11-206L10"]).find_genes(["LYZ.1", "RP11-206L10.2"]).tolist() == [-1, -1]


def test_ambiguous_symbols_need_an_id():
    two = GppcFeatureExtractor(["ENSG1", "ENSG2"], ["SHOX", "SHOX"])
    assert two.find_genes(["ENSG2", "ENSG1"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="`SHOX` stands for several genes of the model: ENSG1, ENSG2; give the id"):
        two.find_genes(["SHOX"])


def test_unknown_genes_are_named_with_close_matches():
    with pytest.raises(ValueError, match=r"gene `STAT2` .* 12 genes of the model \(and 1 more .*did you mean `STAT1`"):
        extractor().gene_index(["LYZ", "STAT2", "nothing"])


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("same_typ", ["same_type", "other"], "; did you mean `same_type`?"),
        ("STAT-1", ["stat1", "IRF1"], "; did you mean `stat1`?"),
        ("q", ["alpha", "beta"], "; there are 2: `alpha`, `beta`"),
        ("q", [], ""),
    ],
)
def test_close_matches(name, options, wanted):
    assert close_matches(name, options) == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gene_ids": ["A", "A"]}, "`gene_ids` holds duplicates"),
        ({"gene_ids": ["A"], "gene_symbols": []}, "`gene_symbols` has 0 entries; wanted 1"),
        ({"gene_ids": ["A"], "normalization": "cpm"}, "`normalization` is 'cpm'"),
    ],
)
def test_bad_vocabularies_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GppcFeatureExtractor(**arguments)


# --- Perturbations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("control", []),
        ("  ", []),
        ("STAT1=ko", [(0, "factor", 0.0)]),
        ("STAT1=KO", [(0, "factor", 0.0)]),
        (" STAT1 = ko ", [(0, "factor", 0.0)]),
        (f"{GENES[0]}=ko", [(0, "factor", 0.0)]),
        (f"{GENES[0]}.4=ko", [(0, "factor", 0.0)]),
        ("STAT1=kd:0.75", [(0, "factor", 0.25)]),
        ("STAT1=kd:1", [(0, "factor", 0.0)]),
        ("STAT1=x3", [(0, "factor", 3.0)]),
        ("STAT1=X0.5", [(0, "factor", 0.5)]),
        ("STAT1=2x", [(0, "factor", 2.0)]),
        ("STAT1=level:2.5", [(0, "level", 2.5)]),
        ("STAT1=delta:-1.3", [(0, "delta", -1.3)]),
        ("STAT1=-1.3", [(0, "delta", -1.3)]),
        ("STAT1=+1.3", [(0, "delta", 1.3)]),
        ("STAT1=1e-1", [(0, "delta", 0.1)]),
        ("STAT1=ko+IRF1=x3", [(0, "factor", 0.0), (1, "factor", 3.0)]),
        ("IRF1=+1.5+STAT1=kd:0.5", [(1, "delta", 1.5), (0, "factor", 0.5)]),
        ({"STAT1": -1.3, "LYZ": "ko"}, [(0, "delta", -1.3), (4, "factor", 0.0)]),
        ({}, []),
    ],
)
def test_perturbation_texts(text, wanted):
    assert extractor().parse_perturbation(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("STAT1", "`perturbation` 'STAT1' is not `GENE=ACTION`"),
        ("=ko", "is not `GENE=ACTION`"),
        ("STAT1=", "is not `GENE=ACTION`"),
        ("STAT1=ko+IRF1", r"wanted ko, kd:SHARE|is not `GENE=ACTION`"),
        ("STAT1=off", "`perturbation` of `STAT1` is 'off'; wanted ko"),
        ("STAT1=kd", "wanted ko"),
        ("STAT1=kd:", "wanted ko"),
        ("STAT1=kd:1.2", "lies between 0 and 1"),
        ("STAT1=kd:-0.1", "lies between 0 and 1"),
        ("STAT1=x-2", "wanted ko|not negative"),
        ("STAT1=level:nan", "wanted ko"),
        ("STAT1=inf", "wanted ko"),
        ("STAT1=set:2", "wanted ko"),
        ("STAT2=ko", "did you mean `STAT1`"),
        ("STAT1=ko+STAT1=x2", "names a gene twice"),
        (f"STAT1=ko+{GENES[0]}=x2", "names a gene twice"),
    ],
)
def test_malformed_perturbations_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        extractor().parse_perturbation(text)


@pytest.mark.parametrize(
    ("value", "action", "amount", "wanted"),
    [
        (2.0, "factor", 0.0, -2.0),
        (2.0, "factor", 1.0, 0.0),
        (np.log(5.0), "factor", 0.5, np.log(3.0) - np.log(5.0)),
        (np.log(5.0), "factor", 2.0, np.log(9.0) - np.log(5.0)),
        (0.0, "factor", 4.0, 0.0),
        (2.0, "level", 0.5, -1.5),
        (2.0, "delta", -0.3, -0.3),
        (-0.5, "factor", 0.0, 0.5),
        (-0.5, "factor", 3.0, 0.0),
    ],
)
def test_what_an_action_means(value, action, amount, wanted):
    assert change_of_log_value(value, action, amount) == pytest.approx(wanted, abs=1e-12)
    np.testing.assert_allclose(change_of_log_value(np.full((2, 1), value), action, amount), wanted, atol=1e-12)


def test_perturbation_features():
    values = np.array([[1.0, 2.0] + [0.0] * 10, [0.5, 0.0] + [0.0] * 10])
    features = extractor().perturbation_features(["IRF1=ko+STAT1=level:3", "control"], values)
    assert features["perturbation_ids"].tolist() == [[1, 0], [0, 0]]
    assert features["perturbation_values"].tolist() == [[-2.0, 2.0], [0.0, 0.0]]
    assert features["perturbation_mask"].tolist() == [[1, 1], [0, 0]]
    one = extractor().perturbation_features("STAT1=ko", values, return_tensors="np")
    assert one["perturbation_values"].tolist() == [[-1.0], [-0.5]]
    assert extractor().perturbation_features("control", values)["perturbation_ids"].shape[0] == 2


# --- Saving ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    options = {"normalization": "log_tpm", "target_sum": 1e6, "organism": "mus_musculus"}
    saved = extractor(**options, gene_lengths=[1000.0 + gene for gene in range(12)])
    wanted = saved(COUNTS)  # builds the look-up tables, which are not saved
    saved.save_pretrained(tmp_path)
    for loaded in (GppcFeatureExtractor.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)):
        assert type(loaded) is GppcFeatureExtractor
        assert loaded.to_dict() == saved.to_dict()
        assert "_genes_of" not in loaded.to_dict()
        features = loaded(COUNTS)
        for name in wanted:
            assert (features[name] == wanted[name]).all(), name
