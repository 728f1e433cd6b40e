"""Pairs of cells from a factor model whose statistics are known, and the closed-form start on them."""

import numpy as np
import pyarrow as pa
import torch

from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.schema import PAIR_SCHEMA
from modeling_gppc import GppcConfig, GppcForPerturbationPrediction
from modeling_gppc.evaluation.model_predictor import model_predictor
from modeling_gppc.evaluation.pair_arrays import PairArrays
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response

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
    pairs = PairArrays.from_table(table, np.ones((1, GENES), dtype=bool))
    predicted, _ = model_predictor(model)(pairs)
    squared = np.where(pairs.scored, (predicted - pairs.target) ** 2, 0)
    return {
        name: squared[pairs.pairing == name].sum() / pairs.scored[pairs.pairing == name].sum() for name in PAIRINGS
    }


def optimum_error(table: pa.Table) -> dict[str, float]:
    """The same for E[B | A, b_S] of the true joint Gaussian."""
    loadings = np.random.default_rng(1).normal(size=(GENES, RANK))
    pairs = PairArrays.from_table(table, np.ones((1, GENES), dtype=bool))
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
