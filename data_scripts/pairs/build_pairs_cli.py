"""`gppc build-pairs`: a Census query turned into a folder of pair rows."""

from dataclasses import dataclass, field

from data_scripts.command_line import POSITIONAL
from data_scripts.options import Count, check_numbers
from data_scripts.pairs.pair_options import PairOptions


@dataclass
class BuildOptions:
    """
    Where the pairs go, and who builds them.

    Args:
        out (`str`): Folder to write. The same command finishes an interrupted one.
        num_proc (`int`, *optional*, defaults to 1): Processes; the rows do not depend on it.
        dask (`str`, *optional*): Address of a dask.distributed scheduler that runs the shards instead.
        dry_run (`bool`, *optional*, defaults to `False`): Say what would be built and how long it would take.
    """

    out: str = field(metadata=POSITIONAL)
    num_proc: Count = 1
    dask: str | None = None
    dry_run: bool = False

    def __post_init__(self):
        check_numbers(self)


OPTIONS = (BuildOptions, PairOptions)


def describe(report: dict) -> str:
    """The report of a build as a short table."""
    lines = [f"{'split':<12}{'cells':>10}{'paired':>10}{'pairs':>10}{'shared':>10}{'differing':>11}{'imposed':>10}"]
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


def run(build: BuildOptions, options: PairOptions) -> None:
    """Builds the folder and says what it holds."""
    # Imported late: these take seconds, and bad options should be named at once.
    if build.dry_run:
        from data_scripts.pairs.dry_run import describe_estimate, estimate

        print(describe_estimate(estimate(options, build.num_proc)))
        return
    from data_scripts.pairs.census_pairs import build_pairs

    folder = build_pairs(options, build.out, build.num_proc, dask=build.dask)
    print(describe(folder.manifest["report"]))
    print(folder.describe_splits())
    print(
        f"{len(folder.gene_ids):,} genes, {len(folder.panels)} sets of measured genes, digest {folder.manifest['digest']}"
    )
    print(f"written to {build.out}")
