"""Cost of `gppc evaluate` on a large screen: baselines, fine-tuned, every division and null, from a file of counts.

python benchmarks/bench_evaluate.py --perturbations 250 500 1000 2000
"""

import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
from bench_tools import exponent, in_child, machine, parser_of

from data_scripts.cells.screens import read_screen
from modeling_gppc.evaluation.evaluate_options import EvaluateOptions
from modeling_gppc.evaluation.screen_evaluation import evaluate_screen


def write_screen(path: Path, n_perturbations: int, n_cells: int, n_genes: int, n_controls: int) -> dict:
    """Counts of cells with five programs, about 14 % expressed; the first tenth of the genes are targets."""
    generator = np.random.default_rng(0)
    names = [f"G{i}" if i < n_genes // 10 else f"T{i}" for i in range(n_perturbations)]
    labels = np.repeat(["control", *names], [n_controls, *[n_cells] * n_perturbations])
    loadings, parts = generator.normal(0, 0.5, (5, n_genes)), []
    for start in range(0, len(labels), 2_000):
        size = min(2_000, len(labels) - start)
        rate = np.exp(generator.normal(size=(size, 5)) @ loadings - 2.5)
        parts.append(scipy.sparse.csr_matrix(generator.poisson(rate).astype(np.float32)))
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    var = pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    anndata.AnnData(scipy.sparse.vstack(parts, format="csr"), obs=obs, var=var).write_h5ad(path)
    return {"cells": len(labels)}


def measure(path: str, model: str) -> dict:
    """CPU and wall seconds of reading and of evaluating a screen."""
    started, wall = time.process_time(), time.monotonic()
    screen = read_screen(path)
    read = time.process_time() - started
    evaluate_screen(screen, EvaluateOptions(mode="fine-tuned", model=[model]), progress=False)
    return {"read": read, "evaluate": time.process_time() - started - read, "wall": time.monotonic() - wall}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--perturbations", nargs="+", type=int, default=[250, 500, 1_000, 2_000], metavar="N")
    parser.add_argument("--cells", type=int, default=100, help="cells of a perturbation")
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--controls", type=int, default=10_000)
    parser.add_argument("--model", default="covariance", help="covariance (baselines only) or gppc")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.perturbations, arguments.cells, arguments.genes, arguments.controls = [5, 8], 12, 60, 60
    seconds = []
    with tempfile.TemporaryDirectory() as scratch:
        for n in arguments.perturbations:
            path = Path(scratch) / f"{n}.h5ad"
            in_child(
                write_screen,
                path=path,
                n_perturbations=n,
                n_cells=arguments.cells,
                n_genes=arguments.genes,
                n_controls=arguments.controls,
            )
            found = in_child(measure, path=str(path), model=arguments.model)
            seconds.append(found["evaluate"])
            print(
                f"{n} perturbations: read {found['read']:.1f}, evaluated {found['evaluate']:.1f} CPU s, "
                f"{found['wall']:.1f} s in all, {found['peak_rss_gb']:.2f} GB",
                flush=True,
            )
    print(f"exponent in perturbations: {exponent(arguments.perturbations, seconds):.2f} ({machine()})")


if __name__ == "__main__":
    main()
