"""Checkpoints that are whole or not there: written under another name, listed, made durable, renamed."""

import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data_scripts.files import make_durable

logger = logging.getLogger(__name__)
# Sizes of a checkpoint's files, written last.
LISTING = "checkpoint.json"
# Where checkpoints are while they are being written or deleted.
UNFINISHED = ".checkpoints"


def unfinished_folder(output_dir: str | Path) -> Path:
    """Folder inside the run's in which checkpoints are written."""
    return Path(output_dir) / UNFINISHED


def clear_unfinished(output_dir: str | Path) -> None:
    """Deletes what killed runs left half-written or half-deleted."""
    shutil.rmtree(unfinished_folder(output_dir), ignore_errors=True)


def publish(written: Path, output_dir: str | Path) -> Path:
    """Lists the files of a fully written checkpoint, makes them durable and gives the checkpoint its name.

    Args:
        written (`Path`): The checkpoint under `unfinished_folder(output_dir)`.
        output_dir (`str` or `Path`): Folder of the run.

    Returns:
        Where the checkpoint is now.
    """
    files = [path for path in sorted(written.rglob("*")) if path.is_file() and path.name != LISTING]
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in files}
    listing = written / LISTING
    listing.write_text(json.dumps(sizes, indent=1) + "\n")
    for path in (*files, listing, written):
        make_durable(path)
    final = Path(output_dir) / written.name
    if final.exists():  # damaged, or of another number of processes; training went past it again
        discard(final)
    os.rename(written, final)
    make_durable(final.parent)
    return final


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint; it loses its name first, so that a kill leaves none half-deleted."""
    grave = unfinished_folder(checkpoint.parent) / f"deleted-{checkpoint.name}"
    grave.parent.mkdir(exist_ok=True)
    shutil.rmtree(grave, ignore_errors=True)
    os.rename(checkpoint, grave)
    shutil.rmtree(grave, ignore_errors=True)


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, oldest first."""
    found = []
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rsplit("-", 1)[1]
        if step.isdigit():
            found.append((int(step), path))
    return sorted(found)


def rotate(output_dir: str | Path, keep: int, best_step: int | None) -> None:
    """Deletes all but the newest checkpoints and the best one.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        keep (`int`): How many stay, the best among them; at least the newest and the best do.
        best_step (`int`, *optional*): Step of the best.
    """
    found = checkpoints(output_dir)
    newest_first = [path for step, path in reversed(found) if step != best_step]
    kept_besides = max(keep - int(len(newest_first) < len(found)), 1)
    if found and found[-1][0] == best_step:  # the newest is the best
        kept_besides = max(keep - 1, 0)
    for path in newest_first[kept_besides:]:
        discard(path)


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are skipped with a warning."""
    for _, path in reversed(checkpoints(output_dir)):
        if is_whole(path):
            return path
        logger.warning("checkpoint %s is half-written and skipped", path.name)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that was written is there in its full size."""
    try:
        sizes = json.loads((checkpoint / LISTING).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False
