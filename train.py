"""Trains a GPPC model, scores it beside its floors and leaves a folder that anyone can load.

    accelerate launch train.py                                          # the default, on real cells that need no download
    accelerate launch train.py --pairs.query.uri cells.soma             # cells that `gppc make-census` wrote
    accelerate launch train.py --config my.yaml --training.max_steps 5000   # your own YAML file; every option is a flag
    accelerate launch train.py --config linear                          # another shipped run
    accelerate launch train.py --config census_naive_b                  # cells of the public Census, written as pairs first
    accelerate launch train.py --config census_naive_b --data.stream true   # or straight from the store
    accelerate launch train.py --data.screen SCREEN.h5ad                # all perturbations of a CRISPR screen
    accelerate launch train.py --data.screen SCREEN.h5ad --folds all  # one model a fold, for `gppc evaluate`
    python train.py --sweep default                                     # a search of options (training/configs/sweeps)

Go on after an interruption with the same command and --resume. Score a finished run again with `gppc score`.
"""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from data_scripts.command_line import run_command
from data_scripts.files import share_weights, write_json
from data_scripts.pairs.pair_folder import PairFolder
from gppc.run_options import RunOptions
from gppc.train_command import LaunchOptions, read_command
from hub_card.hub_upload import check_target
from hub_card.model_card import write_model_card
from hub_card.push import push_model
from hub_card.push_during_training import HubPush
from modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.evaluation.plots import plot_learning_curve
from modeling_gppc.evaluation.score_run import check_scoring, load_network_of, score_model
from modeling_gppc.fitting.fit_linear_response import keep_network_if_it_pays
from modeling_gppc.inference.loading import feature_extractor_of
from modeling_gppc.pipeline_gppc import PerturbationPredictionPipeline
from modeling_gppc.training.checkpoints import last_checkpoint
from modeling_gppc.training.launch import broadcast_buffers, leave, main_first, processes
from modeling_gppc.training.run_facts import run_facts
from modeling_gppc.training.run_folder import claim_folder
from modeling_gppc.training.screen_run import fit_screen_run
from modeling_gppc.training.trainer import MODEL_FOLDER, GppcTrainer


def train(options: RunOptions, folder: PairFolder, state: PartialState, launch: LaunchOptions) -> GppcTrainer:
    """Fits the linear response in closed form, then trains the network beside it; returns the finished trainer."""
    model = options.make_model(folder)
    trainer = options.make_trainer(model, folder, (state.process_index, state.num_processes))
    checkpoint = last_checkpoint(options.output_dir) if launch.resume else None
    if checkpoint is None:
        if state.is_main_process:
            options.fit_linear_response(model, folder)
        broadcast_buffers(state, model)
    if launch.push_to_hub is not None and launch.hub_strategy == "every_save":
        facts = functools.partial(run_facts, trainer, folder, options.data)
        trainer.add_callback(HubPush(launch.push_to_hub, feature_extractor_of(folder), facts))
    trainer.train_or_load(checkpoint)
    kept = keep_network_if_it_pays(model, trainer.state.log_history)
    if not kept and state.is_main_process:
        print("The network did not pay on validation cells; the model is its linear response alone.")
    return trainer


def save(trainer: GppcTrainer, model: GppcForPerturbationPrediction, options: RunOptions, folder: PairFolder) -> Path:
    """Writes the model with all that is known of it before it is scored; returns its folder."""
    out = Path(options.output_dir) / MODEL_FOLDER
    extractor = feature_extractor_of(folder)
    # Writes model and feature extractor with their code and the pipeline's.
    PerturbationPredictionPipeline(model=model, feature_extractor=extractor, device=model.device).save_pretrained(out)
    share_weights(out)
    write_json(run_facts(trainer, folder, options.data), out / "run.json")
    write_json(trainer.state.log_history, out / "training_log.json")
    plot_learning_curve(trainer.state.log_history, out / "figures" / "learning_curve.png")
    write_model_card(out)
    return out


def score(model: GppcForPerturbationPrediction, options: RunOptions, folder: PairFolder, out: Path) -> None:
    """Scores the saved model beside its floors; a mistake here leaves the model and says how to go on."""
    try:
        network = load_network_of(options.output_dir)
        print(f"\n{score_model(model, folder, options.evaluation, out, options.seed, network)}\n")
        write_model_card(out)
    except BaseException:
        print(f"The model is saved and not scored; score it with: gppc score {out}", file=sys.stderr)
        raise


def main(argv: list[str] | None = None) -> int:
    """Runs one training; bad input ends with one line and exit status 2, an interruption with 130."""
    words = sys.argv[1:] if argv is None else argv
    return run_command("train.py", lambda: run(words))


def run(words: Sequence[str]) -> None:
    """Does what the words of a command line ask for."""
    # 1. Everything that can be known is checked before anything long.
    asked = read_command(words, __doc__)
    if isinstance(asked, str):
        print(asked)
        return
    launch, options = asked
    transformers_logging.set_verbosity_error()
    if launch.sweep is not None:
        from gppc.sweep import run_sweep

        out = run_sweep(options, launch.resume)
        print(f"{(out / 'sweep.md').read_text()}\nSweep folder: {out}; best options: {out / 'best.yaml'}")
        return
    options.check_files()
    if launch.push_to_hub is not None:
        check_target(launch.push_to_hub)
    with processes(options.training.use_cpu) as state:
        mine, content, data = state.is_main_process, dataclasses.asdict(options), options.data
        main_first(state, lambda: mine and claim_folder(content, launch.resume, state.num_processes))
        if data.screen is not None:
            # Fitted in closed form, one model or one a fold; `gppc evaluate` scores them.
            fitted = fit_screen_run(data.screen, data.screen_options, options.screen, options.output_dir)
            outs = list(fitted) if mine else []
            for out in outs:
                write_model_card(out)
        else:
            # 2. Cells become pairs, and what depends on the cells is checked.
            folder = main_first(state, lambda: options.prepare_pairs(progress=mine))
            check_scoring(folder, options.evaluation)
            if mine:
                print(folder.describe_splits())
            # 3. Training.
            trainer = train(options, folder, state, launch)
            model = trainer.whole_model()
            # 4. What was learned is saved before it is scored.
            outs = [save(trainer, model, options, folder)] if mine else []
            for out in outs:
                score(model, options, folder, out)
        # 5. The way to others.
        for out in outs:
            print(f'Model folder: {out}\nLoad it with AutoModel.from_pretrained("{out}", trust_remote_code=True)')
            if launch.push_to_hub is not None:
                print(json.dumps(push_model(out, launch.push_to_hub).__dict__, default=str))
        state.wait_for_everyone()


if __name__ == "__main__":
    leave(main(), int(os.environ.get("WORLD_SIZE", "1")))
