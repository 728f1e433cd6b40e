"""Option dataclasses as flags: the help text of a command, what its command line says, and how it ends."""

import argparse
import dataclasses
import inspect
import itertools
import json
import operator
import os
import re
import sys
import types
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import yaml

from data_scripts.options import join_options, merge, read_yaml
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


@dataclasses.dataclass(frozen=True)
class Flag:
    """
    One option.

    Args:
        name (`str`): Dotted name, e.g. `training.max_steps`.
        hint: Its type.
        default: Its default; `MISSING` where it must be given.
        text (`str`): What the docstring of its class says of it.
        section (`tuple[str, str]`): Heading in the help text, and the line below.
        positional (`bool`): Whether its value may stand without the flag.
    """

    name: str
    hint: typing.Any
    default: typing.Any
    text: str
    section: tuple[str, str]
    positional: bool


def flags_of(*classes: type, prefix: str = "") -> dict[str, Flag]:
    """Flags of option dataclasses by name: one a field, nested dataclasses with dotted names.

    A `dict` field may name the class whose fields are its keys: `metadata={"keys": CLASS}`. A field that several classes
    have is one flag for all of them.
    """
    flags: dict[str, Flag] = {}
    for cls in classes:
        nested: dict[str, Flag] = {}
        hints, texts = typing.get_type_hints(cls), argument_texts(cls)
        summary = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
        section = (prefix.rstrip("."), summary) if prefix else (summary.rstrip("."), "")
        for field in filter(operator.attrgetter("init"), dataclasses.fields(cls)):
            name, hint = f"{prefix}{field.name}", hints[field.name]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            flag = Flag(name, hint, default, texts.get(field.name, ""), section, "positional" in field.metadata)
            flags.setdefault(name, flag)
            inner = field.metadata.get("keys", kind_of(hint))
            if dataclasses.is_dataclass(inner):
                nested |= flags_of(inner, prefix=f"{name}.")
        flags |= nested
    return flags


def kind_of(hint) -> typing.Any:
    """The type that an option has where it is not `None`; `Any` where it may have several."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else typing.Any


def container_of(hint) -> type | None:
    """`list` or `dict` where a flag takes several words."""
    origin = typing.get_origin(kind_of(hint)) or kind_of(hint)
    return {list: list, tuple: list, dict: dict}.get(origin)


def argument_texts(cls: type) -> dict[str, str]:
    """What the `Args:` section of a class and of those it extends says of each field, in one line."""
    texts = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        lines = itertools.takewhile(lambda line: not line or line.startswith(" "), section.splitlines())
        for entry in re.split(r"(?:^|\n) {4}(?=\w)", "\n".join(lines))[1:]:
            entry = re.sub(r"\[(`\w+`)\]", r"\1", " ".join(entry.split()))
            # `first (`int`), second, third (`float`, *optional*): text`
            head = re.match(r"\w+(?: \([^)]*\))?(?:, \w+(?: \([^)]*\))?)*[:.]", entry)
            if head:
                names = re.findall(r"\w+", re.sub(r"\([^)]*\)", "", head.group()))
                texts |= dict.fromkeys(names, entry[head.end() :].strip())
    return texts


def help_text(command: str, description: str, *classes: type) -> str:
    """Every option of a command with its type, meaning and default, under the headings of its classes."""
    flags = flags_of(*classes)
    names = [_place(flag) for flag in flags.values() if flag.positional]
    parser = argparse.ArgumentParser(
        usage=" ".join([command, *names, "[--name value ...]"]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for section, members in itertools.groupby(flags.values(), key=lambda flag: flag.section):
        group = parser.add_argument_group(*section)
        for flag in members:
            if not dataclasses.is_dataclass(kind_of(flag.hint)):  # its fields are flags themselves
                default = "required" if flag.default is dataclasses.MISSING else f"default: {_shown(flag.default)}"
                text = f"{flag.text} ({default})".replace("%", "%%")
                group.add_argument(f"--{flag.name}", metavar=value_name(flag.hint), help=text)
    return parser.format_help()


def _place(flag: Flag) -> str:
    name = flag.name.upper() + (" ..." if container_of(flag.hint) else "")
    return name if flag.default is dataclasses.MISSING else f"[{name}]"


def value_name(hint) -> str:
    """What stands for a value of a type in help texts."""
    kind = kind_of(hint)
    if typing.get_origin(kind) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    names = {
        bool: "[true|false]",
        int: "INTEGER",
        float: "NUMBER",
        str: "TEXT",
        list: "VALUE ...",
        dict: "NAME=VALUE ...",
    }
    return names.get(container_of(hint) or kind, "VALUE")


def _shown(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=dataclasses.asdict)


def read_flags(words: Sequence[str], *classes: type) -> dict:
    """What a command line says, as nested mappings of option names to values; types are checked with the options.

    `--a.b value` or `--a.b=value`; lists as `--a.b x y` or `[x, y]`, mappings as `--a.b x=1 y=2`, `--a.b.x 1` or
    `{x: 1}`, what is true as `--a.b`. Text is taken as it is, everything else as YAML, and `null` for nothing. A dash in
    a name counts as an underscore.

    Raises:
        ValueError: For an unknown flag (with close matches), one without a value, or a word that belongs to no flag.
    """
    flags, left, loose = flags_of(*classes), deque(words), deque()
    given: dict[str, tuple[typing.Any, list[str]]] = {}
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
    for flag in flags.values():
        if flag.positional and flag.name not in given and loose:
            given[flag.name] = (flag.hint, _take(loose, flag.hint))
    if loose:
        raise ValueError(f"`{loose[0]}` is not a flag; wanted `--name value`, e.g. `--{next(reversed(flags))} VALUE`.")
    changes: dict = {}
    for name in sorted(given, key=lambda name: name.count(".")):
        value = _read(name, *given[name])
        for key in reversed(name.split(".")):
            value = {key: value}
        changes = merge(changes, value)
    return changes


def hint_of(name: str, flags: Mapping[str, Flag]) -> typing.Any:
    """The type of an option, or of an entry in one that is a mapping.

    Raises:
        ValueError: If there is none, with those of the same last name, or close matches.
    """
    if name in flags:
        return flags[name].hint
    for known, flag in flags.items():
        if container_of(flag.hint) is dict and name.startswith(f"{known}."):
            return typing.get_args(kind_of(flag.hint))[1]
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
            read = _read_yaml(name, text)
        elif container is list:
            read = [_read(name, inner[0], [text])]
        elif label and equals:
            read = {label: _read(name, inner[1], [entry])}
        else:
            raise ValueError(f"`{name}` is {text!r}; wanted NAME=VALUE.")
        value = value + read if container is list else value | read
    return value


def _read_yaml(name: str, text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"`{name}` is {text!r}, which is not valid YAML.") from error


def read_options(words: Sequence[str], *classes: type) -> list:
    """Options of a command line: defaults, overridden by the YAML file that `--config` names, overridden by flags.

    Returns:
        `list`: An object of each class.

    Raises:
        ValueError: For an unknown, missing or wrong option.
    """
    changes = read_flags(words, ConfigFile, *classes)
    config = changes.pop("config", None)
    return join_options(merge({} if config is None else read_yaml(config), changes), *classes)


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
