"""Everything a training run needs to know: defaults, overridden by a YAML file, overridden by flags."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.command_line import read_flags
from data_scripts.options import Seed, check_numbers, from_mapping, merge, nested, read_yaml
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.pair_options import PairOptions
from modeling_gppc.configuration_gppc import SIZES, GppcConfig
from modeling_gppc.evaluation.score_options import EvaluationOptions
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.normalization_gppc import close_matches
from modeling_gppc.training.arguments import DataOptions, TrainingOptions, find_config
from modeling_gppc.training.prepare_data import check_files, prepare_pairs
from modeling_gppc.training.screen_run_options import ScreenRunOptions
from modeling_gppc.training.stream_rows import open_stream, sample_rows
from modeling_gppc.training.trainer import GppcTrainer, make_trainer

# What the data decide, not the person who starts a run.
DERIVED_MODEL_FIELDS = ("vocab_size", "pairings")
# Where cells may come from; exactly one of these is given.
SOURCES = (
    *("data.pairs", "data.example", "data.files", "data.synthetic", "data.screen"),
    *("pairs.query.uri", "pairs.query.census_version"),
)


def sources_of(mapping: Mapping) -> dict[str, Any]:
    """Dotted name -> value of every source of cells that the options of a run name."""
    found = {}
    for name in SOURCES:
        value: Any = mapping
        for key in name.split("."):
            value = (value or {}).get(key)
        if value is not None:
            found[name] = value
    return found


# What `model` may say: `size`, and every field of `GppcConfig` that the data do not decide.
ModelOptions = make_dataclass(
    "ModelOptions",
    [("size", str | None, None)]
    + [
        (entry.name, entry.type, entry.default)
        for entry in fields(GppcConfig)
        if entry.name in GppcConfig.__annotations__ and entry.name not in ("model_type", *DERIVED_MODEL_FIELDS)
    ],
)
ModelOptions.__doc__ = (
    "The model; see `GppcConfig`.\n\nArgs:\n    size (`str`, *optional*): "
    f"One of {', '.join(SIZES)}, see docs/model.md. The other options override what it says."
    + inspect.cleandoc(GppcConfig.__doc__).partition("Args:")[2]
)


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
    seed: Seed = 0
    data: DataOptions = field(default_factory=DataOptions)
    pairs: PairOptions = field(default_factory=PairOptions)
    screen: ScreenRunOptions = field(default_factory=ScreenRunOptions)
    model: dict[str, Any] = field(default_factory=dict, metadata={"keys": ModelOptions})
    training: TrainingOptions = field(default_factory=TrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self):
        check_numbers(self)
        known = [entry.name for entry in fields(ModelOptions)]
        for name in self.model:
            if name in DERIVED_MODEL_FIELDS:
                raise ValueError(f"`model.{name}` follows from the data; leave it out.")
            if name not in known:
                raise ValueError(f"`model.{name}` is not an option{close_matches(name, known)}.")
        self.model_config(vocab_size=2, pairings=list(self.pairs.matching.pairings))
        given = sources_of({"data": vars(self.data), "pairs": {"query": vars(self.pairs.query)}})
        if len(given) != 1:
            got = " and ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(
                f"`data`: cells come from {got}; wanted exactly one of {', '.join(f'`{name}`' for name in SOURCES)}."
            )
        if self.data.stream and not self.training.redraw_perturbations:
            raise ValueError(
                "`training.redraw_perturbations` is false with `data.stream`, which draws partners and imposed genes "
                "anew in every epoch; leave `data.stream` out to impose the same ones always."
            )
        # Which data sets there are is known with the cells; which pairings, already here.
        if self.data.pairs is None and self.data.screen is None:
            pairings = self.pairs.matching.pairings
            for name in self.evaluation.splits or ():
                if name.rsplit("/", 1)[-1] not in pairings:
                    raise ValueError(
                        f"`evaluation.splits` names {name!r}; wanted a pairing, or DATASET/PAIRING"
                        f"{close_matches(name, pairings)}"
                    )

    def model_config(self, vocab_size: int, pairings: list[str]) -> GppcConfig:
        """The model's configuration; `ValueError` naming the option whose value does not fit."""
        settings = dict(self.model)
        settings.setdefault("default_pairing", "same_type" if "same_type" in pairings else pairings[0])
        size = settings.pop("size", None)
        build = GppcConfig if size is None else functools.partial(GppcConfig.from_size, size)
        try:
            return build(vocab_size=vocab_size, pairings=pairings, **settings)
        except Exception as error:  # `@strict` raises a class of its own that is no ValueError
            raise ValueError(f"`model`: {' '.join(str(error).split())}") from error

    def make_model(self, folder: PairFolder) -> GppcForPerturbationPrediction:
        """A model of the folder's genes with fresh weights."""
        set_seed(self.seed)
        config = self.model_config(folder.genes.num_rows, folder.pairings)
        config._attn_implementation = self.training.attn_implementation
        return GppcForPerturbationPrediction(config)

    def make_trainer(
        self, model: GppcForPerturbationPrediction, folder: PairFolder, place: tuple[int, int] = (0, 1)
    ) -> GppcTrainer:
        """A trainer of a model; `place` is the process's index and the number of processes, which share a stream."""
        settings = self.training
        redraw = self.pairs.perturbation if settings.redraw_perturbations else None
        rows, validation = row_sets(folder)
        if self.data.stream:
            rows = open_stream(folder, settings, self.data.stream_pool_shards, self.seed, *place)
        collator = PairCollator(folder.panels, redraw, seed=self.seed, n_query_genes=settings.n_query_genes)
        validation_collator = PairCollator(folder.panels)
        return make_trainer(
            model, settings, self.output_dir, self.seed, rows, validation, collator, validation_collator
        )

    def fit_linear_response(self, model: GppcForPerturbationPrediction, folder: PairFolder) -> None:
        """The closed-form start; of streamed pairs it reads the sample of rows that the folder holds."""
        cells, iterations = self.training.linear_start_cells, self.training.linear_start_iterations
        initialize_linear_response(model, *row_sets(folder), folder.panels, cells, iterations, self.seed)

    def check_files(self) -> None:
        """Looks at the files and folders that the options name, without reading cells; raises `ValueError`."""
        check_files(self.data, self.pairs)

    def prepare_pairs(self, progress: bool = True) -> PairFolder:
        """Makes or opens the pairs of the run; see [`~training.prepare_data.prepare_pairs`]."""
        sample = sample_rows(self.pairs, self.training) if self.data.stream else None
        return prepare_pairs(self.data, self.pairs, self.output_dir, train_rows=sample, progress=progress)


def row_sets(folder: PairFolder) -> tuple[PairDataset, PairDataset]:
    """The training and validation pairs that a folder holds."""
    return tuple(PairDataset(folder.split(name), folder.pairings) for name in ("train", "validation"))


def run_options(config: str | None, changes: Mapping) -> RunOptions:
    """Options of a YAML file with changes laid over it. A source of cells among the changes replaces the file's.

    Args:
        config (`str`, *optional*): The file, or the name of a shipped one. Without one it is `own` where the changes name
            a source of cells (the folder of the run is then named after that source; `screen` where they name a screen),
            else `default`.
        changes (`Mapping`): Option names to values, nested.

    Raises:
        ValueError: For an unknown file, option or value, naming the option and close matches.
    """
    given = sources_of(changes)
    path = find_config(config or ("screen" if "data.screen" in given else "own" if given else "default"))
    mapping = read_yaml(path)
    for name in SOURCES if given else ():
        mapping = merge(mapping, nested(name, None))
    source = next(iter(given.values()), None) if config is None else None
    source = source[0] if isinstance(source, list) and source else source
    mapping.setdefault("output_dir", f"runs/{Path(source).stem if isinstance(source, str) else path.stem}")
    return from_mapping(RunOptions, merge(mapping, changes))


def parse_options(config: str | None, flags: Sequence[str]) -> RunOptions:
    """[`run_options`] with changes as flags: `["--training.max_steps", "500"]`."""
    return run_options(config, read_flags(flags, RunOptions))
