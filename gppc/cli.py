"""The `gppc` command: each sub-command is a module with `OPTIONS`, its option classes, and `run`, which takes one of each."""

import importlib
import sys

from data_scripts.command_line import ConfigFile, help_text, read_options, run_command
from modeling_gppc.normalization_gppc import close_matches

# name -> (module, one line of help). Only the module of the command that is asked for is imported, and what takes long
# to import is imported by its `run`, so that help texts and mistyped flags answer at once.
COMMANDS = {
    "make-census": ("data_scripts.store.local_census_cli", "write AnnData files into a local store in Census layout"),
    "make-synthetic": (
        "data_scripts.synthetic.synthetic_cli",
        "write cells of a known gene network into a local store",
    ),
    "build-pairs": ("data_scripts.pairs.build_pairs_cli", "turn a Census query into pair rows (Arrow / Parquet)"),
    "predict": ("modeling_gppc.inference.predict_cli", "predict expression after perturbations of an AnnData's cells"),
    "score": ("gppc.score_cli", "score a trained run on its test pairs again"),
    "evaluate": ("modeling_gppc.evaluation.evaluate_cli", "score responses of a CRISPR screen beside every baseline"),
    "compare": ("modeling_gppc.evaluation.compare_cli", "pool the evaluations of several screens in one statement"),
    "push": ("hub_card.push_cli", "upload a model, pairs, the metric or the demo to the Hub"),
}
HELP = {"-h", "--help"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Bad input ends with one line on stderr and exit status 2, an interruption with 130."""
    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    return run_command(f"gppc {command}" if command in COMMANDS else "gppc", lambda: run(command, words))


def run(command: str, words: list[str]) -> int | None:
    """Runs `gppc COMMAND WORDS`."""
    if command in HELP:
        print("usage: gppc COMMAND [--name value ...]\n\n`gppc COMMAND --help` lists the options of a command.\n")
        print("\n".join(f"  {name:<16}{summary}" for name, (_, summary) in COMMANDS.items()))
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"gppc {version('gppc')}")
        return 0
    if command not in COMMANDS:
        raise ValueError(f"`{command}` is not a command{close_matches(command, COMMANDS)}")
    name, summary = COMMANDS[command]
    module = importlib.import_module(name)
    if HELP & set(words):
        print(help_text(f"gppc {command}", summary, *module.OPTIONS, ConfigFile))
        return 0
    return module.run(*read_options(words, *module.OPTIONS))


if __name__ == "__main__":
    sys.exit(main())
