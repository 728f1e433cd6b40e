"""The tables behind docs/evaluation.md: every screen of a folder, in every way that its cells allow.

    python benchmarks/screen_tables.py SCREENS_DIR --out DIR
    python benchmarks/screen_tables.py SCREENS_DIR --out DIR --gene-features TERMS.tsv --only in-context fine-tuned
    python benchmarks/screen_tables.py --smoke

SCREENS_DIR holds AnnData files with raw counts (*.h5ad). Every evaluation is one of `gppc evaluate`, in a folder of its own
in DIR; those that DIR holds already are read, not run again. `--gene-features` adds the fine-tuned task with features: a
table of gene (as the screens call it) and term, such as NCBI's gene2go joined with the symbols of gene_info.
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
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.evaluation.screen_report import render_evaluation, write_evaluation


def tasks_of(screen: Screen, features: str | None) -> dict[str, dict]:
    """Name -> options of every evaluation that a screen allows."""
    labels, tuned, tasks = screen.perturbations.values(), {"mode": "fine-tuned"}, {}
    if sum(p.measured for p in labels) >= 2:
        tasks["in-context"] = {}
    if len(labels) >= 5:
        tasks["fine-tuned"] = tuned
        if features is not None:
            tasks["fine-tuned_features"] = tuned | {"gene_features": features}
    if any(len(p.genes) > 1 for p in labels):
        for seen in (2, 1, 0):
            tasks[f"doubles_{seen}_seen"] = tuned | {"split": "combinations", "seen": seen}
    for kind in ("batch", "cell_line"):
        if len(np.unique(getattr(screen, kind))) > 1:
            tasks[f"held-out_{kind}"] = tuned | {"hold_out": kind, "max_genes": 20_000}
    return tasks


def make_tables(folder: Path, out: Path, features: str | None, only: list[str] | None) -> None:
    """Runs and prints every evaluation of every screen."""
    for file in sorted(folder.glob("*.h5ad")):
        try:
            screen = read_screen(file, ScreenOptions())
        except ValueError as error:
            print(f"\n## {file.stem}\n\nNot possible: {error}", flush=True)
            continue
        for task, options in tasks_of(screen, features).items():
            if only and not task.startswith(tuple(only)):
                continue
            results = out / file.stem / task
            print(f"\n## {screen.name}, {task}\n", flush=True)
            try:
                if not (results / "evaluation.json").is_file():
                    write_evaluation(evaluate_screen(screen, EvaluateOptions(**options), progress=False), results)
                print(render_evaluation(json.loads((results / "evaluation.json").read_text()), markdown=True))
            except ValueError as error:
                print(f"Not possible: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("screens", nargs="?", type=Path, help="folder with AnnData screens")
    parser.add_argument("--out", type=Path, help="folder for the evaluations")
    parser.add_argument("--gene-features", metavar="FILE", help="table of gene and term, or gene and numbers")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="in-context, fine-tuned, doubles, held-out")
    parser.add_argument("--smoke", action="store_true", help="a tiny synthetic screen, seconds")
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            smoke_screen(Path(scratch) / "smoke.h5ad")
            terms = pd.DataFrame({"gene": [f"G{index}" for index in range(6)], "term": ["a", "b", "c"] * 2})
            terms.to_csv(Path(scratch) / "terms.csv", index=False)
            make_tables(Path(scratch), Path(scratch) / "out", f"{scratch}/terms.csv", arguments.only)
    elif arguments.screens and arguments.out:
        make_tables(arguments.screens, arguments.out, arguments.gene_features, arguments.only)
    else:
        parser.error("give SCREENS_DIR and --out DIR, or --smoke")


if __name__ == "__main__":
    main()
