"""`gppc`: every option is in a help text, and help texts and mistakes answer at once."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from data_scripts.command_line import argument_texts, sections_of
from gppc.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
# What takes seconds to import.
SLOW = ("torch", "transformers", "pandas", "anndata", "scipy", "tiledbsoma", "datasets", "matplotlib")


def fields_below(cls, prefix=""):
    """Dotted names of the fields of a dataclass that are no dataclasses themselves."""
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if inner is not None and typing.get_origin(hint) not in (list, dict):
            yield from fields_below(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_with_its_meaning(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    options = importlib.import_module(COMMANDS[command][0]).OPTIONS
    names = [name for cls in options for name in fields_below(cls)]
    assert names
    for name in names:
        assert f"\n  --{name} " in text, name
    assert text.count("(default:") + text.count("(required)") >= len(set(names))
    for _, cls, fields in sections_of(*options):
        texts = argument_texts(cls)
        assert all(texts[field.name] for field, _ in fields if not dataclasses.is_dataclass(field.default_factory))


def test_help_lists_every_command(capsys):
    for words in (["--help"], ["-h"], []):
        assert main(words) == 0
        text = capsys.readouterr().out
        for name, (_, summary) in COMMANDS.items():
            assert f"  {name} " in text and summary in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evalute"], "gppc: error: `evalute` is not a command; did you mean `evaluate`?"),
        (["--overwrite"], "gppc: error: `--overwrite` is not a command; there are "),
        (
            ["make-census", "s", "f", "--organsim", "x"],
            "gppc make-census: error: `--organsim` is not an option; did you mean `organism`",
        ),
        (["make-census", "s"], "gppc make-census: error: `files` is missing"),
        (
            ["build-pairs", "o", "--uri", "x"],
            "gppc build-pairs: error: `--uri` is not an option; did you mean `query.uri`?",
        ),
        (["build-pairs", "o", "--config", "none.yaml"], "gppc build-pairs: error: `config` none.yaml is not a file"),
        (["push", "a/b", "--kind", "modle"], "gppc push: error: `kind` is 'modle'; wanted one of"),
        (["predict", "m", "c", "d"], "gppc predict: error: `d` is not a flag"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, line, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


def in_a_fresh_process(code):
    """What a process of its own prints as JSON, with the CPU seconds it took and the slow libraries it loaded."""
    report = (
        f"\nimport json, resource, sys\nused = resource.getrusage(resource.RUSAGE_SELF)\n"
        f"print(json.dumps([used.ru_utime + used.ru_stime, [name for name in {SLOW} if name in sys.modules]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code + report], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["bild-pairs"],
        *([command, "--help"] for command in COMMANDS),
        ["make-census", "store", "a.h5ad", "--organsim", "x"],
        ["build-pairs", "out", "--panel.n_gene", "5"],
        ["predict", "model", "cells.h5ad", "--perturb", "A=ko"],
    ],
    ids=" ".join,
)
def test_what_needs_no_computation_answers_at_once(words):
    seconds, loaded = in_a_fresh_process(f"from gppc.cli import main\nmain({words})")
    # About 0.15 s; the bound leaves room for a busy machine, and none for importing torch.
    assert loaded == [] and seconds < 1


@pytest.mark.parametrize(
    "module",
    [
        "modeling_gppc",
        "modeling_gppc.normalization_gppc",
        "data_scripts.command_line",
        "data_scripts.files",
        "data_scripts.cells.screen_options",
        "data_scripts.pairs.pair_options",
        "data_scripts.synthetic.network_config",
        "modeling_gppc.inference.predict_options",
        "modeling_gppc.evaluation.evaluate_options",
    ],
)
def test_options_modules_load_nothing_slow(module):
    assert in_a_fresh_process(f"import {module}")[1] == []


def test_a_class_asked_for_is_registered():
    code = """
import modeling_gppc
from transformers import AutoConfig
assert "GppcConfig" not in vars(modeling_gppc)
from modeling_gppc import GppcConfig
assert AutoConfig.for_model("gppc").__class__ is GppcConfig is modeling_gppc.GppcConfig
try:
    modeling_gppc.GppcModle
except AttributeError as error:
    assert "GppcModle" in str(error)
else:
    raise SystemExit(1)
"""
    assert "torch" in in_a_fresh_process(code)[1]
