"""Everything that is checked and decided before a model predicts."""

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from data_scripts.cells.read_options import ReadOptions
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.inference.input_cells import InputCells, input_cells
from modeling_gppc.inference.loading import load_model
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.screen_response_gppc import SOURCES

# Columns of obs that a prediction adds; columns of these names in the input are kept with `input_` in front.
ADDED_COLUMNS = ("perturbation", "source_cell")
LAYERS = ("delta", "std", "direction")


@dataclass
class Prediction:
    """
    Everything that is known before the model runs.

    Args:
        model, extractor: The model and what was saved with it.
        cells ([`InputCells`]): Its input.
        texts (`list[str]`): The perturbations as given.
        parsed (`list`): The same as lists of (vocabulary id, action, amount).
        query (`np.ndarray`): Vocabulary ids of the genes to predict.
        obs, var, uns: Of the output.
        warnings (`list[str]`): What a person should know, a line each.
    """

    model: GppcForPerturbationPrediction
    extractor: GppcFeatureExtractor
    cells: InputCells
    texts: list[str]
    parsed: list[list[tuple[int, str, float]]]
    query: np.ndarray
    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict
    warnings: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (perturbation by perturbation, all cells each) and genes of the output."""
        return len(self.texts) * len(self.cells), len(self.query)


def prepare_prediction(
    model: str | Path | tuple[GppcForPerturbationPrediction, GppcFeatureExtractor],
    adata: str | Path | anndata.AnnData,
    perturbations: str | Sequence[str],
    *,
    genes: Sequence[str] | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    **reading,
) -> Prediction:
    """Checks everything before the model runs.

    Args:
        model, adata, perturbations, batch_size: As in [`predict_anndata`]; cells may also be a file.
        genes (`Sequence[str]`, *optional*): Genes to predict; defaults to all of the model.
        device (`str`, *optional*): See [`load_model`]; only for a model given by name.
        **reading: Where counts, gene names and counts over all genes are; see [`ReadOptions`].

    Raises:
        ValueError: For a missing model, a malformed perturbation or one given twice, a gene that the model does not
            know, an option out of range, or cells that are not raw counts of known genes.
    """
    reading = ReadOptions(**reading)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; wanted at least 1.")
    name = "a model in memory" if isinstance(model, tuple) else str(model)
    network, extractor = model if isinstance(model, tuple) else load_model(model, device)
    texts, parsed = _parse_perturbations(extractor, perturbations)
    query = np.arange(extractor.vocab_size) if genes is None else extractor.gene_index(list(genes))
    if len(query) == 0 or len(np.unique(query)) != len(query):
        raise ValueError("`genes` names no gene, or one twice; give each gene to predict once.")
    cells = input_cells(adata, extractor, reading)
    perturbed, warnings = _perturbed_genes(extractor, cells, parsed)
    warnings = [*cells.warnings, *warnings]
    uns = {
        "model": name,
        "version": metadata.version("gppc"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "perturbations": np.array(texts, dtype=object),
        "organism": extractor.organism,
        "normalization": extractor.normalization,
        "target_sum": extractor.target_sum,
        "library_size": cells.library_source,
        "n_cells": len(cells),
        "n_known_genes": len(cells.gene_index),
        "unknown_genes": cells.unknown,
        "perturbed_genes": perturbed,
        "warnings": np.array(warnings, dtype=object),
    }
    if network.config.use_screen_response:
        uns["sources"] = np.array(_answer_sources(network, extractor, texts), dtype=object)
    columns = {
        "gene_symbol": [extractor.gene_symbols[gene] for gene in query],
        "measured": np.isin(query, cells.gene_index),
    }
    var = pd.DataFrame(columns, index=pd.Index([extractor.gene_ids[gene] for gene in query], name="gene_id"))
    obs = _output_obs(cells.obs, texts)
    return Prediction(network.eval(), extractor, cells, texts, parsed, query, obs, var, uns, warnings)


def _parse_perturbations(
    extractor: GppcFeatureExtractor, perturbations: str | Sequence[str]
) -> tuple[list[str], list[list[tuple[int, str, float]]]]:
    """Texts as they are shown, and what they mean; see [`GppcFeatureExtractor.parse_perturbation`]."""
    texts = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    texts = [text.strip() or "control" for text in texts]
    if not texts:
        raise ValueError("`perturbations` is empty; wanted at least one, such as `STAT1=ko`.")
    if len(set(texts)) != len(texts):
        text, times = Counter(texts).most_common(1)[0]
        raise ValueError(f"`perturbations` names {text!r} {times} times; give it once.")
    return texts, [extractor.parse_perturbation(text) for text in texts]


def _answer_sources(
    model: GppcForPerturbationPrediction, extractor: GppcFeatureExtractor, texts: list[str]
) -> list[str]:
    """Where a model of a screen takes its answer to each perturbation from, in words; see `SOURCES`."""
    features = extractor.perturbation_features(texts, model.levels().expand(len(texts), -1))
    device = next(model.parameters()).device
    source = model.respond(**{name: tensor.to(device) for name, tensor in features.items()}).source
    return [SOURCES[index] for index in source.tolist()]


def _output_obs(obs: pd.DataFrame, texts: list[str]) -> pd.DataFrame:
    taken = {name: f"input_{name}" for name in ADDED_COLUMNS if name in obs}
    source = obs.rename(columns=taken)
    output = source if len(texts) == 1 else pd.concat([source] * len(texts))
    names = np.tile(obs.index.astype(str).to_numpy(), len(texts))
    output = output.assign(
        perturbation=pd.Categorical(np.repeat(texts, len(obs)), categories=texts), source_cell=names
    )
    if len(texts) == 1:
        return output.set_axis(names, axis=0)
    return output.set_axis([f"{cell}|{text}" for cell, text in zip(names, output["perturbation"])], axis=0)


def _perturbed_genes(
    extractor: GppcFeatureExtractor, cells: InputCells, parsed: list[list[tuple[int, str, float]]]
) -> tuple[pd.DataFrame, list[str]]:
    """In how many cells the perturbed genes are measured and expressed, and warnings where they are not."""
    position = {int(gene): column for column, gene in enumerate(cells.gene_index)}
    lowered = {gene for spec in parsed for gene, action, _ in spec if action == "factor"}
    records, warnings = [], []
    for gene in sorted({gene for spec in parsed for gene, _, _ in spec}):
        if gene >= extractor.vocab_size:  # a target of a screen that its panel does not measure
            name = extractor.target_ids[gene - extractor.vocab_size]
            records.append((name, name, False, 0))
            continue
        symbol, column = extractor.gene_symbols[gene], position.get(gene)
        expressed = 0 if column is None else int((cells.counts[:, [column]] != 0).sum())
        records.append((extractor.gene_ids[gene], symbol, column is not None, expressed))
        if column is None:
            warnings.append(
                f"`{symbol}` is perturbed but not measured in the input; its level before is estimated from the "
                "other genes."
            )
        elif gene in lowered and expressed < len(cells):
            warnings.append(
                f"`{symbol}` is not expressed in {len(cells) - expressed} of {len(cells)} cells, where removing or "
                "scaling its expression leaves it at zero."
            )
    return pd.DataFrame(records, columns=["gene_id", "gene_symbol", "measured", "n_cells_expressed"]), warnings
