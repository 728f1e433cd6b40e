"""Predicted expression after perturbations: AnnData in, AnnData out."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import torch
from tqdm.auto import tqdm

from data_scripts.cells.anndata_file import check_path
from data_scripts.files import write_atomically
from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor
from modeling_gppc.inference.prediction_plan import LAYERS, Prediction, prepare_prediction
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
        **options: See [`prepare_prediction`]: `genes`, `device`, and those of [`ReadOptions`]:
            `layer`, `value_kind`, `gene_column`, `symbol_column`, `library_size_column`.

    Returns:
        `AnnData`, one row a perturbation and cell (perturbation by perturbation, with `obs.perturbation` and
        `obs.source_cell`), one column a gene of the model: `X` log values of the cells afterwards; layers `delta` (their
        change by the perturbation, [`~GppcForPerturbationPrediction.respond`]), `std` (its standard deviation; zero where
        imposed) and `direction` (probability that its sign is right if the gene changes); `var` (`gene_symbol`,
        `measured` in the input); `varm["mean_delta"]` (a column a perturbation); `uns["gppc"]` where it comes from and
        which genes of the input the model does not know.

    Raises:
        ValueError: Before the model runs, for anything that cannot be predicted; see [`prepare_prediction`].
    """
    prediction = prepare_prediction(model, adata, perturbations, batch_size=batch_size, **options)
    for line in prediction.warnings:
        warnings.warn(line, stacklevel=2)
    layers = {name: np.empty(prediction.shape, dtype=np.float32) for name in ("X", *LAYERS)}
    mean_delta = _fill(prediction, layers, batch_size, progress)
    return anndata.AnnData(
        layers.pop("X"),
        obs=prediction.obs,
        var=prediction.var,
        layers=layers,
        varm={"mean_delta": mean_delta},
        uns={"gppc": prediction.uns},
    )


def predict_file(
    model: str | Path,
    cells: str | Path,
    perturbations: str | Sequence[str],
    out: str | Path,
    *,
    overwrite: bool = False,
    batch_size: int = 256,
    progress: bool = True,
    **options,
) -> tuple[Prediction, np.ndarray]:
    """Predicts the cells of a file into a file, block by block: memory does not grow with the perturbations.

    Args:
        model (`str` or `Path`): A model folder or a Hub id.
        cells (`str` or `Path`): The file to read; see [`open_cells`].
        perturbations, batch_size, progress, **options: See [`predict_anndata`].
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
    prediction = prepare_prediction(model, cells, perturbations, batch_size=batch_size, **options)
    prediction.uns["cells"] = str(cells)
    with write_atomically(out) as temporary, h5py.File(temporary, "w") as file:
        empty = {"mean_delta": np.zeros((prediction.shape[1], len(prediction.texts)), dtype=np.float32)}
        frame = anndata.AnnData(obs=prediction.obs, var=prediction.var, varm=empty, uns={"gppc": prediction.uns})
        anndata.io.write_elem(file, "/", frame)
        arrays = {}
        for name in ("X", *LAYERS):
            path = name if name == "X" else f"layers/{name}"
            if path in file:
                del file[path]
            arrays[name] = file.create_dataset(path, shape=prediction.shape, dtype=np.float32)
            arrays[name].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        mean_delta = _fill(prediction, arrays, batch_size, progress)
        file["varm/mean_delta"][...] = mean_delta
    return prediction, mean_delta


def _fill(prediction: Prediction, arrays: dict, batch_size: int, progress: bool) -> np.ndarray:
    """Runs the model, writes every block into `arrays` (numpy or HDF5) and returns the mean of `delta` over cells."""
    n_cells = len(prediction.cells)
    total = np.zeros((len(prediction.texts), prediction.shape[1]))
    with tqdm(total=prediction.shape[0], desc="Predicting", unit="cell", disable=not progress) as bar:
        for text, rows, block in _predicted_blocks(prediction, batch_size):
            span = slice(text * n_cells + rows.start, text * n_cells + rows.stop)
            for name, array in arrays.items():
                array[span] = block[name]
            total[text] += block["delta"].sum(axis=0, dtype=np.float64)
            bar.update(rows.stop - rows.start)
    return (total.T / n_cells).astype(np.float32)


@torch.inference_mode()
def _predicted_blocks(prediction: Prediction, batch_size: int) -> Iterator[tuple[int, slice, dict[str, np.ndarray]]]:
    """Yields (perturbation, cells, values): `X` and the layers, by name.

    Each cell is encoded once and asked about all perturbations, `batch_size` rows at a time.
    """
    model, extractor = prediction.model, prediction.extractor
    device = next(model.parameters()).device
    n_cells, n_texts, vocab_size = len(prediction.cells), len(prediction.texts), extractor.vocab_size
    whole = np.array_equal(prediction.query, np.arange(vocab_size))
    query = None if whole else torch.from_numpy(prediction.query).to(device)
    for start in range(0, n_cells, batch_size):
        rows = slice(start, min(start + batch_size, n_cells))
        n_rows = rows.stop - rows.start
        features = prediction.cells.features(extractor, rows)
        encoded = model.encode(**{name: tensor.to(device) for name, tensor in features.items()})
        levels = model.levels(encoded).numpy(force=True)
        at_once = max(1, batch_size // n_rows)
        for first in range(0, n_texts, at_once):
            texts = prediction.texts[first : first + at_once]
            index = np.tile(np.arange(n_rows), len(texts))
            change = extractor.perturbation_features(np.repeat(texts, n_rows).tolist(), levels[index])
            output = model.respond(
                encoded,
                **{name: tensor.to(device) for name, tensor in change.items()},
                query_ids=query,
                state_index=torch.from_numpy(index).to(device),
            )
            values = {
                "X": output.expression,
                "delta": output.change,
                "std": output.variance.sqrt(),
                "direction": output.direction,
            }
            arrays = {name: tensor.float().numpy(force=True) for name, tensor in values.items()}
            for position in range(len(texts)):
                part = slice(position * n_rows, (position + 1) * n_rows)
                yield first + position, rows, {name: array[part] for name, array in arrays.items()}
