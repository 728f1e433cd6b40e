"""Figures of a run: scores beside floors, learning curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from data_scripts.files import write_atomically
from modeling_gppc.evaluation.pair_scores import MODEL_METHOD, OPTIMUM
from modeling_gppc.evaluation.report import ordered

MODEL_COLOUR, CEILING_COLOUR, FLOOR_COLOUR = "#0b6e99", "#8a8a8a", "#c9b79c"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Saves a figure atomically; the ending chooses the format."""
    path = Path(path)
    with write_atomically(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "gppc"}):
        figure.savefig(temporary, dpi=150, bbox_inches="tight", format=path.suffix.removeprefix("."))
    return path


def plot_scores(results: dict, path: str | Path, metric: str = "r2", hidden: Sequence[str] = ("no_change",)) -> Path:
    """Horizontal bars of a metric with its interval: a panel a split, a bar a method.

    Args:
        results (`dict`): Content of `results.json`.
        path (`str` or `Path`): Where to save.
        metric (`str`, *optional*, defaults to `"r2"`): A metric that has an interval `<metric>_ci95`.
        hidden (`Sequence[str]`, *optional*): Methods whose bar would squeeze all others.
    """
    splits = results["splits"]
    names = ordered({name: None for split in splits.values() for name in split["methods"]})
    names = [name for name in names if name not in hidden]
    figure = Figure(figsize=(max(3.4 * len(splits), 4.5), 0.34 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for axis, (split_name, split) in zip(axes, splits.items()):
        for position, name in enumerate(names):
            entry = split["methods"].get(name)
            if entry is None or entry.get(metric) is None:
                continue
            colour = {MODEL_METHOD: MODEL_COLOUR, OPTIMUM: CEILING_COLOUR}.get(name, FLOOR_COLOUR)
            value = entry[metric]
            low, high = entry.get(f"{metric}_ci95") or (value, value)
            error = [[max(value - low, 0)], [max(high - value, 0)]] if None not in (low, high) else None
            axis.barh(position, value, color=colour, xerr=error, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_title(f"{split_name} ({split['n_pairs']} pairs)", fontsize=9)
        axis.set_xlabel(metric, fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(np.arange(len(names)), names)
    axes[0].invert_yaxis()
    return save_figure(figure, path)


def plot_learning_curve(history: Sequence[dict], path: str | Path, references: dict[str, float] | None = None) -> Path:
    """Training and validation loss against the step.

    Args:
        history (`Sequence[dict]`): Entries of the trainer's log: `step` with `loss` or `eval_loss` (or `eval_mse`).
        path (`str` or `Path`): Where to save.
        references (`dict[str, float]`, *optional*): Errors drawn as lines, e.g. of the best floor.
    """
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for key, label, colour in (
        ("loss", "training loss", CEILING_COLOUR),
        ("eval_loss", "validation loss", MODEL_COLOUR),
        ("eval_mse", "validation MSE", MODEL_COLOUR),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
        if points:
            steps, values = zip(*points)
            axis.plot(steps, values, label=label, color=colour, linestyle="--" if key == "eval_loss" else "-")
    for name, value in (references or {}).items():
        axis.axhline(value, linewidth=0.9, linestyle=":", color="#333333")
        axis.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    axis.set_xlabel("step")
    axis.set_ylabel("error")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
