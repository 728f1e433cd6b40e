"""`gppc make-synthetic`: cells from a known gene network, written into a local store."""

import argparse
from pathlib import Path

import yaml

from data_scripts.options import from_mapping, read_yaml
from data_scripts.synthetic.network_config import FORMS, SyntheticConfig

FLAGS = {
    "form": "form",
    "cells": "n_cells",
    "genes": "n_genes",
    "regulators": "n_regulators",
    "cell_types": "n_cell_types",
    "donors": "n_donors",
    "datasets": "n_datasets",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    defaults = SyntheticConfig()
    parser.add_argument("store", type=Path, help="folder to write; the network is saved as STORE.network.safetensors")
    parser.add_argument("--config", type=Path, help="YAML file of options (the fields of SyntheticConfig)")
    parser.add_argument("--form", help=f"{' or '.join(FORMS)} (default {defaults.form})")
    for flag, name in FLAGS.items():
        if flag != "form":
            shown = name.removeprefix("n_").replace("_", " ")
            parser.add_argument(f"--{flag.replace('_', '-')}", type=int, help=f"{shown} ({getattr(defaults, name)})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any option, e.g. measured_share=0.6"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store of that name")


def config_from(arguments: argparse.Namespace) -> SyntheticConfig:
    """Options of a config file, overridden by flags, overridden by `--set`.

    Raises:
        ValueError: For an option or value that does not exist.
    """
    mapping = read_yaml(arguments.config) if arguments.config is not None else {}
    mapping.update(
        {name: getattr(arguments, flag) for flag, name in FLAGS.items() if getattr(arguments, flag) is not None}
    )
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"`--set` is {text!r}; wanted NAME=VALUE, e.g. measured_share=0.6.")
        try:
            mapping[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"`--set` {text!r} has a malformed value: {' '.join(str(error).split())}") from error
    return from_mapping(SyntheticConfig, mapping)


def run(arguments: argparse.Namespace) -> int:
    """Writes the store and says what is in it."""
    config = config_from(arguments)
    # Imported late: SOMA takes seconds to load, a mistyped option should answer at once.
    from data_scripts.synthetic.network_store import network_path, write_synthetic

    report, _ = write_synthetic(arguments.store, config, overwrite=arguments.overwrite, progress=True)
    print(report.summary())
    print(f"network -> {network_path(arguments.store)}")
    return 0
