"""`gppc score`: a trained run scored again, with other options of scoring or after its scoring failed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_scripts.command_line import POSITIONAL
from modeling_gppc.evaluation.score_options import EvaluationOptions


@dataclass
class ScoreOptions:
    """
    Which run is scored.

    Args:
        folder (`str`): Folder of a run that train.py made, or its `model`.
        evaluation (`dict`): Fields of [`EvaluationOptions`]; what is left out is as in the run itself.
    """

    folder: str = field(metadata=POSITIONAL)
    evaluation: dict[str, Any] = field(default_factory=dict, metadata={"keys": EvaluationOptions})


OPTIONS = (ScoreOptions,)


def run(options: ScoreOptions) -> None:
    """Scores the model and writes its results, figures and card anew."""
    # Imported late: these take seconds, and a mistyped flag should be answered at once.
    from data_scripts.options import from_mapping, merge
    from data_scripts.pairs.pair_folder import PairFolder
    from gppc.run_options import RunOptions
    from hub_card.model_card import write_model_card
    from modeling_gppc.evaluation.score_run import load_network_of, score_model
    from modeling_gppc.inference.loading import load_model
    from modeling_gppc.training.run_folder import OPTIONS_FILE
    from modeling_gppc.training.trainer import MODEL_FOLDER

    given = Path(options.folder)
    run_folder = given.parent if (given / "config.json").is_file() else given
    model_folder, file = run_folder / MODEL_FOLDER, run_folder / OPTIONS_FILE
    if not file.is_file() or not model_folder.is_dir():
        raise ValueError(
            f"`folder` {given} is not the folder of a finished run or its model: {run_folder} lacks "
            f"{OPTIONS_FILE if not file.is_file() else MODEL_FOLDER}; wanted what train.py wrote."
        )
    written = {**json.loads(file.read_text()), "output_dir": str(run_folder)}
    written.pop("processes", None)
    own = from_mapping(RunOptions, merge(written, {"evaluation": options.evaluation}))
    if own.data.screen is not None:
        raise ValueError(f"`folder` {run_folder} is a run on a screen; score it with `gppc evaluate --screen`.")
    folder = PairFolder(own.data.pairs or run_folder / "pairs")
    model, _ = load_model(model_folder, "cpu" if own.training.use_cpu else None)
    print(score_model(model, folder, own.evaluation, model_folder, own.seed, load_network_of(run_folder)))
    write_model_card(model_folder)
    print(f"\nwritten to {model_folder}: results.json, figures, README.md")
