"""How much responses differ between groups: the estimate by hand, and the coverage that it gives."""

import numpy as np
import pytest
from tiny_screens import N_GENES, make_adata

from data_scripts.cells.screens import ScreenOptions, read_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.fitting.replicate_variance import (
    USUAL_RATIO,
    GroupResponses,
    random_effects,
    responses_by_group,
    variance_between,
)

LABELS = ("control", *(f"G{i}" for i in range(6)))


def grouped_screen(n_groups: int, spread: float, seed: int = 0):
    """Six perturbations in several batches whose responses differ by `spread` about a common one; batches shift too."""
    adata = make_adata(LABELS, n=40 * n_groups, controls=150 * n_groups, seed=seed)
    generator = np.random.default_rng(seed + 1)
    group = np.arange(adata.n_obs) % n_groups
    adata.obs["batch"] = [f"b{index}" for index in group]
    values = adata.X + 3
    label = adata.obs["perturbation"].to_numpy()
    for index in range(n_groups):
        values[group == index] += generator.normal(size=N_GENES) * 0.5
        for name in LABELS[1:]:
            values[(group == index) & (label == name)] += generator.normal(size=N_GENES) * spread
    adata.X = values.astype(np.float32)
    return read_screen(adata, ScreenOptions(value_kind="log"))


def test_random_effects_are_spread_minus_sampling_error():
    generator = np.random.default_rng(0)
    within, true = np.full(400, 0.5), 0.04
    parts = {}
    for label in "ABCDEFGH":
        sampling = np.full((3, 400), 0.02)
        delta = generator.normal(size=400) + generator.normal(size=(3, 400)) * np.sqrt(true + 0.02)
        parts[label] = GroupResponses(["x", "y", "z"], delta, sampling, np.ones((3, 400), bool))
    found = random_effects(parts, within, np.ones(400, bool))
    assert found.mean() == pytest.approx(true, rel=0.1)
    own = np.mean([part.delta.var(axis=0, ddof=1) - 0.02 for part in parts.values()], axis=0)
    assert found == pytest.approx(0.5 * np.maximum(own, 0) + 0.5 * own.mean())
    alone = {label: part.without("x").without("y") for label, part in parts.items()}
    assert random_effects(alone, within, np.ones(400, bool)) is None


def test_responses_are_against_the_controls_of_their_group():
    screen = grouped_screen(2, 0.0)
    part = responses_by_group(screen, LABELS[1:], screen.batch)["G2"]
    inside = screen.batch == "b1"
    by_hand = screen.values[inside & (screen.label == "G2")].mean(axis=0) - screen.values[
        inside & screen.is_control
    ].mean(axis=0)
    assert part.groups == ["b0", "b1"] and np.allclose(part.delta[1], by_hand, atol=1e-5)


def test_one_group_has_the_usual_variance():
    screen = grouped_screen(2, 0.3)
    parts = {label: part.without("b1") for label, part in responses_by_group(screen, LABELS[1:], screen.batch).items()}
    batch, line = (variance_between(screen, parts, kind) for kind in ("batch", "cell_line"))
    assert np.allclose(line / batch, USUAL_RATIO["cell_line"] / USUAL_RATIO["batch"])


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_intervals_hold_what_they_say_in_a_group_that_was_held_out(spread):
    """However far apart batches respond, and however far apart their controls lie."""
    screen = grouped_screen(4, spread)
    options = EvaluateOptions(mode="fine-tuned", hold_out="batch")
    methods = evaluate_screen(screen, options, progress=False).summary["methods"]
    assert 0.85 <= methods["gppc"]["coverage90"] <= 0.95
