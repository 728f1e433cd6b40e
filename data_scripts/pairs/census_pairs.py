"""Census query -> folder of pair rows: resumable, the same bytes for any number of processes; and as a `datasets` builder."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from data_scripts.files import write_arrays, write_json
from data_scripts.pairs.build_tasks import build_shard, count_part, load_part, run_tasks, shard_done
from data_scripts.pairs.gene_selection import choose_genes
from data_scripts.pairs.pair_folder import PairFolder, finish_pair_folder, read_table
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.pairs.pair_plan import PairPlan, check_folder, digest_of, plan_identity, query_for
from data_scripts.pairs.schema import GENE_SCHEMA, PAIR_SCHEMA, SPLITS
from data_scripts.store.freed_memory import return_freed_memory


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for one build, else raises `ValueError`; the lock dies with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"`out` {folder} is being written by another build; wait for it or choose another."
            ) from error
        yield


# What a stream needs of the plan.
STREAMED_FROM = ("plan.json", "cells.arrow", "measured.npy", "genes.npy")


def build_pairs(
    options: PairOptions,
    out: str | Path,
    num_proc: int = 1,
    progress: bool = True,
    dask: str | None = None,
    train_rows: int | None = None,
) -> PairFolder:
    """Builds a pairs folder, or finishes or opens the one that the same options began.

    Args:
        options (`PairOptions`): What to build.
        out (`str` or `Path`): The folder: new, or of the same run.
        num_proc (`int`, *optional*, defaults to 1): Processes; the rows do not depend on it.
        progress (`bool`, *optional*, defaults to `True`): Show progress bars.
        dask (`str`, *optional*): Address of a `dask.distributed` scheduler to run the shards on; its workers must see
            the store and `out` under the same paths.
        train_rows (`int`, *optional*): Write only about so many training rows, a random sample of the whole store, and
            keep the plan: for training from a [`~stream_pairs.PairStream`]. The other splits are written whole.

    Raises:
        ValueError: For bad options, a bad store or a folder of another run; before long work where it can be known.
    """
    out = Path(out) if dask is None else Path(out).resolve()
    with planned(options, out, num_proc, progress, dask, train_rows) as plan:
        if plan is not None:
            todo = [index for index in range(plan.n_shards) if not shard_done(plan, index)]
            run_tasks(build_shard, plan, todo, num_proc, progress, "pairs", dask)
            finish(plan)
            return_freed_memory()
    return PairFolder(out)


@contextlib.contextmanager
def planned(
    options: PairOptions,
    out: Path,
    num_proc: int,
    progress: bool,
    dask: str | None = None,
    train_rows: int | None = None,
) -> Iterator[PairPlan | None]:
    """Holds a folder exclusively, with its plan made or opened and its genes chosen; `None` where it is finished."""
    query = query_for(options)
    identity = plan_identity(options, query.source)
    if train_rows is not None:
        identity["train_rows"] = train_rows
    if check_folder(out, identity) == "finished":
        yield None
        return
    with exclusive(out):
        state = check_folder(out, identity)  # another build may have ended since
        if state == "finished":
            yield None
            return
        for leftover in out.rglob(".*.tmp"):
            leftover.unlink()
        plan = PairPlan(out) if state == "unfinished" else PairPlan.create(out, query, options, identity)
        write_genes(plan, num_proc, progress, dask)
        yield plan


def plan_pairs(options: PairOptions, out: str | Path, num_proc: int = 1, progress: bool = True) -> PairPlan:
    """The first part of [`build_pairs`]: plan and gene panel without rows, for streaming them while training.

    Args and errors are those of [`build_pairs`]; a folder that is finished already is refused.
    """
    with planned(options, Path(out), num_proc, progress) as plan:
        if plan is None:
            raise ValueError(f"`out` {out} holds the finished rows; train from them, or stream into another folder.")
        return plan


def write_genes(plan: PairPlan, num_proc: int, progress: bool, dask: str | None = None) -> None:
    """Writes the vocabulary (`genes.npy`), after a pass over the training cells where the rule needs one."""
    if (plan.work / "genes.npy").is_file():
        return
    options, selected = plan.options.panel, np.load(plan.work / "selected.npy")
    if options.rule in ("common", "variable"):
        todo = [index for index in range(plan.n_shards) if not (plan.work / f"panel-{index:05d}.npz").is_file()]
        run_tasks(count_part, plan, todo, num_proc, progress, "gene panel", dask)
    parts = (load_part(plan, index) for index in range(plan.n_shards))
    genes, steps = choose_genes(parts, plan.training_cells, plan.measured, selected, options, plan.var)
    write_json(steps, plan.work / "panel.json")
    write_arrays(genes.astype(np.int64), plan.work / "genes.npy")


def finish(plan: PairPlan) -> None:
    """Writes gene statistics, report and manifest, and clears the work folder."""
    reports = [json.loads((plan.work / f"shard-{index:05d}.json").read_text()) for index in range(plan.n_shards)]
    splits = {}
    for name in SPLITS:
        shards = [report["files"][name] for report in reports if name in report["files"]]
        splits[name] = {"n_pairs": sum(shard["n_rows"] for shard in shards), "shards": shards}
    report = merge_reports([report["report"] for report in reports])
    report["panel"] = json.loads((plan.work / "panel.json").read_text())
    sampled = plan.content["identity"].get("train_rows") is not None
    if sampled:
        report["splits"] = {SPLITS[0]: {"cells": int(plan.training_cells.sum())}, **report["splits"]}
    if not any(entry["n_pairs"] for entry in splits.values()):
        reasons = sorted({reason for entry in report["splits"].values() for reason in entry["cells_unpaired"]})
        raise ValueError(f"no cell found a partner ({', '.join(reasons)}); relax `pairings` or `min_shared_genes`.")
    finish_pair_folder(
        plan.out,
        gene_table(plan),
        plan.panels,
        {
            "organism": plan.options.query.organism,
            "normalization": plan.options.query.normalization,
            "target_sum": plan.options.query.target_sum,
            "pairings": list(plan.options.matching.pairings),
            "source": plan.content["source"],
            "options": dataclasses.asdict(plan.options),
            "identity": plan.content["identity"],
            "splits": splits,
            "split_by": plan.content["split_by"],
            "report": report,
            **({"train_split": "a random sample of the pairs; training streams all of them"} if sampled else {}),
        },
    )
    if sampled:
        for path in plan.work.iterdir():
            if path.name not in STREAMED_FROM:
                path.unlink()
    else:
        shutil.rmtree(plan.work)


def merge_reports(reports: list[dict]) -> dict:
    """Adds the shards' counts up and turns sums into means a pair."""
    merged: dict = {}
    for report in reports:
        for name, entry in report.items():
            _add(merged.setdefault(name, {}), entry)
    for entry in merged.values():
        sums = entry.pop("sums")
        compared = sums.pop("compared_pairs")
        for name, total in sums.items():
            n_pairs = compared if name == "differing_genes" else entry["pairs"]
            entry[f"mean_{name}"] = total / n_pairs if n_pairs else None
    return {"splits": {name: merged[name] for name in SPLITS if name in merged}}


def _add(total: dict, part: dict) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def gene_table(plan: PairPlan) -> pa.Table:
    """The vocabulary with statistics over the training cells."""
    n_genes = len(plan.genes)
    totals = {name: np.zeros(n_genes) for name in ("n_expressed", "sums", "squares")}
    for index in range(plan.n_shards):
        with np.load(plan.work / f"shard-{index:05d}.npz") as part:
            for name, total in totals.items():
                total += part[name]
    cells = plan.training_cells
    measured = plan.measured[:, plan.genes]
    n_measured = cells @ measured
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(n_measured > 0, totals["sums"] / n_measured, 0.0)
        variance = np.where(n_measured > 0, totals["squares"] / n_measured - mean**2, 0.0)
    var = plan.var.iloc[plan.genes]
    lengths = (
        var["feature_length"].to_numpy(dtype=np.float32)
        if "feature_length" in var
        else np.full(n_genes, np.nan, np.float32)
    )
    names = [var[column].astype(str).tolist() for column in ("feature_id", "feature_name")]
    numbers = [n_measured, totals["n_expressed"].astype(np.int64), (cells > 0).astype(np.int64) @ measured]
    moments = [mean.astype(np.float32), np.maximum(variance, 0).astype(np.float32)]
    return pa.table([pa.array(column) for column in (*names, lengths, *numbers, *moments)], schema=GENE_SCHEMA)


@dataclass
class CensusPairsConfig(datasets.BuilderConfig):
    """
    Configuration of [`CensusPairs`]; `digest` stands for everything the rows depend on in the cache key.

    Args:
        options (`PairOptions`): What to build.
        num_proc (`int`, *optional*, defaults to 1): Processes of the build.
    """

    options: PairOptions = field(default_factory=PairOptions)
    num_proc: int = 1


class CensusPairs(datasets.ArrowBasedBuilder):
    """
    Pair rows as a `datasets` builder: `CensusPairs.from_options(options).download_and_prepare()`, `.as_dataset()`.

    It runs the same resumable build as `gppc build-pairs` and hands its shards on.
    """

    BUILDER_CONFIG_CLASS = CensusPairsConfig

    @classmethod
    def from_options(
        cls, options: PairOptions, cache_dir: str | Path | None = None, num_proc: int = 1
    ) -> "CensusPairs":
        """Builder whose cache key covers store, query, panel, matching, seeds and code version."""
        digest = digest_of(plan_identity(options, query_for(options).source))
        return cls(
            cache_dir=None if cache_dir is None else str(cache_dir),
            config_name=f"pairs-{digest}",
            version=datasets.Version("1.0.0"),
            options=options,
            num_proc=num_proc,
        )

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Pairs of single cells that share a context, with a few imposed expression changes.",
            features=datasets.Features.from_arrow_schema(PAIR_SCHEMA),
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        folder = Path(self.cache_dir).parent / f"{self.config.name}-folder"
        pairs = build_pairs(self.config.options, folder, self.config.num_proc)
        generators = []
        for name in pairs.splits:
            shards = [str(folder / shard["file"]) for shard in pairs.manifest["splits"][name]["shards"]]
            generators.append(datasets.SplitGenerator(name=name, gen_kwargs={"shards": shards}))
        return generators

    def _generate_tables(self, shards: list[str]) -> Iterator[tuple[str, pa.Table]]:
        for shard in shards:
            for index, batch in enumerate(read_table(shard).to_batches()):
                yield f"{Path(shard).name}-{index}", pa.Table.from_batches([batch])
