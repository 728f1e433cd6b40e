"""`gppc push`: a model folder, a pairs folder, the metric or the demo to the Hub."""

import argparse
import sys
from pathlib import Path

KINDS = ("auto", "model", "dataset", "metric", "demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `gppc push`."""
    parser.add_argument("repo_id", help="name, or namespace/name")
    parser.add_argument("folder", nargs="?", help="model folder or pairs folder; not needed for metric and demo")
    parser.add_argument("--kind", choices=KINDS, default="auto", help="what to push; found out from the folder")
    parser.add_argument("--public", action="store_true", help="a new repository is public (default: private)")
    parser.add_argument("--revision", default="main", help="branch, created when absent (default: main)")
    parser.add_argument("--tag", help="tag for the result, such as v1")
    parser.add_argument("--no-create", action="store_true", help="fail when the repository is absent")
    parser.add_argument("--message", default="Upload with gppc push", help="title of the commit")
    parser.add_argument("--license", default="other", help="licence identifier for a data set (default: other)")
    parser.add_argument("--model", help="model repository that the demo asks")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of `gppc evaluate` with this model, for its card; kept in the model folder as transfer.json",
    )
    parser.add_argument("--attempts", type=int, default=6, help="attempts after dropped connections, 429 and 5xx")


def find_kind(kind: str, folder: Path | None) -> str:
    """What is to be pushed.

    Raises:
        ValueError: If the folder does not say, or is missing.
    """
    if kind in ("metric", "demo"):
        return kind
    if folder is None:
        raise ValueError("`folder` is missing; wanted a model folder or a pairs folder (or --kind metric, demo).")
    if not folder.is_dir():
        raise ValueError(f"`folder` {folder} is not a folder.")
    if kind != "auto":
        return kind
    is_model, is_pairs = (folder / "config.json").is_file(), (folder / "manifest.json").is_file()
    if is_model and is_pairs:
        raise ValueError(f"`folder` {folder} holds config.json and manifest.json; say --kind model or --kind dataset.")
    if not is_model and not is_pairs:
        raise ValueError(
            f"`folder` {folder} holds neither a config.json (a model) nor a manifest.json (pairs); name the folder "
            "that training or `gppc build-pairs` wrote."
        )
    return "model" if is_model else "dataset"


def run(arguments: argparse.Namespace) -> int:
    """Pushes and says in a few lines what happened."""
    folder = None if arguments.folder is None else Path(arguments.folder)
    kind = find_kind(arguments.kind, folder)
    if kind == "demo" and not arguments.model:
        raise ValueError("`--model` is missing; wanted the model repository that the demo asks.")
    if arguments.evaluation and kind != "model":
        raise ValueError(f"`--evaluation` is for the card of a model; this is a {kind}.")
    # Only now: importing takes seconds, a mistyped argument should not.
    from hub_card.hub_upload import Retries
    from hub_card.push import push_dataset, push_demo, push_metric, push_model

    options = {
        "private": not arguments.public,
        "revision": arguments.revision,
        "tag": arguments.tag,
        "create": not arguments.no_create,
        "message": arguments.message,
        "retries": Retries(attempts=arguments.attempts),
    }
    if kind == "model":
        if arguments.evaluation:
            from hub_card.model_card import add_transfer

            add_transfer(folder, arguments.evaluation)
        report = push_model(folder, arguments.repo_id, **options)
    elif kind == "dataset":
        report = push_dataset(folder, arguments.repo_id, license=arguments.license, **options)
    elif kind == "metric":
        report = push_metric(arguments.repo_id, **options)
    else:
        report = push_demo(arguments.repo_id, model=arguments.model, **options)
    changes = len(report.uploaded) + len(report.deleted)
    state = f"{len(report.uploaded)} files sent, {len(report.deleted)} removed" if changes else "nothing to change"
    lines = [f"{report.url} ({report.revision}, {report.commit[:8]}): {state}"]
    if report.left_out:
        shown = ", ".join(report.left_out[:5]) + (", ..." if len(report.left_out) > 5 else "")
        lines.append(f"not uploaded: {shown}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
