"""`gppc score`: a trained run scored again, with other options of scoring or after its scoring failed."""

import argparse
import dataclasses
import json
from pathlib import Path

from modeling_gppc.evaluation.score_options import EvaluationOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `gppc score`."""
    parser.add_argument("folder", type=Path, help="folder of a run that train.py made, or its `model`")
    for field in dataclasses.fields(EvaluationOptions):
        parser.add_argument(
            f"--evaluation.{field.name}", metavar="VALUE", help="as in train.py; default: the run's own"
        )


def run(arguments: argparse.Namespace) -> int:
    """Scores the model and writes its results, figures and card anew.

    Raises:
        ValueError: For a folder without a finished run, a run on a screen, or an option that does not fit.
    """
    given = {
        name: text for name, text in vars(arguments).items() if name.startswith("evaluation.") and text is not None
    }
    # Imported late: these take seconds, and a mistyped flag should be told at once.
    from data_scripts.options import from_mapping
    from data_scripts.pairs.pair_folder import PairFolder
    from gppc.run_options import RunOptions
    from hub_card.model_card import write_model_card
    from modeling_gppc.evaluation.score_run import load_network_of, score_model
    from modeling_gppc.inference.loading import load_model
    from modeling_gppc.training.arguments import merge, read_flags
    from modeling_gppc.training.run_folder import OPTIONS_FILE
    from modeling_gppc.training.trainer import MODEL_FOLDER

    run_folder = arguments.folder.parent if (arguments.folder / "config.json").is_file() else arguments.folder
    model_folder, file = run_folder / MODEL_FOLDER, run_folder / OPTIONS_FILE
    if not file.is_file() or not model_folder.is_dir():
        raise ValueError(
            f"`folder` {arguments.folder} is not the folder of a finished run or its model: {run_folder} lacks "
            f"{OPTIONS_FILE if not file.is_file() else MODEL_FOLDER}; wanted what train.py wrote."
        )
    flags = [part for name, text in given.items() for part in (f"--{name}", text)]
    written = {**json.loads(file.read_text()), "output_dir": str(run_folder)}
    written.pop("processes", None)
    options = from_mapping(RunOptions, merge(written, read_flags(flags)))
    if options.data.screen is not None:
        raise ValueError(f"`folder` {run_folder} is a run on a screen; score it with `gppc evaluate --screen`.")
    folder = PairFolder(options.data.pairs or run_folder / "pairs")
    model, _ = load_model(model_folder, "cpu" if options.training.use_cpu else None)
    print(score_model(model, folder, options.evaluation, model_folder, options.seed, load_network_of(run_folder)))
    write_model_card(model_folder)
    print(f"\nwritten to {model_folder}: results.json, figures, README.md")
    return 0
