"""The model card: rendered from what a training run wrote, never typed in."""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data_scripts.files import write_json, write_text
from modeling_gppc.evaluation.report import markdown_table
from modeling_gppc.evaluation.transfer_scorecard import TRANSFER_FILE, transfer_scorecard
from modeling_gppc.normalization_gppc import close_matches

TEMPLATES = Path(__file__).parent / "templates"
# Stands for the repository's name until a push replaces it in what it uploads.
PLACEHOLDER = "USER/REPOSITORY"
MODEL_METHOD = "gppc"
LABELLED = " (labels)"
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
SCREEN_TEXT = (
    "Fitted on a CRISPR screen: there are no pairs of cells to score it on. `gppc evaluate --mode fine-tuned` scores models "
    "of folds of the same screen on perturbations that they did not see.\n"
)
# What `run.json` must say: key -> (type, what it is). `None` is allowed where a fact was not measured.
RUN_FACTS = {
    "store": (str, "name or version of the store of cells, such as a Census version"),
    "filters": ((str, list, dict, type(None)), "the query's filters; null for none"),
    "cells": (int, "number of cells read"),
    "genes": (int, "number of genes of the vocabulary"),
    "seconds": ((int, float), "wall-clock seconds of training"),
    "flop": ((int, float, type(None)), "floating-point operations of training; null where not counted"),
    "seed": (int, "the seed"),
    "command": (str, "the command that started the run"),
}
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
    """Reads a JSON file that holds a mapping.

    Raises:
        ValueError: If the file is missing, is not JSON or does not hold a mapping.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"`folder` {path.parent} holds no `{path.name}`; wanted the folder a run wrote.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"`{path.name}` in {path.parent} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path.name}` in {path.parent} holds {type(content).__name__}; wanted a mapping.")
    return content


def portable(text: str) -> str:
    """Replaces every absolute path of a text by its last component: cards and uploads must not name a machine."""
    text = re.sub(r"(?<![\w:/.~])(?:file://)?/(?:[\w.+@-]+/)+([\w.+@-]*)", lambda match: match[1] or ".", text)
    return re.sub(r"\b[A-Za-z]:\\(?:[^\\\s]+\\)*", "", text)


def read_results(path: Path) -> dict:
    """Reads and checks `{"schema_version": 1, "splits": {NAME: {"n_pairs", "n_genes", "methods": {...}}}}`."""
    results = read_json(path)
    if results.get("schema_version") != 1 or not isinstance(results.get("splits"), dict) or not results["splits"]:
        raise ValueError(f"`{path.name}` in {path.parent} has no `schema_version` 1 with `splits`; train again.")
    for split, content in results["splits"].items():
        missing = [key for key in ("n_pairs", "n_genes", "methods") if key not in content]
        if missing:
            raise ValueError(f"`{path.name}`: split `{split}` lacks {', '.join(f'`{key}`' for key in missing)}.")
    return results


def read_transfer(path: Path) -> dict:
    """Reads and checks the scorecard on real screens; see [`~transfer_scorecard.transfer_scorecard`]."""
    transfer = read_json(path)
    if transfer.get("schema_version") != 1 or not isinstance(transfer.get("screens"), list):
        raise ValueError(
            f"`{path.name}` in {path.parent} has no `schema_version` 1 with `screens`; write it with "
            "`gppc push MODEL --evaluation DIR`."
        )
    return transfer


def check_run(run: Mapping) -> None:
    """Refuses a `run.json` that lacks a fact of [`RUN_FACTS`] or states it in another type."""
    for key, (kind, meaning) in RUN_FACTS.items():
        if key not in run:
            raise ValueError(f"`run.json` lacks `{key}` ({meaning}){close_matches(key, run)}")
        if not isinstance(run[key], kind) or isinstance(run[key], bool):
            raise ValueError(f"`run.json`: `{key}` is {run[key]!r}; wanted {meaning}.")


def shown(value: float | int | None) -> str:
    """A figure as it appears in a card: integers with separators, others with four decimals."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def progress_text(unfinished: Mapping) -> str:
    """What stands instead of scores while training goes on."""
    text = (
        f"Training is not finished: this is step {shown(unfinished['step'])} of {shown(unfinished['max_steps'])}. "
        "Scores on test cells beside the floors come with the finished model."
    )
    if "eval_mse" in unfinished:
        text += (
            f" Last validation: mean squared error {shown(unfinished['eval_mse'])} (linear response alone "
            f"{shown(unfinished['eval_linear_mse'])}), r2 against the gene mean {shown(unfinished['eval_r2'])}."
        )
    return f"{text}\n"


NOT_SCORED = "This checkpoint has not been scored yet: `gppc score` does it beside the pairs that it was trained on.\n"


def _method_table(methods: Mapping[str, Mapping], meanings: Mapping[str, str], names: Mapping[str, str]) -> str:
    """Methods down, in the order of `names` (method -> what it is called), the scores that were computed across."""
    used = [metric for metric in meanings if any(scores.get(metric) is not None for scores in methods.values())]
    rows = [[label, *(_with_interval(methods[name], metric) for metric in used)] for name, label in names.items()]
    return markdown_table(["method", *(meanings[metric] for metric in used)], rows)


def score_tables(results: Mapping) -> str:
    """One Markdown table a split: methods down, the [`METRICS`] that were computed across, with their intervals."""
    tables = []
    for split, content in results["splits"].items():
        names = {}
        for method, scores in content["methods"].items():
            bold = f"**{method}**" if method == MODEL_METHOD else method
            names[method] = bold + (LABELLED if scores.get("uses_labels") else "")
        tables.append(f"**{split}** ({shown(content['n_pairs'])} pairs, {shown(content['n_genes'])} genes)\n")
        tables.append(f"{_method_table(content['methods'], METRICS, names)}\n")
    return "\n".join(tables)


def _with_interval(scores: Mapping, metric: str) -> str:
    interval = scores.get(f"{metric}_ci95")
    text = shown(scores.get(metric))
    return text if not interval or text == "-" else f"{text} [{shown(interval[0])}, {shown(interval[1])}]"


def evaluation_entries(results: Mapping, dataset_name: str) -> list[EvalResult]:
    """The `model-index`: every finite score of the model and of the floors, with its interval as `args`."""
    entries = []
    for split, content in results["splits"].items():
        for method, scores in content["methods"].items():
            for metric, meaning in METRICS.items():
                value = scores.get(metric)
                if value is None or not math.isfinite(value):
                    continue
                interval = scores.get(f"{metric}_ci95")
                entries.append(
                    EvalResult(
                        task_type="perturbation-prediction",
                        task_name="Expression after imposed expression changes",
                        dataset_type="cell-pairs",
                        dataset_name=dataset_name,
                        dataset_split=split,
                        metric_type=metric,
                        metric_value=value,
                        metric_name=meaning if method == MODEL_METHOD else f"{meaning} (floor: {method})",
                        metric_args={"ci95": list(interval)} if interval else None,
                    )
                )
    return entries


def count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, read from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


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
        known["parameters"] = count_parameters(weights)
    for key, label in OPTIONAL_FACTS.items():
        value = known.get(key)
        if value:
            text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            rows[label] = portable(text) if isinstance(text, str) else shown(text)
    rows["seed"] = str(run["seed"])
    rows["command"] = f"`{portable(run['command'])}`"
    return "\n".join(f"| {label} | {str(value).replace('|', '&#124;')} |" for label, value in rows.items())


def _cost(run: Mapping) -> str:
    flop = "not counted" if run["flop"] is None else f"about {run['flop']:.3g} floating-point operations"
    count = run.get("processes")
    processes = f" on {count} process{'es' if count > 1 else ''}" if count else ""
    return (
        f"Training took {run['seconds']:,.0f} s{processes}; its cost whatever the hardware: {flop}. "
        "Energy was not measured."
    )


def _figures(folder: Path) -> str:
    figures = sorted((folder / "figures").glob("*.png"))
    return "".join(f"![{path.stem.replace('_', ' ')}](figures/{path.name})\n\n" for path in figures)


def transfer_tables(transfer: Mapping) -> str:
    """One Markdown table a screen: the model first, then the baselines by correlation, with intervals."""
    lines = [
        "Responses (perturbed minus control means) to real perturbations that this checkpoint was not trained on, "
        "perturbed genes left out of the scores; intervals are over perturbations.\n"
    ]
    for screen in transfer["screens"]:
        methods, subject = screen["methods"], screen["subject"]
        lines.append(
            f"**{portable(screen['screen'])}**, {screen['mode']} ({shown(screen['n_perturbations'])} perturbations, "
            f"{shown(screen['n_genes'])} genes; a replicate would correlate {shown(screen['split_half_pearson'])})\n"
        )
        names = {}
        for name in sorted(methods, key=lambda name: (name != subject, -(methods[name].get("pearson_delta") or 0))):
            names[name] = f"**{name}**" if name == subject else name
            names[name] += " (perturbed cells)" if methods[name]["reads_perturbed_cells"] else ""
        lines.append(f"{_method_table(methods, TRANSFER, names)}\n")
    return "\n".join(lines)


def _transfer(folder: Path) -> str:
    path = folder / TRANSFER_FILE
    if path.is_file():
        return transfer_tables(read_transfer(path))
    return (
        "This checkpoint was not scored on a real perturbation screen when the card was written: how far it carries "
        "over to real interventions is not known. Score it on a screen like yours before relying on it.\n"
    )


def render_model_card(folder: str | Path) -> str:
    """Renders the card of a run folder.

    Args:
        folder (`str` or `Path`): Holds `config.json`, `preprocessor_config.json` and `run.json` (the facts of
            [`RUN_FACTS`], and those of [`OPTIONAL_FACTS`] that are known); where that says `unfinished` (`step`,
            `max_steps` and, if known, `eval_mse`, `eval_linear_mse`, `eval_r2`), the card says how far training is.
            A finished model that was scored has `results.json` (scores and floors by split), and `transfer.json`
            where screens were scored; see [`add_transfer`].

    Returns:
        `str`: The Markdown text with its metadata block.

    Raises:
        ValueError: If a file is missing or a fact is missing or malformed, naming it.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    preprocessor = read_json(folder / "preprocessor_config.json")
    run = read_json(folder / "run.json")
    check_run(run)
    unfinished = run.get("unfinished")
    scored = not unfinished and (folder / "results.json").is_file()
    results = read_results(folder / "results.json") if scored else None
    why = SCREEN_TEXT if run.get("screen") else NOT_SCORED
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
        scores=score_tables(results) if results else progress_text(unfinished) if unfinished else why,
        figures=_figures(folder),
        transfer=_transfer(folder),
        vocab_size=shown(len(preprocessor.get("gene_ids", ()))),
        organism=preprocessor.get("organism", "homo_sapiens").replace("_", " "),
        cost=_cost(run),
        version=run.get("version", "0.1.0"),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def add_transfer(folder: str | Path, evaluations: Iterable[str | Path]) -> Path:
    """Writes what `gppc evaluate` found for a model into its folder as `transfer.json`, and the card anew.

    Args:
        folder (`str` or `Path`): The model folder.
        evaluations (`Iterable`): See [`~transfer_scorecard.transfer_scorecard`], also for what is raised.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    write_json(transfer_scorecard(folder, evaluations), folder / TRANSFER_FILE)
    return write_model_card(folder)


def write_model_card(folder: str | Path) -> Path:
    """Renders the card of a run folder into its `README.md` and returns the path; see [`render_model_card`]."""
    return write_text(render_model_card(folder), Path(folder) / "README.md")
