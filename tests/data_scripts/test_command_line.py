"""Option dataclasses as flags: what every type takes, what a file and flags make together, what is said of mistakes."""

import dataclasses
from typing import Any, Literal

import pytest

from data_scripts.command_line import POSITIONAL, flags_of, help_text, read_flags, read_options, run_command
from data_scripts.options import merge


@dataclasses.dataclass
class Inner:
    """
    Things inside.

    Args:
        low, high (`float`, *optional*): Bounds,
            over two lines.
        entries (`list[dict]`, *optional*): Mappings.
    """

    low: float = 0.5
    high: float | None = None
    entries: list[dict[str, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Keys:
    """
    Keys of a mapping.

    Args:
        width (`int`): How wide.
    """

    width: int = 3


@dataclasses.dataclass
class Base:
    """
    What is inherited.

    Args:
        seed (`int`): Of the draw.

    Raises:
        nothing (`int`): This is no argument.
    """

    seed: int = 0


@dataclasses.dataclass
class Options(Base):
    """
    All that can be set.

    Args:
        text (`str`): Some text, 5% of it.
        number (`float`), count (`int`, *optional*): Numbers.
        switch (`bool`): On or off.
        choice (`str`): `a`, or `b`.
        names (`list[str]`): Names.
        pair (`tuple[int, ...]`): Numbers.
        shares (`dict[str, float]`): Gene to share.
        anything (`dict`): See [`Keys`].
        either (`int` or `str`, *optional*): A number, or a word.
        inner, absent ([`Inner`]): Nested.
    """

    text: str | None = None
    number: float = 1.0
    count: int | None = None
    switch: bool = False
    choice: Literal["a", "b"] = "a"
    names: list[str] | None = None
    pair: tuple[int, ...] = ()
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    anything: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"keys": Keys})
    either: int | str | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)
    absent: Inner | None = None


@dataclasses.dataclass
class Command:
    """
    What it is done with.

    Args:
        out (`str`): Where to.
        files (`list[str]`): From where.
        seed (`int`): Of the draw.
    """

    out: str = dataclasses.field(metadata=POSITIONAL)
    files: list[str] = dataclasses.field(default_factory=list, metadata=POSITIONAL)
    seed: int = 0


# Words of a command line -> option, value.
GOOD = {
    "text": ("--text abc", "text", "abc"),
    "text that looks like a number": ("--text 12", "text", "12"),
    "text after an equals sign": ("--text=--abc=1", "text", "--abc=1"),
    "no text": ("--text null", "text", None),
    "a dash for an underscore": ("--inner.low 2", "inner.low", 2.0),
    "number": ("--number 1e-3", "number", 1e-3),
    "negative number": ("--number -2", "number", -2.0),
    "integer": ("--count 5", "count", 5),
    "no integer": ("--count null", "count", None),
    "the last one counts": ("--count 5 --count 6", "count", 6),
    "switch": ("--switch", "switch", True),
    "switch in words": ("--switch false", "switch", False),
    "switch before another": ("--switch --count 5", "switch", True),
    "choice": ("--choice b", "choice", "b"),
    "list": ("--names a b --count 1", "names", ["a", "b"]),
    "list in brackets": ("--names [a,b]", "names", ["a", "b"]),
    "list, one after another": ("--names a --names b c", "names", ["a", "b", "c"]),
    "list in brackets, the last one counts": ("--names [a] --names [b,c]", "names", ["b", "c"]),
    "empty list": ("--names []", "names", []),
    "numbers stay names": ("--names 1 2", "names", ["1", "2"]),
    "tuple": ("--pair 1 2", "pair", (1, 2)),
    "mapping": ("--shares A.1=0.5 B=1", "shares", {"A.1": 0.5, "B": 1.0}),
    "mapping in brackets": ("--shares {A:~0.5}", "shares", {"A": 0.5}),
    "mapping by a name below": ("--shares.A 0.5", "shares", {"A": 0.5}),
    "mapping of anything": ("--anything.a.b [1]", "anything", {"a": {"b": [1]}}),
    "key with a class": ("--anything.width 4", "anything", {"width": 4}),
    "one of two types": ("--either 3", "either", 3),
    "the other of two types": ("--either all", "either", "all"),
    "nested": ("--inner.high 3", "inner", Inner(high=3.0)),
    "nested, dashes": ("--inner.entries {a:~1} {b:~2}", "inner.entries", [{"a": 1}, {"b": 2}]),
    "nested as a mapping": ("--inner {low:~3}", "inner", Inner(low=3.0)),
    "nested where there is none": ("--absent.low 3", "absent", Inner(low=3.0)),
    "whole, then part": ("--absent.low 4 --absent {low:~3,high:~9}", "absent", Inner(low=4.0, high=9.0)),
    "inherited": ("--seed 3", "seed", 3),
}
BAD = {
    "unknown": ("--txt a", "`--txt` is not an option; did you mean `text`?"),
    "unknown inside": ("--inner.lowe 1", "`--inner.lowe` is not an option; did you mean `inner.low`"),
    "known elsewhere": ("--low 1", "`--low` is not an option; did you mean `inner.low` or `absent.low`?"),
    "nothing near": ("--zzzzzzzzz 1", "`--zzzzzzzzz` is not an option; there are"),
    "no value": ("--count", "`--count` has no value; wanted `--count INTEGER`."),
    "no value before a flag": ("--names --switch", "`--names` has no value; wanted `--names VALUE ...`."),
    "no flag": ("count=3", "`count=3` is not a flag; wanted `--name value`"),
    "text for a number": ("--number many", "`number` is 'many' (str); wanted float."),
    "fraction for an integer": ("--count 1.5", "`count` is 1.5 (float); wanted int."),
    "no integer where one is needed": ("--seed null", "`seed` is None (NoneType); wanted int."),
    "word for a switch": ("--switch=maybe", "`switch` is 'maybe' (str); wanted bool."),
    "wrong choice": ("--choice c", "`choice` is 'c'; wanted one of 'a', 'b'."),
    "wrong entry": ("--pair 1 x", "`pair[1]` is 'x' (str); wanted int."),
    "no label": ("--shares 0.5", "`shares` is '0.5'; wanted NAME=VALUE."),
    "wrong share": ("--shares A=much", "`shares.A` is 'much' (str); wanted float."),
    "no YAML": ("--pair [1", "`pair` is '[1', which is not valid YAML."),
    "no mapping": ("--inner 3", "`inner` is 3; wanted a mapping of option names to values."),
}


def split(words):
    return [word.replace("~", " ") for word in words.split()]


@pytest.mark.parametrize("name", GOOD)
def test_flags_become_options(name):
    words, option, value = GOOD[name]
    (found,) = read_options(split(words), Options)
    for key in option.split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(name):
    words, message = BAD[name]
    with pytest.raises(ValueError) as caught:
        read_options(split(words), Options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_dashes_in_names_are_underscores():
    assert read_flags(["--a-b.c-d=x-y"], dataclasses.make_dataclass("A", [("a_b", dict[str, str])])) == {
        "a_b": {"c_d": "x-y"}
    }


@pytest.mark.parametrize(
    ("words", "out", "files"),
    [
        ("o", "o", []),
        ("o f g", "o", ["f", "g"]),
        ("--seed 1 o f", "o", ["f"]),
        ("o --seed 1 f g", "o", ["f", "g"]),
        ("--out o f g", "o", ["f", "g"]),
        ("o --files f g", "o", ["f", "g"]),
    ],
)
def test_positional_words_fill_their_fields_in_order(words, out, files):
    (found,) = read_options(words.split(), Command)
    assert (found.out, found.files) == (out, files)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"^`out` is missing; it has no default"):
        read_options(["--seed", "3"], Command)


def test_a_field_of_two_classes_is_one_flag():
    command, options = read_options(["o", "--seed", "3", "--count", "2"], Command, Options)
    assert command.seed == options.seed == 3 and options.count == 2
    assert list(flags_of(Command, Options)).count("seed") == 1


def test_flags_lie_over_the_file_and_the_file_over_defaults(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("number: 1e-4\nout: there\ninner: {low: 2, high: 3}\nshares: {A: 1}\n")
    words = ["--config", str(config), "--inner.high", "4", "--shares", "B=2"]
    command, options = read_options(words, Command, Options)
    assert (command.out, options.number, options.count) == ("there", 1e-4, None)
    assert options.inner == Inner(2.0, 4.0) and options.shares == {"A": 1.0, "B": 2.0}
    config.write_text("numbr: 1")
    with pytest.raises(ValueError, match=r"^`numbr` is not an option; did you mean `number`"):
        read_options(words, Command, Options)


def test_help_tells_every_option_its_type_meaning_and_default():
    text = " ".join(help_text("gppc x", "what it does", Command, Options).split())
    assert text.startswith("usage: gppc x OUT [FILES ...] [--name value ...] what it does")
    for line in (
        "--out TEXT Where to. (required)",
        "--text TEXT Some text, 5% of it. (default: null)",
        "--number NUMBER Numbers. (default: 1.0)",
        "--count INTEGER Numbers. (default: null)",
        "--switch [true|false] On or off. (default: false)",
        "--choice {a,b} `a`, or `b`. (default: a)",
        "--names VALUE ... Names. (default: null)",
        "--shares NAME=VALUE ... Gene to share. (default: {})",
        "--anything NAME=VALUE ... See `Keys`. (default: {})",
        "anything: Keys of a mapping. --anything.width INTEGER How wide. (default: 3)",
        "--either VALUE A number, or a word. (default: null)",
        "inner: Things inside. --inner.low NUMBER Bounds, over two lines. (default: 0.5)",
        "absent: Things inside. --absent.low NUMBER Bounds, over two lines. (default: 0.5)",
    ):
        assert line in text, line
    assert "--inner VALUE" not in text and "nothing" not in text


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (ValueError("two\n  lines"), 2, "gppc x: error: two lines\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "gppc x: error: [Errno 2] No such file: 'a'\n"),
        (KeyboardInterrupt(), 130, "gppc x: interrupted\n"),
    ],
)
def test_a_command_ends_with_one_line(error, status, line, capsys, monkeypatch):
    def command():
        if error is not None:
            raise error

    assert run_command("gppc x", command) == status
    assert capsys.readouterr().err == line
    # Of several processes the first one says it.
    monkeypatch.setenv("RANK", "1")
    assert run_command("gppc x", command) == status and capsys.readouterr().err == ""


def test_a_bug_is_no_bad_input():
    with pytest.raises(KeyError):
        run_command("gppc x", lambda: {}["a"])


def test_merge_leaves_both_as_they_are():
    base, changes = {"a": {"b": 1, "c": [1]}}, {"a": {"c": [2]}, "d": {}}
    assert merge(base, changes) == {"a": {"b": 1, "c": [2]}, "d": {}}
    assert base == {"a": {"b": 1, "c": [1]}} and changes == {"a": {"c": [2]}, "d": {}}
