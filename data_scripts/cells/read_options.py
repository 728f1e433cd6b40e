"""How AnnData is read, the same options with the same names in every command, and their flags."""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterable

from modeling_gppc.feature_extraction_gppc import VALUE_KINDS


@dataclasses.dataclass
class ReadOptions:
    """
    Where an AnnData holds what is read; each column is found by its usual names where it is not named.

    Args:
        layer (`str`, *optional*): Layer with the values, or `raw` for `adata.raw`; `X` when absent.
        value_kind (`str`, *optional*, defaults to `"counts"`): `counts` (whole numbers), `estimated_counts` (with
            fractions) or `log` (normalised log values already); never guessed.
        gene_column (`str`, *optional*): Column of var that identifies genes, by Ensembl id or symbol; else the index.
        symbol_column (`str`, *optional*): Column of var with gene symbols.
        library_size_column (`str`, *optional*): Column of obs with the counts over all genes, for files that hold only
            some of them; else a usual name that no cell contradicts, else the sum of what is there.
    """

    layer: str | None = None
    value_kind: str = "counts"
    gene_column: str | None = None
    symbol_column: str | None = None
    library_size_column: str | None = None

    def __post_init__(self):
        if self.value_kind not in VALUE_KINDS:
            raise ValueError(f"`value_kind` is {self.value_kind!r}; wanted one of {', '.join(VALUE_KINDS)}.")


def help_texts(options: type) -> dict[str, str]:
    """First sentence about each option of a dataclass, from the docstrings of the class and of those it extends."""
    found = {}
    for cls in reversed(options.__mro__[:-1]):
        entries = re.split(r"\n        (?=\w)", (cls.__doc__ or "").partition("Args:")[2])
        for names, text in re.findall(r"^([\w, ]+) \(.*?\): (.*)$", "\n".join(map(_one_line, entries)), re.M):
            found |= dict.fromkeys(names.split(", "), text.partition(". ")[0].rstrip("."))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("`", "")


def add_flags(parser, options: type, leave_out: Iterable[str] = ()) -> None:
    """Adds a flag for every option of a dataclass, with the option's own help and default.

    Args:
        parser (`ArgumentParser` or a group of one): Gets `--layer`, `--value-kind`, ...
        options (`type`): [`ReadOptions`] or a dataclass that extends it.
        leave_out (`Iterable[str]`, *optional*): Options without a flag.
    """
    hints, helps = typing.get_type_hints(options), help_texts(options)
    for field in dataclasses.fields(options):
        if field.name in leave_out:
            continue
        kind = str(hints[field.name])
        settings = {"help": helps[field.name].replace("%", "%%"), "default": argparse.SUPPRESS}
        if "dict" in kind or "list" in kind:
            settings |= {"nargs": "+", "metavar": "LABEL=VALUE" if "dict" in kind else "LABEL"}
        elif field.name == "value_kind":
            settings["choices"] = VALUE_KINDS
        else:
            settings |= {"type": int if "int" in kind else float if "float" in kind else str}
            settings["metavar"] = "COLUMN" if field.name.endswith("_column") else "NAME" if "str" in kind else "N"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def options_from_flags(options: type, flags: dict):
    """An options object from command-line values; mappings as `LABEL=VALUE` texts, other flags are passed over.

    Args:
        options (`type`): As given to [`add_flags`].
        flags (`dict`): `vars(arguments)`.

    Raises:
        ValueError: For a text that is not `LABEL=VALUE`, or an option that the dataclass refuses.
    """
    hints = typing.get_type_hints(options)
    given = {field.name: flags[field.name] for field in dataclasses.fields(options) if field.name in flags}
    for name, texts in given.items():
        if typing.get_origin(hints[name]) is dict:
            given[name] = dict(_entry(name, text, typing.get_args(hints[name])[1]) for text in texts)
    return options(**given)


def _entry(name: str, text: str, kind: type) -> tuple[str, typing.Any]:
    key, _, value = text.partition("=")
    try:
        if key and value:
            return key, kind(value)
    except ValueError:
        pass
    raise ValueError(f"`{name}` {text!r} is not LABEL={'GENE' if kind is str else 'SHARE'}.")
