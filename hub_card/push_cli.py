"""`gppc push`: a model folder, a pairs folder, the metric or the demo to the Hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_scripts.command_line import POSITIONAL
from data_scripts.options import Count, check_numbers


@dataclass
class PushOptions:
    """
    What is pushed, and where to.

    Args:
        repo_id (`str`): Name of the repository, or namespace/name.
        folder (`str`, *optional*): Model folder or pairs folder; not needed for metric and demo.
        kind (`str`, *optional*, defaults to `"auto"`): What to push; `auto` finds it out from the folder.
        public (`bool`, *optional*, defaults to `False`): Make a new repository public.
        revision (`str`, *optional*, defaults to `"main"`): Branch; created when absent.
        tag (`str`, *optional*): Tag for the result, such as v1.
        no_create (`bool`, *optional*, defaults to `False`): Fail when the repository is absent.
        message (`str`, *optional*): Title of the commit.
        license (`str`, *optional*, defaults to `"other"`): Licence identifier of a data set.
        model (`str`, *optional*): Model repository that the demo asks.
        evaluation (`list[str]`, *optional*): Folders that `gppc evaluate` wrote with this model, for its card; kept in
            the model folder as transfer.json.
        attempts (`int`, *optional*, defaults to 6): Attempts after dropped connections, 429 and 5xx.
    """

    repo_id: str = field(metadata=POSITIONAL)
    folder: str | None = field(default=None, metadata=POSITIONAL)
    kind: Literal["auto", "model", "dataset", "metric", "demo"] = "auto"
    public: bool = False
    revision: str = "main"
    tag: str | None = None
    no_create: bool = False
    message: str = "Upload with gppc push"
    license: str = "other"
    model: str | None = None
    evaluation: list[str] = field(default_factory=list)
    attempts: Count = 6

    def __post_init__(self):
        check_numbers(self)


OPTIONS = (PushOptions,)


def run(arguments: PushOptions) -> None:
    """Pushes and says in a few lines what happened."""
    kind, folder = arguments.kind, Path(arguments.folder or ".")
    if kind not in ("metric", "demo"):
        if arguments.folder is None:
            raise ValueError("`folder` is missing; wanted a model folder or a pairs folder (or --kind metric, demo).")
        if not folder.is_dir():
            raise ValueError(f"`folder` {folder} is not a folder.")
        files = {"model": "config.json", "dataset": "manifest.json"}
        found = [name for name, file in files.items() if (folder / file).is_file()] if kind == "auto" else [kind]
        if len(found) != 1:
            raise ValueError(
                f"`folder` {folder} holds {'both' if found else 'neither'} a config.json (a model) "
                f"{'and' if found else 'nor'} a manifest.json (pairs); name a folder that training or `gppc build-pairs` "
                "wrote, or say --kind."
            )
        kind = found[0]
    if kind == "demo" and not arguments.model:
        raise ValueError("`--model` is missing; wanted the model repository that the demo asks.")
    if arguments.evaluation and kind != "model":
        raise ValueError(f"`--evaluation` is for the card of a model; this is a {kind}.")
    # Only now: importing takes seconds, a mistyped argument should not.
    from hub_card.model_card import add_transfer
    from hub_card.push import push_dataset, push_demo, push_metric, push_model

    options = {
        "private": not arguments.public,
        "revision": arguments.revision,
        "tag": arguments.tag,
        "create": not arguments.no_create,
        "message": arguments.message,
        "attempts": arguments.attempts,
    }
    if arguments.evaluation:
        add_transfer(folder, arguments.evaluation)
    name = arguments.repo_id
    pushes = {
        "model": lambda: push_model(folder, name, **options),
        "dataset": lambda: push_dataset(folder, name, arguments.license, **options),
        "metric": lambda: push_metric(name, **options),
        "demo": lambda: push_demo(name, model=arguments.model, **options),
    }
    report = pushes[kind]()
    changes = f"{len(report.uploaded)} files sent, {len(report.deleted)} removed"
    state = changes if report.uploaded or report.deleted else "nothing to change"
    print(f"{report.url} ({report.revision}, {report.commit[:8]}): {state}")
    if report.left_out:
        print(f"not uploaded: {', '.join(report.left_out[:5])}{', ...' if len(report.left_out) > 5 else ''}")
