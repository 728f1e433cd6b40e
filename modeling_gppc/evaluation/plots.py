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


def plot_scores(results: dict, path: str | Path) -> Path:
    """Horizontal bars of r2 with its interval, from the content of `results.json`: a panel a split, a bar a method."""
    splits = results["splits"]
    names = ordered({name: None for split in splits.values() for name in split["methods"]})
    names = [name for name in names if name != "no_change"]  # its bar would squeeze all others
    figure = Figure(figsize=(max(3.4 * len(splits), 4.5), 0.34 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for axis, (split_name, split) in zip(axes, splits.items()):
        for position, name in enumerate(names):
            entry = split["methods"].get(name, {})
            if entry.get("r2") is None:
                continue
            colour = {MODEL_METHOD: MODEL_COLOUR, OPTIMUM: CEILING_COLOUR}.get(name, FLOOR_COLOUR)
            low, high = entry["r2_ci95"]
            error = [[max(entry["r2"] - low, 0)], [max(high - entry["r2"], 0)]]
            axis.barh(position, entry["r2"], color=colour, xerr=error, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_title(f"{split_name} ({split['n_pairs']} pairs)", fontsize=9)
        axis.set_xlabel("r2", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(np.arange(len(names)), names)
    axes[0].invert_yaxis()
    return save_figure(figure, path)


def plot_learning_curve(history: Sequence[dict], path: str | Path) -> Path:
    """Training loss and validation error against the step, from the trainer's log (`step`, `loss`, `eval_mse`)."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    lines = (("loss", "training loss", CEILING_COLOUR), ("eval_mse", "validation MSE", MODEL_COLOUR))
    for key, label, colour in lines:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axis.plot(*zip(*points), label=label, color=colour)
            axis.legend(frameon=False, fontsize=8)
    axis.set_xlabel("step")
    axis.set_ylabel("error")
    return save_figure(figure, path)
