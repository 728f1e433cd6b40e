"""`gppc build-pairs`: a Census query turned into a folder of pair rows."""

import argparse
from pathlib import Path

import yaml

from data_scripts.options import from_mapping, read_yaml
from data_scripts.pairs.pair_options import PairOptions

FLAGS = {
    "uri": "query.uri",
    "census_version": "query.census_version",
    "organism": "query.organism",
    "obs_filter": "query.obs_filter",
    "layer": "query.layer",
    "n_genes": "panel.n_genes",
    "pairs_per_cell": "matching.pairs_per_cell",
    "format": "file_format",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("out", type=Path, help="folder to write; the same command finishes an interrupted one")
    parser.add_argument("--config", type=Path, help="YAML file of options (see docs/data.md)")
    parser.add_argument("--uri", help="store in Census layout: a folder or an S3 address")
    parser.add_argument("--census-version", help="release of the public Census: stable, latest or a date")
    parser.add_argument("--organism", help="homo_sapiens (default) or mus_musculus")
    parser.add_argument("--obs-filter", help="cells, e.g. \"tissue == 'blood'\"")
    parser.add_argument("--layer", help="raw (default), normalized or log_values")
    parser.add_argument("--n-genes", type=int, help="size of the gene panel")
    parser.add_argument("--pairs-per-cell", type=int, help="partners drawn for each cell")
    parser.add_argument(
        "--format",
        help="arrow (memory-mapped), parquet (small) or auto (default): parquet for panels of more than 4,096 genes",
    )
    parser.add_argument("--seed", type=int, help="seed of matching and sampling")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any option, e.g. matching.policy=nearest"
    )
    parser.add_argument("--num-proc", type=int, default=1, help="processes; the rows do not depend on it")

    parser.add_argument("--dask", metavar="ADDRESS", help="run the shards on this dask.distributed scheduler")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built, and how long it would take")


def options_from(arguments: argparse.Namespace) -> PairOptions:
    """Options of a config file, overridden by flags, overridden by `--set`.

    Raises:
        ValueError: For an option or value that does not exist.
    """
    mapping = read_yaml(arguments.config) if arguments.config is not None else {}
    settings = [
        (name, getattr(arguments, flag)) for flag, name in FLAGS.items() if getattr(arguments, flag) is not None
    ]
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"`--set` is {text!r}; wanted NAME=VALUE, e.g. panel.n_genes=1000.")
        try:
            settings.append((name, yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise ValueError(f"`--set` {text!r} has a malformed value: {' '.join(str(error).split())}") from error
    for name, value in settings:
        *path, last = name.split(".")
        place = mapping
        for key in path:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"`{name}` goes through {key!r}, which is not a group of options.")
        place[last] = value
    return from_mapping(PairOptions, mapping)


def describe(report: dict) -> str:
    """The report of a build as a short table."""
    lines = [f"{'split':<12}{'cells':>10}{'paired':>10}{'pairs':>10}{'shared':>10}{'differing':>11}{'revealed':>10}"]
    for name, entry in report["splits"].items():
        means = [entry[f"mean_{key}_genes"] for key in ("shared", "differing", "revealed")]
        shown = [f"{mean:.1f}" if mean is not None else "-" for mean in means]
        lines.append(
            f"{name:<12}{entry['cells']:>10,}{entry['cells_paired']:>10,}{entry['pairs']:>10,}"
            f"{shown[0]:>10}{shown[1]:>11}{shown[2]:>10}"
        )
        pairings = ", ".join(f"{key} {count:,}" for key, count in entry["pairs_per_pairing"].items())
        lines.append(f"{'':<12}pairs by pairing: {pairings}")
        if entry["cells_unpaired"]:
            reasons = ", ".join(f"{key} {count:,}" for key, count in entry["cells_unpaired"].items())
            lines.append(f"{'':<12}cells without a partner: {reasons}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    """Builds the folder and says what it holds."""
    options = options_from(arguments)
    # Imported late: these take seconds, and bad options should be told at once.
    if arguments.dry_run:
        from data_scripts.pairs.dry_run import estimate, tell

        print(tell(estimate(options, arguments.num_proc)))
        return 0
    from data_scripts.pairs.census_pairs import build_pairs

    folder = build_pairs(options, arguments.out, arguments.num_proc, dask=arguments.dask)
    print(describe(folder.manifest["report"]))
    print(folder.describe_splits())
    print(
        f"{len(folder.gene_ids):,} genes, {len(folder.panels)} sets of measured genes, digest {folder.manifest['digest']}"
    )
    print(f"written to {arguments.out}")
    return 0
