"""Screens of every convention in, and what is refused or set aside."""

import dataclasses

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from data_scripts.cells.column_names import find_column
from data_scripts.cells.screen_cells import keep_genes
from data_scripts.cells.screen_labels import is_control_word, read_modality, split_label
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import one_sided_mean, read_screen
from data_scripts.command_line import read_options
from modeling_gppc.fitting.observed_responses import ObservedResponses

GENES = ["STAT1", "IRF1", "MYC", "HLA-A", "ACTB"]


def make_screen(labels=None, column="perturbation", n=20, **obs):
    labels = ["control", "STAT1", "IRF1"] if labels is None else labels
    generator = np.random.default_rng(0)
    counts = generator.poisson(3.0, size=(n * len(labels), len(GENES))).astype(np.float32)
    frame = pd.DataFrame({column: np.repeat(labels, n)}, index=[f"cell{i}" for i in range(len(counts))])
    for name, values in obs.items():
        frame[name] = values
    return anndata.AnnData(
        scipy.sparse.csr_matrix(counts),
        obs=frame,
        var=pd.DataFrame({"symbol": GENES}, index=[f"ENSG{i}" for i in range(len(GENES))]),
    )


@pytest.mark.parametrize(
    ("column", "labels", "expected"),
    [
        ("perturbation", ["control", "STAT1"], {"STAT1"}),  # scPerturb
        ("target_gene", ["non-targeting", "STAT1"], {"STAT1"}),  # cell-eval
        ("condition", ["ctrl", "STAT1+ctrl", "ctrl+IRF1", "STAT1+IRF1"], {"STAT1", "IRF1", "IRF1+STAT1"}),  # GEARS
        ("gene", ["NT", "STAT1;IRF1"], {"IRF1+STAT1"}),
        ("Perturbation", ["Non_Targeting", "stat1", "STAT1 ", "Stat1"], {"STAT1"}),
        ("guide_target", ["NTC_1", "ntc2", "ENSG1", "STAT1_IRF1"], {"IRF1", "IRF1+STAT1"}),
        ("gene_target", ["negative control", "HLA-A", "MARCH8"], {"HLA-A", "MARCH8"}),
    ],
)
def test_conventions(column, labels, expected):
    screen = read_screen(make_screen(labels, column))
    assert set(screen.perturbations) == expected
    assert screen.is_control.sum() % 20 == 0 and screen.is_control.any()
    assert all(p.n_cells % 20 == 0 and p.n_cells for p in screen.perturbations.values())


def test_words_and_parts():
    assert [is_control_word(word) for word in ("NT", "Non-Targeting", "ctrl_3", "NTC", "NTN1", "CTRL1B", "safe")] == [
        True,
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    assert split_label("A+ctrl") == ["A"] and split_label("A , B|C") == ["A", "B", "C"]
    modalities = ["CRISPRko", "CRISPRi", "dCas9-KRAB", "CRISPRa", "ORF", "cas9", "cytokine"]
    assert [read_modality(text) for text in modalities] == [
        "knock-out",
        "CRISPRi",
        "CRISPRi",
        "CRISPRa",
        "overexpression",
        "knock-out",
        "unknown",
    ]
    assert find_column(["x", "Batch"], "batch") == "Batch" and find_column(["x"], "batch") is None


def test_values_are_normalised_over_all_genes():
    adata = make_screen()
    adata.obs["n_counts_full"] = 1_000.0
    screen = read_screen(adata)
    assert np.allclose(screen.values, np.log1p(adata.X.toarray() * 10), atol=1e-5)
    assert screen.covariate_names == ["log library size"] and screen.library_is_complete
    partial = read_screen(make_screen())
    # A sum over a targeted panel is itself a response: no covariate.
    assert partial.covariate_names == [] and not partial.library_is_complete
    logged = make_screen()
    logged.X = scipy.sparse.csr_matrix(np.log1p(logged.X.toarray()))
    assert np.array_equal(read_screen(logged, ScreenOptions(value_kind="log")).values, logged.X.toarray())


def test_target_changes_measured_and_stated_stay_apart():
    adata = make_screen()
    screen = read_screen(adata)
    ((column, change, form),) = screen.target_changes("STAT1")
    cells, controls = screen.cells_of("STAT1"), screen.cells_of("control")
    assert column == 0 and form == "measured"
    assert change == pytest.approx(screen.values[cells][:, 0].mean() - screen.values[controls][:, 0].mean(), abs=1e-6)
    stated = read_screen(adata, ScreenOptions(guide_efficiency={"STAT1": 0.8}))
    ((_, change, form),) = stated.target_changes("STAT1")
    level = screen.values[controls][:, 0].mean()
    assert form == "stated" and change == pytest.approx(np.log1p(0.2 * np.expm1(level)) - level, abs=1e-5)
    unmeasured = read_screen(make_screen(["control", "STAT1+GHOST"]))
    assert not unmeasured.perturbations["GHOST+STAT1"].measured
    assert [entry[0] for entry in unmeasured.target_changes("GHOST+STAT1")] == [0]
    assert unmeasured.panel_targets.tolist() == [0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda a: a.obs.rename(columns={"perturbation": "what"}, inplace=True), "`perturbation_column` is not given"),
        (lambda a: a.obs.replace({"perturbation": {"control": "MYC"}}, inplace=True), "no control cells"),
        (lambda a: setattr(a, "obs_names", ["same"] * a.n_obs), "duplicate barcodes"),
        (lambda a: setattr(a, "X", a.X * 0.5), "non-integer|mixes raw and log"),
        (lambda a: setattr(a, "X", -a.X), "negative"),
        (lambda a: a.obs.__setitem__("p_mito", "low"), "obs column `p_mito` of `screen` is `low` for cell `cell0`"),
        (lambda a: a.obs.__setitem__("perturbation", "control"), "no perturbation left"),
    ],
)
def test_bad_input_is_one_clear_line(spoil, words):
    adata = make_screen()
    spoil(adata)
    with pytest.raises(ValueError, match=words) as error:
        read_screen(adata)
    assert "\n" not in str(error.value)


def test_mixed_log_and_raw_cells_are_refused():
    adata = make_screen()
    dense = adata.X.toarray()
    dense[:20] = np.log1p(dense[:20])
    adata.X = scipy.sparse.csr_matrix(dense)
    with pytest.raises(ValueError, match="mixes raw and log values: 20 cells"):
        read_screen(adata)
    with pytest.raises(ValueError, match="log values are finite and stay below about 20"):
        counts = make_screen()
        counts.X = counts.X * 100
        read_screen(counts, ScreenOptions(value_kind="log"))


def test_what_is_set_aside_is_counted():
    labels = ["control", "STAT1", "stat1", "enh:chr1.5", "IRF1"]
    adata = make_screen(labels, perturbation_type="CRISPRi")
    adata.obs.iloc[-19:, 0] = "control"  # one cell of IRF1 is left
    screen = read_screen(adata)
    said = {reason: (count, example) for reason, count, example in screen.exclusions}
    assert said["not a gene (map it with `label_genes` if it stands for one)"] == (20, "enh:chr1.5")
    assert said["fewer than 10 cells of a perturbation"] == (1, "IRF1")
    assert said["labels spelt differently were merged, nothing was lost"][1] == "STAT1 = stat1"
    assert list(screen.perturbations) == ["STAT1"] and screen.perturbations["STAT1"].modality == "CRISPRi"
    assert "set aside: 20 cells" in screen.summary()
    mapped = read_screen(adata, ScreenOptions(label_genes={"enh:chr1.5": "MYC"}))
    assert set(mapped.perturbations) == {"STAT1", "MYC"}
    cytokines = make_screen(["control", "IFNB1"], perturbation_type="cytokine")
    with pytest.raises(ValueError, match="no perturbation left: not a gene"):
        read_screen(cytokines)
    assert read_screen(cytokines, ScreenOptions(label_genes={"IFNB1": "IFNB1"})).perturbations


def test_bad_options_are_named():
    for flags, words in (
        (["--guide-efficiency", "STAT1=2"], "`guide_efficiency` is .*2.0.*; wanted a number >= 0 and <= 1"),
        (["--guide-efficiency", "STAT1"], "`guide_efficiency` is 'STAT1'; wanted NAME=VALUE"),
        (["--value-kind", "raw"], "wanted one of 'counts', 'estimated_counts', 'log'"),
        (["--min-cells", "1"], "`min_cells` is 1; wanted a number >= 2"),
    ):
        with pytest.raises(ValueError, match=words):
            read_options(flags, ScreenOptions)
    with pytest.raises(ValueError, match="is not a column of obs"):
        read_screen(make_screen(), ScreenOptions(perturbation_column="pertubation"))
    with pytest.raises(ValueError, match="does not exist"):
        read_screen("nowhere.h5ad")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("file", "controls", "measured"),
    [
        ("papalexi2021_thp1_ko_303genes", 2205, 9),
        ("schraivogel2020_k562_tapseq_crispri_72genes", 7793, 10),
        ("norman2019_k562_crispra_500hvg", 100, 1),
    ],
)
def test_real_screens(real_data, file, controls, measured):
    screen = read_screen(real_data / "perturbation" / f"{file}.h5ad")
    assert screen.is_control.sum() == controls
    assert sum(p.measured for p in screen.perturbations.values()) == measured


SURE, UNSURE = "surer control labels are there", "guide not known"


@pytest.mark.parametrize(
    ("labels", "controls", "expected", "set_aside"),
    [
        # Words that may mean "no guide was found" are controls only where no surer word is there.
        (["None", "STAT1"], {"None"}, {"STAT1"}, {}),
        (["None", "negative", "neg", "NT", "STAT1"], {"NT"}, {"STAT1"}, {SURE: 60}),
        (["untreated", "STAT1", "IRF1"], {"untreated"}, {"STAT1", "IRF1"}, {}),
        (["wt", "mock", "non-targeting-control", "STAT1"], {"non-targeting-control"}, {"STAT1"}, {SURE: 40}),
        (["NT", "STAT1+", "+", "None+STAT1"], {"NT"}, {"STAT1"}, {"no label": 20}),
        # Spellings of controls.
        (["NT-1", "NT-2", "sgNT", "AAVS1", "STAT1"], {"NT-1", "NT-2", "sgNT", "AAVS1"}, {"STAT1"}, {}),
        (["safe-harbor", "scramble_2", "LacZ", "STAT1"], {"safe-harbor", "scramble_2", "LacZ"}, {"STAT1"}, {}),
        # A guide that is not known is neither.
        (["ctrl", "nan", "STAT1"], {"ctrl"}, {"STAT1"}, {UNSURE: 20}),
        (["ctrl", "NA", "unassigned", "unknown", "STAT1"], {"ctrl"}, {"STAT1"}, {UNSURE: 60}),
        (["ctrl", "multiple", "doublet", "Doublets", "STAT1"], {"ctrl"}, {"STAT1"}, {UNSURE: 60}),
        (["ctrl", "STAT1+nan", "IRF1"], {"ctrl"}, {"IRF1"}, {UNSURE: 20}),
        # Versions of Ensembl ids, renamed symbols and dates.
        (["ctrl", "ENSG00000115415.19", "IRF1"], {"ctrl"}, {"STAT1", "IRF1"}, {}),
        (["ctrl", "MARCH8", "IRF1"], {"ctrl"}, {"MARCHF8", "IRF1"}, {}),
        (["ctrl", "8-Mar", "IRF1"], {"ctrl"}, {"MARCHF8", "IRF1"}, {}),
        # A symbol that two genes share: both are targets; their ids tell them apart.
        (["ctrl", "TWIN", "IRF1"], {"ctrl"}, {"TWIN", "IRF1"}, {}),
        (["ctrl", "ENSG4", "ENSG5", "IRF1"], {"ctrl"}, {"ENSG4", "ENSG5", "IRF1"}, {}),
    ],
)
def test_labels_as_they_come(labels, controls, expected, set_aside):
    symbols = ["STAT1", "IRF1", "MYC", "MARCHF8", "TWIN", "TWIN", *(f"G{i}" for i in range(8))]
    ids = ["ENSG00000115415", *(f"ENSG{i}" for i in range(1, len(symbols)))]
    counts = np.random.default_rng(0).poisson(3.0, size=(20 * len(labels), len(symbols))).astype(np.float32)
    frame = pd.DataFrame({"perturbation": np.repeat(labels, 20)}, index=[f"c{i}" for i in range(len(counts))])
    adata = anndata.AnnData(counts, obs=frame, var=pd.DataFrame({"symbol": symbols}, index=ids))
    screen = read_screen(adata)
    assert set(screen.perturbations) == expected
    assert screen.is_control.sum() == 20 * len(controls)
    for label in controls:
        assert f"{label!r} (20)" in screen.summary()
    counted = {reason: count for reason, count, _ in screen.exclusions if count}
    assert len(counted) == len(set_aside)
    for words, count in set_aside.items():
        assert [found for reason, found in counted.items() if words in reason] == [count]
    if "TWIN" in expected:
        assert screen.panel_targets.tolist() == [1, 4, 5] and screen.perturbations["TWIN"].columns.tolist() == [4, 5]
    if "ENSG4" in expected:
        assert screen.perturbations["ENSG5"].gene_index.tolist() == [5]


def test_labels_that_look_like_controls_are_listed():
    screen = read_screen(make_screen(["ctrl", "STAT1", "NonTarget-B"]))
    assert "name them with `control_labels` if they are none: NonTarget-B" in screen.summary()


def test_a_batch_without_controls_is_named_and_left_out():
    adata = make_screen(["ctrl", "STAT1", "STAT1", "IRF1"], batch=np.repeat(["a", "a", "b", "a"], 20))
    screen = read_screen(adata)
    assert ("in a batch without two control cells", 20, "b / line") in screen.exclusions
    assert screen.perturbations["STAT1"].n_cells == 20 and set(screen.batch) == {"a"}
    adata.obs["batch"] = np.repeat(["a", "b", "b", "b"], 20)
    with pytest.raises(ValueError, match="`batch_column`: no batch holds perturbed cells and two control cells"):
        read_screen(adata)


def test_responses_are_against_controls_of_the_same_batches():
    """Two batches that differ by 3, and perturbations that sit in one or the other: no response holds the difference."""
    labels, n = ["ctrl", "STAT1", "ctrl", "IRF1"], 200
    adata = make_screen(labels, n=n, batch=np.repeat(["a", "a", "b", "b"], n))
    values = np.random.default_rng(1).normal(3, 0.1, (len(labels) * n, len(GENES)))
    values[2 * n :] += 3
    adata.X = values.astype(np.float32)
    for matched in (True, False):
        screen = dataclasses.replace(read_screen(adata, ScreenOptions(value_kind="log")), matched=matched)
        delta = ObservedResponses.of(screen, ["IRF1", "STAT1"]).delta
        assert np.abs(delta - (0 if matched else [[1.5], [-1.5]])).max() < 0.05
    levels = read_screen(adata, ScreenOptions(value_kind="log")).control_levels
    assert levels.shares(np.array(["a\x1fline"] * 3 + ["b\x1fline"])) == pytest.approx([0.75, 0.25])
    assert levels.number_for(np.array(["a\x1fline"])) == pytest.approx(n)
    # 1 / (.5^2 / n + .5^2 / n) = 2 n
    assert levels.number_for(np.array(["a\x1fline", "b\x1fline"])) == pytest.approx(2 * n)


def test_a_screen_without_a_gene_to_score_is_refused():
    with pytest.raises(ValueError, match="5 of its 5 genes are targets of some perturbation"):
        read_screen(make_screen(["ctrl", *GENES]))


def test_max_genes_leaves_genes_to_score():
    adata = make_screen(["ctrl", "STAT1", "IRF1", "MYC"])
    kept = keep_genes(read_screen(adata), 2)
    assert len(kept.gene_ids) == 4 and len(kept.panel_targets) == 3
    assert len(keep_genes(read_screen(make_screen(["ctrl", "STAT1"])), 2).gene_ids) == 2


@pytest.mark.parametrize("size", [np.nan, np.inf, 0.0])
def test_a_library_size_that_cannot_be_is_refused_by_cell(size):
    adata = make_screen()
    adata.obs["total"] = 1_000.0
    adata.obs.loc["cell7", "total"] = size
    with pytest.raises(ValueError, match="for cell `cell7`"):
        read_screen(adata, ScreenOptions(library_size_column="total"))


@pytest.mark.parametrize(("change", "error"), [(0.006, 0.03), (-0.2, 0.03), (0.5, 0.01), (-0.01, 0.02)])
def test_the_change_at_a_target_has_the_sign_of_its_modality(change, error):
    """The mean of a normal cut off at zero, by integration."""
    grid = np.linspace(min(change, 0) - 10 * error, 0, 400_001)
    exponent = -0.5 * ((grid - change) / error) ** 2
    weight = np.exp(exponent - exponent.max())
    by_hand = (grid * weight).sum() / weight.sum()
    assert one_sided_mean(change, error, -1) == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
    assert one_sided_mean(-change, error, 1) == pytest.approx(-by_hand, rel=1e-3, abs=1e-6)
    assert one_sided_mean(change, error, 0) == change and one_sided_mean(change, 0.0, -1) == change


def test_a_knock_down_lowers_its_target():
    """A measured rise within its error is a fall; without a modality it stays as measured."""
    adata = make_screen(perturbation_type="CRISPRi")
    rows = adata.obs["perturbation"] == "STAT1"
    dense = adata.X.toarray()
    dense[rows.to_numpy(), 0] = dense[(adata.obs["perturbation"] == "control").to_numpy(), 0] + 1
    adata.X = scipy.sparse.csr_matrix(dense)
    ((_, change, _),) = read_screen(adata).target_changes("STAT1")
    del adata.obs["perturbation_type"]
    ((_, measured, _),) = read_screen(adata).target_changes("STAT1")
    assert measured > 0 > change > -0.5
