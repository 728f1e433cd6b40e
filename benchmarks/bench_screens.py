"""Responses of a screen: `gppc evaluate`'s methods against `cipher-perturb` and `cell-eval` on the same cells.

pip install -e '.[peers]'
python benchmarks/bench_screens.py --screen SCREEN.h5ad
python benchmarks/bench_screens.py --smoke
"""

import argparse
import contextlib
import importlib.util
import io
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from data_scripts.cells.screens import read_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.metrics import pearson_delta
from modeling_gppc.evaluation.report import text_table
from modeling_gppc.evaluation.screen_baselines import ScreenContext, covariance
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen
from modeling_gppc.evaluation.screen_report import response_anndatas


def smoke_screen(path: Path) -> None:
    """A small screen of counts: three programs, six knock-downs."""
    generator = np.random.default_rng(0)
    loadings = generator.normal(size=(60, 3)) * 0.4
    labels = np.repeat(["control", *(f"G{i}" for i in range(6))], [500, *[120] * 6])
    state = generator.normal(size=(len(labels), 3))
    for gene in range(6):
        state[labels == f"G{gene}"] -= 2 * loadings[gene] / np.linalg.norm(loadings[gene])
    counts = generator.poisson(np.exp(0.5 + state @ loadings.T)).astype(np.float32)
    adata = anndata.AnnData(
        counts, obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    )
    adata.var_names = [f"G{i}" for i in range(60)]
    adata.write_h5ad(path)


def timed(function):
    """Result and CPU seconds of a call, its printing silenced."""
    began = time.process_time()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        result = function()
    return result, time.process_time() - began


def compare(path: Path) -> list[list[str]]:
    """Rows of the table: who, CPU seconds, mean pearson_delta without the own target's gene."""
    screen, seconds = timed(lambda: read_screen(path))
    labels = sorted(label for label, p in screen.perturbations.items() if p.measured)
    rows = [["gppc: read the screen", f"{seconds:.1f}", ""]]
    context = ScreenContext.build(screen, [], labels)
    prediction, seconds = timed(lambda: covariance(context))
    observed = np.stack([screen.values[screen.cells_of(label)].mean(axis=0) for label in labels])
    observed = observed - screen.values[screen.is_control].mean(axis=0)
    others = np.ones(observed.shape, dtype=bool)
    for row, label in enumerate(labels):
        others[row, screen.perturbations[label].gene_index] = False
    ours = pearson_delta(prediction.delta, observed, others)
    rows.append(["gppc: covariance", f"{seconds:.1f}", f"{np.nanmean(ours):.3f}"])
    if importlib.util.find_spec("cipher"):
        import cipher

        symbols = anndata.read_h5ad(path)
        symbols.var_names = screen.gene_symbols
        with tempfile.TemporaryDirectory() as folder:
            symbols.write_h5ad(Path(folder) / "symbols.h5ad")
            result, seconds = timed(
                lambda: cipher.forward_prediction(
                    str(Path(folder) / "symbols.h5ad"),
                    normalization="log1CP10k",
                    exclude_target_from_fit=True,
                    exclude_target_from_eval=True,
                    expression_threshold=0.0,
                    min_samples=10,
                    min_train_genes=20,
                    min_test_genes=20,
                    progress=False,
                )
            )
        found = f"{result.results['pearson_real'].mean():.3f} (sign fitted on the response)"
        rows.append(["cipher-perturb: forward", f"{seconds:.1f}", found])
    # As cipher-perturb measures: one mean of all controls on both sides.
    options = EvaluateOptions(controls="shared")
    evaluation, seconds = timed(lambda: evaluate_screen(screen, options, progress=False))
    value = pearson_delta(evaluation.predictions["gppc"].delta, observed, others)
    rows.append(["gppc: evaluate, in context, all metrics", f"{seconds:.1f}", f"{np.nanmean(value):.3f}"])
    if importlib.util.find_spec("cell_eval"):
        from cell_eval._types import PerturbationAnndataPair
        from cell_eval.metrics._anndata import pearson_delta as peer

        predicted, real = response_anndatas(evaluation, "gppc", max_cells=10_000)

        def score():
            data = PerturbationAnndataPair(real=real, pred=predicted, pert_col="target", control_pert="non-targeting")
            return peer(data)

        scores, seconds = timed(score)
        rows.append(
            [
                "cell-eval: pearson_delta of the same, all genes",
                f"{seconds:.1f}",
                f"{np.mean(list(scores.values())):.3f}",
            ]
        )
        same = pearson_delta(evaluation.predictions["gppc"].delta, evaluation.truth.delta)
        rows.append(["gppc: the same", "", f"{np.nanmean(same):.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--screen", help="an AnnData screen with raw counts")
    parser.add_argument("--smoke", action="store_true", help="a small synthetic screen, seconds")
    arguments = parser.parse_args()
    if not arguments.smoke and arguments.screen is None:
        parser.error("give --screen FILE.h5ad, or --smoke")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smoke.h5ad" if arguments.smoke else Path(arguments.screen)
        if arguments.smoke:
            smoke_screen(path)
        rows = compare(path)
    print(text_table(["what", "CPU s", "mean pearson_delta"], rows))


if __name__ == "__main__":
    main()
