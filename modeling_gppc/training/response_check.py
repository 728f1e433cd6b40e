"""Whether a learned departure brings the responses among held-out cells nearer to what they are."""

from dataclasses import dataclass

import numpy as np
import torch

from modeling_gppc import GppcForPerturbationPrediction

# Cells that a predicted response is averaged over.
RESPONSE_CELLS = 128


@dataclass(frozen=True)
class ResponseCheck:
    """
    Predicted against observed responses, with the departure and by the linear response alone.

    Args:
        error, linear_error (`float`): Squared error, mean over genes that were moved.
        correlation, linear_correlation (`float`): Pearson correlation over the other genes, likewise.
    """

    error: float
    linear_error: float
    correlation: float
    linear_correlation: float

    @property
    def departure_pays(self) -> bool:
        """Whether the departure improves both: a smaller response alone lowers the error and may turn away."""
        return self.error < self.linear_error and self.correlation > self.linear_correlation


@torch.inference_mode()
def check_responses(model: GppcForPerturbationPrediction, values: np.ndarray) -> ResponseCheck:
    """
    Compares predicted responses with those among cells that the model did not learn from: those in which a gene is high
    against those in which it is low, every gene in turn, the gene itself left out.

    A pair of cells says little of what a gene's level does to the mean of the others; a network can lower the error
    of pairs and spoil that.

    Args:
        model ([`GppcForPerturbationPrediction`]): A network with one panel, all of whose genes are measured.
        values (`np.ndarray`): Log values of the cells, float32 of shape `(n_cells, V)`.
    """
    n_genes = values.shape[1]
    device = next(model.parameters()).device
    source = torch.as_tensor(values[:RESPONSE_CELLS], device=device)
    ids = torch.arange(n_genes, device=device).expand(len(source), -1)
    panel = torch.ones(1, n_genes, dtype=torch.bool, device=device)
    encoded = model.eval().encode(ids, source, None, panel, torch.zeros(len(source), dtype=torch.long, device=device))
    found: list[list[float]] = []
    for gene in range(n_genes):
        high = values[:, gene] > np.median(values[:, gene])
        if min(high.sum(), (~high).sum()) < 10:
            continue
        observed = values[high].mean(axis=0) - values[~high].mean(axis=0)
        sides = []
        for side in (high, ~high):
            at = torch.full((len(source), 1), gene, device=device)
            output = model.decode(encoded, at, float(values[side, gene].mean()) - source[:, [gene]])
            sides.append([part.mean(dim=0).cpu().numpy() for part in (output.logits, output.linear_response)])
        others = np.arange(n_genes) != gene
        observed, predicted = observed[others], [(above - below)[others] for above, below in zip(*sides)]
        errors = [float(((response - observed) ** 2).sum()) for response in predicted]
        found.append([*errors, *(_correlation(response, observed) for response in predicted)])
    return ResponseCheck(*np.mean(found, axis=0).tolist()) if found else ResponseCheck(0.0, 0.0, 0.0, 0.0)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-12))
