"""`gppc evaluate`: a CRISPR screen, a model and every baseline; one command, one folder."""

import argparse
from pathlib import Path

from data_scripts.cells.screen_options import options_from_flags
from data_scripts.cells.screens import read_screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gppc evaluate`."""
    parser.add_argument("--screen", required=True, metavar="FILE.h5ad", help="the screen: an AnnData file")
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
    for name, text in (
        ("perturbation-column", "obs column with the labels"),
        ("batch-column", "obs column with batches"),
        ("cell-line-column", "obs column with cell lines"),
        ("library-size-column", "obs column with counts over all genes"),
        ("symbol-column", "var column with symbols"),
        ("layer", "layer with the values"),
    ):
        group.add_argument(f"--{name}", help=f"{text}; found by its standard names when absent")
    group.add_argument("--control-labels", nargs="+", metavar="LABEL", help="labels of control cells")
    group.add_argument("--value-kind", default="counts", help="counts, or log for values that are log values already")
    group.add_argument("--label-genes", nargs="+", metavar="LABEL=GENE", help="genes that other labels stand for")
    group.add_argument("--guide-efficiency", nargs="+", metavar="GENE=SHARE", help="share removed, where not measured")
    group.add_argument("--min-cells", type=int, default=10, help="perturbations with fewer cells are set aside")
    group.add_argument("--max-cells", type=int, help="at most so many cells a label")


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
    names = [
        "perturbation_column",
        "batch_column",
        "cell_line_column",
        "library_size_column",
        "symbol_column",
        "layer",
        "control_labels",
        "value_kind",
        "label_genes",
        "guide_efficiency",
        "min_cells",
        "max_cells",
        "seed",
    ]
    screen = read_screen(arguments.screen, options_from_flags(**{name: getattr(arguments, name) for name in names}))
    print(screen.summary(), flush=True)
    evaluation = evaluate_screen(screen, options, progress=not arguments.quiet)
    from modeling_gppc.evaluation.screen_report import render_evaluation, write_evaluation

    write_evaluation(evaluation, out)
    print(
        f"\n{render_evaluation(evaluation.summary)}\n\nwritten to {out}: report.html, evaluation.json, "
        "per_perturbation.csv, predicted.h5ad, observed.h5ad, figures/"
    )
    return 0
