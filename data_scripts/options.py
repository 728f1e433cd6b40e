"""Strict reading of option dataclasses from YAML or JSON mappings."""

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import yaml

from modeling_gppc.normalization_gppc import close_matches


def read_yaml(path: str | Path) -> dict:
    """Reads a YAML file that holds a mapping.

    Raises:
        ValueError: If there is no such file, it is not valid YAML or does not hold a mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"`config` {path} is not a file; wanted a YAML file of options.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`config` {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"`config` {path} holds {type(content).__name__}; wanted a mapping of option names to values."
        )
    return content


def from_mapping(cls: type, mapping: Mapping, where: str = ""):
    """Builds the dataclass `cls` from a mapping, checking every key and the type of every value.

    Nested dataclass fields take nested mappings. Integers are accepted where floats are wanted.

    Args:
        cls (`type`): A dataclass.
        mapping (`Mapping`): Option names to values.
        where (`str`, *optional*): Dotted name of the mapping itself, for error messages.

    Raises:
        ValueError: For an unknown key (with close matches) or a value of another type, naming the dotted key.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"`{where}` is {mapping!r}; wanted a mapping of option names to values.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in mapping.items():
        if key not in fields:
            raise ValueError(f"`{prefix}{key}` is not an option{close_matches(str(key), fields)}.")
        arguments[key] = _convert(hints[key], value, f"{prefix}{key}")
    for name, field in fields.items():
        if name not in arguments and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"`{prefix}{name}` is missing; it has no default.")
    return cls(**arguments)


def join_options(mapping: Mapping, *classes: type) -> list:
    """Builds several dataclasses from one mapping; a key goes to every class that has a field of that name.

    Raises:
        ValueError: As [`from_mapping`].
    """
    names = {cls: {field.name for field in dataclasses.fields(cls)} for cls in classes}
    known = set().union(*names.values())
    for key in mapping:
        if key not in known:
            raise ValueError(f"`{key}` is not an option{close_matches(str(key), sorted(known))}")
    return [from_mapping(cls, {key: mapping[key] for key in mapping if key in names[cls]}) for cls in classes]


def merge(base: Mapping, changes: Mapping) -> dict:
    """`base` with `changes` laid over it, mapping by mapping."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _convert(hint, value, where: str):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in (argument for argument in arguments if argument is not type(None)):
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"`{where}` is {value!r}; wanted one of {', '.join(map(repr, arguments))}.")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"`{where}` is {value!r}; wanted a list.")
        item = arguments[0] if arguments else typing.Any
        return origin(_convert(item, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"`{where}` is {value!r}; wanted a mapping.")
        return {str(name): _convert(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if hint is typing.Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ValueError(f"`{where}` is {value!r} ({type(value).__name__}); wanted {hint.__name__}.")
    return value
