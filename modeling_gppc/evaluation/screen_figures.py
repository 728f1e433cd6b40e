"""Figures of a screen: scores beside baselines, predicted against observed responses, calibration."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modeling_gppc.evaluation.plots import CEILING_COLOUR, FLOOR_COLOUR, MODEL_COLOUR, save_figure


def plot_screen_scores(summary: dict, path: str | Path) -> Path:
    """pearson_delta of every method with its interval, the shuffled null as a mark, the ceiling as a line."""
    methods = summary["methods"]
    names = sorted(methods, key=lambda n: (n != summary["subject"], -(methods[n]["pearson_delta"] or 0)))
    figure = Figure(figsize=(6, 0.36 * len(names) + 1.3), layout="constrained")
    axis = figure.subplots()
    for position, name in enumerate(names):
        entry = methods[name]
        value = entry["pearson_delta"]
        low, high = entry["pearson_delta_ci95"]
        error = [[max(value - low, 0)], [max(high - value, 0)]] if np.isfinite([low, high]).all() else None
        colour = MODEL_COLOUR if name == summary["subject"] else FLOOR_COLOUR
        axis.barh(position, value, color=colour, xerr=error, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        if entry.get("shuffled_pearson") is not None:
            axis.plot(entry["shuffled_pearson"], position, "x", color="#a33333", label="target-shuffled null")
    axis.axvline(
        summary["ceiling"]["split_half_pearson"], color=CEILING_COLOUR, linestyle="--", label="split-half ceiling"
    )
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("pearson_delta, mean over perturbations")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="lower right")
    return save_figure(figure, path)


def plot_responses(evaluation, method: str, path: str | Path, at_most: int = 12) -> Path:
    """Predicted against observed change of every scored gene, a panel a perturbation, highest ceilings first."""
    truth, prediction = evaluation.truth, evaluation.predictions[method]
    order = np.argsort(-evaluation.ceiling, kind="stable")[:at_most]
    columns = min(4, len(order))
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, index in zip(axes, order):
        predicted, observed = prediction.delta[index, truth.mask], truth.delta[index, truth.mask]
        axis.plot(predicted, observed, ".", markersize=3, color=MODEL_COLOUR, alpha=0.6)
        axis.axhline(0, color="#999999", linewidth=0.6)
        axis.axvline(0, color="#999999", linewidth=0.6)
        score = evaluation.scores[method]["pearson_delta"][index]
        axis.set_title(f"{truth.labels[index]}: r {score:.2f}, ceiling {evaluation.ceiling[index]:.2f}", fontsize=8)
        axis.tick_params(labelsize=6)
    for axis in axes[len(order) :]:
        axis.set_visible(False)
    figure.supxlabel("predicted change of log value", fontsize=9)
    figure.supylabel("observed", fontsize=9)
    return save_figure(figure, path)


def plot_calibration(summary: dict, path: str | Path) -> Path:
    """Share of observed deltas inside the interval against the interval's level."""
    figure = Figure(figsize=(3.6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=CEILING_COLOUR, linestyle="--", linewidth=1)
    for name, shares in summary["calibration"].items():
        levels = [float(level) for level in shares]
        colour = MODEL_COLOUR if name == summary["subject"] else FLOOR_COLOUR
        axis.plot(levels, list(shares.values()), "o-", color=colour, label=name)
    axis.set_xlim(0.4, 1)
    axis.set_ylim(0.4, 1)
    axis.set_xlabel("level of the interval")
    axis.set_ylabel("share of observed deltas inside")
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
