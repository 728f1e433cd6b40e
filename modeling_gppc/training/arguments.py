"""Options of a training run: defaults, overridden by a YAML file, overridden by flags."""

import argparse
import copy
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import SchedulerType

from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.options import from_mapping, read_yaml
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.synthetic.network import SyntheticConfig
from modeling_gppc.configuration_gppc import GppcConfig
from modeling_gppc.feature_extraction_gppc import close_matches
from modeling_gppc.training.screen_run_options import ScreenRunOptions

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "default"
# What the data decide, not the person who starts a run.
DERIVED_MODEL_FIELDS = ("vocab_size", "pairings")
REPORTERS = ("tensorboard", "trackio", "wandb")
HUB_STRATEGIES = ("end", "every_save")
# Numbers that must be above zero; `None` is what it says elsewhere.
POSITIVE = (
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "save_total_limit",
    "max_validation_pairs",
    "early_stopping_patience",
    "n_query_genes",
    "linear_start_cells",
    "linear_start_iterations",
)


@dataclass
class DataOptions:
    """
    Where the cells come from; exactly one of the first five, or a `uri` / `census_version` in `pairs.query`.

    Args:
        pairs (`str`, *optional*): Folder that `gppc build-pairs` wrote.
        example (`str`, *optional*): Cells that need no download: `pbmc68k_reduced`, as scanpy ships them.
        files (`list[str]`, *optional*): AnnData files of raw counts; written into a local store first. The name of a
            file without its ending is its data set's name.
        synthetic (`SyntheticConfig`, *optional*): Cells from a known gene network; written into a local store first.
        screen (`str`, *optional*): AnnData file of a CRISPR screen; `screen` says what is fitted on it.
        screen_options (`ScreenOptions`, *optional*): How it is read.
        stream (`bool`, *optional*, defaults to `False`): Train straight from the store: pairs are read, matched and
            collated ahead in the background, partners are drawn anew in every epoch. Written are only the validation
            and test pairs, and a sample of training pairs for the closed-form start and the floors.
        stream_pool_shards (`int`, *optional*, defaults to 2): Shards that a batch draws its pairs from; the pairs of
            about half of them are in each worker's memory.
        num_proc (`int`, *optional*, defaults to 1): Processes that build pairs.
        library_size_key, cell_type_key, donor_key (`str`, *optional*): Columns of obs of `files`, where their names
            are not the usual ones.
    """

    pairs: str | None = None
    example: Literal["pbmc68k_reduced"] | None = None
    files: list[str] | None = None
    synthetic: SyntheticConfig | None = None
    screen: str | None = None
    screen_options: ScreenOptions = field(default_factory=ScreenOptions)
    stream: bool = False
    stream_pool_shards: int = 2
    num_proc: int = 1
    library_size_key: str | None = None
    cell_type_key: str | None = None
    donor_key: str | None = None

    def __post_init__(self):
        for name in ("num_proc", "stream_pool_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"`data.{name}` is {getattr(self, name)}; wanted at least 1.")
        if self.stream and self.pairs is not None:
            raise ValueError(
                f"`data.stream` is true with `data.pairs` {self.pairs!r}, whose rows are finished; give the store they "
                "were built from as `pairs.query.uri` (or `census_version`), or leave `data.stream` out."
            )
        if self.stream and self.screen is not None:
            raise ValueError(
                f"`data.stream` is true with `data.screen` {self.screen!r}, whose cells fit into memory; leave "
                "`data.stream` out."
            )


@dataclass
class TrainingOptions:
    """
    How the model is trained; names are those of `transformers.TrainingArguments` where they mean the same.

    Args:
        learning_rate, weight_decay, adam_beta2, max_grad_norm (`float`): AdamW.
        lr_scheduler_type (`str`), lr_scheduler_kwargs (`dict`), warmup_steps (`int`): Schedule.
        max_steps (`int`): Optimiser steps.
        per_device_train_batch_size, per_device_eval_batch_size, gradient_accumulation_steps (`int`): Pairs.
        eval_steps, save_steps, logging_steps (`int`): How often.
        save_total_limit (`int`): Checkpoints kept, the best among them.
        early_stopping_patience (`int`, *optional*): Evaluations without improvement before training ends.
        max_validation_pairs (`int`): Validation pairs scored at each evaluation.
        redraw_perturbations (`bool`): Draw the revealed genes anew in every epoch.
        n_query_genes (`int`, *optional*): Genes predicted in a batch; defaults to all.
        start_from (`str`, *optional*): Folder of a trained model whose weights the network starts with; genes are
            found by id, sizes are that model's. The linear response is fitted on the run's own cells all the same.
        linear_start_cells (`int`): Cells that the closed-form start is fitted on, at most.
        linear_start_iterations (`int`): Passes over them.
        precision (`str`): `fp32`, `bf16` or `fp16`.
        attn_implementation (`str`): `sdpa` or `eager`.
        gradient_checkpointing, torch_compile (`bool`): Trade time for memory; compile the model.
        dataloader_num_workers (`int`): Processes that collate ahead, each training process its own; 0: none.
        report_to (`list[str]`): Any of `tensorboard`, `trackio`, `wandb`.
        use_cpu (`bool`): Train on the CPU even where an accelerator is.
        deterministic (`bool`): Refuse algorithms whose result differs from run to run on a GPU; slower.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 100
    max_steps: int = 1000
    per_device_train_batch_size: int = 128
    per_device_eval_batch_size: int = 256
    gradient_accumulation_steps: int = 1
    eval_steps: int = 250
    save_steps: int = 250
    logging_steps: int = 50
    save_total_limit: int = 2
    early_stopping_patience: int | None = None
    max_validation_pairs: int = 2_000
    redraw_perturbations: bool = True
    n_query_genes: int | None = None
    start_from: str | None = None
    linear_start_cells: int = 20_000
    linear_start_iterations: int = 30
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    dataloader_num_workers: int = 1
    report_to: list[str] = field(default_factory=list)
    use_cpu: bool = False
    deterministic: bool = False

    def __post_init__(self):
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`training.{name}` is {value}; wanted a positive number.")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`training.{name}` is {getattr(self, name)}; wanted 0 or more.")
        schedules = [schedule.value for schedule in SchedulerType]
        if self.lr_scheduler_type not in schedules:
            raise ValueError(
                f"`training.lr_scheduler_type` is {self.lr_scheduler_type!r}"
                f"{close_matches(self.lr_scheduler_type, schedules)}"
            )
        if self.precision == "fp16" and (self.use_cpu or not torch.cuda.is_available()):
            raise ValueError("`training.precision` is 'fp16', which needs a GPU; wanted fp32 or bf16 on the CPU.")
        if self.save_steps % self.eval_steps:
            raise ValueError(
                f"`training.save_steps` is {self.save_steps}; wanted a multiple of `eval_steps` ({self.eval_steps}), "
                "so that every checkpoint was evaluated."
            )
        for name in self.report_to:
            if name not in REPORTERS:
                raise ValueError(f"`training.report_to` names {name!r}{close_matches(name, REPORTERS)}")
            if importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"`training.report_to` names {name!r}, which is not installed; `pip install {name}`, or leave it out."
                )


@dataclass
class EvaluationOptions:
    """
    What is scored at the end.

    Args:
        max_pairs (`int`): Test pairs a split, at most.
        max_floor_pairs (`int`): Training pairs that floors are fitted on, at most; they are dense in memory.
        n_resamples (`int`): Bootstrap resamples.
        floors (`list[str]`, *optional*): Names of floors; defaults to all.
        optimum_pairs (`int`): Pairs on which the best predictor of count-form synthetic cells is estimated.
        optimum_samples (`int`): States drawn for each cell of that estimate.
        splits (`list[str]`, *optional*): Names of the splits to score, as `results.json` calls them; defaults to all.
        perturbation (`str`, *optional*): The first prediction's perturbation; defaults to a knock-out of a gene that
            is commonly expressed and varies.
    """

    max_pairs: int = 4_000
    max_floor_pairs: int = 12_000
    n_resamples: int = 1_000
    floors: list[str] | None = None
    optimum_pairs: int = 150
    optimum_samples: int = 512
    splits: list[str] | None = None
    perturbation: str | None = None


@dataclass
class RunOptions:
    """
    Everything a training run needs to know.

    Args:
        output_dir (`str`): Folder of the run: store and pairs it makes, checkpoints, and `model`, what is kept.
        seed (`int`): Of weights, order of pairs and bootstrap; pairs have `pairs.seed`.
        data, pairs, screen, training, evaluation: See the classes, [`PairOptions`] and [`ScreenRunOptions`].
        model (`dict`): Fields of [`GppcConfig`] other than those the data decide; `size` names a size of
            [`GppcConfig.from_size`], which the other fields override.
    """

    output_dir: str = "runs/default"
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    pairs: PairOptions = field(default_factory=PairOptions)
    screen: ScreenRunOptions = field(default_factory=ScreenRunOptions)
    model: dict[str, Any] = field(default_factory=dict)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self):
        derived = ("model_type", *DERIVED_MODEL_FIELDS)
        fields = ["size", *(name for name in GppcConfig.__annotations__ if name not in derived)]
        for name in self.model:
            if name in DERIVED_MODEL_FIELDS:
                raise ValueError(f"`model.{name}` follows from the data; leave it out.")
            if name not in fields:
                raise ValueError(f"`model.{name}` is not an option{close_matches(name, fields)}.")
        self.model_config(vocab_size=2, pairings=list(self.pairs.matching.pairings))
        names = ("pairs", "example", "files", "synthetic", "screen")
        given = [f"data.{name}" for name in names if getattr(self.data, name) is not None]
        query = self.pairs.query
        given += [f"pairs.query.{name}" for name in ("uri", "census_version") if getattr(query, name) is not None]
        if len(given) != 1:
            got = " and ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(
                f"`data`: cells come from {got}; wanted exactly one of `data.pairs`, `data.example`, `data.files`, "
                "`data.synthetic`, `data.screen`, `pairs.query.uri`, `pairs.query.census_version`."
            )
        if self.data.stream and not self.training.redraw_perturbations:
            raise ValueError(
                "`training.redraw_perturbations` is false with `data.stream`, which draws partners and revealed genes "
                "anew in every epoch; leave `data.stream` out to reveal the same ones always."
            )

    def model_config(self, vocab_size: int, pairings: list[str]) -> GppcConfig:
        """The model's configuration.

        Raises:
            ValueError: Naming the option whose value does not fit.
        """
        settings = dict(self.model)
        settings.setdefault("default_pairing", "same_type" if "same_type" in pairings else pairings[0])
        size = settings.pop("size", None)
        build = GppcConfig if size is None else functools.partial(GppcConfig.from_size, size)
        try:
            return build(vocab_size=vocab_size, pairings=pairings, **settings)
        except Exception as error:  # `@strict` raises a class of its own that is no ValueError
            raise ValueError(f"`model`: {' '.join(str(error).split())}") from error


def find_config(name: str) -> Path:
    """A YAML file by path, or a shipped one by name with or without its ending.

    Raises:
        ValueError: If there is none, with close matches.
    """
    for path in (Path(name), CONFIGS / f"{name}.yaml", CONFIGS / Path(name).name):
        if path.is_file():
            return path
    shipped = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise ValueError(f"`config` {name} does not exist{close_matches(Path(name).stem, shipped)}")


def merge(base: Mapping, changes: Mapping) -> dict:
    """`base` with `changes` laid over it, mapping by mapping."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def read_flags(flags: Sequence[str]) -> dict:
    """`--section.name value` or `--section.name=value` flags as nested mappings; values are read as YAML.

    Raises:
        ValueError: For something that is no flag, or a flag without a value.
    """
    changes: dict = {}
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--"):
            raise ValueError(f"`{flag}` is not a flag; wanted `--name value`, e.g. `--training.max_steps 500`.")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            position += 1
            if position >= len(flags):
                raise ValueError(f"`--{name}` has no value; wanted `--{name} VALUE`.")
            text = flags[position]
        position += 1
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"`--{name}` has the value {text!r}, which is not valid YAML.") from error
        *sections, last = name.replace("-", "_").split(".")
        inner = changes
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return changes


def build_parser(description: str) -> argparse.ArgumentParser:
    """Parser of the few flags that are not options of the run."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every option of the YAML file is a flag too: --training.max_steps 500, --pairs.panel.n_genes 2000.",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file, or the name of a shipped one")
    parser.add_argument(
        "--sweep", metavar="YAML", help="search options instead of training once; see docs/training.md"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the same run")
    parser.add_argument("--push_to_hub", metavar="REPO", help="push the finished model to this Hub repository")
    parser.add_argument(
        "--hub_strategy",
        choices=HUB_STRATEGIES,
        default=HUB_STRATEGIES[0],
        help="push at the end only, or the model of every saved checkpoint as well",
    )
    return parser


def parse_options(config: str, flags: Sequence[str]) -> RunOptions:
    """Options of a YAML file overridden by flags.

    Raises:
        ValueError: For an unknown file, option or value, naming the option and close matches.
    """
    path = find_config(config)
    mapping = read_yaml(path)
    mapping.setdefault("output_dir", f"runs/{path.stem}")
    return from_mapping(RunOptions, merge(mapping, read_flags(flags)))
