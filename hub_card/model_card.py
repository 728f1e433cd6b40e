"""The model card: rendered from what a training run wrote, never typed in."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from data_scripts.files import write_json, write_text
from modeling_gppc.evaluation.transfer_scorecard import TRANSFER_FILE, transfer_scorecard
from modeling_gppc.normalization_gppc import close_matches

TEMPLATES = Path(__file__).parent / "templates"
TEXTS = yaml.safe_load((TEMPLATES / "texts.yaml").read_text())
# Stands for the repository's name until a push replaces it in what it uploads.
PLACEHOLDER = "USER/REPOSITORY"
MODEL_METHOD = "gppc"
METRICS = {
    "mse": "mean squared error",
    "r2": "r2 against the gene mean",
    "pearson_delta": "Pearson correlation of the change",
    "coverage90": "share inside the predicted 90 % interval",
    "crps": "continuous ranked probability score",
}
TRANSFER = {
    "pearson_delta": "Pearson correlation of the response",
    "direction_accuracy": "share of directions right",
    "normalised_squared_error": "squared error over that of no response",
    "matched_minus_shuffled": "correlation beyond shuffled targets",
    "coverage90": "share inside the predicted 90 % interval",
}
# What `run.json` must say; `null` stands where there was no filter, or where operations were not counted.
RUN_FACTS = ("store", "filters", "cells", "genes", "seconds", "flop", "seed", "command")
OPTIONAL_FACTS = {
    "pairs": "training pairs",
    "pairings": "pairings",
    "split_by": "split by",
    "parameters": "parameters",
    "steps": "optimiser steps",
    "processes": "processes",
    "digest": "digest of the pairs",
}


def read_json(path: Path) -> dict:
    """Reads a JSON file that holds a mapping; `ValueError` where it does not, or is missing."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"`folder` {path.parent} holds no `{path.name}`; wanted the folder a run wrote.") from None
    except ValueError as error:
        raise ValueError(f"`{path.name}` in {path.parent} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path.name}` in {path.parent} holds {type(content).__name__}; wanted a mapping.")
    return content


def portable(text: str) -> str:
    """Replaces every absolute path of a text by its last component: cards and uploads must not name a machine."""
    text = re.sub(r"(?<![\w:/.~])(?:file://)?/(?:[\w.+@-]+/)+([\w.+@-]*)", lambda match: match[1] or ".", text)
    return re.sub(r"\b[A-Za-z]:\\(?:[^\\\s]+\\)*", "", text)


def _read_results(path: Path) -> dict:
    """Reads and checks `{"schema_version": 1, "splits": {NAME: {"n_pairs", "n_genes", "methods": {...}}}}`."""
    results = read_json(path)
    if results.get("schema_version") != 1 or not isinstance(results.get("splits"), dict) or not results["splits"]:
        raise ValueError(f"`{path.name}` in {path.parent} has no `schema_version` 1 with `splits`; train again.")
    for split, content in results["splits"].items():
        if missing := {"n_pairs", "n_genes", "methods"} - set(content):
            raise ValueError(f"`{path.name}`: split `{split}` lacks `{min(missing)}`; train again.")
    return results


def shown(value: float | int | None) -> str:
    """A figure as it appears in a card: integers with separators, others with four decimals."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def _score_text(results: Mapping | None, run: Mapping) -> str:
    """One table a split, or why there is none: training goes on, there are no pairs, or nobody scored the model."""
    if results is not None:
        return "\n".join(
            f"**{split}** ({shown(content['n_pairs'])} pairs, {shown(content['n_genes'])} genes)\n\n"
            + method_table(content["methods"], METRICS, MODEL_METHOD, {"uses_labels": "labels"})
            for split, content in results["splits"].items()
        )
    if unfinished := run.get("unfinished"):
        text = TEXTS["unfinished"] + (TEXTS["validated"] if "eval_mse" in unfinished else "")
        return Template(text).substitute({name: shown(value) for name, value in unfinished.items()})
    return TEXTS["screen" if run.get("screen") else "not_scored"]


def method_table(methods: Mapping, metrics: Mapping[str, str], subject: str, notes: Mapping[str, str]) -> str:
    """A Markdown table: methods down, the metrics that were computed across, with their intervals.

    `notes` names flags among the scores, and what stands behind the name of a method where one is set.
    """
    metrics = {name: text for name, text in metrics.items() if any(s.get(name) is not None for s in methods.values())}
    lines = [["method", *metrics.values()], ["---"] * (1 + len(metrics))]
    for name, scores in methods.items():
        label = f"**{name}**" if name == subject else name
        label += "".join(f" ({note})" for flag, note in notes.items() if scores.get(flag))
        cells = [shown(scores.get(metric)) for metric in metrics]
        for column, metric in enumerate(metrics):
            interval = scores.get(f"{metric}_ci95")
            if interval and cells[column] != "-":
                cells[column] += f" [{shown(interval[0])}, {shown(interval[1])}]"
        lines.append([label, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def evaluation_entries(results: Mapping, dataset_name: str) -> list[EvalResult]:
    """The `model-index`: every finite score of the model and of the floors, with its interval as `args`."""
    return [
        EvalResult(
            task_type="perturbation-prediction",
            task_name="Expression after imposed expression changes",
            dataset_type="cell-pairs",
            dataset_name=dataset_name,
            dataset_split=split,
            metric_type=metric,
            metric_value=scores[metric],
            metric_name=meaning if method == MODEL_METHOD else f"{meaning} (floor: {method})",
            metric_args={"ci95": list(interval)} if (interval := scores.get(f"{metric}_ci95")) else None,
        )
        for split, content in results["splits"].items()
        for method, scores in content["methods"].items()
        for metric, meaning in METRICS.items()
        if shown(scores.get(metric)) != "-"
    ]


def fact_rows(facts: Mapping) -> str:
    """Rows of a Markdown table of two columns."""
    return "\n".join(f"| {label} | {str(value).replace('|', '&#124;')} |" for label, value in facts.items())


def _facts(run: Mapping, config: Mapping, folder: Path) -> str:
    filters = run["filters"] if isinstance(run["filters"], str) else json.dumps(run["filters"])
    rows = {
        "cells from": portable(run["store"]),
        "filters": f"`{portable(filters)}`" if run["filters"] else "none",
        "cells": shown(run["cells"]),
        "genes": shown(run["genes"]),
    }
    known = {"pairings": config.get("pairings"), **run}
    weights = folder / "model.safetensors"
    if "parameters" not in known and weights.is_file():
        with safe_open(weights, "numpy") as file:
            names = file.keys()
            known["parameters"] = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    for key, label in OPTIONAL_FACTS.items():
        if value := known.get(key):
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            rows[label] = portable(text) if isinstance(text, str) else shown(text)
    return fact_rows({**rows, "seed": run["seed"], "command": f"`{portable(run['command'])}`"})


def transfer_text(folder: Path) -> str:
    """One table a screen of `transfer.json`: the model first, then the baselines by correlation."""
    path = folder / TRANSFER_FILE
    if not path.is_file():
        return TEXTS["no_transfer"]
    transfer = read_json(path)
    if transfer.get("schema_version") != 1 or not isinstance(transfer.get("screens"), list):
        raise ValueError(
            f"`{path.name}` in {path.parent} has no `schema_version` 1 with `screens`; write it with "
            "`gppc push MODEL --evaluation DIR`."
        )
    parts = []
    for screen in transfer["screens"]:
        subject, methods = screen["subject"], screen["methods"]
        order = sorted(methods, key=lambda name: (name != subject, -(methods[name].get("pearson_delta") or 0)))
        methods = {name: methods[name] for name in order}
        parts.append(
            f"**{portable(screen['screen'])}**, {screen['mode']} ({shown(screen['n_perturbations'])} perturbations, "
            f"{shown(screen['n_genes'])} genes; a replicate would correlate {shown(screen['split_half_pearson'])})\n\n"
            + method_table(methods, TRANSFER, subject, {"reads_perturbed_cells": "perturbed cells"})
        )
    return "\n".join(parts)


def render_model_card(folder: str | Path) -> str:
    """Renders the card of a model folder, with its metadata block, from `config.json`, `preprocessor_config.json`,
    `run.json` (see [`RUN_FACTS`] and [`OPTIONAL_FACTS`]; `unfinished` says how far training is), and, where there,
    `results.json` (scores by split) and `transfer.json`, see [`add_transfer`]. `ValueError` names a file or fact that
    is missing or malformed."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    preprocessor = read_json(folder / "preprocessor_config.json")
    run = read_json(folder / "run.json")
    for fact in RUN_FACTS:
        if fact not in run:
            raise ValueError(f"`run.json` lacks `{fact}`{close_matches(fact, run)}")
    scored = not run.get("unfinished") and (folder / "results.json").is_file()
    results = _read_results(folder / "results.json") if scored else None
    name = portable(str(run.get("name") or "GPPC"))
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        tags=["biology", "single-cell", "gene-expression", "perturbation-prediction", "gppc", "custom_code"],
        metrics=list(METRICS),
        model_name=name,
        eval_results=evaluation_entries(results, portable(run["store"])) if results else None,
    )
    symbols = preprocessor.get("gene_symbols") or preprocessor.get("gene_ids") or ["GENE"]
    normalization = preprocessor.get("normalization", "none")
    target_sum = f" with a target sum of {preprocessor.get('target_sum', 0):,.0f}" if normalization != "none" else ""
    text = Template((TEMPLATES / "model_card.md").read_text()).substitute(
        name=name,
        placeholder=PLACEHOLDER,
        gene=symbols[0],
        facts=_facts(run, config, folder),
        normalization=normalization,
        target_sum=target_sum,
        scores=_score_text(results, run),
        figures="".join(
            f"![{path.stem.replace('_', ' ')}](figures/{path.name})\n\n"
            for path in sorted((folder / "figures").glob("*.png"))
        ),
        transfer=transfer_text(folder),
        vocab_size=shown(len(preprocessor.get("gene_ids", ()))),
        organism=preprocessor.get("organism", "homo_sapiens").replace("_", " "),
        seconds=f"{run['seconds']:,.0f}",
        processes=run.get("processes", 1),
        flop="not counted" if run["flop"] is None else f"about {run['flop']:.3g}",
        version=run.get("version", "0.1.0"),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def add_transfer(folder: str | Path, evaluations: Iterable[str | Path]) -> Path:
    """Writes what `gppc evaluate` found for a model into its folder as `transfer.json`, and the card anew; returns the
    card's path. See [`~transfer_scorecard.transfer_scorecard`], also for what is raised."""
    folder = Path(folder)
    write_json(transfer_scorecard(folder, evaluations), folder / TRANSFER_FILE)
    return write_model_card(folder)


def write_model_card(folder: str | Path) -> Path:
    """Renders the card of a run folder into its `README.md` and returns the path; see [`render_model_card`]."""
    return write_text(render_model_card(folder), Path(folder) / "README.md")
