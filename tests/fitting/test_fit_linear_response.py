"""The closed-form start, on pairs whose statistics are known."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.schema import PAIR_SCHEMA
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.model_predictor import ModelPredictor
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response, keep_departure_if_it_pays

GENES, RANK = 24, 3
PAIRINGS = ["same_type", "same_dataset"]


def pair_table(n: int, seed: int, states: np.ndarray | None = None) -> pa.Table:
    """Pairs from a factor model: `same_type` pairs share half of their factors' variance, the others nothing."""
    truth = np.random.default_rng(1)
    loadings = truth.normal(size=(GENES, RANK))
    rng = np.random.default_rng(seed)
    shared = np.arange(n) % 2 == 0
    centre = np.zeros((n, RANK)) if states is None else states[rng.integers(len(states), size=n)]
    partner = np.where(shared[:, None], centre, centre[rng.permutation(n)])
    common = rng.normal(size=(n, RANK)) * shared[:, None]
    weight = np.sqrt(np.where(shared, 0.5, 1.0))[:, None]
    cells = [
        (middle + np.sqrt(0.5) * common + weight * rng.normal(size=(n, RANK))) @ loadings.T
        + 0.5 * rng.normal(size=(n, GENES))
        for middle in (centre, partner)
    ]
    revealed = rng.permuted(np.tile(np.arange(GENES), (n, 1)), axis=1)[:, :2]
    revealed.sort(axis=1)
    change = np.take_along_axis(cells[1] - cells[0], revealed, 1)
    lists = {"source": cells[0], "target": cells[1]}
    columns = {}
    for side, values in lists.items():
        columns[f"{side}_gene_ids"] = [list(range(GENES))] * n
        columns[f"{side}_values"] = values.astype(np.float32).tolist()
    columns["perturbation_gene_ids"] = revealed.tolist()
    columns["perturbation_values"] = change.astype(np.float32).tolist()
    columns["pairing"] = np.where(shared, *PAIRINGS).tolist()
    columns["source_soma_joinid"] = list(range(n))
    columns["target_soma_joinid"] = list(range(n, 2 * n))
    for field in PAIR_SCHEMA:
        if field.name not in columns:
            columns[field.name] = ["x" if field.type == pa.string() else 0] * n
    columns["is_control"] = [True] * n
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in PAIR_SCHEMA})


def started(train: pa.Table, validation: pa.Table, components: int) -> GppcForPerturbationPrediction:
    torch.manual_seed(0)
    config = GppcConfig(
        vocab_size=GENES,
        pairings=PAIRINGS,
        num_factors=RANK,
        num_components=components,
        hidden_size=8,
        num_attention_heads=2,
        num_latents=1,
        readout_size=8,
        intermediate_size=8,
    )
    model = GppcForPerturbationPrediction(config).eval()
    panels = np.ones((1, GENES), dtype=bool)
    datasets = [PairDataset(table, PAIRINGS) for table in (train, validation)]
    initialize_linear_response(model, *datasets, panels)
    return model


def errors(model, table: pa.Table) -> dict[str, float]:
    """Mean squared error of each pairing over the genes that were not revealed."""
    pairs = PairArrays.from_table(table, np.ones((1, GENES), dtype=bool), GENES)
    predicted, _ = ModelPredictor(model)(pairs)
    squared = np.where(pairs.scored, (predicted - pairs.target) ** 2, 0)
    return {
        name: squared[pairs.pairing == name].sum() / pairs.scored[pairs.pairing == name].sum() for name in PAIRINGS
    }


def optimum_error(table: pa.Table) -> dict[str, float]:
    """The same for E[B | A, b_S] of the true joint Gaussian."""
    loadings = np.random.default_rng(1).normal(size=(GENES, RANK))
    pairs = PairArrays.from_table(table, np.ones((1, GENES), dtype=bool), GENES)
    sigma = loadings @ loadings.T + 0.25 * np.eye(GENES)
    output = {}
    for name, share in (("same_type", 0.5), ("same_dataset", 0.0)):
        cross = share * loadings @ loadings.T
        weights = cross @ np.linalg.inv(sigma)
        left = sigma - weights @ cross.T
        total = count = 0
        for row in np.flatnonzero(pairs.pairing == name):
            ids = pairs.revealed_ids[row]
            mean = weights @ pairs.source[row]
            gain = left[:, ids] @ np.linalg.inv(left[np.ix_(ids, ids)])
            mean = mean + gain @ (pairs.revealed_levels[row] - mean[ids])
            scored = pairs.scored[row]
            total += ((mean - pairs.target[row])[scored] ** 2).sum()
            count += scored.sum()
        output[name] = total / count
    return output


def test_start_is_the_optimum_of_gaussian_pairs_and_needs_no_cell_states():
    test = pair_table(600, seed=12)
    model = started(pair_table(6000, seed=10), pair_table(1000, seed=11), components=6)
    reached, best = errors(model, test), optimum_error(test)
    for name in PAIRINGS:
        assert reached[name] < 1.03 * best[name]
    # One state is enough for Gaussian cells, and validation says so.
    assert torch.isclose(model.model.linear_response.states.component_logits.exp().max(), torch.tensor(1.0))


def test_cell_states_are_kept_where_they_pay():
    states = np.random.default_rng(2).normal(size=(4, RANK)) * 5
    tables = [pair_table(n, seed=seed, states=states) for n, seed in ((4000, 20), (800, 21), (600, 22))]
    mixture = errors(started(*tables[:2], components=6), tables[2])
    single = errors(started(*tables[:2], components=1), tables[2])
    assert mixture["same_dataset"] < 0.9 * single["same_dataset"]
    assert mixture["same_type"] < single["same_type"]


@pytest.mark.parametrize("best, kept", [(0.9, True), (1.1, False), (1.0, False)])
def test_departure_that_does_not_pay_is_switched_off(best, kept):
    config = GppcConfig(vocab_size=4, hidden_size=8, num_attention_heads=2)
    model = GppcForPerturbationPrediction(config)
    history = [
        {"eval_mse": 1.5, "eval_linear_mse": 1.0},
        {"eval_mse": best, "eval_linear_mse": 1.0},
        {"loss": 0.1},
    ]
    assert keep_departure_if_it_pays(model, history) is kept
    assert model.config.use_departure is kept
