"""Metrics of responses: by hand, and equal to the packages that define them."""

import anndata
import numpy as np
import pytest
from energy_distance import energy_distance

from modeling_gppc.evaluation.metrics import (
    centroid_accuracy,
    de_overlap,
    direction_accuracy,
    discrimination,
    l2_top_expressed,
    mean_absolute_error,
    mean_squared_error,
    normalised_squared_error,
    pearson_delta,
    perturbench_rank,
    r2_score,
    significant_genes,
    systema_pearson,
    weighted_mse,
)

OBSERVED = np.array([[1.0, -2.0, 0.0, 1.0], [0.5, 0.5, -1.0, 0.0], [-1.0, 1.0, 1.0, -1.0]])
PREDICTED = np.array([[2.0, -1.0, 1.0, 0.0], [0.5, -0.5, -2.0, 0.0], [-1.0, 1.0, 1.0, -1.0]])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (direction_accuracy, [2 / 3, 2 / 3, 1]),
        (normalised_squared_error, [4 / 6, 2 / 1.5, 0]),
        (mean_absolute_error, [1, 0.5, 0]),
        (mean_squared_error, [1, 0.5, 0]),
        (r2_score, [1 - 4 / 6, 1 - 2 / 1.5, 1]),
        (lambda p, o: l2_top_expressed(p, o, np.array([0.0, 3.0, 2.0, 1.0]), n=2), [np.sqrt(2), np.sqrt(2), 0]),
        (lambda p, o: weighted_mse(p, o, np.array([[0.0, 2.0, 1.0, 0.0]] * 3)), [1, 1, 0]),
        # Prediction 0 is nearest to observation 0 and so on: nothing is closer.
        (discrimination, [1, 1, 1]),
        (centroid_accuracy, [1, 1, 1]),
        (perturbench_rank, [0, 0, 0]),
    ],
)
def test_by_hand(metric, expected):
    assert metric(PREDICTED, OBSERVED) == pytest.approx(expected)


def test_masks_leave_genes_out():
    mask = np.array([True, True, True, False])
    spoiled = PREDICTED.copy()
    spoiled[:, 3] = 1e6
    for metric in (pearson_delta, discrimination):
        assert np.array_equal(metric(spoiled, OBSERVED, mask=mask), metric(PREDICTED, OBSERVED, mask=mask))


def test_constant_predictions_win_nothing():
    constant = np.tile(OBSERVED.mean(axis=0), (3, 1))
    assert discrimination(np.zeros((3, 4)), OBSERVED, "cosine") == pytest.approx(2 / 3)  # midrank of three: 1
    assert discrimination(constant, OBSERVED).mean() == pytest.approx(2 / 3)
    assert np.array_equal(systema_pearson(constant, OBSERVED, OBSERVED.mean(axis=0)), np.zeros(3))
    assert systema_pearson(OBSERVED, OBSERVED, OBSERVED.mean(axis=0)) == pytest.approx(1)
    assert perturbench_rank(constant, OBSERVED) == pytest.approx(1)
    assert np.isnan(pearson_delta(np.zeros((1, 4)), OBSERVED[:1])).all()


def test_ranked_genes_and_their_overlap():
    ranked = significant_genes(np.array([0.1, -3.0, 2.0, 5.0]), np.array([0.01, 0.02, 0.03, 0.5]))
    assert ranked.tolist() == [1, 2, 0]
    assert de_overlap(ranked, np.array([2, 3])) == pytest.approx(1 / 3)
    assert de_overlap(ranked, np.array([2, 3]), precision=True) == pytest.approx(1 / 2)
    assert de_overlap(ranked, np.array([2, 3]), k=1) == 0
    assert de_overlap(ranked[:0], ranked) == 0


@pytest.fixture(scope="module")
def cells():
    """A pair of AnnDatas, real and predicted, whose perturbations are named like some genes."""
    generator = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(30)]
    labels = np.repeat(["non-targeting", "g1", "g2", "g5", "g7"], [60, 25, 30, 20, 40])
    effect = {name: generator.normal(size=30) * (name != "non-targeting") for name in np.unique(labels)}

    def draw(weight, seed):
        noise = np.random.default_rng(seed).gamma(1.0, 0.5, size=(len(labels), 30))
        values = np.maximum(noise + weight * np.stack([effect[name] for name in labels]), 0)
        adata = anndata.AnnData(values.astype(np.float32))
        adata.var_names, adata.obs["target"] = genes, labels
        adata.obs_names = [f"c{i}" for i in range(len(labels))]
        return adata

    return draw(0.5, 1), draw(0.3, 2)


def bulks(adata):
    names = np.unique(adata.obs["target"])
    means = {name: adata.X[(adata.obs["target"] == name).to_numpy()].astype(np.float64).mean(axis=0) for name in names}
    control = means.pop("non-targeting")
    return np.stack([means[name] for name in sorted(means)]), control


def test_equal_to_cell_eval(cells):
    peer = pytest.importorskip("cell_eval.metrics._anndata")
    types = pytest.importorskip("cell_eval._types")
    real, predicted = cells
    data = types.PerturbationAnndataPair(real=real, pred=predicted, pert_col="target", control_pert="non-targeting")
    (real_bulk, real_control), (predicted_bulk, predicted_control) = bulks(real), bulks(predicted)
    delta, delta_hat = real_bulk - real_control, predicted_bulk - predicted_control
    own_target = np.array([[gene != name for gene in real.var_names] for name in ("g1", "g2", "g5", "g7")])
    pairs = [
        (peer.pearson_delta(data), pearson_delta(delta_hat, delta)),
        (peer.mse(data), mean_squared_error(predicted_bulk, real_bulk)),
        (peer.mae(data), mean_absolute_error(predicted_bulk, real_bulk)),
        (peer.mse_delta(data), mean_squared_error(delta_hat, delta)),
        (peer.mae_delta(data), mean_absolute_error(delta_hat, delta)),
    ]
    for distance in ("l1", "l2", "cosine"):
        ours = discrimination(delta_hat, delta, distance, own_target, ties="position")
        pairs.append((peer.discrimination_score(data, metric=distance), ours))
    for theirs, ours in pairs:
        assert list(theirs) == ["g1", "g2", "g5", "g7"]
        assert np.array(list(theirs.values())) == pytest.approx(ours, abs=1e-6)
    distances = [
        [
            energy_distance(
                a.X[(a.obs["target"] == n).to_numpy()], a.X[(a.obs["target"] == "non-targeting").to_numpy()]
            )
            for n in ("g1", "g2", "g5", "g7")
        ]
        for a in cells
    ]
    assert peer.edistance(data) == pytest.approx(np.corrcoef(*distances)[0, 1], abs=1e-6)


def test_de_overlap_equals_cell_eval(cells):
    pytest.importorskip("cell_eval")
    import polars
    from cell_eval._types import DEComparison, DEResults

    generator = np.random.default_rng(3)
    genes = np.array([f"g{i}" for i in range(30)])
    frames, arrays = [], []
    for _ in range(2):
        change, fdr = generator.normal(size=30), generator.uniform(0, 0.1, size=30)
        arrays.append((change, fdr))
        frames.append(
            polars.DataFrame(
                {
                    "target": ["g1"] * 30,
                    "feature": genes,
                    "log2_fold_change": change,
                    "abs_log2_fold_change": np.abs(change),
                    "p_value": fdr,
                    "fdr": fdr,
                }
            )
        )
    data = DEComparison(real=DEResults(frames[0]), pred=DEResults(frames[1]))
    ranked = [significant_genes(*pair) for pair in arrays]
    for k in (None, 5, 50):
        assert data.compute_overlap(k, "overlap", 0.05)["g1"] == pytest.approx(de_overlap(*ranked, k))
        assert data.compute_overlap(k, "precision", 0.05)["g1"] == pytest.approx(
            de_overlap(*ranked, k, precision=True)
        )


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
def test_equal_to_cell_eval2(cells, distance):
    peer = pytest.importorskip("cell_eval2.metrics.discrimination")
    delta_module = pytest.importorskip("cell_eval2.metrics.delta")
    real, predicted = cells
    (real_bulk, real_control), (predicted_bulk, predicted_control) = bulks(real), bulks(predicted)
    names = np.array(["g1", "g2", "g5", "g7", "non-targeting"])
    theirs_real = (names, np.vstack([real_bulk, real_control]))
    theirs_predicted = (names, np.vstack([predicted_bulk, predicted_control]))
    panel = ~np.isin(real.var_names, names)
    theirs = peer.discrimination_score(
        pred_bulk=theirs_predicted, real_bulk=theirs_real, distance=distance, genes=real.var_names.to_numpy()
    )
    ours = discrimination(predicted_bulk - predicted_control, real_bulk - real_control, distance, panel)
    assert [theirs[name] for name in names[:4]] == pytest.approx(ours.tolist(), abs=1e-6)
    theirs = delta_module.pearson_delta(pred_bulk=theirs_predicted, real_bulk=theirs_real)
    ours = pearson_delta(predicted_bulk - predicted_control, real_bulk - real_control)
    assert [theirs[name] for name in names[:4]] == pytest.approx(ours.tolist(), abs=1e-6)
