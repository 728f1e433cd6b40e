"""Predicted expression after perturbations: AnnData in, AnnData out."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import torch
from tqdm.auto import tqdm

from data_scripts.cells.anndata_file import check_path
from data_scripts.files import write_atomically
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.inference.loading import load_model
from modeling_gppc.inference.perturbed_states import predicted_blocks
from modeling_gppc.inference.prediction_plan import LAYERS, Prediction, parse_perturbations, prepare_prediction
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction


def predict_anndata(
    model: str | Path | tuple[GppcForPerturbationPrediction, GppcFeatureExtractor],
    adata: anndata.AnnData,
    perturbations: str | Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
    **options,
) -> anndata.AnnData:
    """Predicts expression of cells after perturbations.

    Args:
        model (`str`, `Path` or tuple): A model folder, a Hub id, or a model with its feature extractor.
        adata (`AnnData`): Cells with raw counts (log values if the model's normalisation is `"none"`).
        perturbations (`str` or `Sequence[str]`): Such as `"STAT1=ko"` or `"STAT1=kd:0.8+IRF1=x3"`; see
            [`GppcFeatureExtractor.parse_perturbation`].
        batch_size (`int`, *optional*, defaults to 256): Rows that the model sees at once.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.
        **options: See [`prepare_prediction`]: `pairing`, `genes`, `device`, and those of [`ReadOptions`]:
            `layer`, `value_kind`, `gene_column`, `symbol_column`, `library_size_column`.

    Returns:
        `AnnData`, one row a perturbation and cell (perturbation by perturbation, with `obs.perturbation` and
        `obs.source_cell`), one column a gene of the model: `X` expected log values afterwards; layers `delta` (their
        change by the perturbation, [`~GppcForPerturbationPrediction.respond`]) and `std` (its standard deviation; zero
        where imposed); `obs.familiarity` (from 0, nothing like the imposed levels was seen in such cells and the
        prediction is one Gaussian's, to 1; absent for a model of a screen); `var` (`gene_symbol`, `measured` in the
        input); `varm["mean_delta"]` (a column a perturbation); `uns["gppc"]` where it comes from and which genes of the
        input the model does not know.

    Raises:
        ValueError: Before the model runs, for anything that cannot be predicted; see [`prepare_prediction`].
    """
    prediction = prepare_prediction(model, adata, perturbations, batch_size=batch_size, **options)
    for line in prediction.warnings:
        warnings.warn(line, stacklevel=2)
    arrays = {name: np.empty(prediction.shape, dtype=np.float32) for name in ("X", *LAYERS)}
    columns = {name: np.empty(prediction.shape[0], dtype=np.float32) for name in prediction.columns}
    mean_delta = fill(prediction, arrays | columns, batch_size, progress)
    output = anndata.AnnData(
        arrays.pop("X"),
        obs=prediction.obs.assign(**columns),
        var=prediction.var,
        layers=arrays,
        uns={"gppc": prediction.uns},
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
        cells (`str` or `Path`): The file to read; see [`open_cells`].
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
    check_path(cells, "`cells`")
    loaded = load_model(model, device)
    parse_perturbations(loaded[1], perturbations)  # a mistyped gene should not wait for a large file
    prediction = prepare_prediction(loaded, cells, perturbations, batch_size=batch_size, **options)
    prediction.uns.update({"model": str(model), "cells": str(cells)})
    with write_atomically(out) as temporary, h5py.File(temporary, "w") as file:
        obs = prediction.obs.assign(**dict.fromkeys(prediction.columns, np.float32(0)))
        frame = anndata.AnnData(obs=obs, var=prediction.var, uns={"gppc": prediction.uns})
        frame.varm["mean_delta"] = np.zeros((prediction.shape[1], len(prediction.texts)), dtype=np.float32)
        anndata.io.write_elem(file, "/", frame)
        arrays = {}
        for name in ("X", *LAYERS):
            path = name if name == "X" else f"layers/{name}"
            if path in file:
                del file[path]
            arrays[name] = file.create_dataset(path, shape=prediction.shape, dtype=np.float32)
            arrays[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        arrays |= {name: file[f"obs/{name}"] for name in prediction.columns}
        mean_delta = fill(prediction, arrays, batch_size, progress)
        file["varm/mean_delta"][...] = mean_delta
    return prediction, mean_delta


def fill(prediction: Prediction, arrays: dict, batch_size: int, progress: bool) -> np.ndarray:
    """Runs the model and writes every block into `arrays` (numpy or HDF5): `X` and layers, each of `prediction.shape`,
    and columns of obs.

    Returns:
        Mean of `delta` over the cells, float32 of shape `(n_genes, n_perturbations)`.
    """
    n_cells = len(prediction.cells)
    total = np.zeros((len(prediction.texts), prediction.shape[1]))
    with tqdm(total=prediction.shape[0], desc="Predicting", unit="cell", disable=not progress) as bar:
        for text, rows, block in predicted_blocks(prediction, batch_size):
            span = slice(text * n_cells + rows.start, text * n_cells + rows.stop)
            for name, array in arrays.items():
                array[span] = block[name]
            total[text] += block["delta"].sum(axis=0, dtype=np.float64)
            bar.update(rows.stop - rows.start)
    return (total.T / n_cells).astype(np.float32)
