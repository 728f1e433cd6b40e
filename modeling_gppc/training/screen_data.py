"""Pairs of a CRISPR screen for a training run: of its control cells alone, or of some perturbations as well."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import MANIFEST, PairFolder
from modeling_gppc.fitting.factor_model import choose_rank
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.training.response_check import check_responses

# AnnData and what reads screens are imported where a screen is read: a run on finished pairs needs none of it.


@dataclass
class ScreenTrainingOptions:
    """
    What of a screen a run trains on, and how the file is read.

    Args:
        train_on (`str`, *optional*, defaults to `"controls"`): `"controls"`: pairs of control cells, no perturbed cell
            is read (in context); `"perturbations"`: also pairs of a control and a perturbed cell, of every fold over
            perturbations but one (fine-tuned).
        folds, fold (`int`, *optional*, defaults to 5 and 0): Division of the perturbations and the part left out.
        fold_seed (`int`, *optional*, defaults to 0): Of that division.
        max_genes (`int`, *optional*, defaults to 2,000): Most variable genes among controls that are kept, targets
            always among them.
        pairs_per_cell (`int`, *optional*, defaults to 10): Pairs whose target is the same cell.
        regress_covariates (`bool`, *optional*, defaults to `True`): Take library size, detected genes, mitochondrial
            share and batch out of the values, where the library size counts all genes.
        refit (`bool`, *optional*, defaults to `True`): With `"controls"`: fit the linear response once more on all of
            them after the run's pairs were scored.
        value_kind (`str`, *optional*, defaults to `"counts"`): `"counts"` or `"log"`.
        perturbation_column, batch_column, cell_line_column, library_size_column, layer (`str`, *optional*): Where they
            are not found by their usual names.
        min_cells (`int`, *optional*, defaults to 10): Perturbations with fewer cells are set aside.
    """

    train_on: Literal["controls", "perturbations"] = "controls"
    folds: int = 5
    fold: int = 0
    fold_seed: int = 0
    max_genes: int = 2_000
    pairs_per_cell: int = 10
    regress_covariates: bool = True
    refit: bool = True
    value_kind: Literal["counts", "log"] = "counts"
    perturbation_column: str | None = None
    batch_column: str | None = None
    cell_line_column: str | None = None
    library_size_column: str | None = None
    layer: str | None = None
    min_cells: int = 10

    def __post_init__(self):
        if self.folds < 2 or not 0 <= self.fold < self.folds:
            raise ValueError(
                f"`data.screen_options.fold` is {self.fold} of {self.folds} `folds`; wanted at least 2 folds, counted "
                "from 0."
            )
        for name, least in (("max_genes", 10), ("pairs_per_cell", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`data.screen_options.{name}` is {getattr(self, name)}; wanted at least {least}.")

    def read(self, path: str):
        """The screen with all its genes."""
        from data_scripts.cells.screens import ScreenOptions, read_screen

        names = ("perturbation_column", "batch_column", "cell_line_column", "library_size_column", "layer")
        options = {name: getattr(self, name) for name in (*names, "value_kind", "min_cells")}
        return read_screen(path, ScreenOptions(**options))


def prepare_screen_pairs(
    path: str, options: ScreenTrainingOptions, folder: Path, seed: int = 0, n_factors: int | None = None
) -> PairFolder:
    """Writes the pairs of a run on a screen into `folder`, or opens them where they are there.

    Control cells are divided into training (eight tenths), validation and test cells; with `"perturbations"` a tenth of
    the cells of every training perturbation validate, and the perturbations of the fold left out are the test pairs.
    Genes, slopes of covariates and the number of factors are chosen on training controls.

    Args:
        path (`str`): AnnData file of the screen.
        options (`ScreenTrainingOptions`): What is read of it.
        folder (`Path`): Where the pairs go.
        seed (`int`, *optional*, defaults to 0): Divides the cells and draws the pairs.
        n_factors (`int`, *optional*): What the run states; chosen by held-out likelihood when absent.

    Raises:
        ValueError: For a screen that cannot be used, or a folder with pairs of another one.
    """
    from data_scripts.cells.screen_cells import cells_digest, keep_genes, some_cells, technical_residuals
    from data_scripts.cells.screen_splits import perturbation_folds
    from data_scripts.cells.screens import CONTROL
    from data_scripts.pairs.leak_guards import SplitPlan, refuse_leaks
    from data_scripts.pairs.screen_pairs import CONTROL_PAIRING, SCREEN_PAIRING, write_split_pairs

    screen = options.read(path)
    generator = np.random.default_rng(seed)
    controls = generator.permutation(screen.cells_of(CONTROL))
    cut = [int(0.8 * len(controls)), int(0.9 * len(controls))]
    rows = dict(zip(("train", "validation", "test"), np.split(controls, cut)))
    # Cells that tell how good the choices were have no part in making them.
    fitted_on = np.sort(rows["train"])
    screen = keep_genes(screen, options.max_genes, fitted_on)
    trained_on: list[str] = []
    held_out: list[str] = []
    if options.train_on == "perturbations":
        fold = perturbation_folds(screen, options.folds, options.fold_seed)[options.fold]
        trained_on, held_out = fold.train, fold.test
        seen = generator.permutation(fold.train_cells)
        cut = int(0.9 * len(seen))
        rows["train"] = np.concatenate([rows["train"], seen[:cut]])
        rows["validation"] = np.concatenate([rows["validation"], seen[cut:]])
        rows["test"] = np.concatenate([rows["test"], fold.test_cells])
    refuse_leaks(
        SplitPlan(
            train_cells=screen.barcodes[rows["train"]],
            validation_cells=screen.barcodes[rows["validation"]],
            test_cells=screen.barcodes[rows["test"]],
            panel_cells=screen.barcodes[fitted_on],
            normalisation_cells=screen.barcodes[fitted_on],
            selection_cells=screen.barcodes[np.concatenate([fitted_on, rows["validation"]])],
            train_perturbations=trained_on,
            test_perturbations=held_out,
        )
    )
    if options.regress_covariates:
        every = np.arange(len(screen.values))
        screen.values = technical_residuals(screen, every, fitted_on).astype(np.float32)
    provenance = {
        "name": screen.name,
        "cells_digest": cells_digest(screen),
        "train_on": options.train_on,
        "regressed": bool(options.regress_covariates and screen.library_is_complete),
        "train_perturbations": trained_on,
        "held_out_perturbations": held_out,
        "n_control_cells": len(controls),
        "n_training_controls": len(fitted_on),
        "refit": options.train_on == "controls" and options.refit,
        "seed": seed,
    }
    if (folder / MANIFEST).is_file():
        stated = dict(json.loads((folder / MANIFEST).read_text()).get("screen") or {})
        stated.pop("n_factors", None)
        if stated != provenance:
            raise ValueError(f"`output_dir` holds pairs of another screen or fold ({folder}); choose another folder.")
        return PairFolder(folder)
    labels = {name: [CONTROL, *trained_on] for name in ("train", "validation")} | {"test": [CONTROL, *held_out]}
    parts = {name: (some_cells(screen, np.sort(cells)), labels[name]) for name, cells in rows.items()}
    # A pairing that no pair has would leave the model with weights that nothing trained.
    pairings = [CONTROL_PAIRING] if options.train_on == "controls" else [CONTROL_PAIRING, SCREEN_PAIRING]
    return write_split_pairs(
        folder,
        parts,
        provenance=provenance | {"n_factors": n_factors or choose_rank(screen.values[fitted_on], seed)},
        pairings=pairings,
        pairs_per_cell=options.pairs_per_cell,
        seed=seed,
    )


def screen_entry(folder: PairFolder) -> dict:
    """What a folder of pairs says of the screen they were made of; empty where they are of none."""
    entry = folder.manifest.get("screen")
    return entry if isinstance(entry, dict) else {}


@torch.no_grad()
def refit_on_all_controls(
    model: GppcForPerturbationPrediction, folder: PairFolder, n_iterations: int, seed: int = 0
) -> None:
    """
    Fits the linear response once more on the control cells of all splits, in place.

    What a run in context is scored on are perturbed cells; the control cells that told how to train it are evidence
    too, once they have told it. Only for one cell state, whose factors may be turned: they are turned to where the
    network learned to read them.

    Args:
        model ([`GppcForPerturbationPrediction`]): Trained.
        folder ([`PairFolder`]): Pairs of control cells.
        n_iterations (`int`): Passes over the cells.
        seed (`int`, *optional*, defaults to 0): Of the fit.
    """
    if model.model is None or model.config.num_components > 1:
        return
    response = model.model.linear_response
    before = response.loadings.clone()
    tables = [folder.split(name) for name in folder.splits]
    pairs = PairDataset(pa.concat_tables(tables), folder.pairings)
    n_cells = screen_entry(folder)["n_control_cells"]
    initialize_linear_response(model, pairs, pairs, folder.panels, n_cells, n_iterations, seed)
    left, _, right = torch.linalg.svd(response.loadings.T @ before)
    turn = left @ right
    response.loadings.copy_(response.loadings @ turn)
    response.coupling.copy_(turn.T @ response.coupling @ turn)


def keep_departure_if_it_responds(model: GppcForPerturbationPrediction, folder: PairFolder) -> bool:
    """Switches the learned departure off where it does not bring responses among held-out controls nearer to what they
    are; for models of control cells alone. Returns whether it is kept."""
    if model.model is not None and model.config.use_departure:
        pairs = PairDataset(folder.split("validation"), folder.pairings)
        _, rows = np.unique(pairs.table.column("source_soma_joinid").to_numpy(), return_index=True)
        values = pairs.dense_cells("source", rows, folder.genes.num_rows)
        model.config.use_departure = check_responses(model, values).departure_pays
    return model.config.use_departure
