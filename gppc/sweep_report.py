"""What a sweep found: a table, a figure, and the options of the best trial."""

import json
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from modeling_gppc.evaluation.plots import FLOOR_COLOUR, MODEL_COLOUR, save_figure

TABLE, BEST, FIGURE = "sweep.md", "best.yaml", "figures/sweep.png"
PANELS_A_ROW = 4


def write_report(study, space: dict[str, Any], out: Path) -> None:
    """Writes `sweep.md`, `best.yaml` and `figures/sweep.png` for the trials that ended.

    Args:
        study (`optuna.Study`): The trials.
        space (`dict`): Names of the options that were searched, and their values.
        out (`Path`): Folder.
    """
    trials = [trial for trial in study.get_trials() if trial.state.is_finished() and trial.value is not None]
    trials.sort(key=lambda trial: (trial.state.name != "COMPLETE", trial.value))
    names = list(space)
    (out / TABLE).write_text(table(trials, names))
    if not trials:
        return
    (out / BEST).write_text(best_options(trials[0], names))
    plot_sweep(trials, space, out / FIGURE)


def shown(value: Any) -> str:
    """A value of an option as text; choices are stored as JSON."""
    if isinstance(value, str):
        value = json.loads(value)
        return "+".join(value) if isinstance(value, list) else str(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(trials: list, names: list[str]) -> str:
    """Markdown, best trial first; an error in brackets is that of a trial that was ended early."""
    lines = ["| trial | validation MSE | of the linear response | parameters | s | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (5 + len(names)))
    for trial in trials:
        error = f"{trial.value:.5f}"
        facts = trial.user_attrs
        cells = [
            str(trial.number),
            error if trial.state.name == "COMPLETE" else f"({error})",
            f"{facts['linear_mse']:.5f}" if "linear_mse" in facts else "",
            f"{facts.get('parameters', 0):,}",
            f"{facts.get('seconds', float('nan')):.0f}",
            *(shown(trial.params[name]) if name in trial.params else "" for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def best_options(trial, names: list[str]) -> str:
    """The best trial's options as YAML, to be laid over the run's own."""
    options: dict[str, Any] = {}
    for name in names:
        value = trial.params.get(name)
        section, _, option = name.partition(".")
        if option and value is not None:
            options.setdefault(section, {})[option] = json.loads(value) if isinstance(value, str) else value
    return yaml.safe_dump(options, sort_keys=False)


def plot_sweep(trials: list, space: dict[str, Any], path: Path) -> Path:
    """Validation error against every option that was searched; the first trial, the run as configured, is ringed."""
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"] or trials
    names = list(space)
    columns = min(len(names), PANELS_A_ROW)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, name in zip(axes, names):
        known = [trial for trial in finished if name in trial.params]
        if isinstance(space[name], list):
            choices = [json.dumps(choice) for choice in space[name]]
            places = [choices.index(trial.params[name]) for trial in known]
            axis.set_xticks(range(len(choices)), [shown(choice) for choice in choices], fontsize=7)
        else:
            places = [trial.params[name] for trial in known]
            axis.set_xscale("log" if space[name].get("log") else "linear")
            axis.xaxis.set_minor_formatter(NullFormatter())
            if all(isinstance(place, int) for place in places):
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.scatter(places, [trial.value for trial in known], s=16, color=MODEL_COLOUR)
        for place, trial in zip(places, known):
            if trial.number == 0:
                axis.scatter([place], [trial.value], s=70, facecolors="none", edgecolors="#333333")
        linear = min((trial.user_attrs.get("linear_mse", float("inf")) for trial in known), default=float("inf"))
        if linear < float("inf"):
            axis.axhline(linear, color=FLOOR_COLOUR, linewidth=1)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("validation MSE", fontsize=8)
    return save_figure(figure, path)
