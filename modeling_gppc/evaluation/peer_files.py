"""`predicted.h5ad` and `observed.h5ad`: cells that cell-eval and cell-eval2 score, and what they then say."""

from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data_scripts.cells.screens import CONTROL
from data_scripts.files import write_atomically
from modeling_gppc.evaluation import metrics

# cell-eval's names for its column and its controls.
TARGET_COLUMN, CONTROL_LABEL = "target", "non-targeting"
FILES = ("predicted.h5ad", "observed.h5ad")


def cells_with_means(cells: np.ndarray, means: np.ndarray, largest: float) -> np.ndarray:
    """Cells (log values `(n, V)`, none negative) scaled gene by gene so that the mean of each gene is the one given.
    No value is scaled beyond `largest`: what the mean of a gene then lacks is added to all cells alike."""
    present, highest = cells.mean(axis=0, dtype=np.float64), cells.max(axis=0)
    wanted = np.divide(means, present, out=np.full(len(means), np.inf), where=present > 0)
    allowed = np.divide(largest, highest, out=np.zeros(len(means)), where=highest > 0)
    scale = np.minimum(wanted, allowed)
    return cells * scale + np.where(scale < wanted, means - scale * present, 0.0)


def response_anndatas(
    evaluation, method: str, seed: int = 0
) -> tuple[anndata.AnnData, anndata.AnnData, dict[str, int]]:
    """Predicted and observed cells of the scored genes, in the first division of the controls, and by file name how
    many means would have been negative (they are 0).

    Both hold the same control cells (`non-targeting`) and as many cells of each perturbation as the screen has; their
    means are those of the controls plus the response predicted by `method`, or observed. The observed response is
    against controls of the same batches, while the peers subtract the mean of all.
    """
    screen, truth = evaluation.screen, evaluation.truth
    generator, scored = np.random.default_rng(seed), np.flatnonzero(truth.mask)
    values, controls = screen.values.of_genes(scored), screen.cells_of(CONTROL)
    # The peers refuse negative values, which log values of the user's own making may hold.
    base = np.maximum(values[controls], 0)
    level, largest = base.mean(axis=0, dtype=np.float64), float(screen.values.matrix.max())
    parts: list[list] = [[scipy.sparse.csr_matrix(base)], [scipy.sparse.csr_matrix(base)]]
    labels, below = [CONTROL_LABEL] * len(controls), dict.fromkeys(FILES, 0)
    for row, label in enumerate(truth.labels):
        cells = screen.cells_of(label)
        drawn = generator.choice(len(controls), len(cells), replace=len(cells) > len(controls))
        sources = (base[drawn], evaluation.predictions[method].delta), (np.maximum(values[cells], 0), truth.delta)
        for name, part, (source, delta) in zip(FILES, parts, sources):
            means = level + delta[row, scored]
            below[name] += int((means < 0).sum())
            made = cells_with_means(source, np.maximum(means, 0), largest)
            part.append(scipy.sparse.csr_matrix(made, dtype=np.float32))
        labels += [label] * len(cells)
    symbols = screen.gene_symbols if len(set(screen.gene_symbols)) == len(screen.gene_symbols) else screen.gene_ids
    var = pd.DataFrame(index=[str(symbols[gene]) for gene in scored])
    obs = pd.DataFrame({TARGET_COLUMN: pd.Categorical(labels)}, index=[f"cell{index}" for index in range(len(labels))])
    made = [anndata.AnnData(scipy.sparse.vstack(part, format="csr"), obs=obs.copy(), var=var.copy()) for part in parts]
    return made[0], made[1], below


def write_peer_files(evaluation, method: str, folder: Path) -> dict:
    """Writes both files into a folder; gives the entry `files` of `evaluation.json`."""
    predicted, observed, below = response_anndatas(evaluation, method)
    for name, adata in zip(FILES, (predicted, observed)):
        with write_atomically(folder / name) as temporary:
            adata.write_h5ad(temporary, compression="gzip")
    scores = {name: float(np.nanmean(values)) for name, values in peer_metrics(predicted, observed).items()}
    return {"method": method, "n_genes": predicted.n_vars, "negative_means": below, "metrics": scores}


def peer_metrics(predicted: anndata.AnnData, observed: anndata.AnnData) -> Mapping[str, np.ndarray]:
    """Metrics of what two such files hold, by the peers' names: a value a perturbation, in the order of their names."""
    deltas = []
    for adata in (predicted, observed):
        labels = adata.obs[TARGET_COLUMN].cat
        members = scipy.sparse.csr_matrix((np.ones(adata.n_obs), (labels.codes, np.arange(adata.n_obs))))
        means = (members @ adata.X).toarray() / np.bincount(labels.codes)[:, None]
        control = list(labels.categories).index(CONTROL_LABEL)
        deltas.append(np.delete(means, control, axis=0) - means[control])
    found = {
        "pearson_delta": metrics.pearson_delta(*deltas),
        "mse_delta": metrics.mean_squared_error(*deltas),
        "mae_delta": metrics.mean_absolute_error(*deltas),
    }
    among = len(deltas[0]) / max(len(deltas[0]) - 1, 1)
    for distance in ("l1", "l2", "cosine"):
        found[f"discrimination_score_{distance}"] = metrics.discrimination(*deltas, distance, ties="position")
        # cell-eval2 ranks among the others, and ties count half.
        found[f"pds_{distance}"] = 1 - among * (1 - metrics.discrimination(*deltas, distance))
    return found
