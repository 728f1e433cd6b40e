"""Trains a GPPC model, scores it beside its floors and leaves a folder that anyone can load.

The embedded default, on real cells that need no download:

    accelerate launch train.py

Another shipped run, or your own YAML file; every option is also a flag:

    accelerate launch train.py --config linear
    accelerate launch train.py --config my.yaml --training.max_steps 5000 --output_dir runs/mine

Pairs of the public Census (see modeling_gppc/training/configs/census_naive_b.yaml):

    accelerate launch train.py --config census_naive_b

A CRISPR screen, all its perturbations or, to be scored by `gppc evaluate`, one model a fold:

    accelerate launch train.py --config screen --data.screen SCREEN.h5ad
    accelerate launch train.py --config screen --data.screen SCREEN.h5ad --screen.fold all --output_dir runs/folds

Straight from a store that is too large to be written out as pairs:

    accelerate launch train.py --config census_naive_b --data.stream true

Go on after an interruption with the same command and --resume.

Search options, one short run after another (see modeling_gppc/training/configs/sweeps):

    python train.py --sweep default
"""

import json
import os
import shlex
import sys
import time
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.pairs.pair_folder import PairFolder
from hub_card.model_card import write_model_card
from hub_card.push_during_training import HubPush
from modeling_gppc import GppcFeatureExtractor, GppcForPerturbationPrediction
from modeling_gppc.evaluation.pair_scores import write_results
from modeling_gppc.evaluation.plots import plot_learning_curve, plot_scores
from modeling_gppc.evaluation.report import render_results
from modeling_gppc.evaluation.score_run import evaluate_run, load_network_of
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response, keep_departure_if_it_pays
from modeling_gppc.inference.first_prediction import first_prediction
from modeling_gppc.pipeline_gppc import PerturbationPredictionPipeline
from modeling_gppc.training.arguments import RunOptions, build_parser, parse_options
from modeling_gppc.training.checkpoints import last_checkpoint
from modeling_gppc.training.launch import broadcast_buffers, leave, main_first, start_processes
from modeling_gppc.training.prepare_data import prepare_pairs
from modeling_gppc.training.run_folder import claim_folder, write_json
from modeling_gppc.training.screen_run import fit_screen_run
from modeling_gppc.training.start_from import start_from, what_was_read
from modeling_gppc.training.stream_rows import open_stream
from modeling_gppc.training.trainer import MODEL_FOLDER, GppcTrainer, make_trainer


def make_model(options: RunOptions, folder: PairFolder) -> GppcForPerturbationPrediction:
    """A model of the folder's vocabulary with fresh weights."""
    set_seed(options.seed)
    config = options.model_config(folder.genes.num_rows, folder.pairings)
    config._attn_implementation = options.training.attn_implementation
    if options.training.start_from is not None:
        return start_from(options.training.start_from, config, folder.gene_ids, folder.gene_symbols)
    return GppcForPerturbationPrediction(config)


def make_extractor(folder: PairFolder) -> GppcFeatureExtractor:
    """The feature extractor that does to cells what was done to the training cells."""
    manifest = folder.manifest
    return GppcFeatureExtractor(
        gene_ids=folder.gene_ids,
        gene_symbols=folder.gene_symbols,
        normalization=manifest["normalization"],
        target_sum=manifest["target_sum"],
        gene_lengths=(
            folder.genes.column("feature_length").to_pylist() if manifest["normalization"] == "log_tpm" else None
        ),
        organism=manifest["organism"],
    )


def train(
    options: RunOptions, folder: PairFolder, state: PartialState, resume: bool, push_to: str | None = None
) -> GppcTrainer:
    """Fits the linear response in closed form, then trains the departure from it; returns the finished trainer.

    With `push_to`, every checkpoint's model is pushed to that repository while training goes on.
    """
    start = time.monotonic()
    settings = options.training
    # Where pairs are streamed, these rows are a sample of them.
    rows = PairDataset(folder.split("train"), folder.pairings)
    validation = PairDataset(folder.split("validation"), folder.pairings)
    redraw = options.pairs.perturbation if settings.redraw_perturbations else None
    model = make_model(options, folder)
    trainer = make_trainer(
        model,
        settings,
        options.output_dir,
        options.seed,
        open_stream(options, folder, state.process_index, state.num_processes) if options.data.stream else rows,
        validation,
        PairCollator(folder.panels, redraw, seed=options.seed, n_query_genes=settings.n_query_genes),
        PairCollator(folder.panels),
    )
    checkpoint = last_checkpoint(options.output_dir) if resume else None
    if checkpoint is None:
        if state.is_main_process:
            initialize_linear_response(
                model,
                rows,
                validation,
                folder.panels,
                max_cells=settings.linear_start_cells,
                n_iterations=settings.linear_start_iterations,
                seed=options.seed,
            )
        broadcast_buffers(state, model)
    push = None
    if push_to is not None:
        extractor = make_extractor(folder)
        push = HubPush(push_to, extractor, lambda: run_facts(trainer, options, folder, time.monotonic() - start))
        trainer.add_callback(push)
    trainer.train_or_load(checkpoint)
    if push is not None:
        push.finish(options.output_dir)
    kept = keep_departure_if_it_pays(model, trainer.state.log_history)
    if not kept and state.is_main_process:
        print("The learned departure did not pay on validation cells; the model is its linear response alone.")
    return trainer


def save(
    trainer: GppcTrainer,
    model: GppcForPerturbationPrediction,
    options: RunOptions,
    folder: PairFolder,
    seconds: float,
) -> Path:
    """Scores the model and writes everything that is kept into `<output_dir>/model`; returns that folder."""
    out = Path(options.output_dir) / MODEL_FOLDER
    extractor = make_extractor(folder)
    # Writes the model, the feature extractor, their code and the pipeline's.
    pipeline = PerturbationPredictionPipeline(model=model, feature_extractor=extractor, device=model.device)
    pipeline.save_pretrained(out)
    results = evaluate_run(
        model, folder, options.evaluation, seed=options.seed, network=load_network_of(options.output_dir)
    )
    write_results(results, out / "results.json")
    write_json(run_facts(trainer, options, folder, seconds), out / "run.json")
    write_json(trainer.state.log_history, out / "training_log.json")
    plot_scores(results, out / "figures" / "scores.png")
    plot_learning_curve(trainer.state.log_history, out / "figures" / "learning_curve.png")
    print(f"\n{render_results(results)}\n")
    prediction = first_prediction(model, extractor, folder, options.evaluation.perturbation)
    prediction.plot(out / "figures" / "first_prediction.png")
    print(f"{prediction.text()}\n")
    write_model_card(out)
    return out


def run_facts(trainer: GppcTrainer, options: RunOptions, folder: PairFolder, seconds: float) -> dict:
    """What the card says about the run."""
    manifest = folder.manifest
    query = manifest.get("options", {}).get("query", {})
    source = options.data.example or query.get("census_version") or query.get("uri")
    cells = manifest.get("report", {}).get("splits", {}).get("train", {}).get("cells")
    n_pairs = manifest["splits"]["train"]["n_pairs"]
    return {
        "store": Path(source or folder.path).name,
        "filters": query.get("obs_filter"),
        "cells": cells or len(folder.split("train").column("source_soma_joinid").unique()),
        "genes": folder.genes.num_rows,
        "seconds": round(seconds, 1),
        "flop": float(trainer.state.total_flos) or None,
        "seed": options.seed,
        "command": command(),
        "pairs": n_pairs if not options.data.stream else "drawn anew in every epoch, straight from the store",
        "pairings": ", ".join(folder.pairings),
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "digest": manifest.get("digest"),
        **what_was_read(folder, options.training.start_from),
    }


def run_screen(options: RunOptions) -> None:
    """Fits a CRISPR screen and writes a model folder with its card, or one a fold."""
    data = options.data
    for out in fit_screen_run(data.screen, data.screen_options, options.screen, options.output_dir):
        run = json.loads((out / "run.json").read_text())
        write_json(run | {"command": command(), "seed": options.screen.seed}, out / "run.json")
        write_model_card(out)
        print(f"Model folder: {out}")


def command() -> str:
    """The command that started the run."""
    return shlex.join(["accelerate", "launch", "train.py", *sys.argv[1:]])


def main(argv: list[str] | None = None) -> int:
    """Runs one training; bad input ends with one line and exit status 2."""
    arguments, flags = build_parser(__doc__).parse_known_args(argv)
    transformers_logging.set_verbosity_error()
    state = None
    try:
        if arguments.sweep is not None:
            from modeling_gppc.training.sweep import read_sweep, run_sweep

            out = run_sweep(read_sweep(arguments.sweep, flags), make_model, arguments.resume)
            print((out / "sweep.md").read_text())
            print(f"Sweep folder: {out}; best options: {out / 'best.yaml'}")
            return 0
        if arguments.hub_strategy != "end" and arguments.push_to_hub is None:
            raise ValueError(f"`--hub_strategy` {arguments.hub_strategy} needs `--push_to_hub REPO`.")
        options = parse_options(arguments.config, flags)
        state = start_processes(options.training.use_cpu)
        main_first(
            state, lambda: state.is_main_process and claim_folder(options, arguments.resume, state.num_processes)
        )
        if options.data.screen is not None:
            if state.is_main_process:
                run_screen(options)
            return 0
        folder = main_first(state, lambda: prepare_pairs(options, progress=state.is_main_process))
        start = time.monotonic()
        push_to = arguments.push_to_hub if arguments.hub_strategy == "every_save" else None
        trainer = train(options, folder, state, arguments.resume, push_to)
        model = trainer.whole_model()
        if state.is_main_process:
            out = save(trainer, model, options, folder, time.monotonic() - start)
            print(f"Model folder: {out}")
            print(f'Load it with AutoModel.from_pretrained("{out}", trust_remote_code=True)')
            if arguments.push_to_hub:
                from hub_card.push import push_model

                print(json.dumps(push_model(out, arguments.push_to_hub).__dict__, default=str))
        state.wait_for_everyone()
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        # Among several, `leave` ends the process: its group's end joins Gloo's threads and holds the interpreter's lock,
        # which these may be waiting for.
        if state is not None and state.num_processes == 1:
            state.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main(), int(os.environ.get("WORLD_SIZE", "1")))
