"""Search of learning rate, sizes, dropout, pairings or any other option of a run with Optuna, resumable."""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from data_scripts.batches.data_collator import PairCollator
from data_scripts.batches.pair_dataset import PairDataset
from data_scripts.files import write_json
from data_scripts.options import from_mapping, merge, read_yaml
from data_scripts.pairs.pair_folder import PairFolder
from gppc.run_options import RunOptions
from gppc.sweep_report import write_report
from modeling_gppc.fitting.fit_linear_response import initialize_linear_response
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.normalization_gppc import close_matches
from modeling_gppc.training.arguments import CONFIGS, find_config
from modeling_gppc.training.run_folder import first_difference
from modeling_gppc.training.throughput import Throughput
from modeling_gppc.training.trainer import GppcTrainer, make_trainer

SWEEPS = CONFIGS / "sweeps"
SWEEP_FILE, DATABASE, STUDY = "sweep.json", "trials.db", "gppc"
# Chooses the training pairs, by the name of their pairing; every other name is an option of a run.
PAIRINGS = "pairings"
# What a range may say beside its bounds.
RANGE_KEYS = ("low", "high", "log", "step")


@dataclass
class SweepOptions:
    """
    A search over options of a run; the validation error of a trial's best evaluation is what is minimised.

    Args:
        space (`dict`): Name of an option (`training.learning_rate`, `model.hidden_size`, `model.size`, or `pairings`,
            the names of the pairings that training pairs are taken from) to its values: a list of choices, or
            `{low, high}` with `log: true` or `step` where wanted.
        config (`str`, *optional*, defaults to `"default"`): YAML file of the run that is varied, or the name of a
            shipped one.
        options (`dict`, *optional*): Laid over it in all trials, e.g. `{training: {max_steps: 300}}`.
        output_dir (`str`, *optional*): Folder of the sweep; defaults to that of the run with `-sweep` behind it.
        n_trials (`int`, *optional*, defaults to 20): Trials in all, those before an interruption included. The first
            one is the run as it is configured.
        seed (`int`, *optional*, defaults to 0): Of the sampler.
        prune (`bool`, *optional*, defaults to `True`): End a trial that is worse than the median of the others at
            the same step; the first five run to their end.
        objective_pairing (`str`, *optional*): Count the error on validation pairs of this pairing only.
    """

    space: dict[str, Any]
    config: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    n_trials: int = 20
    seed: int = 0
    prune: bool = True
    objective_pairing: str | None = None

    def __post_init__(self):
        if self.n_trials < 1:
            raise ValueError(f"`n_trials` is {self.n_trials}; wanted at least 1.")
        if not self.space:
            raise ValueError("`space` is empty; wanted at least one option and its values.")
        if self.run_options({}).data.stream:
            raise ValueError("`data.stream` is set; wanted stored pairs, which all trials read: leave it out.")
        for name, values in self.space.items():
            check_values(name, values)
            for value in values if isinstance(values, list) else (values["low"], values["high"]):
                self.run_options({name: value})

    @property
    def folder(self) -> Path:
        """Where the sweep's files are."""
        return Path(self.output_dir or f"{self.run_options({}).output_dir.removesuffix('-sweep')}-sweep")

    def run_options(self, values: dict[str, Any]) -> RunOptions:
        """Options of the run with some values of the space.

        Raises:
            ValueError: For an unknown option, or a value that does not fit.
        """
        path = find_config(self.config)
        mapping = merge({"output_dir": f"runs/{path.stem}", **read_yaml(path)}, self.options)
        if self.output_dir is not None:
            mapping["output_dir"] = self.output_dir
        for name, value in values.items():
            if name == PAIRINGS:
                known = list(mapping.get("pairs", {}).get("matching", {}).get("pairings", {})) or None
                if not isinstance(value, list) or not value or (known and not set(value) <= set(known)):
                    raise ValueError(f"`space.{PAIRINGS}` offers {value!r}; wanted lists of names of pairings.")
                continue
            *sections, last = name.split(".")
            if sections == ["training"] and last not in TrainingArguments.__dataclass_fields__:
                raise ValueError(
                    f"`space.{name}` cannot be searched{close_matches(last, TrainingArguments.__dataclass_fields__)}; "
                    "wanted an option of training that `transformers.TrainingArguments` has too."
                )
            if sections not in (["training"], ["model"]):
                raise ValueError(f"`space.{name}` cannot be searched; wanted `training.*`, `model.*` or `{PAIRINGS}`.")
            mapping = merge(mapping, {sections[0]: {last: value}})
        return from_mapping(RunOptions, mapping)


def check_values(name: str, values: Any) -> None:
    """Refuses values of an option that are neither choices nor a range."""
    if isinstance(values, list):
        if not values:
            raise ValueError(f"`space.{name}` has no choices.")
        return
    if not isinstance(values, dict) or not {"low", "high"} <= set(values):
        raise ValueError(f"`space.{name}` is {values!r}; wanted a list of choices, or {{low, high}}.")
    for key in values:
        if key not in RANGE_KEYS:
            raise ValueError(f"`space.{name}.{key}` is not an option{close_matches(str(key), RANGE_KEYS)}")
    # YAML reads 1e-4 as text.
    values.update({key: float(values[key]) for key in ("low", "high") if isinstance(values[key], str)})
    if not values["low"] < values["high"]:
        raise ValueError(f"`space.{name}` goes from {values['low']} to {values['high']}; wanted low < high.")


def read_sweep(name: str, changes: Mapping) -> SweepOptions:
    """Options of a sweep: a YAML file by path, or a shipped one by name, with changes laid over it.

    Raises:
        ValueError: For a file that does not exist, or an unknown option or value.
    """
    for path in (Path(name), SWEEPS / f"{name}.yaml", SWEEPS / Path(name).name):
        if path.is_file():
            return from_mapping(SweepOptions, merge(read_yaml(path), changes))
    shipped = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    raise ValueError(f"`sweep` {name} does not exist{close_matches(Path(name).stem, shipped)}")


def claim_sweep(sweep: SweepOptions, resume: bool) -> Path:
    """Takes the sweep's folder; more trials may be asked for later, nothing else may change.

    Raises:
        ValueError: If the folder holds another sweep, or this one and `resume` is not set.
    """
    folder, mine = sweep.folder, json.loads(json.dumps(dataclasses.asdict(sweep)))
    file = folder / SWEEP_FILE
    if file.is_file():
        theirs = json.loads(file.read_text())
        difference = first_difference({**theirs, "n_trials": 0}, {**mine, "n_trials": 0})
        if difference is not None:
            raise ValueError(f"`output_dir` {folder} holds another sweep ({difference}); choose another one.")
        if not resume:
            raise ValueError(f"`output_dir` {folder} already holds this sweep; add `--resume` to go on with it.")
    elif (folder / DATABASE).exists():
        raise ValueError(f"`output_dir` {folder} holds trials of an unknown sweep; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mine, file)
    return folder


class SweepTrainer(GppcTrainer):
    """A trainer of many short runs, none of which is kept: a fresh model, fresh counts and the trial's rows each."""

    sweep: "Sweep"

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in `GppcTrainer`; the trial remembers what is worth a column."""
        metrics = super().evaluate(*args, **kwargs)
        self.sweep.note(metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save = False
        return best


class Sweep:
    """
    The state of a search between trials.

    Args:
        sweep ([`SweepOptions`]): What is searched.
        folder ([`PairFolder`]): Pairs.
        make_model (`Callable`): Options of a run and the folder to a model with fresh weights.
    """

    def __init__(
        self,
        sweep: SweepOptions,
        folder: PairFolder,
        make_model: Callable[[RunOptions, PairFolder], GppcForPerturbationPrediction],
    ):
        self.sweep, self.folder, self.make_model = sweep, folder, make_model
        self.base = sweep.run_options({})
        # The closed-form start is the same for all trials of the same factors and pairs.
        self.starts: dict[tuple, dict[str, torch.Tensor]] = {}
        self.rows: dict[tuple, PairDataset] = {}
        self.trial = None
        self.began = time.monotonic()

    def values(self, trial) -> dict[str, Any]:
        """The trial's value of every dimension of the space."""
        values = {}
        for name, spec in self.sweep.space.items():
            if isinstance(spec, list):
                # Optuna stores text and numbers; lists go through it as JSON.
                texts = [json.dumps(choice) for choice in spec]
                values[name] = json.loads(trial.suggest_categorical(name, texts))
                continue
            whole = isinstance(spec["low"], int) and isinstance(spec["high"], int)
            suggest = trial.suggest_int if whole else trial.suggest_float
            more = {key: spec[key] for key in ("log", "step") if key in spec}
            values[name] = suggest(name, spec["low"], spec["high"], **more)
        return values

    def training_values(self, trial) -> dict[str, Any]:
        """The trial's training arguments, for the Trainer."""
        return {name.split(".")[1]: v for name, v in self.values(trial).items() if name.startswith("training.")}

    def first_values(self) -> dict[str, Any]:
        """The run as it is configured, as far as the space allows: the first trial."""
        found: dict[str, Any] = {}
        model = self.base.model_config(self.folder.genes.num_rows, self.folder.pairings)
        for name, spec in self.sweep.space.items():
            section, _, option = name.partition(".")
            if name == PAIRINGS:
                value = list(self.folder.pairings)
            elif name == "model.size":
                value = self.base.model.get("size")
            else:
                value = getattr(self.base.training if section == "training" else model, option)
            if isinstance(spec, list):
                if value in spec:
                    found[name] = json.dumps(spec[spec.index(value)])
            elif value is not None and spec["low"] <= value <= spec["high"]:
                found[name] = value
        return found

    def pairs(self, split: str, pairings: list[str] | None) -> PairDataset:
        """Rows of a split whose pairing is among those given; defaults to all."""
        key = (split, None if pairings is None else tuple(pairings))
        if key not in self.rows:
            table = self.folder.split(split)
            if pairings is not None and set(pairings) != set(self.folder.pairings):
                names = np.asarray(table.column("pairing").to_pylist())
                table = table.filter(pa.array(np.isin(names, pairings)))
            self.rows[key] = PairDataset(table, self.folder.pairings)
            if not len(self.rows[key]):
                raise ValueError(f"`{PAIRINGS}` {pairings} have no {split} pair; wanted {self.folder.pairings}.")
        return self.rows[key]

    def start(self, trial, trainer: SweepTrainer) -> GppcForPerturbationPrediction:
        """A fresh model for a trial, its linear response in place; the trainer gets the trial's rows."""
        import optuna

        values = self.values(trial)
        try:
            options = self.sweep.run_options(values)
            set_seed(options.seed)
            model = self.make_model(options, self.folder)
        except ValueError as error:  # sizes that do not fit each other
            trial.set_user_attr("refused", str(error))
            raise optuna.TrialPruned(str(error)) from error
        rows = self.pairs("train", values.get(PAIRINGS))
        trainer.train_dataset, trainer.throughput = rows, Throughput()
        self.trial, self.began = trial, time.monotonic()
        trial.set_user_attr("parameters", model.num_parameters())
        response = model.model.linear_response
        key = (options.model_config(2, self.folder.pairings).num_factors, model.config.num_components, id(rows))
        if key not in self.starts:
            settings = options.training
            initialize_linear_response(
                model,
                rows,
                self.pairs("validation", None),
                self.folder.panels,
                max_cells=settings.linear_start_cells,
                n_iterations=settings.linear_start_iterations,
                seed=options.seed,
            )
            self.starts[key] = {name: tensor.clone() for name, tensor in response.state_dict().items()}
        response.load_state_dict(self.starts[key])
        set_seed(options.seed)
        self.began = time.monotonic()
        return model

    def note(self, metrics: dict[str, float]) -> None:
        """Facts of the trial that are no part of the objective."""
        if self.trial is not None:
            self.trial.set_user_attr("seconds", round(time.monotonic() - self.began, 1))
            self.trial.set_user_attr("linear_mse", metrics["eval_linear_mse"])

    def trainer(self) -> SweepTrainer:
        """The trainer of all trials."""
        settings = self.base.training
        redraw = self.base.pairs.perturbation if settings.redraw_perturbations else None
        pairing = self.sweep.objective_pairing
        trainer = make_trainer(
            self.make_model(self.base, self.folder),
            settings,
            self.sweep.folder,
            self.base.seed,
            self.pairs("train", None),
            self.pairs("validation", None if pairing is None else [pairing]),
            PairCollator(self.folder.panels, redraw, seed=self.base.seed, n_query_genes=settings.n_query_genes),
            PairCollator(self.folder.panels),
            trainer_class=SweepTrainer,
        )
        trainer.sweep = self
        trainer.model_init = lambda trial: self.start(trial, trainer)
        trainer.args.save_strategy, trainer.args.load_best_model_at_end = SaveStrategy.NO, False
        return trainer


def run_sweep(
    sweep: SweepOptions, make_model: Callable[[RunOptions, PairFolder], GppcForPerturbationPrediction], resume: bool
) -> Path:
    """Runs the trials that are still to do, writes table, figure and the best run's options; returns their folder.

    Every trial is in a database as soon as it ends; one that was interrupted runs again.

    Raises:
        ValueError: If Optuna is not installed, for a folder that holds something else, and what a run raises.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("`sweep` needs Optuna, which is not installed; `pip install 'gppc[sweep]'`.")
    import optuna

    out = claim_sweep(sweep, resume)
    options = sweep.run_options({})
    folder = dataclasses.replace(options, output_dir=str(out)).prepare_pairs()
    if sweep.objective_pairing is not None and sweep.objective_pairing not in folder.pairings:
        raise ValueError(
            f"`objective_pairing` is {sweep.objective_pairing!r}"
            f"{close_matches(sweep.objective_pairing, folder.pairings)}"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(out / DATABASE).resolve()}"
    states = optuna.trial.TrialState
    study = optuna.create_study(storage=storage, study_name=STUDY, direction="minimize", load_if_exists=True)
    search = Sweep(sweep, folder, make_model)
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
    others = [trial for trial in study.get_trials() if trial.state != states.FAIL]
    again = [trial.system_attrs.get("fixed_params", trial.params) for trial in others]
    for trial in study.get_trials(states=(states.FAIL,)):
        if trial.params and trial.params not in again:
            study.enqueue_trial(trial.params)
            again.append(trial.params)
    if not study.get_trials():
        study.enqueue_trial(search.first_values())
    done = len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))
    if done < sweep.n_trials:
        trainer = search.trainer()
        trainer.hyperparameter_search(
            hp_space=search.training_values,
            # The best evaluation so far: this one is not yet in the trainer's state.
            compute_objective=lambda metrics: min(metrics["eval_mse"], trainer.state.best_metric or float("inf")),
            n_trials=sweep.n_trials - done,
            backend="optuna",
            storage=storage,
            study_name=STUDY,
            load_if_exists=True,
            # A resumed search does not draw what was drawn before.
            sampler=optuna.samplers.TPESampler(
                seed=sweep.seed + done, multivariate=True, warn_independent_sampling=False
            ),
            pruner=optuna.pruners.MedianPruner() if sweep.prune else optuna.pruners.NopPruner(),
        )
    write_report(study, sweep.space, out)
    return out
