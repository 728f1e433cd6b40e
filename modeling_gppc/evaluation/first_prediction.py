"""The first thing a run says about biology: what happens to test cells when one gene is changed."""

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

N_CELLS = 256


@dataclasses.dataclass
class FirstPrediction:
    """Mean response of some cells to a perturbation: genes that are not imposed, strongest first, the mean change of
    their log value, and the standard error of that mean over the cells."""

    perturbation: str
    symbols: list[str]
    delta: np.ndarray
    standard_error: np.ndarray
    n_cells: int

    def text(self, n_genes: int = 10) -> str:
        """A small table of the strongest responses."""
        rows = [
            [symbol, f"{change:+.4f}", f"{error:.4f}"]
            for symbol, change, error in zip(self.symbols[:n_genes], self.delta, self.standard_error)
        ]
        title = f"First prediction: {self.perturbation} in {self.n_cells} test cells, strongest responses"
        table = text_table(("gene", "change of log value", "standard error"), rows)
        return (
            f"{title}\n{table}\nThis is what cells with such levels look like among unperturbed ones, a change of cell type "
            "included; it is not shown that imposing the levels does it. The standard error says how alike the cells are, "
            "not how sure the model is."
        )

    def plot(self, path: str | Path, n_genes: int = 20) -> Path:
        """Bars of the strongest responses."""
        figure = Figure(figsize=(4.5, 0.24 * min(n_genes, len(self.symbols)) + 1), layout="constrained")
        axis = figure.subplots()
        position = np.arange(len(self.symbols[:n_genes]))
        axis.barh(position, self.delta[:n_genes], xerr=self.standard_error[:n_genes], color=MODEL_COLOUR)
        axis.set_yticks(position, self.symbols[:n_genes], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_xlabel("predicted change of log value", fontsize=9)
        axis.set_title(f"{self.perturbation}, {self.n_cells} test cells", fontsize=9)
        return save_figure(figure, path)


def choose_perturbation(folder: PairFolder) -> str:
    """Knock-out of the gene that varies most among those expressed in at least a quarter of the cells; a fall by one
    where values are no counts."""
    genes = folder.genes.to_pydict()
    share = np.array(genes["n_cells_expressed"]) / np.maximum(genes["n_cells_measured"], 1)
    variance = np.nan_to_num(np.array(genes["variance"], dtype=float))
    candidates = share >= min(0.25, np.quantile(share, 0.9))
    symbol = genes["gene_symbol"][int(np.argmax(np.where(candidates, variance, -1)))]
    return f"{symbol}={'delta:-1' if folder.manifest['normalization'] == 'none' else 'ko'}"


def perturbed_rows(
    extractor: GppcFeatureExtractor, folder: PairFolder, perturbation: str | None
) -> tuple[str, np.ndarray]:
    """The perturbation to show, chosen where none is given, and rows of test pairs whose source cells are shown.

    Raises:
        ValueError: For an unknown gene, a malformed perturbation, or one of a gene that no test cell measures.
    """
    perturbation = choose_perturbation(folder) if perturbation is None else perturbation
    try:
        imposed = [gene for gene, _, _ in extractor.parse_perturbation(perturbation)]
    except ValueError as error:
        raise ValueError(f"`evaluation.perturbation`: {error}") from error
    table = folder.split("test")
    panel = table.column("source_panel").to_numpy()
    _, rows = np.unique(table.column("source_soma_joinid").to_numpy(), return_index=True)
    rows = rows[folder.panels[panel[rows]][:, imposed].all(axis=1)]
    if not len(rows):
        raise ValueError(f"`evaluation.perturbation` {perturbation!r}: no test cell measures the gene; name another.")
    return perturbation, np.sort(np.random.default_rng(0).permutation(rows)[:N_CELLS])


@torch.inference_mode()
def first_prediction(
    model, extractor: GppcFeatureExtractor, folder: PairFolder, perturbation: str | None = None
) -> FirstPrediction:
    """Predicts the source cells of test pairs with and without a perturbation; see [`perturbed_rows`]."""
    perturbation, rows = perturbed_rows(extractor, folder, perturbation)
    imposed = [gene for gene, _, _ in extractor.parse_perturbation(perturbation)]
    table = folder.split("test")
    values = PairDataset(table, folder.pairings).dense_cells("source", rows, extractor.vocab_size)
    device = next(model.parameters()).device
    inputs = extractor.from_values(values, folder.panels[table.column("source_panel").to_numpy()[rows]])
    encoded = model.eval().encode(**{name: tensor.to(device) for name, tensor in inputs.items()})
    change = extractor.perturbation_features(perturbation, model.levels(encoded))
    response = model.respond(encoded, **{name: tensor.to(device) for name, tensor in change.items()})
    delta = response.change.float().numpy(force=True)
    mean, error = delta.mean(axis=0), delta.std(axis=0) / np.sqrt(len(delta))
    others = np.setdiff1d(np.arange(len(mean)), imposed)
    order = others[np.argsort(-np.abs(mean[others]))]
    symbols = [extractor.gene_symbols[gene] for gene in order]
    return FirstPrediction(perturbation, symbols, mean[order], error[order], len(rows))
