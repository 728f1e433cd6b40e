"""Options of data and training, and how a YAML file and flags are read."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import SchedulerType, get_scheduler

from data_scripts.cells.read_options import CensusReadOptions
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.options import Count, CountOrZero, NotNegative, Positive, Range, check_numbers
from data_scripts.synthetic.network import SyntheticConfig
from modeling_gppc.normalization_gppc import close_matches

CONFIGS = Path(__file__).parent / "configs"
REPORTERS = ("tensorboard", "trackio", "wandb")


@dataclass
class DataOptions:
    """
    Where the cells come from; exactly one of `pairs`, `example`, `files`, `synthetic` and `screen`, or a `uri` /
    `census_version` in `pairs.query`.

    Args:
        pairs (`str`, *optional*): Folder that `gppc build-pairs` wrote.
        example (`str`, *optional*): Cells that need no download: `pbmc68k_reduced`, as scanpy ships them.
        files (`list[str]`, *optional*): AnnData files of raw counts; written into a local store first. The name of a
            file without its ending is its data set's name.
        file_options (`CensusReadOptions`, *optional*): How they are read.
        synthetic (`SyntheticConfig`, *optional*): Cells from a known gene network; written into a local store first.
        screen (`str`, *optional*): AnnData file of a CRISPR screen; `screen` says what is fitted on it.
        screen_options (`ScreenOptions`, *optional*): How it is read.
        stream (`bool`, *optional*, defaults to `False`): Train straight from the store: pairs are read, matched and
            collated ahead in the background, partners are drawn anew in every epoch. Written are only the validation
            and test pairs, and the sample of training pairs that the closed-form start is fitted on.
        stream_pool_shards (`int`, *optional*, defaults to 2): Shards that a batch draws its pairs from; the pairs of
            about half of them are in each worker's memory.
        num_proc (`int`, *optional*, defaults to 1): Processes that build pairs.
    """

    pairs: str | None = None
    example: Literal["pbmc68k_reduced"] | None = None
    files: list[str] | None = None
    file_options: CensusReadOptions = field(default_factory=CensusReadOptions)
    synthetic: SyntheticConfig | None = None
    screen: str | None = None
    screen_options: ScreenOptions = field(default_factory=ScreenOptions)
    stream: bool = False
    stream_pool_shards: Count = 2
    num_proc: Count = 1

    def __post_init__(self):
        check_numbers(self, "data")
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
        redraw_perturbations (`bool`): Draw the imposed genes anew in every epoch.
        n_query_genes (`int`, *optional*): Genes predicted in a batch; defaults to all.
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

    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.01
    adam_beta2: Annotated[float, Range(0, 1, below=True)] = 0.98
    max_grad_norm: NotNegative = 1.0
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, int | float | Any] = field(default_factory=dict)
    warmup_steps: CountOrZero = 100
    max_steps: Count = 1000
    per_device_train_batch_size: Count = 128
    per_device_eval_batch_size: Count = 256
    gradient_accumulation_steps: Count = 1
    eval_steps: Count = 250
    save_steps: Count = 250
    logging_steps: Count = 50
    save_total_limit: Count = 2
    early_stopping_patience: Count | None = None
    max_validation_pairs: Count = 2_000
    redraw_perturbations: bool = True
    n_query_genes: Count | None = None
    linear_start_cells: Count = 20_000
    linear_start_iterations: Count = 30
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    dataloader_num_workers: CountOrZero = 1
    report_to: list[str] = field(default_factory=list)
    use_cpu: bool = False
    deterministic: bool = False

    def __post_init__(self):
        check_numbers(self, "training")
        schedules = [schedule.value for schedule in SchedulerType]
        if self.lr_scheduler_type not in schedules:
            raise ValueError(
                f"`training.lr_scheduler_type` is {self.lr_scheduler_type!r}"
                f"{close_matches(self.lr_scheduler_type, schedules)}"
            )
        try:  # a schedule of its own checks its settings
            optimizer, settings = torch.optim.SGD([torch.zeros(1)]), self.lr_scheduler_kwargs
            get_scheduler(self.lr_scheduler_type, optimizer, self.warmup_steps, self.max_steps, settings)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`training.lr_scheduler_kwargs` {self.lr_scheduler_kwargs} do not fit {self.lr_scheduler_type!r}: "
                f"{' '.join(str(error).split())}"
            ) from error
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
