"""Option dataclasses as flags: the help text of a command, what its command line says, and how it ends."""

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
import types
import typing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from data_scripts.options import from_mapping, merge, nested, part_of, read_yaml
from modeling_gppc.normalization_gppc import close_matches

# `metadata` of a dataclass field whose value may stand on the command line without its flag, in the order of the fields.
POSITIONAL = {"positional": True}


@dataclasses.dataclass
class ConfigFile:
    """
    Where options come from.

    Args:
        config (`str`, *optional*): YAML file with options by their names here; a flag overrides the file.
    """

    config: str | None = None


def sections_of(*classes: type, prefix: str = "") -> Iterator[tuple[str, type, list[tuple[dataclasses.Field, Any]]]]:
    """Yields option dataclasses and those nested in them: prefix (`training.`), class, fields with their types."""
    for cls in classes:
        hints = typing.get_type_hints(cls)
        fields = [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]
        yield prefix, cls, fields
        for field, hint in fields:
            inner = field.metadata.get("keys", kind_of(hint))
            if dataclasses.is_dataclass(inner):
                yield from sections_of(inner, prefix=f"{prefix}{field.name}.")


def flags_of(*classes: type) -> dict[str, Any]:
    """Dotted name -> type of every option; a field that several classes have is one option of all of them."""
    return {f"{prefix}{field.name}": hint for prefix, _, fields in sections_of(*classes) for field, hint in fields}


def kind_of(hint) -> Any:
    """The type that an option has where it is not `None`; `Any` where it may have several."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else Any


def container_of(hint) -> type | None:
    """`list` or `dict` where a flag takes several words."""
    return {list: list, tuple: list, dict: dict}.get(typing.get_origin(kind_of(hint)))


def argument_texts(cls: type) -> dict[str, str]:
    """What the `Args:` section of a class and of those it extends says of each field, in one line."""
    texts = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        lines = itertools.takewhile(lambda line: not line or line.startswith(" "), section.splitlines())
        for entry in re.split(r"(?:^|\n) {4}(?=\w)", "\n".join(lines))[1:]:
            entry = re.sub(r"\[(`[\w.]+`)\]", r"\1", " ".join(entry.split()))
            # `first (`int`), second, third (`float`, *optional*): text`
            head = re.match(r"\w+(?: \([^)]*\))?(?:, \w+(?: \([^)]*\))?)*[:.]", entry)
            if head:
                names = re.findall(r"\w+", re.sub(r"\([^)]*\)", "", head.group()))
                texts |= dict.fromkeys(names, entry[head.end() :].strip())
    return texts


def help_text(command: str, description: str, *classes: type) -> str:
    """Every option of a command with its type, meaning and default, under the headings of its classes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    usage, listed = [command], set()
    for prefix, cls, fields in sections_of(*classes):
        texts, summary = argument_texts(cls), inspect.cleandoc(cls.__doc__).partition("\n")[0]
        group = parser.add_argument_group(*((prefix[:-1], summary) if prefix else (summary.rstrip("."), "")))
        for field, hint in fields:
            name, required = f"{prefix}{field.name}", field.default is field.default_factory is dataclasses.MISSING
            if "positional" in field.metadata:
                place = name.upper() + (" ..." if container_of(hint) else "")
                usage.append(place if required else f"[{place}]")
            # The fields of a nested class are options themselves.
            if not dataclasses.is_dataclass(kind_of(hint)) and name not in listed:
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                if not required and not isinstance(default, str):
                    default = json.dumps(default, default=dataclasses.asdict)
                text = f"{texts.get(field.name, '')} ({'required' if required else f'default: {default}'})"
                group.add_argument(f"--{name}", metavar=value_name(hint), help=text.replace("%", "%%"))
                listed.add(name)
    parser.usage = " ".join([*usage, "[--name value ...]"])
    return parser.format_help()


def value_name(hint) -> str:
    """What stands for a value of a type in help texts."""
    kind = kind_of(hint)
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    names = {bool: "[true|false]", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    names |= {list: "VALUE ...", dict: "NAME=VALUE ..."}
    return names.get(container_of(hint) or kind, "VALUE")


def read_flags(words: Sequence[str], *classes: type) -> dict:
    """What a command line says, as nested mappings of option names to values; types are checked with the options.

    `--a.b value` or `--a.b=value`; lists as `--a.b x y` or `[x, y]`, mappings as `--a.b x=1 y=2`, `--a.b.x 1` or
    `{x: 1}`, what is true as `--a.b`. Text is taken as it is, everything else as YAML, and `null` for nothing. A dash in
    a name counts as an underscore.

    Raises:
        ValueError: For an unknown flag (with close matches), one without a value, or a word that belongs to no flag.
    """
    flags, left, loose = flags_of(*classes), deque(words), deque()
    given: dict[str, tuple[Any, list[str]]] = {}
    while left:
        word = left.popleft()
        if not word.startswith("--"):
            loose.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        hint = hint_of(name, flags)
        if equals:
            texts = [text]
        elif kind_of(hint) is bool and not (left and left[0] in ("true", "false")):
            texts = ["true"]
        else:
            texts = _take(left, hint)
            if not texts:
                raise ValueError(f"`--{name}` has no value; wanted `--{name} {value_name(hint)}`.")
        given.setdefault(name, (hint, []))[1].extend(texts)
    for field in itertools.chain.from_iterable(map(dataclasses.fields, classes)):
        if "positional" in field.metadata and field.name not in given and loose:
            given[field.name] = (flags[field.name], _take(loose, flags[field.name]))
    if loose:
        raise ValueError(f"`{loose[0]}` is not a flag; wanted `--name value`, e.g. `--{next(iter(flags))} VALUE`.")
    changes: dict = {}
    for name in sorted(given, key=lambda name: name.count(".")):
        changes = merge(changes, nested(name, _read(name, *given[name])))
    return changes


def hint_of(name: str, flags: Mapping[str, Any]) -> Any:
    """The type of an option, or of an entry in one that is a mapping; raises `ValueError` with close matches."""
    if name in flags:
        return flags[name]
    for known, hint in flags.items():
        if container_of(hint) is dict and name.startswith(f"{known}."):
            return typing.get_args(kind_of(hint))[1]
    last = name.rpartition(".")[2]
    same = [f"`{known}`" for known in flags if known.rpartition(".")[2] == last]
    hint = f"; did you mean {' or '.join(same)}?" if same else close_matches(name, flags)
    raise ValueError(f"`--{name}` is not an option{hint}")


def _take(words: deque[str], hint) -> list[str]:
    """Takes what belongs to a flag off the front: one word, or all up to the next flag where it takes several."""
    taken = []
    while words and not words[0].startswith("--") and (container_of(hint) or not taken):
        taken.append(words.popleft())
    return taken


def _read(name: str, hint, texts: list[str]):
    container, kind = container_of(hint), kind_of(hint)
    if texts[-1] == "null" and types.NoneType in typing.get_args(hint):
        return None
    if container is None:
        return texts[-1] if kind is str else _read_yaml(name, texts[-1])
    inner = typing.get_args(kind)
    value: list | dict = container()
    for text in texts:
        label, equals, entry = text.partition("=")
        if text[:1] == ("[" if container is list else "{"):
            value = _read_yaml(name, text)  # all of it, whatever came before
        elif container is list:
            value.append(_read(name, inner[0], [text]))
        elif label and equals:
            value[label] = _read(name, inner[1], [entry])
        else:
            raise ValueError(f"`{name}` is {text!r}; wanted NAME=VALUE.")
    return value


def _read_yaml(name: str, text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}` is {text!r}, which is not valid YAML.") from error


def read_options(words: Sequence[str], *classes: type) -> list:
    """Options of a command line, an object of each class: defaults, overridden by the YAML file that `--config` names,
    overridden by flags; an option of several classes goes to all of them. `ValueError` for an unknown, missing or
    wrong option."""
    changes = read_flags(words, ConfigFile, *classes)
    config = changes.pop("config", None)
    mapping = merge({} if config is None else read_yaml(config), changes)
    known = [field.name for cls in classes for field in dataclasses.fields(cls)]
    for key in mapping:
        if key not in known:
            raise ValueError(f"`{key}` is not an option{close_matches(str(key), known)}")
    return [from_mapping(cls, part_of(mapping, cls)) for cls in classes]


def run_command(name: str, command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status: bad input ends with one line and 2, an interruption with 130."""
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        status, line = 2, f"error: {' '.join(str(error).split())}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    if os.environ.get("RANK", "0") == "0":  # one of several processes says it
        sys.stderr.write(f"{name}: {line}\n")
    return status
