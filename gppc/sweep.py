"""Search of options of a run with Optuna: one short training after another, resumable."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from data_scripts.files import write_text
from data_scripts.options import Count, Seed, check_numbers, from_mapping, merge, nested, read_yaml
from data_scripts.pairs.pair_folder import PairFolder
from gppc.run_options import RunOptions
from modeling_gppc.evaluation.report import markdown_table
from modeling_gppc.training.arguments import find_config
from modeling_gppc.training.run_folder import first_difference

try:
    import optuna
except ImportError as error:
    raise ValueError("`--sweep` needs Optuna, which is not installed; `pip install 'gppc[sweep]'`.") from error

COMPLETE, PRUNED = ENDED = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


@dataclass
class SweepOptions:
    """
    A search over options of a run; what is minimised is the validation error of a trial's best evaluation.

    Args:
        space (`dict`): Name of an option (`training.learning_rate`, `model.hidden_size`, `model.size`) to its values:
            a list of choices, or `{low, high}` with `log: true` or `step` where wanted.
        config (`str`, *optional*, defaults to `"default"`): YAML file of the run that is varied, or the name of a
            shipped one.
        options (`dict`, *optional*): Changes to it in all trials, e.g. `{training: {max_steps: 300}}`.
        output_dir (`str`, *optional*): Folder of the sweep; defaults to that of the run with `-sweep` behind it.
        n_trials (`int`, *optional*, defaults to 20): Trials in all, those before an interruption included.
        seed (`int`, *optional*, defaults to 0): Of the sampler.
    """

    space: dict[str, Any]
    config: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    n_trials: Count = 20
    seed: Seed = 0

    def __post_init__(self):
        check_numbers(self)
        if not self.space:
            raise ValueError("`space` is empty; wanted an option with its values at least.")
        run = self.run_options({})
        if run.data.stream:
            raise ValueError("`data.stream` is set; wanted stored pairs, which all trials read: leave it out.")
        self.output_dir = self.output_dir or f"{run.output_dir}-sweep"
        for name, values in self.space.items():
            wanted = distribution(name, values)
            for value in values if isinstance(values, list) else (wanted.low, wanted.high):
                self.run_options({name: value})

    def run_options(self, values: dict[str, Any]) -> RunOptions:
        """Options of the run with some values of the space; `ValueError` for one that does not fit."""
        path = find_config(self.config)
        mapping = merge({"output_dir": f"runs/{path.stem}", **read_yaml(path)}, self.options)
        for name, value in values.items():
            if name.partition(".")[0] not in ("training", "model"):
                raise ValueError(f"`space.{name}` cannot be searched; wanted `training.*` or `model.*`.")
            mapping = merge(mapping, nested(name, value))
        if self.output_dir is not None:
            mapping["output_dir"] = self.output_dir
        return from_mapping(RunOptions, mapping)


def distribution(name: str, values: list | dict):
    """An option's choices or range in Optuna's terms; `ValueError` for values that are neither."""
    try:
        if isinstance(values, list):
            return optuna.distributions.CategoricalDistribution(values)
        # YAML reads 1e-4 as text.
        values = {key: float(value) if isinstance(value, str) else value for key, value in values.items()}
        whole = isinstance(values["low"], int) and isinstance(values["high"], int)
        return (optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution)(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`space.{name}` is {values!r}; wanted a list of choices, or {{low, high}} with `log` or `step` ({error})."
        ) from error


def read_sweep(name: str, changes: dict[str, Any]) -> SweepOptions:
    """Options of a sweep: a YAML file by path, or a shipped one by name, with changes of flags."""
    path = Path(name) if Path(name).is_file() else find_config(f"sweeps/{name}")
    return from_mapping(SweepOptions, merge(read_yaml(path), changes))


class ReportToOptuna(TrainerCallback):
    """Hands every evaluation to Optuna, which ends a trial that is worse than the median of the others."""

    def __init__(self, trial: optuna.Trial):
        self.trial = trial

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """See `TrainerCallback`."""
        self.trial.set_user_attr("linear_mse", metrics["eval_linear_mse"])
        self.trial.report(metrics["eval_mse"], state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def run_trial(trial: optuna.Trial, sweep: SweepOptions, folder: PairFolder) -> float:
    """Trains with a trial's options, keeping nothing; returns the validation error of the best evaluation. A trial
    that is ended early, or whose sizes do not fit each other, raises `optuna.TrialPruned`."""
    try:
        options = sweep.run_options(trial.params)
        model = options.make_model(folder)
    except ValueError as error:
        raise optuna.TrialPruned(str(error)) from error
    trainer = options.make_trainer(model, folder)
    trainer.args.save_strategy, trainer.args.load_best_model_at_end = SaveStrategy.NO, False
    trainer.add_callback(ReportToOptuna(trial))
    options.fit_linear_response(model, folder)
    trainer.train()
    return min(entry["eval_mse"] for entry in trainer.state.log_history if "eval_mse" in entry)


def run_sweep(sweep: SweepOptions, resume: bool) -> Path:
    """Runs the trials that are still to do, and writes `sweep.md` and `best.yaml`.

    The first trial is the run as it is configured: the table tells whether its options hold. Every trial is in a
    database as soon as it ends; one that was interrupted does not count. With `resume` the sweep that the folder holds
    goes on, also with more trials. Raises `ValueError` if the folder holds another sweep, or this one without
    `resume`, and what a run raises.
    """
    out = Path(sweep.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(out / 'trials.db').resolve()}"
    study = optuna.create_study(storage=storage, study_name="gppc", load_if_exists=True)
    mine = {**dataclasses.asdict(sweep), "n_trials": 0}
    difference = first_difference(study.user_attrs.get("sweep", mine), mine)
    if difference is not None:
        raise ValueError(f"`output_dir` {out} holds another sweep ({difference}); choose another one.")
    if study.trials and not resume:
        raise ValueError(f"`output_dir` {out} already holds this sweep; add `--resume` to go on with it.")
    study.set_user_attr("sweep", mine)
    folder = sweep.run_options({}).prepare_pairs()
    # A resumed search does not draw what was drawn before.
    study.sampler = optuna.samplers.TPESampler(seed=sweep.seed + len(study.trials))
    space = {name: distribution(name, values) for name, values in sweep.space.items()}
    while (done := len(study.get_trials(states=ENDED))) < sweep.n_trials:
        trial = study.ask(space if done else None)
        try:
            study.tell(trial, run_trial(trial, sweep, folder))
        except optuna.TrialPruned:
            study.tell(trial, state=PRUNED)
    write_report(study, list(space), out)
    return out


def write_report(study: optuna.Study, names: list[str], out: Path) -> None:
    """Writes a table of the trials, best first, those ended early in brackets, and the options of the best one."""
    trials = [trial for trial in study.get_trials(states=ENDED) if trial.value is not None]
    trials.sort(key=lambda trial: (trial.state != COMPLETE, trial.value))
    rows = []
    for trial in trials:
        error = f"{trial.value:.5f}" if trial.state == COMPLETE else f"({trial.value:.5f})"
        values = [trial.params.get(name, "as configured") for name in names]
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        linear, seconds = trial.user_attrs["linear_mse"], trial.duration.total_seconds()
        rows.append([str(trial.number), error, f"{linear:.5f}", f"{seconds:.0f}", *values])
    header = ["trial", "validation MSE", "of the linear response", "s", *names]
    write_text(markdown_table(header, rows) + "\n", out / "sweep.md")
    best: dict[str, Any] = {}
    for name, value in trials[0].params.items() if trials else ():
        best = merge(best, nested(name, value))
    write_text(yaml.safe_dump(best, sort_keys=False), out / "best.yaml")
