"""`gppc predict`: expression of an AnnData's cells after perturbations."""

import dataclasses
import sys
import time

import numpy as np

from data_scripts.cells.read_options import ReadOptions
from modeling_gppc.inference.predict_options import PredictOptions

TOP_GENES = 5
MAX_SHOWN = 10
OPTIONS = (PredictOptions, ReadOptions)


def run(options: PredictOptions, reading: ReadOptions) -> None:
    """Writes the predictions and says which genes respond most."""
    # Imported late: a mistyped option should answer at once.
    from modeling_gppc.inference.predict import predict_file

    start = time.perf_counter()
    given = dataclasses.asdict(options) | dataclasses.asdict(reading)
    quiet, perturbations = given.pop("quiet"), given.pop("perturb")
    prediction, mean_delta = predict_file(perturbations=perturbations, progress=not quiet, **given)
    for line in prediction.warnings:
        print(f"gppc predict: warning: {line}", file=sys.stderr)
    if not quiet:
        print(summary(prediction, mean_delta))
        print(f"{options.out} written in {time.perf_counter() - start:.1f} s")


def summary(prediction, mean_delta: np.ndarray) -> str:
    """What was predicted, and for each perturbation the genes whose mean changes most."""
    unknown = prediction.cells.unknown
    lines = [
        f"{len(prediction.cells)} cells x {prediction.shape[1]} genes x {len(prediction.texts)} perturbations; "
        f"library size: {prediction.cells.library_source}; {len(prediction.cells.gene_index)} genes of the input "
        f"known to the model, {len(unknown)} not (listed in uns)"
    ]
    matched = unknown[unknown["close_match"] != ""].head(TOP_GENES)
    if len(matched):
        pairs = ", ".join(f"{gene} ({match}?)" for gene, match in zip(matched["gene"], matched["close_match"]))
        lines.append(f"unknown, with the closest name: {pairs}")
    symbols = prediction.var["gene_symbol"].to_numpy()
    sources = dict(zip(prediction.texts, prediction.uns.get("sources", ())))
    for text, spec, column in list(zip(prediction.texts, prediction.parsed, mean_delta.T))[:MAX_SHOWN]:
        others = ~np.isin(prediction.query, [gene for gene, _, _ in spec])
        order = [gene for gene in np.argsort(-np.abs(column), kind="stable") if others[gene]][:TOP_GENES]
        source = f" ({sources[text].partition(':')[0]})" if text in sources else ""
        lines.append(f"{text}{source}: " + ", ".join(f"{symbols[gene]} {column[gene]:+.3f}" for gene in order))
    if len(prediction.texts) > MAX_SHOWN:
        lines.append(f"... and {len(prediction.texts) - MAX_SHOWN} more perturbations")
    return "\n".join(lines)
