"""One statement over several screens: differences of a model from each baseline, pooled."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modeling_gppc.evaluation.metrics import percentile_interval

# Options of an evaluation that decide what its scores mean: they must be the same in all that are pooled.
SAME = ("mode", "controls", "split", "seen", "hold_out", "change", "shuffle_labels")
CEILINGS = (0.2, 0.5)
UNLIKE = 0.5
N_RESAMPLES = 5_000


@dataclasses.dataclass
class ScreenScores:
    """What one evaluation says of each of P perturbations: one metric of every method, score of a replicate, whether
    targets are measured, and 1 - correlation of the response with the mean of the others."""

    name: str
    subject: str
    scores: dict[str, np.ndarray]
    ceiling: np.ndarray
    measured: np.ndarray
    unlike: np.ndarray


def read_scores(folder: str | Path, metric: str) -> tuple[ScreenScores, dict]:
    """Scores and options of a folder that `gppc evaluate` wrote; `ValueError` where it holds none, no model or not the
    metric."""
    folder = Path(folder)
    if not (folder / "evaluation.json").is_file():
        raise ValueError(
            f"`evaluations` {folder} holds no evaluation.json; wanted folders that `gppc evaluate` wrote."
        )
    summary = json.loads((folder / "evaluation.json").read_text())
    if summary["subject"] is None:
        raise ValueError(f"`evaluations` {folder} scored baselines only; there is no model to compare with them.")
    with open(folder / "per_perturbation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if metric not in rows[0] or "unlike_others" not in rows[0]:
        columns = [name for name in rows[0] if name not in ("perturbation", "method")]
        raise ValueError(f"`metric` is {metric!r}; `{folder}` has {', '.join(columns)}; run `gppc evaluate` again.")
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    first = by_method[summary["subject"]]

    def column(entries: list[dict], name: str) -> np.ndarray:
        return np.array([float(entry[name] or "nan") for entry in entries])

    scores = {name: column(entries, metric) for name, entries in by_method.items()}
    scores = {name: values for name, values in scores.items() if np.isfinite(values).all()}
    options = {"mode": summary["mode"]} | {name: summary["options"][name] for name in SAME[1:]}
    return (
        ScreenScores(
            summary["screen"],
            summary["subject"],
            scores,
            column(first, "ceiling"),
            np.array([entry["target_measured"] == "True" for entry in first]),
            column(first, "unlike_others"),
        ),
        options,
    )


def compare_screens(folders: Sequence[str | Path], metric: str = "pearson_delta", seed: int = 0) -> dict:
    """Pools the differences of a model from each baseline over screens, one folder of `gppc evaluate` each.

    Returns a `dict` with `screens`, `metric` (a column of `per_perturbation.csv`), `subject` and `comparisons`:
    baseline -> `n`, `difference` (mean over all perturbations), `ci95` (screens, and perturbations within them, drawn
    with replacement), `by_screen` (screen -> difference), and the same numbers by stratum in `strata`. Raises
    `ValueError` for fewer than two screens, one screen twice, or evaluations with different options.
    """
    read = [read_scores(folder, metric) for folder in folders]
    parts, first = [part for part, _ in read], read[0][1]
    names = [part.name for part in parts]
    if len(parts) < 2 or len(set(names)) < len(names):
        raise ValueError(f"`evaluations` are of {', '.join(names)}; wanted at least two, of different screens.")
    for folder, (_, options) in zip(folders, read):
        for option in SAME:
            if options[option] != first[option]:
                raise ValueError(
                    f"`evaluations` differ in `{option}`: {first[option]!r} in {folders[0]}, {options[option]!r} in "
                    f"{folder}; pool evaluations of one kind."
                )
    subject = parts[0].subject
    baselines = [name for name in parts[0].scores if name != subject and all(name in part.scores for part in parts)]
    comparisons = {}
    for name in baselines:
        gaps = [part.scores[subject] - part.scores[name] for part in parts]
        comparisons[name] = pooled(gaps, seed) | {
            "by_screen": {part.name: float(gap.mean()) for part, gap in zip(parts, gaps)},
            "strata": {
                stratum: pooled([gap[keep] for gap, keep in zip(gaps, kept)], seed)
                for stratum, kept in strata(parts).items()
            },
        }
    return {"screens": names, "metric": metric, "subject": subject, "comparisons": comparisons}


def strata(parts: Sequence[ScreenScores]) -> dict[str, list[np.ndarray]]:
    """Which perturbations of each screen belong to each stratum."""
    low, high = CEILINGS
    rules = {
        f"ceiling below {low}": lambda part: part.ceiling < low,
        f"ceiling {low} to {high}": lambda part: (part.ceiling >= low) & (part.ceiling <= high),
        f"ceiling above {high}": lambda part: part.ceiling > high,
        "target measured": lambda part: part.measured,
        "target not measured": lambda part: ~part.measured,
        "response like the others": lambda part: part.unlike < UNLIKE,
        "response unlike the others": lambda part: part.unlike >= UNLIKE,
    }
    return {name: [rule(part) for part in parts] for name, rule in rules.items()}


def pooled(gaps: Sequence[np.ndarray], seed: int = 0) -> dict:
    """Mean difference over all perturbations, with a 95 % interval: screens are drawn with replacement, and then the
    perturbations within each."""
    gaps = [gap for gap in gaps if len(gap)]
    values = np.concatenate([*gaps, np.zeros(0)])
    if len(values) < 2:
        return {"n": len(values), "difference": None, "ci95": None}
    generator, samples = np.random.default_rng(seed), np.empty(N_RESAMPLES)
    for index in range(N_RESAMPLES):
        drawn = [gaps[screen] for screen in generator.integers(0, len(gaps), len(gaps))]
        rows = [gap[generator.integers(0, len(gap), len(gap))] for gap in drawn]
        samples[index] = np.concatenate(rows).mean()
    return {"n": len(values), "difference": float(values.mean()), "ci95": percentile_interval(samples)}


def comparison_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that a person reads."""
    header = ["baseline", "stratum", "n", f"{result['subject']} - baseline", "95 % interval", *result["screens"]]
    rows = []
    for name, entry in result["comparisons"].items():
        by_screen = [f"{value:+.3f}" for value in entry["by_screen"].values()]
        rows.append([name, "all", *_numbers(entry), *by_screen])
        for stratum, part in entry["strata"].items():
            if part["difference"] is not None:
                rows.append(["", stratum, *_numbers(part), *[""] * len(by_screen)])
    return header, rows


def _numbers(entry: dict) -> list[str]:
    low, high = entry["ci95"]
    return [str(entry["n"]), f"{entry['difference']:+.3f}", f"[{low:.3f}, {high:.3f}]"]
