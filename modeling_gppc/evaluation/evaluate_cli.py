"""`gppc evaluate`: a CRISPR screen, a model and every baseline; one command, one folder."""

import argparse
from pathlib import Path

from data_scripts.cells.read_options import add_flags, options_from_flags
from data_scripts.cells.screen_options import ScreenOptions
from data_scripts.cells.screens import read_screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gppc evaluate`."""
    parser.add_argument(
        "--screen", required=True, metavar="FILE", help="the screen: .h5ad, .zarr, or .h5 of 10x Genomics"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for tables, predictions, figures, report")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["gppc"],
        help="gppc, covariance, or a model folder that train.py left; several: one a fold",
    )
    parser.add_argument("--mode", default="in-context", help="zero-shot, in-context (controls only) or fine-tuned")
    parser.add_argument("--folds", type=int, default=5, help="folds over perturbations (fine-tuned)")
    parser.add_argument(
        "--split", default="perturbations", help="perturbations, or combinations: doubles from singles"
    )
    parser.add_argument("--seen", type=int, default=2, help="members of a double seen alone: 0, 1 or 2")
    parser.add_argument(
        "--hold-out",
        metavar="GROUP",
        help="batch or cell_line: each from the others; batch=NAME: that one (fine-tuned)",
    )
    parser.add_argument(
        "--gene-features", metavar="FILE", help="table of what is known of genes: gene and term, or gene and numbers"
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument(
        "--max-genes", type=int, default=2_000, help="most variable genes among controls that are kept"
    )
    parser.add_argument(
        "--hold-targets", type=float, default=0.1, help="how firmly other targets are held: 0, 0.1, 1, ..."
    )
    parser.add_argument(
        "--change", default="measured", help="what is imposed on a measured target: measured, or stated"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    group = parser.add_argument_group("reading the screen")
    add_flags(group, ScreenOptions, leave_out=("target_sum", "seed"))


def run(arguments: argparse.Namespace) -> int:
    """Runs the evaluation and prints its table.

    Raises:
        ValueError: For options, a screen or a model that cannot be used, or an output folder of another run.
    """
    # Options are checked before anything slow is imported or read.
    from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
    from modeling_gppc.evaluation.screen_evaluation import evaluate_screen

    options = EvaluateOptions(
        mode=arguments.mode,
        model=arguments.model,
        folds=arguments.folds,
        split=arguments.split,
        seen=arguments.seen,
        seed=arguments.seed,
        hold_targets=arguments.hold_targets,
        change=arguments.change,
        hold_out=arguments.hold_out,
        gene_features=arguments.gene_features,
        max_genes=arguments.max_genes,
    )
    out = Path(arguments.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "evaluation.json").is_file()):
        raise ValueError(f"`out` {out} holds something else than an evaluation; choose another folder.")
    screen = read_screen(arguments.screen, options_from_flags(ScreenOptions, vars(arguments)))
    print(screen.summary(), flush=True)
    evaluation = evaluate_screen(screen, options, progress=not arguments.quiet)
    from modeling_gppc.evaluation.screen_report import render_evaluation, write_evaluation

    write_evaluation(evaluation, out)
    print(
        f"\n{render_evaluation(evaluation.summary)}\n\nwritten to {out}: report.html, evaluation.json, "
        "per_perturbation.csv, predicted.h5ad, observed.h5ad, figures/"
    )
    return 0
