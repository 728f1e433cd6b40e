"""Floors against closed forms, and what must never reach them."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from data_scripts.pairs.schema import PAIR_SCHEMA
from modeling_gppc.evaluation import pair_floors
from modeling_gppc.evaluation.gaussian_floors import (
    LabelledGaussianFloor,
    LinearJointFloor,
    LinearRevealedFloor,
    PairMoments,
    condition_on_imposed,
)
from modeling_gppc.evaluation.mean_floors import ContextMeanFloor, masked_mse
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.evaluation.pair_floors import FLOORS, fit_floors

GENES = 12


def make_pairs(n=400, seed=0, n_panels=2, n_types=3, width=3, with_labels=True) -> PairArrays:
    """Cells of a few types; source and target share the type."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_types, GENES))
    mixing = np.random.default_rng(98).normal(size=(GENES, GENES)) * 0.4
    types = generator.integers(0, n_types, n)
    source, target = (
        (centres[types] + generator.normal(size=(n, GENES)) @ mixing.T).astype(np.float32) for _ in range(2)
    )
    panels = np.ones((n_panels, GENES), dtype=bool)
    if n_panels > 1:
        panels[1, :3] = False
    source_panel, target_panel = generator.integers(0, n_panels, (2, n))
    source, target = source * panels[source_panel], target * panels[target_panel]
    ids = np.stack([3 + generator.permutation(GENES - 3)[:width] for _ in range(n)]).reshape(n, width)
    mask = generator.random((n, width)) < 0.8
    changes = np.take_along_axis(target - source, ids, axis=1) * mask
    label = np.array([f"type{t}" for t in types]) if with_labels else np.full(n, "")
    return PairArrays(
        source=source,
        target=target,
        source_panel=source_panel,
        target_panel=target_panel,
        panels=panels,
        revealed_ids=ids,
        revealed_changes=changes,
        revealed_mask=mask,
        pairing=np.full(n, "same_type"),
        cell_type=label,
        target_cell_type=label,
        dataset=np.full(n, "d"),
        donor=np.array([f"donor{i % 2}" for i in range(n)]),
        source_id=np.arange(n),
        target_id=np.arange(n) + n,
    )


def test_rows_become_arrays():
    row = {field.name: None for field in PAIR_SCHEMA}
    first = row | {
        "source_gene_ids": [0, 2],
        "source_values": [1.0, 2.0],
        "target_gene_ids": [1],
        "target_values": [3.0],
        "source_panel": 0,
        "target_panel": 1,
        "perturbation_gene_ids": [2, 1],
        "perturbation_values": [-2.0, 3.0],
        "pairing": "same_type",
        "cell_type": "T",
        "target_cell_type": "B",
        "dataset_id": "d",
        "donor_id": "x",
        "source_soma_joinid": 5,
        "target_soma_joinid": 6,
    }
    # The second source's panel lacks gene 0: what stands there is no measurement.
    second = first | {"source_gene_ids": [0], "source_values": [np.nan], "perturbation_gene_ids": [0]}
    second |= {"perturbation_values": [0.5], "source_panel": 1}
    table = pa.concat_tables([pa.Table.from_pylist([r], schema=PAIR_SCHEMA) for r in (first, second)]).slice(0, 2)
    panels = np.array([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=bool)
    pairs = PairArrays.from_table(table, panels)
    assert pairs.source.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0]]
    assert pairs.target.tolist() == [[0, 3, 0, 0], [0, 3, 0, 0]]
    assert pairs.revealed_ids.tolist() == [[2, 1], [0, 0]]
    assert pairs.revealed_mask.tolist() == [[True, True], [True, False]]
    assert pairs.revealed_levels.tolist() == [[0.0, 3.0], [0.5, 0.0]]
    assert pairs.scored.tolist() == [[False, False, False, False], [False, True, True, False]]
    assert PairArrays.from_table(table.slice(1), panels).source_panel.tolist() == [1]


def linear_joint(moments, panels, ridge) -> LinearJointFloor:
    floor = LinearJointFloor()
    floor.moments, floor.panels = moments, panels
    floor.use_ridge(ridge)
    return floor


def test_linear_joint_is_the_dense_conditional_formula():
    pairs = make_pairs(n_panels=1)
    moments = PairMoments(pairs)
    floor = linear_joint(moments, pairs.panels, ridge=0.0)
    floor.shrinkage = 0.0
    predicted = floor.predict(pairs)
    sigma, cross = moments.covariance, moments.cross
    gain = cross @ np.linalg.inv(sigma)
    residual = sigma - gain @ cross.T
    for row in range(20):
        mean = moments.target_mean + gain @ (pairs.source[row] - moments.source_mean)
        at = pairs.revealed_ids[row][pairs.revealed_mask[row]]
        surprise = pairs.target[row, at] - mean[at]
        expected = mean + residual[:, at] @ np.linalg.solve(residual[np.ix_(at, at)], surprise)
        assert np.allclose(predicted[row], expected, atol=1e-3)


def test_state_regression_is_ridge_and_marginalises_unmeasured_genes():
    pairs = make_pairs(n_panels=1)
    moments = PairMoments(pairs)
    centred = pairs.source - moments.source_mean
    scale = np.sqrt(np.diag(moments.covariance))
    # Sigma pools sources and targets; make it the source's so that the peer's normal equations are the same.
    moments.covariance = centred.T.astype(float) @ centred / len(pairs)
    scale = np.sqrt(np.diag(moments.covariance))
    peer = Ridge(alpha=0.7 * len(pairs), fit_intercept=False).fit(centred / scale, pairs.target - moments.target_mean)
    regression = linear_joint(moments, pairs.panels, 0.7)
    expected = moments.target_mean + (centred / scale) @ peer.coef_.T
    assert np.allclose(regression.predict(pairs.without_revealed()), expected, atol=1e-4)
    part = linear_joint(moments, np.concatenate([pairs.panels, [[False] * 3 + [True] * 9]]), 0.7)
    weights = part.weights(1)
    assert not weights[:, :3].any()
    peer = Ridge(alpha=0.7 * len(pairs), fit_intercept=False).fit(
        (centred / scale)[:, 3:], pairs.target - moments.target_mean
    )
    assert np.allclose(weights[:, 3:] * scale[3:], peer.coef_, atol=1e-4)


def test_conditioning_takes_any_number_of_revealed_genes():
    pairs = make_pairs(n=30, width=GENES - 3, n_panels=1)
    generator = np.random.default_rng(1)
    root = generator.normal(size=(GENES, GENES))
    covariance = root @ root.T + 0.5 * np.eye(GENES)
    mean = generator.normal(size=(30, GENES))
    predicted = condition_on_imposed(mean, covariance, pairs, block=7)
    for row in range(30):
        at = pairs.revealed_ids[row][pairs.revealed_mask[row]]
        solved = np.linalg.solve(covariance[np.ix_(at, at)], pairs.target[row, at] - mean[row, at])
        assert np.allclose(predicted[row], mean[row] + covariance[:, at] @ solved, atol=1e-3)
    assert np.array_equal(condition_on_imposed(mean, covariance, pairs.without_revealed()), mean)


@pytest.fixture(scope="module")
def fitted():
    return fit_floors(make_pairs(), make_pairs(n=200, seed=1), progress=False)


@pytest.mark.parametrize("name", FLOORS)
def test_no_floor_reads_the_target(name):
    clean, validation, test = make_pairs(), make_pairs(n=100, seed=1), make_pairs(n=50, seed=2)
    floor = FLOORS[name]().fit(clean, validation)
    before = floor.predict(test)
    assert before.shape == test.target.shape and np.isfinite(before).all()
    hidden = test.select(np.arange(len(test)))
    hidden.target[...] = -5.0
    assert np.array_equal(floor.predict(hidden), before)


@settings(max_examples=20)
@given(seed=st.integers(0, 1_000))
def test_order_and_padding_of_revealed_genes_do_not_matter(fitted, seed):
    test = make_pairs(n=20, seed=5)
    generator = np.random.default_rng(seed)
    order = generator.permutation(test.revealed_ids.shape[1])
    moved = test.select(np.arange(len(test)))
    moved.revealed_ids, moved.revealed_changes = test.revealed_ids[:, order], test.revealed_changes[:, order]
    moved.revealed_mask = test.revealed_mask[:, order]
    moved.revealed_ids = np.where(moved.revealed_mask, moved.revealed_ids, generator.integers(0, GENES))
    for name, floor in fitted.items():
        wanted = floor.predict(test)
        # Sums of three genes' terms in another order, in single precision.
        bound = 8 * np.finfo(np.float32).eps * np.abs(wanted).max()
        np.testing.assert_allclose(floor.predict(moved), wanted, rtol=0, atol=bound, err_msg=name)


def test_floors_rank_as_the_truth_demands(fitted):
    test = make_pairs(n=2_000, seed=3)
    errors = {name: masked_mse(floor.predict(test), test) for name, floor in fitted.items()}
    assert errors["no_change"] > errors["mean"] > errors["context_mean"]
    assert errors["linear_revealed"] < errors["mean"]
    assert errors["linear_joint"] < errors["linear_revealed"]
    assert errors["conditional_gaussian_labelled"] == min(errors.values())
    assert fitted["context_mean"].settings["labels"][-1] == "cell_type"


def test_context_mean_falls_back_on_wider_groups():
    train = make_pairs(n=600)
    floor = ContextMeanFloor()
    floor.levels = (("dataset", "cell_type"),)
    floor.fit(train, train)
    strange = make_pairs(n=3)
    strange.cell_type = np.array(["type0", "unknown", "unknown"])
    strange.dataset = np.array(["d", "d", "elsewhere"])
    predicted = floor.predict(strange)
    overall = FLOORS["mean"]().fit(train, train).mean
    measured = train.target_measured[:, 0] & (train.cell_type == "type0")
    expected = (train.target[measured, 0].sum() + 10 * overall[0]) / (measured.sum() + 10)
    assert predicted[0, 0] == pytest.approx(expected, abs=0.02)
    assert np.allclose(predicted[1], overall, atol=1e-3) and np.allclose(predicted[2], overall, atol=1e-6)


def test_labelled_floor_weighs_types_by_what_is_revealed():
    """With no usable label of the source, imposed genes tell the type of the target."""
    train, test = make_pairs(n=1_000), make_pairs(n=500, seed=4)
    for pairs in (train, test):
        pairs.cell_type = np.full(len(pairs), "any")
    labelled = LabelledGaussianFloor().fit(train, test)
    linear = LinearRevealedFloor().fit(train, test)
    assert masked_mse(labelled.predict(test), test) < masked_mse(linear.predict(test), test)


def test_wide_panels_get_a_factor_model(monkeypatch):
    monkeypatch.setattr(pair_floors, "MAX_DENSE_GENES", GENES - 1)
    names = ["linear_revealed", "linear_joint", "conditional_gaussian"]
    fitted = fit_floors(make_pairs(), make_pairs(n=50, seed=1), names=names, progress=False)
    test = make_pairs(n=20, seed=5)
    other = dataclasses.replace(test, source=test.source[::-1], source_panel=test.source_panel[::-1])
    # Levels are kept: the change from another source is another one.
    other.revealed_changes = test.revealed_levels - np.take_along_axis(other.source, test.revealed_ids, axis=1)
    apart = {name: np.abs(floor.predict(test) - floor.predict(other)).max() for name, floor in fitted.items()}
    assert apart["linear_revealed"] < 1e-4 < 0.1 < apart["linear_joint"]
    np.testing.assert_array_equal(*(fitted[name].predict(test) for name in names[1:]))
