"""The folder of a run: which run it holds, and whether that one may go on."""

import dataclasses
import json
import os
from pathlib import Path

from modeling_gppc.training.arguments import RunOptions

OPTIONS_FILE = "options.json"


def claim_folder(options: RunOptions, resume: bool) -> Path:
    """Takes the run's folder, or refuses to mix two runs in one.

    Args:
        options (`RunOptions`): The run.
        resume (`bool`): Whether to go on with the run that the folder holds.

    Raises:
        ValueError: If the folder holds a run and `resume` is not set, or another run, naming the first difference.
    """
    folder = Path(options.output_dir)
    mine = json.loads(json.dumps(dataclasses.asdict(options)))
    file = folder / OPTIONS_FILE
    if file.is_file():
        theirs = json.loads(file.read_text())
        difference = first_difference(theirs, mine)
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
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"`output_dir` {folder} holds other files and no run; choose an empty or a new folder.")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` {folder} is a file; choose a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mine, file)
    return folder


def first_difference(theirs, mine, where: str = "") -> str | None:
    """The first option that differs, as text; the folder's own name may differ."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted({*theirs, *mine}):
            name = f"{where}.{key}" if where else key
            if name == "output_dir":
                continue
            difference = first_difference(theirs.get(key), mine.get(key), name)
            if difference is not None:
                return difference
        return None
    return None if theirs == mine else f"`{where}` is {theirs!r} there and {mine!r} here"


def write_json(content, path: Path) -> None:
    """Writes a JSON file under a temporary name and moves it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
