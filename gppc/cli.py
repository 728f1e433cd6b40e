"""The `gppc` command: each sub-command is a module with `add_arguments(parser)` and `run(arguments)`."""

import argparse
import importlib
import sys

# name -> (module, one line of help); modules are imported only when their command is asked for,
# so `gppc --help` and a mistyped flag answer at once.
COMMANDS = {
    "make-census": ("data_scripts.store.local_census_cli", "write AnnData files into a local store in Census layout"),
    "make-synthetic": (
        "data_scripts.synthetic.synthetic_cli",
        "write cells from a known gene network into a local store",
    ),
    "build-pairs": ("data_scripts.pairs.build_pairs_cli", "turn a Census query into pair rows (Arrow / Parquet)"),
    "predict": ("modeling_gppc.inference.predict_cli", "predict expression after perturbations of an AnnData's cells"),
    "score": ("gppc.score_cli", "score a trained run on its test pairs again"),
    "evaluate": (
        "modeling_gppc.evaluation.evaluate_cli",
        "score predicted responses of a CRISPR screen beside every baseline",
    ),
    "push": ("hub_card.push_cli", "upload a model, pairs, the metric or the demo to the Hub"),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser; only the module of `command`, when given, is imported to fill in its arguments."""
    parser = argparse.ArgumentParser(prog="gppc", description=__doc__.split(":")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == command:
            importlib.import_module(module).add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Bad input ends with one line on stderr and exit status 2, an interruption with 130."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((argument for argument in argv if argument in COMMANDS), None)
    arguments = build_parser(command).parse_args(argv)
    try:
        return importlib.import_module(COMMANDS[arguments.command][0]).run(arguments) or 0
    except (ValueError, OSError) as error:
        print(f"gppc {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gppc {arguments.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
