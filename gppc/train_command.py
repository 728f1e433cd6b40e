"""The command line of train.py: what is run, and with which options."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_scripts.command_line import help_text, read_flags
from data_scripts.options import from_mapping, merge, nested, part_of
from gppc.run_options import RunOptions, run_options
from modeling_gppc.training.screen_run_options import EVERY_FOLD


@dataclass
class LaunchOptions:
    """
    What is run.

    Args:
        config (`str`, *optional*): YAML file of the options below, or the name of a shipped one; a flag overrides the file.
            Without it `own` where a flag names cells (`screen` where it names a screen), else `default`.
        resume (`bool`, *optional*, defaults to `False`): Go on from the last checkpoint of the same run.
        push_to_hub (`str`, *optional*): Hub repository that the finished model is pushed to.
        hub_strategy (`str`, *optional*, defaults to `"end"`): Push at the end only, or the model of every saved
            checkpoint as well.
        folds (`str` or `int`, *optional*): Leave perturbations of a screen out, so that `gppc evaluate` can score the
            model on them: `all` fits one model a fold, in folders of their own; a number fits the model without that
            fold, counted from 0. The same as `screen.fold`.
        sweep (`str`, *optional*): Search options instead of training once: a YAML file, or the name of a shipped one;
            `--sweep NAME --help` lists its options.
    """

    config: str | None = None
    resume: bool = False
    push_to_hub: str | None = None
    hub_strategy: Literal["end", "every_save"] = "end"
    folds: str | int | None = None
    sweep: str | None = None


def read_command(words: Sequence[str], description: str):
    """What the words of a command line ask for: the help text, or [`LaunchOptions`] and [`RunOptions`] (`SweepOptions`
    where a sweep is asked for). Raises `ValueError` for an unknown file, option or value, naming the option and close
    matches.
    """
    kind = RunOptions
    if any(word.partition("=")[0] == "--sweep" for word in words):
        from gppc.sweep import SweepOptions, read_sweep

        kind = SweepOptions
    if {"-h", "--help"} & set(words):
        return help_text("train.py", description, LaunchOptions, kind)
    changes = read_flags(words, LaunchOptions, kind)
    launch, changes = from_mapping(LaunchOptions, part_of(changes, LaunchOptions)), part_of(changes, kind)
    if launch.sweep is not None:
        for name in ("folds", "push_to_hub"):
            if getattr(launch, name) is not None:
                raise ValueError(f"`--{name}` is given with `--sweep`, which keeps no model; leave one of them out.")
        return launch, read_sweep(launch.sweep, changes)
    if launch.push_to_hub is None and launch.hub_strategy != "end":
        raise ValueError(f"`--hub_strategy` {launch.hub_strategy} needs `--push_to_hub REPO`.")
    if launch.folds is not None:
        changes = merge(changes, nested("screen.fold", launch.folds))
    options = run_options(launch.config, changes)
    if launch.folds is not None and options.data.screen is None:
        raise ValueError(f"`--folds` {launch.folds} is of a screen; name it with `--data.screen FILE.h5ad`.")
    if launch.push_to_hub is not None and options.data.screen is not None and options.screen.fold == EVERY_FOLD:
        raise ValueError(
            f"`push_to_hub` is {launch.push_to_hub!r} with `folds` {EVERY_FOLD!r}, which makes several models; push "
            "the one you want with `gppc push`."
        )
    return launch, options
