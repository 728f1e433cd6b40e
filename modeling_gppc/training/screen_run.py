"""A training run on a CRISPR screen: control cells and perturbations in, model folders out."""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_scripts.cells.control_halves import control_halves, with_controls
from data_scripts.cells.screen_cells import controls_digest, keep_genes, perturbed_digest
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screen_splits import Fold, perturbation_folds
from data_scripts.cells.screens import Screen, read_screen
from data_scripts.files import share_weights, write_json
from modeling_gppc.fitting.fit_controls import fit_controls
from modeling_gppc.fitting.fit_screen import fit_screen
from modeling_gppc.fitting.gene_features import read_gene_features
from modeling_gppc.pipeline_gppc import PerturbationPredictionPipeline
from modeling_gppc.training.run_facts import command
from modeling_gppc.training.screen_run_options import EVERY_FOLD, ScreenRunOptions


def fit_screen_run(
    path: str | Path, reading: ScreenOptions, options: ScreenRunOptions, output_dir: str | Path
) -> Iterator[Path]:
    """Fits a screen and yields one model folder (`model` in `output_dir`), or one a fold (`fold_1/model` and so on);
    folders that are there already are kept.

    `run.json` of a folder holds the facts of its run; `screen` there is what leak guards ask for (`name`,
    `cells_digest`, `controls_digest`, `train_on`, `train_perturbations`, `held_out_perturbations`). Raises
    `ValueError` for a screen that cannot be used, before anything is fitted.
    """
    screen = read_screen(path, reading)
    print(screen.summary(), flush=True)
    if options.half_controls:
        kept, _ = control_halves(screen, options.divisions, options.seed)[0]
        screen = with_controls(screen, kept)
        print(f"Fitted with {len(kept)} control cells; the other half is left for the truth.", flush=True)
    screen = dataclasses.replace(keep_genes(screen, options.max_genes), matched=options.controls != "shared")
    everything = sorted(screen.perturbations)
    features = None
    if options.gene_features is not None:
        features = read_gene_features(
            options.gene_features, {gene for p in screen.perturbations.values() for gene in p.genes}
        )
    none = np.zeros(0, dtype=int)
    plans = [("", Fold("", everything if options.train_on == "perturbations" else [], [], none, none))]
    if options.fold is not None:
        folds = perturbation_folds(screen, options.folds, options.seed)
        chosen = range(options.folds) if options.fold == EVERY_FOLD else [options.fold]
        plans = [(f"fold_{index + 1}", folds[index]) for index in chosen]
    controls = None
    for name, fold in plans:
        out, start = Path(output_dir) / name / "model", time.monotonic()
        if not out.exists():
            controls = controls or fit_controls(screen, options.n_factors, options.seed)
            model, extractor = fit_screen(screen, fold.train, options, features, controls)
            unfinished = out.with_name(".model.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            # Writes the model, the feature extractor, their code and the pipeline's.
            PerturbationPredictionPipeline(model=model, feature_extractor=extractor).save_pretrained(unfinished)
            share_weights(unfinished)
            facts = screen_facts(screen, fold, options)
            write_json(facts | {"seconds": round(time.monotonic() - start, 1)}, unfinished / "run.json")
            unfinished.rename(out)
        yield out


def screen_facts(screen: Screen, fold: Fold, options: ScreenRunOptions) -> dict:
    """What the card says of the run, and what leak guards ask for."""
    return {
        "store": screen.name,
        "filters": None,
        "cells": int(screen.is_control.sum() + np.isin(screen.label, fold.train).sum()),
        "genes": len(screen.gene_ids),
        "flop": None,
        "seed": options.seed,
        "command": command(),
        "datasets": [screen.name],
        "screen": {
            "name": screen.name,
            "cells_digest": perturbed_digest(screen),
            "controls_digest": controls_digest(screen),
            "train_on": options.train_on,
            "train_perturbations": fold.train,
            "held_out_perturbations": fold.test,
            "n_control_cells": int(screen.is_control.sum()),
        },
    }
