"""Pairs of a CRISPR screen for a training run: of its control cells alone, or of some perturbations as well."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_scripts.pair_folder import MANIFEST, PairFolder

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
        """The screen, its genes chosen on controls."""
        from data_scripts.screen_cells import keep_genes
        from data_scripts.screens import ScreenOptions, read_screen

        names = ("perturbation_column", "batch_column", "cell_line_column", "library_size_column", "layer")
        options = {name: getattr(self, name) for name in (*names, "value_kind", "min_cells")}
        return keep_genes(read_screen(path, ScreenOptions(**options)), self.max_genes)


def prepare_screen_pairs(path: str, options: ScreenTrainingOptions, folder: Path, seed: int = 0) -> PairFolder:
    """Writes the pairs of a run on a screen into `folder`, or opens them where they are there.

    Control cells are divided into training (eight tenths), validation and test cells; with `"perturbations"` a tenth of
    the cells of every training perturbation validate, and the perturbations of the fold left out are the test pairs.

    Args:
        path (`str`): AnnData file of the screen.
        options (`ScreenTrainingOptions`): What is read of it.
        folder (`Path`): Where the pairs go.
        seed (`int`, *optional*, defaults to 0): Divides the cells and draws the pairs.

    Raises:
        ValueError: For a screen that cannot be used, or a folder with pairs of another one.
    """
    from data_scripts.screen_cells import cells_digest, some_cells, technical_residuals
    from data_scripts.screen_pairs import CONTROL_PAIRING, SCREEN_PAIRING, write_split_pairs
    from data_scripts.screens import CONTROL
    from modeling_gppc.evaluation.leak_guards import guard_fold
    from modeling_gppc.evaluation.screen_splits import perturbation_folds

    screen = options.read(path)
    generator = np.random.default_rng(seed)
    controls = generator.permutation(screen.cells_of(CONTROL))
    cut = [int(0.8 * len(controls)), int(0.9 * len(controls))]
    rows = dict(zip(("train", "validation", "test"), np.split(controls, cut)))
    labels: dict[str, list[str]] = {name: [CONTROL] for name in rows}
    held_out: list[str] = []
    if options.train_on == "perturbations":
        fold = perturbation_folds(screen, options.folds, options.fold_seed)[options.fold]
        held_out = fold.test
        scored = [gene for i, gene in enumerate(screen.gene_ids) if i not in set(screen.panel_targets.tolist())]
        targets = [screen.gene_ids[i] for i in screen.panel_targets]
        guard_fold(screen.barcodes, fold.train_cells, fold.test_cells, fold.train, fold.test, scored, targets)
        seen = generator.permutation(fold.train_cells)
        cut = int(0.9 * len(seen))
        rows["train"] = np.concatenate([rows["train"], seen[:cut]])
        rows["validation"] = np.concatenate([rows["validation"], seen[cut:]])
        rows["test"] = np.concatenate([rows["test"], fold.test_cells])
        for name in ("train", "validation"):
            labels[name] = [CONTROL, *fold.train]
        labels["test"] = [CONTROL, *fold.test]
    if options.regress_covariates:
        every = np.arange(len(screen.values))
        screen.values = technical_residuals(screen, every, np.sort(controls)).astype(np.float32)
    provenance = {
        "name": screen.name,
        "cells_digest": cells_digest(screen),
        "train_on": options.train_on,
        "regressed": bool(options.regress_covariates and screen.library_is_complete),
        "train_perturbations": labels["train"][1:],
        "held_out_perturbations": held_out,
        "n_control_cells": len(controls),
        "seed": seed,
    }
    if (folder / MANIFEST).is_file():
        if json.loads((folder / MANIFEST).read_text()).get("screen") != provenance:
            raise ValueError(f"`output_dir` holds pairs of another screen or fold ({folder}); choose another folder.")
        return PairFolder(folder)
    parts = {name: (some_cells(screen, np.sort(cells)), labels[name]) for name, cells in rows.items()}
    # A pairing that no pair has would leave the model with weights that nothing trained.
    pairings = [CONTROL_PAIRING] if options.train_on == "controls" else [CONTROL_PAIRING, SCREEN_PAIRING]
    return write_split_pairs(
        folder,
        parts,
        provenance=provenance,
        pairings=pairings,
        pairs_per_cell=options.pairs_per_cell,
        seed=seed,
    )
