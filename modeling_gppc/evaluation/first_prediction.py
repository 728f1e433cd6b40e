"""The first thing a run says about biology: what happens to test cells of one type when one gene is changed."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from modeling_gppc.evaluation.plots import MODEL_COLOUR, save_figure
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor

# Cells that are shown, and of how many the commonest kind is looked for.
N_CELLS, N_SEEN = 256, 2_048
# Half the width of a 90 % interval, in standard deviations.
Z90 = 1.645


@dataclasses.dataclass
class FirstPrediction:
    """Mean response of some cells of one kind to a perturbation: genes that are not imposed, strongest first, the mean
    change of their log value, its standard deviation, and the probability that its sign is right if the gene changes."""

    perturbation: str
    kind: str
    symbols: list[str]
    delta: np.ndarray
    std: np.ndarray
    direction: np.ndarray
    n_cells: int

    def text(self, n_genes: int = 10) -> str:
        """A small table of the strongest responses."""
        rows = [
            [symbol, f"{change:+.4f}", f"[{change - Z90 * std:+.3f}, {change + Z90 * std:+.3f}]", f"{direction:.2f}"]
            for symbol, change, std, direction in zip(self.symbols[:n_genes], self.delta, self.std, self.direction)
        ]
        title = (
            f"First prediction: {self.perturbation} in {self.n_cells} test cells ({self.kind}), strongest responses"
        )
        table = text_table(("gene", "change of log value", "90 % interval", "direction right"), rows)
        return (
            f"{title}\n{table}\nThis is a prediction from what varies together among cells of one state, which the "
            "perturbation is taken not to change; it is no proof of cause. Sizes are cautious: a true change may be nothing, "
            "or several times as large where most of what varies with the gene is its doing. The last column is the "
            "probability of the sign, if the gene changes at all, as learned on simulated systems; real ones are less sure."
        )

    def plot(self, path: str | Path, n_genes: int = 20) -> Path:
        """Bars of the strongest responses."""
        figure = Figure(figsize=(4.5, 0.24 * min(n_genes, len(self.symbols)) + 1), layout="constrained")
        axis = figure.subplots()
        position = np.arange(len(self.symbols[:n_genes]))
        axis.barh(position, self.delta[:n_genes], xerr=Z90 * self.std[:n_genes], color=MODEL_COLOUR)
        axis.set_yticks(position, self.symbols[:n_genes], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_xlabel("predicted change of log value, 90 % interval", fontsize=9)
        axis.set_title(f"{self.perturbation}, {self.n_cells} test cells ({self.kind})", fontsize=9)
        return save_figure(figure, path)


def choose_perturbation(values: np.ndarray, symbols: list[str], normalization: str) -> str:
    """Knock-out of the gene that varies most among those that at least half of some cells express (log values `(n, V)`);
    a fall by one where values are no counts."""
    share = (values != 0).mean(axis=0)
    gene = np.argmax(np.where(share >= min(0.5, share.max()), values.var(axis=0), -1))
    return f"{symbols[gene]}={'delta:-1' if normalization == 'none' else 'ko'}"


def cells_to_show(
    extractor: GppcFeatureExtractor, folder: PairFolder, perturbation: str | None
) -> tuple[np.ndarray, list[int]]:
    """Rows of test pairs, one a source cell, that measure the genes of a perturbation (of any, where none is given), and
    these genes.

    Raises:
        ValueError: For an unknown gene, a malformed perturbation, or one of a gene that no test cell measures.
    """
    try:
        imposed = [gene for gene, _, _ in extractor.parse_perturbation(perturbation or "")]
    except ValueError as error:
        raise ValueError(f"`evaluation.perturbation`: {error}") from error
    table = folder.split("test")
    panel = table.column("source_panel").to_numpy()
    _, rows = np.unique(table.column("source_soma_joinid").to_numpy(), return_index=True)
    rows = rows[folder.panels[panel[rows]][:, imposed].all(axis=1)]
    if not len(rows):
        raise ValueError(f"`evaluation.perturbation` {perturbation!r}: no test cell measures the gene; name another.")
    return rows, imposed


@torch.inference_mode()
def first_prediction(
    model, extractor: GppcFeatureExtractor, folder: PairFolder, perturbation: str | None = None
) -> FirstPrediction:
    """Predicts what a perturbation does to source cells of test pairs, those of the commonest cell type; of the commonest
    unsupervised state, where no two types are named. Without a perturbation one is chosen for these cells."""
    rows, imposed = cells_to_show(extractor, folder, perturbation)
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:N_SEEN])
    table = folder.split("test")
    values = PairDataset(table, folder.pairings).dense_cells("source", rows, extractor.vocab_size)
    measured = folder.panels[table.column("source_panel").to_numpy()[rows]]
    device = next(model.parameters()).device

    def encode(chosen: np.ndarray):
        inputs = extractor.from_values(values[chosen], measured[chosen])
        return model.encode(**{name: tensor.to(device) for name, tensor in inputs.items()})

    model.eval()
    kinds = np.array(table.column("cell_type").take(rows).to_pylist(), dtype=str)
    if len(np.unique(kinds)) < 2:
        states = [
            encode(rows).factors.states.log_weights.argmax(1) for rows in np.array_split(np.arange(len(rows)), 8)
        ]
        kinds = np.array([f"state {state}" for state in torch.cat(states).tolist()])
    names, counts = np.unique(kinds, return_counts=True)
    kind = str(names[np.argmax(counts)])
    chosen = np.flatnonzero(kinds == kind)[:N_CELLS]
    if perturbation is None:
        perturbation = choose_perturbation(values[chosen], extractor.gene_symbols, extractor.normalization)
        imposed = [gene for gene, _, _ in extractor.parse_perturbation(perturbation)]
    levels = model.levels(encode(chosen))
    features = extractor.perturbation_features(perturbation, levels)
    response = model.respond(**{name: tensor.to(device) for name, tensor in features.items()})
    # Cells that have the imposed level already do not change, and say nothing of a direction.
    moved = features["perturbation_values"].numpy(force=True).any(axis=1)
    direction = response.direction.numpy(force=True)[moved if moved.any() else slice(None)].mean(axis=0)
    mean = response.change.numpy(force=True).mean(axis=0)
    std = np.sqrt(response.variance.numpy(force=True).mean(axis=0))
    others = np.setdiff1d(np.arange(len(mean)), imposed)
    order = others[np.argsort(-np.abs(mean[others]))]
    symbols = [extractor.gene_symbols[gene] for gene in order]
    return FirstPrediction(perturbation, kind, symbols, mean[order], std[order], direction[order], len(chosen))
