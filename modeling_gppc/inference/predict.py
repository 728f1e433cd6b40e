"""Predicted expression after perturbations: AnnData in, AnnData out."""

import datetime
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor, change_of_log_value, close_matches
from modeling_gppc.inference.input_cells import InputCells, check_cells_path, input_cells, read_cells
from modeling_gppc.inference.loading import load_model
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction

REFERENCES = ("unperturbed", "held")
# Columns of obs that a prediction adds; columns of these names in the input are kept with `input_` in front.
ADDED_COLUMNS = ("perturbation", "source_cell")


@dataclass
class Prediction:
    """
    Everything that is known before the model runs.

    Args:
        model, extractor: The model and what was saved with it.
        cells ([`InputCells`]): Its input.
        texts (`list[str]`): The perturbations as given.
        parsed (`list[list[tuple[int, str, float]]]`): The same as (vocabulary id, action, amount).
        pairing (`str`): Context that the cell before and the cell after share.
        query (`np.ndarray`): Vocabulary ids of the genes to predict.
        reference (`str`): What `delta` is the difference from.
        obs (`pd.DataFrame`), var (`pd.DataFrame`): Of the output.
        uns (`dict`): Where the prediction comes from.
        warnings (`list[str]`): What a person should know, a line each.
    """

    model: GppcForPerturbationPrediction
    extractor: GppcFeatureExtractor
    cells: InputCells
    texts: list[str]
    parsed: list[list[tuple[int, str, float]]]
    pairing: str
    query: np.ndarray
    reference: str
    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict
    warnings: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (perturbation by perturbation, all cells each) and genes of the output."""
        return len(self.texts) * len(self.cells), len(self.query)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers beside X; the origin's form has no variance and no linear response."""
        if self.model.config.architecture != "latents":
            return ("delta",)
        return ("delta", "std", "linear_response_delta")

    @property
    def perturbed(self) -> np.ndarray:
        """Vocabulary ids of all perturbed genes, ascending."""
        return np.unique([gene for spec in self.parsed for gene, _, _ in spec]).astype(np.int64)


def predict_anndata(
    model: str | Path | tuple[GppcForPerturbationPrediction, GppcFeatureExtractor],
    adata: anndata.AnnData,
    perturbations: str | Sequence[str],
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    library_size_key: str | None = None,
    pairing: str | None = None,
    genes: Sequence[str] | None = None,
    reference: str = "unperturbed",
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> anndata.AnnData:
    """Predicts expression of cells after perturbations.

    Args:
        model (`str`, `Path` or tuple): A model folder, a Hub id, or a model with its feature extractor.
        adata (`AnnData`): Cells with raw counts (log values if the model's normalisation is `"none"`).
        perturbations (`str` or `Sequence[str]`): Such as `"STAT1=ko"` or `"STAT1=kd:0.8+IRF1=x3"`; see
            [`GppcFeatureExtractor.parse_perturbation`].
        layer, gene_column, library_size_key: Where counts, gene names and counts over all genes are; see
            [`input_cells`].
        pairing (`str`, *optional*): Context that the cell before and the cell after share, one of the model's
            `config.pairings`; defaults to `config.default_pairing`.
        genes (`Sequence[str]`, *optional*): Genes to predict; defaults to all that the model knows.
        reference (`str`, *optional*, defaults to `"unperturbed"`): What `delta` is the difference from: the
            prediction for the same cell without a perturbation, or (`"held"`) with the same genes imposed at the
            cell's own level, which removes what merely knowing their level says.
        batch_size (`int`, *optional*, defaults to 256): Rows that the model sees at once.
        device (`str`, *optional*): See [`load_model`]; only for a model given by name.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `AnnData`, one row a perturbation and cell (perturbation by perturbation, with `obs.perturbation` and
        `obs.source_cell`), one column a gene of the model: `X` expected log values; layers `delta` (difference from the
        reference), `std` (of a single cell's log value; zero where imposed) and `linear_response_delta` (the
        closed-form part of `delta`); `var` (`gene_symbol`, `measured` in the input); `varm["mean_delta"]` (a column a
        perturbation); `uns["gppc"]` where it comes from and which genes of the input the model does not know.

    Raises:
        ValueError: Before the model runs, for anything that cannot be predicted; see [`prepare_prediction`].
    """
    prediction = prepare_prediction(
        model,
        adata,
        perturbations,
        layer=layer,
        gene_column=gene_column,
        library_size_key=library_size_key,
        pairing=pairing,
        genes=genes,
        reference=reference,
        batch_size=batch_size,
        device=device,
    )
    for line in prediction.warnings:
        warnings.warn(line, stacklevel=2)
    arrays = {name: np.empty(prediction.shape, dtype=np.float32) for name in ("X", *prediction.layers)}
    mean_delta = fill(prediction, arrays, batch_size, progress)
    output = anndata.AnnData(
        arrays.pop("X"), obs=prediction.obs, var=prediction.var, layers=arrays, uns={"gppc": prediction.uns}
    )
    output.varm["mean_delta"] = mean_delta
    return output


def predict_file(
    model: str | Path,
    cells: str | Path,
    perturbations: str | Sequence[str],
    out: str | Path,
    *,
    overwrite: bool = False,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool = True,
    **options,
) -> tuple[Prediction, np.ndarray]:
    """Predicts the cells of a file into a file, block by block: memory does not grow with the perturbations.

    Args:
        model (`str` or `Path`): A model folder or a Hub id.
        cells (`str` or `Path`): The `.h5ad` file to read.
        perturbations, batch_size, device, progress, **options: See [`predict_anndata`].
        out (`str` or `Path`): The `.h5ad` file to write, with the content that [`predict_anndata`] returns; it
            appears under its name only when it is complete.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a file of that name.

    Returns:
        What was predicted, and the mean `delta` of each gene, shape `(n_genes, n_perturbations)`.

    Raises:
        ValueError: Before the model runs; also if `out` exists or cannot be such a file.
    """
    out = Path(out)
    if out.suffix != ".h5ad":
        raise ValueError(f"`out` is {str(out)!r}; wanted a file name that ends in .h5ad.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ValueError(f"`out` {str(out)!r} exists; choose another name or replace it with `overwrite`.")
    check_cells_path(cells)
    loaded = load_model(model, device)
    _parse(loaded[1], perturbations)  # a mistyped gene should not wait for a large file
    prediction = prepare_prediction(loaded, read_cells(cells), perturbations, batch_size=batch_size, **options)
    prediction.uns.update({"model": str(model), "cells": str(cells)})
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            frame = anndata.AnnData(obs=prediction.obs, var=prediction.var, uns={"gppc": prediction.uns})
            frame.varm["mean_delta"] = np.zeros((prediction.shape[1], len(prediction.texts)), dtype=np.float32)
            anndata.io.write_elem(file, "/", frame)
            arrays = {}
            for name in ("X", *prediction.layers):
                path = name if name == "X" else f"layers/{name}"
                if path in file:
                    del file[path]
                arrays[name] = file.create_dataset(path, shape=prediction.shape, dtype=np.float32)
                arrays[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            mean_delta = fill(prediction, arrays, batch_size, progress)
            file["varm/mean_delta"][...] = mean_delta
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return prediction, mean_delta


def prepare_prediction(
    model: str | Path | tuple[GppcForPerturbationPrediction, GppcFeatureExtractor],
    adata: anndata.AnnData,
    perturbations: str | Sequence[str],
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    library_size_key: str | None = None,
    pairing: str | None = None,
    genes: Sequence[str] | None = None,
    reference: str = "unperturbed",
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Prediction:
    """Checks everything before the model runs; arguments as in [`predict_anndata`].

    Raises:
        ValueError: For a missing model, a malformed perturbation or one given twice, a gene or pairing that the model
            does not know, an option out of range, or cells that are not raw counts of known genes.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; wanted at least 1.")
    if reference not in REFERENCES:
        raise ValueError(f"`reference` is {reference!r}; wanted one of {', '.join(REFERENCES)}.")
    name = "a model in memory" if isinstance(model, tuple) else str(model)
    network, extractor = model if isinstance(model, tuple) else load_model(model, device)
    texts, parsed = _parse(extractor, perturbations)
    pairings = list(network.config.pairings)
    pairing = network.config.default_pairing if pairing is None else pairing
    if pairing not in pairings:
        raise ValueError(
            f"`pairing` is {pairing!r}, which this model was not trained on{close_matches(pairing, pairings)}"
        )
    query = np.arange(extractor.vocab_size) if genes is None else extractor.gene_index(list(genes))
    if len(query) == 0 or len(np.unique(query)) != len(query):
        raise ValueError("`genes` names no gene, or one twice; give each gene to predict once.")
    cells = input_cells(adata, extractor, layer=layer, gene_column=gene_column, library_size_key=library_size_key)
    prediction = Prediction(
        model=network.eval(),
        extractor=extractor,
        cells=cells,
        texts=texts,
        parsed=parsed,
        pairing=pairing,
        query=query,
        reference=reference,
        obs=_output_obs(adata.obs, texts),
        var=pd.DataFrame(
            {
                "gene_symbol": [extractor.gene_symbols[gene] for gene in query],
                "measured": np.isin(query, cells.gene_index),
            },
            index=pd.Index([extractor.gene_ids[gene] for gene in query], name="gene_id"),
        ),
        uns={},
        warnings=list(cells.warnings),
    )
    counts = _check_perturbed(prediction)
    prediction.uns = {
        "model": name,
        "version": metadata.version("gppc"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "perturbations": np.array(texts, dtype=object),
        "pairing": pairing,
        "reference": reference,
        "organism": extractor.organism,
        "normalization": extractor.normalization,
        "target_sum": extractor.target_sum,
        "library_size": cells.library_source,
        "n_cells": len(cells),
        "n_known_genes": len(cells.gene_index),
        "unknown_genes": cells.unknown,
        "perturbed_genes": counts,
        "warnings": np.array(prediction.warnings, dtype=object),
    }
    return prediction


def _parse(
    extractor: GppcFeatureExtractor, perturbations: str | Sequence[str]
) -> tuple[list[str], list[list[tuple[int, str, float]]]]:
    texts = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    texts = [text.strip() or "control" for text in texts]
    if not texts:
        raise ValueError("`perturbations` is empty; wanted at least one, such as `STAT1=ko`.")
    if len(set(texts)) != len(texts):
        text, times = Counter(texts).most_common(1)[0]
        raise ValueError(f"`perturbations` names {text!r} {times} times; give it once.")
    return texts, [extractor.parse_perturbation(text) for text in texts]


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


def _check_perturbed(prediction: Prediction) -> pd.DataFrame:
    """Counts in how many cells the perturbed genes are measured and expressed; warns where they are not."""
    cells, extractor = prediction.cells, prediction.extractor
    position = {int(gene): column for column, gene in enumerate(cells.gene_index)}
    lowered = {gene for spec in prediction.parsed for gene, action, amount in spec if action == "factor"}
    records = []
    for gene in prediction.perturbed.tolist():
        symbol, column = extractor.gene_symbols[gene], position.get(gene)
        expressed = 0 if column is None else int((cells.counts[:, [column]] != 0).sum())
        records.append((extractor.gene_ids[gene], symbol, column is not None, expressed))
        if column is None:
            prediction.warnings.append(
                f"`{symbol}` is perturbed but not measured in the input; its level before is estimated from the "
                "other genes."
            )
        elif gene in lowered and expressed < len(cells):
            prediction.warnings.append(
                f"`{symbol}` is not expressed in {len(cells) - expressed} of {len(cells)} cells, where removing or "
                "scaling its expression leaves it at zero."
            )
    return pd.DataFrame(records, columns=["gene_id", "gene_symbol", "measured", "n_cells_expressed"])


def fill(prediction: Prediction, arrays: dict, batch_size: int, progress: bool) -> np.ndarray:
    """Runs the model and writes every block into `arrays` (numpy or HDF5), `X` and layers, each of `prediction.shape`.

    Returns:
        Mean of `delta` over the cells, float32 of shape `(n_genes, n_perturbations)`.
    """
    n_cells = len(prediction.cells)
    total = np.zeros((len(prediction.texts), prediction.shape[1]))
    with tqdm(total=prediction.shape[0], desc="Predicting", unit="cell", disable=not progress) as bar:
        for text, rows, block in _blocks(prediction, batch_size):
            span = slice(text * n_cells + rows.start, text * n_cells + rows.stop)
            for name, array in arrays.items():
                array[span] = block[name]
            total[text] += block["delta"].sum(axis=0, dtype=np.float64)
            bar.update(rows.stop - rows.start)
    return (total.T / n_cells).astype(np.float32)


def _blocks(prediction: Prediction, batch_size: int) -> Iterator[tuple[int, slice, dict[str, np.ndarray]]]:
    """Yields (perturbation, cells, values); each cell is encoded once, then decoded for all perturbations."""
    n_cells, n_texts = len(prediction.cells), len(prediction.texts)
    for start in range(0, n_cells, batch_size):
        rows = slice(start, min(start + batch_size, n_cells))
        n_rows = rows.stop - rows.start
        states = _EncodedCells(prediction, rows)
        at_once = max(1, batch_size // n_rows)
        for first in range(0, n_texts, at_once):
            chunk = range(first, min(first + at_once, n_texts))
            values = states.predict(chunk)
            for position, text in enumerate(chunk):
                part = slice(position * n_rows, (position + 1) * n_rows)
                yield text, rows, {name: array[part] for name, array in values.items()}


class _EncodedCells:
    """Some cells, encoded once, and their prediction without a perturbation."""

    def __init__(self, prediction: Prediction, rows: slice):
        self.prediction = prediction
        self.model = prediction.model
        self.device = next(self.model.parameters()).device
        features = prediction.cells.features(prediction.extractor, rows)
        self.features = {name: tensor.to(self.device) for name, tensor in features.items()}
        self.n_cells = rows.stop - rows.start
        self.query = torch.from_numpy(prediction.query).to(self.device)
        pairings = list(self.model.config.pairings)
        self.pairing = pairings.index(prediction.pairing)
        with torch.inference_mode():
            self.encoded = self.model.encode(**self.features) if self.model.origin is None else None
            self.levels = self._own_levels()
            self.unperturbed = None
            if prediction.reference == "unperturbed":
                empty = np.zeros((self.n_cells, 0))
                self.unperturbed = self._run(empty.astype(np.int64), empty, empty.astype(np.int64))

    def _own_levels(self) -> np.ndarray:
        """Log values of the perturbed genes before the perturbation, estimated where not measured, `(n, genes)`."""
        genes = torch.from_numpy(self.prediction.perturbed).to(self.device).expand(self.n_cells, -1)
        if self.encoded is None:
            ids, values = self.features["input_ids"], self.features["expression_values"]
            dense = values.new_zeros(self.n_cells, self.model.config.vocab_size).scatter_add(1, ids, values)
            levels = dense.gather(1, genes)
        else:
            zeros = torch.zeros(genes.shape, device=self.device)
            levels = self.model.model.imposed_levels(self.encoded, genes, zeros)
        return levels.double().cpu().numpy()

    def _run(self, ids: np.ndarray, changes: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
        """Model outputs for rows that repeat the cells, perturbation by perturbation."""
        index = torch.arange(len(ids), device=self.device) % self.n_cells
        inputs = {
            "perturbation_ids": torch.from_numpy(ids).to(self.device),
            "perturbation_values": torch.from_numpy(changes.astype(np.float32)).to(self.device),
            "perturbation_mask": torch.from_numpy(mask).to(self.device),
            "pairing_ids": torch.full_like(index, self.pairing),
            "query_ids": self.query,
        }
        if self.encoded is None:
            repeated = {name: tensor[index] for name, tensor in self.features.items()}
            return {"X": self.model(**repeated, **inputs).logits.float()}
        output = self.model.decode(self.encoded, **inputs, state_index=index)
        return {
            "X": output.logits.float(),
            "std": (0.5 * output.logvar.float()).exp(),
            "linear_response_delta": output.linear_response.float(),
        }

    @torch.inference_mode()
    def predict(self, chunk: range) -> dict[str, np.ndarray]:
        """X and layers for some of the perturbations, rows perturbation by perturbation, cell by cell."""
        prediction, n_cells = self.prediction, self.n_cells
        specs = [prediction.parsed[text] for text in chunk]
        width = max(map(len, specs))
        ids = np.zeros((len(specs), n_cells, width), dtype=np.int64)
        changes = np.zeros(ids.shape)
        mask = np.zeros(ids.shape, dtype=np.int64)
        column = {int(gene): place for place, gene in enumerate(prediction.perturbed)}
        for row, spec in enumerate(specs):
            for place, (gene, action, amount) in enumerate(spec):
                ids[row, :, place] = gene
                mask[row, :, place] = 1
                changes[row, :, place] = change_of_log_value(self.levels[:, column[gene]], action, amount)
        shape = (len(specs) * n_cells, width)
        ids, changes, mask = ids.reshape(shape), changes.reshape(shape), mask.reshape(shape)
        after = self._run(ids, changes, mask)
        if self.unperturbed is None:
            before = self._run(ids, np.zeros(shape), mask)
        else:
            before = {name: tensor.repeat(len(specs), 1) for name, tensor in self.unperturbed.items()}
        values = {"X": after["X"], "delta": after["X"] - before["X"]}
        if "std" in after:
            rows, places = np.nonzero(mask)
            imposed = torch.zeros(len(ids), self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            imposed[rows, ids[rows, places]] = True
            values["std"] = after["std"].masked_fill(imposed[:, self.query], 0.0)
            name = "linear_response_delta"
            values[name] = after[name] - before[name]
        return {name: tensor.cpu().numpy() for name, tensor in values.items()}
