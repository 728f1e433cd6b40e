"""Fitting a screen: controls alone, perturbations by hand, features, covariates, what may be asked about."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_screens import N_GENES, make_adata

from data_scripts.cells.log_values import LogValues
from data_scripts.cells.screen_cells import TechnicalCovariates
from data_scripts.cells.screens import ScreenOptions, read_screen
from modeling_gppc.fitting import fit_screen_response
from modeling_gppc.fitting.fit_controls import batch_drift, fit_controls
from modeling_gppc.fitting.fit_screen import fit_screen, target_inputs, target_likeness
from modeling_gppc.fitting.fit_screen_options import ScreenFitOptions
from modeling_gppc.fitting.fit_screen_response import leave_one_out, process_mean
from modeling_gppc.fitting.gene_features import read_gene_features
from modeling_gppc.fitting.observed_responses import ObservedResponses
from modeling_gppc.screen_response_gppc import OWN

LOG = ScreenOptions(value_kind="log")


@pytest.fixture(scope="module")
def screen():
    return read_screen(make_adata(), LOG)


def change_of(fitted, text):
    model, extractor = fitted
    return model.respond(**extractor.perturbation_features(text, model.levels())).change[0].numpy()


def spoil(screen, cells):
    values = np.array(screen.values)
    values[cells] = 9.0
    return dataclasses.replace(screen, values=LogValues(values))


def test_a_model_of_controls_reads_no_perturbed_cell(screen):
    texts = [f"G{i}=delta:-0.5" for i in range(6)]
    fitted = fit_screen(screen, [], ScreenFitOptions(n_factors=3))
    spoiled = spoil(screen, ~screen.is_control)
    again = fit_screen(spoiled, [], ScreenFitOptions(n_factors=3))
    for text in texts:
        assert np.array_equal(change_of(fitted, text), change_of(again, text))


def test_a_model_of_controls_is_the_sized_conditional_gaussian(screen):
    model, extractor = fit_screen(screen, [], ScreenFitOptions(n_factors=3, hold_targets=0.0))
    factors = fit_controls(screen, 3).factors
    sigma = factors.loadings @ factors.loadings.T
    own = sigma[:, 0] / (sigma[0, 0] + factors.noise[0]) * -0.5
    deviation = np.sqrt(np.diag(sigma) + factors.noise)
    reach = batch_drift(screen) * np.linalg.norm(deviation[1:])
    wanted = own / 3 / np.sqrt(1 + (np.linalg.norm(own[1:]) / reach) ** 2)
    assert change_of((model, extractor), "G0=delta:-0.5")[1:] == pytest.approx(wanted[1:], abs=1e-5)
    held = fit_screen(screen, [], ScreenFitOptions(n_factors=3, hold_targets=1e4))
    others = slice(1, 6)
    assert np.abs(change_of(held, "G0=delta:-0.5")[others]).max() < 0.2 * np.abs(wanted[others]).max()


def test_only_cells_of_the_seen_perturbations_are_read(screen):
    labels = ["G0", "G1", "G2"]
    spoiled = spoil(screen, np.isin(screen.label, ["G3", "G4", "G5"]))
    options = ScreenFitOptions(n_factors=3)
    for text in ("G5=delta:-0.5", "G0=ko"):
        assert np.array_equal(
            change_of(fit_screen(screen, labels, options), text), change_of(fit_screen(spoiled, labels, options), text)
        )


def test_perturbations_of_like_genes_respond_alike(screen, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_screen_response, "FEATURE_WEIGHTS", (1.0,))
    """The process by hand: two like perturbations in training, one of their kind predicted, another unlike any."""
    table = tmp_path / "terms.tsv"
    table.write_text("gene\tterm\nG0\tx\nG1\tx\nG2\ty\nG3\tx\nG5\tz\nG9\tx\nFAR\ty\n")
    features = read_gene_features(table, ["G0"])
    labels = ["G0", "G1", "G2"]
    model, extractor = fit_screen(screen, labels, ScreenFitOptions(n_factors=3), features)
    likeness = target_likeness(screen, labels, extractor, features)
    assert likeness[[0, 1, 2, 3, 5, 9]].tolist() == [
        [1, 1, 0],
        [1, 1, 0],
        [0, 0, 1],
        [1, 1, 0],
        [0, 0, 0],
        [1, 1, 0],
    ]
    # A gene of the table that the screen does not measure may be asked about.
    assert extractor.target_ids == ["FAR"] and likeness[N_GENES].tolist() == [0, 0, 1]
    part, votes = model.screen_response, ObservedResponses.of(screen, labels).shrunken
    assert part.mean.numpy() == pytest.approx(votes.mean(axis=0), abs=1e-5)
    alike = process_mean(votes, likeness[:3], likeness[[N_GENES]])[0]
    assert change_of((model, extractor), "FAR=ko") == pytest.approx(float(part.scale) * alike, abs=1e-4)


def test_leave_one_out_is_what_is_left(monkeypatch):
    """From one inverse, and one by one; a row that is related to another leaves both out."""
    generator = np.random.default_rng(0)
    votes, root = generator.normal(size=(6, 4)), generator.normal(size=(6, 6))
    kernel, related = root @ root.T / 6, np.eye(6, dtype=bool)
    related[4, 5] = related[5, 4] = True
    found = leave_one_out(votes, kernel, related)
    for row in range(6):
        rest = np.flatnonzero(~related[row])
        wanted = process_mean(votes[rest], kernel[np.ix_(rest, rest)], kernel[row][None, rest])
        assert found[row] == pytest.approx(wanted[0])
    assert not leave_one_out(votes[:1], kernel[:1, :1], related[:1, :1]).any()


def test_shared_controls_divide_by_length_as_they_used_to(screen):
    labels = sorted(screen.perturbations)
    delta = ObservedResponses.of(screen, labels).delta
    norms = np.linalg.norm(delta[:, 6:], axis=1, keepdims=True)
    model, _ = fit_screen(screen, labels, ScreenFitOptions(n_factors=3, controls="shared"))
    means = [(delta / norms**power).mean(axis=0) for power in (0.0, 0.5, 1.0)]
    assert any(np.allclose(model.screen_response.mean, mean, atol=1e-5) for mean in means)


def test_process_by_hand():
    votes, like = np.array([[1.0, 0.0], [3.0, 2.0]]), np.array([[1.0, 0.5], [0.5, 1.0]])
    mean = np.array([2.0, 1.0])
    found = process_mean(votes, like, np.array([[0.5, 0.5], [0.0, 0.0]]))
    # (K + I)^-1 = [[2, -.5], [-.5, 2]] / 3.75
    weights = np.array([[2, -0.5], [-0.5, 2]]) @ (votes - mean) / 3.75
    assert np.allclose(found, [mean + 0.5 * weights.sum(axis=0), mean])


def test_seen_perturbations_answer_with_their_shrunken_response(screen):
    labels = sorted(screen.perturbations)
    model, extractor = fit_screen(screen, labels, ScreenFitOptions(n_factors=3))
    features = extractor.perturbation_features("G2=ko", model.levels())
    out = model.respond(**features)
    observed = ObservedResponses.of(screen, labels)
    assert out.source.tolist() == [OWN]
    wanted = observed.signal_share[2] * observed.delta[2]
    assert out.change[0, 6:].numpy() == pytest.approx(wanted[6:], abs=1e-5)
    error = observed.within[6:].sum() * (1 / 60 + 1 / 400)
    assert observed.signal_share[2] == pytest.approx(1 - error / (observed.delta[2, 6:] ** 2).sum())


def test_combinations_are_related_to_what_shares_a_gene():
    labels = ["G0", "G0+G1", "G1"]
    screen = read_screen(make_adata(("control", *labels), n=20, controls=60), LOG)
    _, extractor = fit_screen(screen, labels, ScreenFitOptions(n_factors=3))
    ids, changes, mask = target_inputs(screen, labels, extractor)
    assert ids.tolist() == [[0, 0], [0, 1], [1, 0]] and mask.tolist() == [[True, False], [True, True], [True, False]]
    assert changes[1] == pytest.approx([change for _, change, _ in screen.target_changes("G0+G1")])


def test_unknown_genes_are_named(screen):
    _, extractor = fit_screen(screen, ["G0", "G1"], ScreenFitOptions(n_factors=3))
    with pytest.raises(ValueError, match="`G99` is not among the 30 measured genes of the model, was not perturbed"):
        extractor.parse_perturbation("G99=ko")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_genes": 5}, "`max_genes` is 5"),
        ({"hold_targets": float("nan")}, "`hold_targets` is nan"),
        ({"n_factors": 0}, "`n_factors` is 0"),
        ({"replicates": "donor"}, "`replicates` is 'donor'"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        ScreenFitOptions(**options)


def test_gene_features_are_terms_or_numbers(tmp_path):
    terms = tmp_path / "terms.tsv"
    terms.write_text("symbol\tterm\nA\tx\nA\ty\nB\tx\nC\tz\nD\tx\n")
    features = read_gene_features(terms, ["a", "B", "GHOST"])
    table = features.table(["a", "B", "GHOST"])
    assert set(table) == {"a", "B"} and table["a"] == pytest.approx([np.log(4 / 3), np.log(4)])
    assert table["B"] == pytest.approx([np.log(4 / 3), 0])
    assert features.rows(["GHOST", "b"]).toarray()[1].any() and not features.rows(["GHOST"]).toarray().any()
    numbers = tmp_path / "numbers.parquet"
    pd.DataFrame({"gene": ["A", "B"], "one": [1.0, 2.0], "two": [0.0, np.nan]}).to_parquet(numbers)
    assert read_gene_features(numbers, ["B"]).rows(["B"]).toarray().tolist() == [[2.0, 0.0]]
    with pytest.raises(ValueError, match="holds none of the 1 perturbed genes"):
        read_gene_features(numbers, ["Z"])
    with pytest.raises(ValueError, match="is not a file"):
        read_gene_features(tmp_path / "absent.csv", ["A"])
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has none of the columns"):
        read_gene_features(tmp_path / "bad.csv", ["A"])


def counted_screen(**columns):
    adata = make_adata()
    adata.X = np.random.default_rng(0).poisson(3.0, adata.shape).astype(np.float32)
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def test_technical_covariates_are_taken_out_where_the_library_is_complete():
    depth = np.linspace(500, 5_000, make_adata().n_obs)
    screen = read_screen(counted_screen(n_counts_full=depth))
    cells = screen.cells_of("control")
    covariates = TechnicalCovariates.fit(screen, cells)
    freed = covariates.residuals(screen.values[cells], screen.covariates[cells])
    assert np.abs([np.corrcoef(np.log(depth[cells]), column)[0, 1] for column in freed.T]).max() < 1e-6
    assert np.allclose(freed.mean(axis=0), screen.values[cells].mean(axis=0), atol=1e-6)
    partial = read_screen(counted_screen())
    none = TechnicalCovariates.fit(partial, cells)
    assert none.names == []
    assert np.array_equal(none.residuals(partial.values[cells], partial.covariates[cells]), partial.values[cells])


def test_technical_covariates_are_applied_to_cells_of_others():
    """The recipe travels: what the extractor makes of control cells is what the fit made of them."""
    adata = counted_screen(n_counts_full=np.linspace(500, 5_000, make_adata().n_obs))
    del adata.obs["batch"]
    screen = read_screen(adata)
    cells = screen.cells_of("control")
    _, extractor = fit_screen(screen, [], ScreenFitOptions(n_factors=3))
    covariates = fit_controls(screen, 3).covariates
    wanted = covariates.residuals(screen.values[cells], screen.covariates[cells])
    inputs = extractor(adata.X[cells], library_size=adata.obs["n_counts_full"].to_numpy()[cells])
    found = torch.zeros(len(cells), N_GENES).scatter_add(1, inputs["input_ids"], inputs["expression_values"])
    assert found.numpy() == pytest.approx(wanted, abs=1e-4)


def test_drift_is_how_far_batches_of_controls_lie_beyond_sampling_error():
    generator = np.random.default_rng(0)
    adata = make_adata(("control", "G0", "G1"), n=20, controls=4_000)
    adata.X = (generator.normal(size=adata.shape) + 5).astype(np.float32)
    assert batch_drift(read_screen(adata, LOG)) < 0.02
    shift = generator.normal(size=N_GENES) * 0.3
    adata.X[(adata.obs["batch"] == "b1").to_numpy()] += shift
    # Two batches of one size lie half their distance from the whole.
    expected = np.sqrt(np.mean((shift / 2) ** 2 / (1 + (shift / 2) ** 2)))
    assert batch_drift(read_screen(adata, LOG)) == pytest.approx(expected, rel=0.1)
    del adata.obs["batch"]
    assert batch_drift(read_screen(adata, LOG)) == 0.06
