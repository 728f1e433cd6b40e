"""Strict reading of option dataclasses from YAML or JSON mappings."""

import contextlib
import copy
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import yaml

from modeling_gppc.normalization_gppc import close_matches


@dataclasses.dataclass(frozen=True)
class Range:
    """
    The values that a number may take; stands in the annotation of an option: `Annotated[float, Range(0, above=True)]`.

    Args:
        low, high (`float`, *optional*): Bounds, themselves allowed.
        above, below (`bool`, *optional*, defaults to `False`): Leave the lower, the upper bound itself out.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        large = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and large and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = [] if self.low == -math.inf else [f"{'>' if self.above else '>='} {self.low:.15g}"]
        high = [] if self.high == math.inf else [f"{'<' if self.below else '<='} {self.high:.15g}"]
        return f"a number {' and '.join(low + high)}" if low + high else "a finite number"


# The usual ranges.
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what numpy takes
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def check_numbers(options, where: str = "") -> None:
    """Checks every number of an options object, also those in lists and mappings, against its annotated [`Range`].

    A number without a range only has to be finite. Raises `ValueError` that names the option, after `where` and a dot.
    """
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value, wanted = getattr(options, field.name), next(_ranges(hints[field.name]), None)
        entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        for entry in entries:
            number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
            if (number and entry not in (wanted or Range())) or (wanted and isinstance(entry, (bool, str))):
                name = f"{where}.{field.name}" if where else field.name
                raise ValueError(f"`{name}` is {value!r}; wanted {wanted or Range()}.")


def _ranges(hint) -> Iterator[Range]:
    """Ranges in the annotations of a type and of what it is made of."""
    for part in typing.get_args(hint):
        if isinstance(part, Range):
            yield part
        else:
            yield from _ranges(part)


def read_yaml(path: str | Path) -> dict:
    """Reads a YAML file that holds a mapping; raises `ValueError` where it is none."""
    if not Path(path).is_file():
        raise ValueError(f"`config` {path} is not a file; wanted a YAML file of options.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"`config` {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`config` {path} holds {type(content).__name__}; wanted a mapping of options to values.")
    return content


def from_mapping(cls: type, mapping: Mapping, where: str = ""):
    """Builds the dataclass `cls` from a mapping, checking every key and the type of every value.

    Nested dataclass fields take nested mappings. Integers are accepted where floats are wanted.

    Raises:
        ValueError: For an unknown key (with close matches) or a value of another type, naming the key after `where`.
    """
    prefix = where and f"{where}."
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


def part_of(mapping: Mapping, cls: type) -> dict:
    """The entries of a mapping that are named like fields of a dataclass."""
    return {field.name: mapping[field.name] for field in dataclasses.fields(cls) if field.name in mapping}


def nested(name: str, value) -> dict:
    """`{"a": {"b": value}}` of the dotted name `a.b`."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


def differences(old: Mapping, new: Mapping, where: str = "") -> Iterator[tuple[str, typing.Any, typing.Any]]:
    """Dotted name and both values of every entry in which two nested mappings differ; a missing one is `None`."""
    for key in sorted({*old, *new}):
        name, before, after = f"{where}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{name}.")
        elif before != after:
            yield name, before, after


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
        kinds = [argument for argument in arguments if argument is not type(None)]
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return _convert(kind, value, where)
        return _convert(kinds[0], value, where)  # raises what is wrong for the first
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
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
            return float(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise ValueError(f"`{where}` is {value!r} ({type(value).__name__}); wanted {hint.__name__}.")
    return value
