"""The folder of a run: which run it holds, and whether that one may go on."""

import json
from collections.abc import Mapping
from pathlib import Path

from data_scripts.files import write_json
from data_scripts.options import differences

OPTIONS_FILE = "options.json"
WORKERS = "training.dataloader_num_workers"
# What may change when a run goes on: it moves no weight.
FREE = (
    "output_dir",
    "data.num_proc",
    WORKERS,
    "training.report_to",
    "training.save_total_limit",
    "training.use_cpu",
    "evaluation",
)


def claim_folder(options: Mapping, resume: bool, processes: int = 1) -> Path:
    """Takes the folder of a run (`output_dir` of its options), or refuses to mix two runs in one.

    Another number of training processes is another run: it decides which pairs make a step.

    Raises:
        ValueError: If the folder holds a run and `resume` is not set, or another run, naming the first difference.
    """
    folder = Path(options["output_dir"])
    mine = json.loads(json.dumps({**options, "processes": processes}))
    file = folder / OPTIONS_FILE
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` {folder} is a file; choose a folder.")
    if file.is_file() and holds_work(folder):
        try:
            theirs = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"`output_dir` {folder} has a damaged {OPTIONS_FILE}; choose another folder.") from error
        # The order of a stream depends on how many read it.
        free = FREE if not options["data"]["stream"] else tuple(name for name in FREE if name != WORKERS)
        difference = first_difference(theirs, mine, free)
        if difference is not None:
            raise ValueError(
                f"`output_dir` {folder} holds another run ({difference}); choose another `--output_dir`, or give the "
                "same options."
            )
        if not resume:
            raise ValueError(
                f"`output_dir` {folder} already holds this run; add `--resume` to go on with it, or choose another "
                "`--output_dir`."
            )
    elif holds_work(folder):
        raise ValueError(f"`output_dir` {folder} holds other files and no run; choose an empty or a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mine, file)
    return folder


def holds_work(folder: Path) -> bool:
    """Whether a folder holds files that a run or a person made; a run that failed at once leaves its options only."""
    return any(
        path.is_file() and path.name != OPTIONS_FILE and not path.name.startswith(".") for path in folder.rglob("*")
    )


def first_difference(theirs: Mapping, mine: Mapping, free: tuple[str, ...] = FREE) -> str | None:
    """The first option that differs, as text, leaving out what moves no number."""
    for name, there, here in differences(theirs, mine):
        if not any(name == left_out or name.startswith(f"{left_out}.") for left_out in free):
            return f"`{name}` is {there!r} there and {here!r} here"
    return None
