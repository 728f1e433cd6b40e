"""The correlation on all controls, freed of the error of their mean: against simulation, where that error is known."""

import anndata
import numpy as np
import pytest

from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import read_screen
from modeling_gppc.evaluation.control_noise import control_means, corrected_pearson
from modeling_gppc.evaluation.metrics import pearson_delta
from modeling_gppc.evaluation.screen_baselines import ScreenContext, run_baselines
from modeling_gppc.evaluation.screen_truth import observe

N_GENES, N_PERTURBATIONS, N_CELLS = 400, 40, 60


def simulate(n_controls, seed):
    """Correlated genes, two batches apart, perturbations with a part in common and a part of their own."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 0.15, N_GENES)
    effects = common + generator.normal(0, 0.3, (N_PERTURBATIONS, N_GENES))
    which = np.repeat(np.arange(-1, N_PERTURBATIONS), [n_controls, *[N_CELLS] * N_PERTURBATIONS])
    levels = np.concatenate([effects, np.zeros((1, N_GENES))])[which]
    label = [f"P{i}" if i >= 0 else "control" for i in which]
    batch = generator.integers(0, 2, len(label))
    loadings = generator.normal(0, 0.3, (3, N_GENES))
    noise = generator.normal(size=(len(label), 3)) @ loadings + generator.normal(0, 0.6, levels.shape)
    adata = anndata.AnnData((5 + batch[:, None] + levels + noise).astype(np.float32))
    adata.obs["perturbation"], adata.obs["batch"] = label, [f"b{b}" for b in batch]
    adata.obs_names = [f"c{i}" for i in range(len(label))]
    screen = read_screen(adata, ScreenOptions(value_kind="log"))
    exact = np.stack([noise[screen.cells_of(name)].mean(axis=0) for name in sorted(screen.perturbations)])
    exact += np.stack([effects[int(name[1:])] for name in sorted(screen.perturbations)])
    return screen, exact


def scores_of(n_controls, seed):
    """Mean correlation of the leave-one-out mean: shared controls, corrected, and against the exact control level."""
    screen, exact = simulate(n_controls, seed)
    labels = sorted(screen.perturbations)
    half = len(labels) // 2
    train, test = labels[:half], labels[half:]
    truth = observe(screen, test, n_splits=1, differential=False)
    context = ScreenContext.build(screen, train, test)
    prediction = run_baselines(context, ["mean"], weigh=True)["mean"]
    shares = np.tile(np.mean([screen.control_shares(label) for label in train], axis=0), (len(test), 1))
    corrected = corrected_pearson({"mean": prediction}, truth, screen, shares)["mean"]
    shared = pearson_delta(prediction.delta, truth.delta)
    wanted = pearson_delta(np.tile(exact[:half].mean(axis=0), (len(test), 1)), exact[half:])
    assert prediction.control_weight == pytest.approx(1)
    return shared.mean(), corrected.mean(), wanted.mean()


@pytest.mark.parametrize("n_controls", [100, 500, 5_000])
def test_the_corrected_correlation_is_that_of_controls_without_end(n_controls):
    n_seeds = {100: 40, 500: 20, 5_000: 3}[n_controls]
    shared, corrected, wanted = np.mean([scores_of(n_controls, seed) for seed in range(n_seeds)], axis=0)
    print(n_controls, shared, corrected, wanted)
    assert corrected == pytest.approx(wanted, rel=0.02)
    if n_controls == 100:
        assert shared > 1.1 * wanted


def test_the_error_of_a_groups_mean_by_hand():
    screen, _ = simulate(200, 0)
    mask = np.ones(N_GENES, dtype=bool)
    whole, *parts = control_means(screen, mask)
    levels = screen.control_levels
    assert whole.means == pytest.approx(levels.means, abs=1e-5) and len(parts) == 10
    cells = screen.values[screen.cells_of("control")].astype(float)
    groups = screen.group[screen.cells_of("control")]
    residual = np.concatenate([cells[groups == name] - cells[groups == name].mean(axis=0) for name in levels.names])
    residual -= residual.mean(axis=1, keepdims=True)
    assert whole.error == pytest.approx((residual**2).sum() / (len(cells) - 2) / levels.counts)
    # Each cell is left out of one part.
    assert np.mean([part.means for part in parts], axis=0) == pytest.approx(whole.means, abs=0.01)
