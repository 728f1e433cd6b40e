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
# Where checkpoints are while they are being written or deleted, inside the run's folder.
UNFINISHED = ".checkpoints"


def clear_unfinished(output_dir: str | Path) -> None:
    """Deletes what killed runs left half-written or half-deleted."""
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)


def publish(written: Path, output_dir: str | Path) -> Path:
    """Lists the files of a checkpoint that is fully written under `UNFINISHED`, makes them durable and gives the
    checkpoint its name; returns where it is now."""
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
    grave = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
    grave.parent.mkdir(exist_ok=True)
    shutil.rmtree(grave, ignore_errors=True)
    os.rename(checkpoint, grave)
    shutil.rmtree(grave, ignore_errors=True)


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Steps and folders of a run's checkpoints, oldest first."""
    found = [(path.name.rsplit("-", 1)[1], path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def rotate(output_dir: str | Path, keep: int, best_step: int | None) -> None:
    """Deletes all checkpoints but `keep`: the best one and the newest, both in any case."""
    found = checkpoints(output_dir)
    others = [path for step, path in reversed(found) if step != best_step]
    room = keep - (len(found) - len(others))
    newest_is_best = bool(found) and found[-1][0] == best_step
    for path in others[max(room, 0 if newest_is_best else 1) :]:
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
