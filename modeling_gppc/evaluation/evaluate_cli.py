"""`gppc evaluate`: a CRISPR screen, a model and every baseline; one command, one folder."""

from dataclasses import dataclass
from pathlib import Path

from data_scripts.cells.screen_options import ScreenOptions
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions


@dataclass
class ReportOptions:
    """
    What is read, and where the report goes.

    Args:
        screen (`str`): The screen: .h5ad, .zarr, or .h5 of 10x Genomics.
        out (`str`): Folder for tables, predictions, figures and the report.
        quiet (`bool`, *optional*, defaults to `False`): No progress bars.
    """

    screen: str
    out: str
    quiet: bool = False

    def __post_init__(self):
        out = Path(self.out)
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "evaluation.json").is_file()):
            raise ValueError(f"`out` {out} holds something else than an evaluation; choose another folder.")


OPTIONS = (ReportOptions, EvaluateOptions, ScreenOptions)


def run(report: ReportOptions, options: EvaluateOptions, reading: ScreenOptions) -> None:
    """Runs the evaluation and prints its table."""
    # Imported late: a mistyped option should answer at once.
    from data_scripts.cells.screens import read_screen
    from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
    from modeling_gppc.evaluation.screen_report import render_evaluation, write_evaluation

    screen = read_screen(report.screen, reading)
    print(screen.summary(), flush=True)
    evaluation = evaluate_screen(screen, options, progress=not report.quiet)
    write_evaluation(evaluation, report.out)
    print(
        f"\n{render_evaluation(evaluation.summary)}\n\nwritten to {report.out}: report.html, evaluation.json, "
        "per_perturbation.csv, predicted.h5ad, observed.h5ad, figures/"
        + (f"; folds in {options.write_folds}" if options.write_folds else "")
    )
