"""Whether a learned departure brings the responses among held-out cells nearer to what they are."""

import numpy as np
import torch

from modeling_gppc import GppcForPerturbationPrediction

# Cells that a predicted response is averaged over.
RESPONSE_CELLS = 128


@torch.inference_mode()
def response_errors(model: GppcForPerturbationPrediction, values: np.ndarray) -> tuple[float, float]:
    """
    Squared error of predicted responses among cells that the model did not learn from: those in which a gene is high
    against those in which it is low, every gene in turn, the gene itself left out.

    A pair of cells says little of what a gene's level does to the mean of the others; a network can lower the error
    of pairs and spoil that.

    Args:
        model ([`GppcForPerturbationPrediction`]): A network with one panel, all of whose genes are measured.
        values (`np.ndarray`): Log values of the cells, float32 of shape `(n_cells, V)`.

    Returns:
        The error of the whole model and that of its linear response alone.
    """
    n_genes = values.shape[1]
    device = next(model.parameters()).device
    source = torch.as_tensor(values[:RESPONSE_CELLS], device=device)
    ids = torch.arange(n_genes, device=device).expand(len(source), -1)
    panel = torch.ones(1, n_genes, dtype=torch.bool, device=device)
    encoded = model.eval().encode(ids, source, None, panel, torch.zeros(len(source), dtype=torch.long, device=device))
    errors, counted = np.zeros(2), 0
    for gene in range(n_genes):
        high = values[:, gene] > np.median(values[:, gene])
        if min(high.sum(), (~high).sum()) < 10:
            continue
        observed = values[high].mean(axis=0) - values[~high].mean(axis=0)
        found = []
        for side in (high, ~high):
            at = torch.full((len(source), 1), gene, device=device)
            output = model.decode(encoded, at, float(values[side, gene].mean()) - source[:, [gene]])
            found.append([part.mean(dim=0).cpu().numpy() for part in (output.logits, output.linear_response)])
        others = np.arange(n_genes) != gene
        for which in range(2):
            errors[which] += float(((found[0][which] - found[1][which] - observed)[others] ** 2).sum())
        counted += 1
    whole, linear = errors / max(counted, 1)
    return float(whole), float(linear)
