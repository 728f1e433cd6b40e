"""The tables of docs/evaluation.md: every screen of a folder in every mode that its cells allow, in one command.

python benchmarks/screen_tables.py SCREENS_DIR --out DIR
python benchmarks/screen_tables.py SCREENS_DIR --out DIR --gene-features TERMS.tsv --label-genes IFNB1=IFNB1
python benchmarks/screen_tables.py --smoke

SCREENS_DIR holds AnnData files with raw counts (*.h5ad). What `--gene-features` adds are rows "with features". A table
like NCBI's gene2go (a gene and a term a row) becomes one with

python benchmarks/screen_tables.py --annotation GENE2GO --names GENES --out TERMS.tsv

where GENES has the same ids beside symbols (NCBI's gene_info, or any table of ids and symbols). Evaluations that DIR holds
already are read, not run again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from bench_tools import smoke_screen

from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import Screen, read_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.report import markdown_table
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.evaluation.screen_report import write_evaluation
from modeling_gppc.normalization_gppc import close_matches

TERM_COLUMNS = ("term", "GO_ID", "go_id", "GO ID")
SYMBOL_COLUMNS = ("symbol", "Symbol", "gene_symbol", "gene_name", "hgnc_symbol")


def read_table(path: str) -> pd.DataFrame:
    """A `.parquet` file, or text with separators."""
    return pd.read_parquet(path) if str(path).endswith(".parquet") else pd.read_csv(path, sep=None, engine="python")


def annotation_table(annotation: pd.DataFrame, names: pd.DataFrame) -> pd.DataFrame:
    """Columns `gene` (symbol) and `term` from a table of ids and terms and one of ids and symbols.

    Raises:
        ValueError: If a column of terms, of symbols or of shared ids is missing.
    """
    term = next((name for name in TERM_COLUMNS if name in annotation), None)
    symbol = next((name for name in SYMBOL_COLUMNS if name in names), None)
    shared = [name for name in annotation.columns if name in names.columns and name not in (term, symbol)]
    # Of shared columns the one that tells genes apart, not e.g. the species.
    key = max(shared, key=lambda name: names[name].nunique(), default=None)
    for option, found, wanted, table in (
        ("annotation", term, TERM_COLUMNS, annotation),
        ("names", symbol, SYMBOL_COLUMNS, names),
        ("names", key, [c for c in annotation.columns if c != term], names),
    ):
        if found is None:
            raise ValueError(
                f"`{option}` has none of the columns {', '.join(map(str, wanted))}"
                f"{close_matches(str(wanted[0]), list(map(str, table.columns)))}."
            )
    joined = annotation[[key, term]].merge(names[[key, symbol]].dropna().drop_duplicates(), on=key)
    return pd.DataFrame({"gene": joined[symbol], "term": joined[term].astype(str)}).drop_duplicates()


def tasks_of(screen: Screen, features: str | None, controls: str) -> dict[str, dict]:
    """Name -> options of every evaluation that a screen allows."""
    common = {"controls": controls}
    labels, tasks = screen.perturbations.values(), {}
    if sum(p.measured for p in labels) >= 2:
        tasks["in-context"] = common
    if len(labels) >= 5:
        tasks["fine-tuned"] = common | {"mode": "fine-tuned"}
        if features is not None:
            tasks["fine-tuned, features"] = tasks["fine-tuned"] | {"gene_features": features}
    closed = common | {"mode": "fine-tuned"}
    if any(len(p.genes) > 1 for p in labels):
        for seen in (2, 1, 0):
            tasks[f"doubles, {seen} seen"] = closed | {"split": "combinations", "seen": seen}
    for kind in ("batch", "cell_line"):
        if len(np.unique(getattr(screen, kind))) > 1:
            tasks[f"held-out {kind}"] = closed | {"hold_out": kind, "max_genes": 20_000}
    return tasks


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """Text of a figure; empty where there is none."""
    return "" if value is None or not np.isfinite(value) else f"{value:{sign}.{digits}f}"


def with_interval(value: float | None, bounds, sign: str = "") -> str:
    """Text of a figure and its interval."""
    if not bounds or any(bound is None or not np.isfinite(bound) for bound in bounds):
        return number(value, sign=sign)
    return f"{number(value, sign=sign)} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def in_context_row(name: str, summary: dict) -> list[str]:
    """One screen in context."""
    entry, rule = summary["methods"][summary["subject"]], summary["methods"]["covariance"]
    against = summary["comparisons"]["covariance"]
    high = against["above_ceiling_half"]
    return [
        f"{name} ({summary['n_perturbations']})",
        with_interval(entry["pearson_delta"], entry["pearson_delta_ci95"]),
        number(rule["pearson_delta"]),
        with_interval(against["difference"], against["ci95"], "+"),
        f"{with_interval(high['difference'], high['ci95'], '+')} ({high['n']})",
        with_interval(entry["matched_minus_shuffled"], entry["matched_minus_shuffled_ci95"], "+"),
        f"{number(entry['normalised_squared_error'])} ({number(rule['normalised_squared_error'])})",
        number(entry.get("coverage90"), 2),
        number(summary["ceiling"]["split_half_pearson"], 2),
    ]


IN_CONTEXT_HEADER = (
    "screen",
    "gppc pearson_delta",
    "covariance rule",
    "gppc - covariance",
    "the same, ceiling > .5",
    "gppc - target-shuffled",
    "size error (covariance)",
    "coverage of 90 %",
    "ceiling",
)
METHOD_HEADER = (
    "method",
    "pearson_delta",
    "Systema",
    "size error",
    "coverage of 90 %",
    "gppc - method",
    "the same, Systema",
    "the same, ceiling > .5",
)


def method_rows(summary: dict) -> list[list[str]]:
    """One evaluation, a row a method, the subject first."""
    subject, rows = summary["subject"], []
    methods = summary["methods"]
    for name in sorted(methods, key=lambda n: (n != subject, -(methods[n]["pearson_delta"] or 0))):
        entry, against = methods[name], summary["comparisons"].get(name)
        row = [f"**{name}**" if name == subject else name]
        row.append(with_interval(entry["pearson_delta"], entry["pearson_delta_ci95"] if name == subject else None))
        row += [number(entry["systema_pearson"]), number(entry["normalised_squared_error"])]
        row.append(number(entry.get("coverage90"), 2))
        if against is None:
            row += ["", "", ""]
        else:
            high, gap = against["above_ceiling_half"], against["systema_pearson"]
            row.append(with_interval(against["difference"], against["ci95"], "+"))
            row.append(with_interval(gap["difference"], gap["ci95"], "+"))
            row.append(with_interval(high["difference"], high["ci95"], "+"))
        rows.append(row)
    return rows


def evaluate(screen: Screen, options: dict, out: Path) -> dict:
    """Content of `evaluation.json`, after running what is not there."""
    file = out / "evaluation.json"
    if not file.is_file():
        write_evaluation(evaluate_screen(screen, EvaluateOptions(**options), progress=False), out)
    return json.loads(file.read_text())


def make_tables(files: list[Path], out: Path, arguments: argparse.Namespace) -> str:
    """Runs every evaluation and returns the tables as Markdown."""
    in_context, parts = [], []
    for file in files:
        screen = read_screen(
            file, ScreenOptions(label_genes=dict(pair.split("=", 1) for pair in arguments.label_genes or ()))
        )
        tasks = tasks_of(screen, arguments.gene_features, arguments.controls)
        for task, options in tasks.items():
            if arguments.only and not any(task.startswith(name) for name in arguments.only):
                continue
            folder = out / file.stem / task.replace(", ", "_").replace(" ", "_")
            try:
                summary = evaluate(screen, options, folder)
            except ValueError as error:
                parts.append(f"## {screen.name}, {task}\n\nNot possible: {error}")
                continue
            if task == "in-context":
                in_context.append(in_context_row(screen.name, summary))
            else:
                title = f"## {screen.name}, {task}: {summary['n_perturbations']} rows, ceiling "
                title += number(summary["ceiling"]["split_half_pearson"])
                parts.append(f"{title}\n\n{markdown_table(METHOD_HEADER, method_rows(summary))}")
            print(f"{screen.name}, {task}: done", flush=True)
    if in_context:
        parts.insert(0, f"## In context\n\n{markdown_table(IN_CONTEXT_HEADER, in_context)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="?", help="folder with AnnData screens")
    parser.add_argument("--out", help="folder for evaluations and tables.md; with --annotation the table's file")
    parser.add_argument("--gene-features", metavar="FILE", help="table of gene and term, or gene and numbers")
    parser.add_argument("--label-genes", nargs="+", metavar="LABEL=GENE", help="genes that other labels stand for")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="in-context, fine-tuned, doubles, held-out")
    parser.add_argument("--controls", default="disjoint", help="disjoint, or shared: the form of the literature")
    parser.add_argument("--annotation", metavar="FILE", help="table of gene ids and terms, to be turned into features")
    parser.add_argument("--names", metavar="FILE", help="table of the same ids and symbols")
    parser.add_argument("--smoke", action="store_true", help="a tiny synthetic screen, seconds")
    arguments = parser.parse_args()
    if arguments.annotation:
        if not arguments.names or not arguments.out:
            parser.error("--annotation wants --names and --out")
        table = annotation_table(read_table(arguments.annotation), read_table(arguments.names))
        table.to_csv(arguments.out, sep="\t", index=False)
        print(f"{table['gene'].nunique()} genes, {table['term'].nunique()} terms: {arguments.out}")
        return
    if not arguments.smoke and not (arguments.screens and arguments.out):
        parser.error("give SCREENS_DIR and --out DIR, or --smoke")
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(arguments.screens or scratch), Path(arguments.out or Path(scratch) / "out")
        if arguments.smoke:
            smoke_screen(folder / "smoke.h5ad")
            ids, symbols = [f"id{i}" for i in range(6)], [f"G{i}" for i in range(6)]
            names = pd.DataFrame({"gene_id": ids, "symbol": symbols})
            terms = pd.DataFrame({"gene_id": ids, "GO_ID": ["a", "b", "c"] * 2})
            arguments.gene_features = str(folder / "terms.tsv")
            annotation_table(terms, names).to_csv(arguments.gene_features, sep="\t", index=False)
        files = sorted(folder.glob("*.h5ad"))
        if not files:
            parser.error(f"{folder} holds no .h5ad file")
        tables = make_tables(files, out, arguments)
        (out / "tables.md").write_text(tables + "\n")
        print(f"\n{tables}")


if __name__ == "__main__":
    main()
