"""Responses among held-out cells, compared as written down by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_gppc.training.response_check import ResponseCheck, check_responses

SLOPES = np.array([[0.0, 0.5, -0.2, 0.1], [0.3, 0.0, 0.4, 0.0], [-0.1, 0.2, 0.0, 0.6], [0.2, 0.1, 0.5, 0.0]])


class Linear(torch.nn.Module):
    """Answers an imposed level with the source's values plus level x slopes; the departure adds a share of them."""

    def __init__(self, departure: np.ndarray):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.departure = torch.as_tensor(departure, dtype=torch.float32)

    def encode(self, ids, source, mask, panel, index):
        return source

    def decode(self, source, genes, changes):
        slopes = torch.as_tensor(SLOPES, dtype=torch.float32)[genes[:, 0]]
        level = source.gather(1, genes) + changes
        linear = source + level * slopes
        return SimpleNamespace(logits=linear + level * self.departure[genes[:, 0]], linear_response=linear)


def by_hand(values, slopes):
    errors, correlations = [], []
    for gene in range(4):
        high = values[:, gene] > np.median(values[:, gene])
        change = values[high].mean(0) - values[~high].mean(0)
        others = np.arange(4) != gene
        predicted = (change[gene] * slopes[gene])[others]
        errors.append(((predicted - change[others]) ** 2).sum())
        correlations.append(np.corrcoef(predicted, change[others])[0, 1])
    return np.mean(errors), np.mean(correlations)


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.7])
def test_as_by_hand(share):
    values = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    values[:, 1] += 0.8 * values[:, 0]
    departure = share * SLOPES[::-1, ::-1]
    found = check_responses(Linear(departure), values)
    error, correlation = by_hand(values, SLOPES + departure)
    linear_error, linear_correlation = by_hand(values, SLOPES)
    wanted = ResponseCheck(error, linear_error, correlation, linear_correlation)
    for name in ("error", "linear_error", "correlation", "linear_correlation"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-5)
    assert found.departure_pays == wanted.departure_pays
    if share == 0.0:
        assert not found.departure_pays


def test_too_few_cells_tell_nothing():
    values = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    assert not check_responses(Linear(SLOPES), values).departure_pays
