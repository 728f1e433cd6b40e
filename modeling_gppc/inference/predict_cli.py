"""`gppc predict`: expression of an AnnData's cells after perturbations."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

TOP_GENES = 5
MAX_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("model", help="model folder, or the id of a model on the Hub")
    parser.add_argument("cells", type=Path, help="cells with raw counts (.h5ad)")
    parser.add_argument(
        "--perturb",
        action="append",
        required=True,
        metavar="GENE=ACTION",
        help="ko, kd:SHARE (share removed), xFACTOR, level:VALUE or delta:CHANGE (log value); join genes with +; "
        "repeat the flag for more perturbations; `control` changes nothing",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write (.h5ad)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    parser.add_argument("--layer", help="layer that holds the counts, or `raw` (default: X)")
    parser.add_argument("--gene-column", help="column of var with Ensembl ids or symbols (default: found)")
    parser.add_argument("--library-size-key", help="column of obs with counts over all genes (default: found, or sum)")
    parser.add_argument("--pairing", help="context shared before and after (default: the model's)")
    parser.add_argument("--genes", nargs="+", metavar="GENE", help="predict only these (default: all the model knows)")
    parser.add_argument("--batch-size", type=int, default=256, help="rows the model sees at once (256)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the first accelerator, else cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(arguments: argparse.Namespace) -> int:
    """Writes the predictions and says which genes respond most."""
    if arguments.out.exists() and not arguments.overwrite:
        raise ValueError(f"`--out` {str(arguments.out)!r} exists; choose another name or add --overwrite.")
    # Imported late: a mistyped option should answer at once.
    from modeling_gppc.inference.predict import predict_file

    start = time.perf_counter()
    prediction, mean_delta = predict_file(
        arguments.model,
        arguments.cells,
        arguments.perturb,
        arguments.out,
        overwrite=arguments.overwrite,
        layer=arguments.layer,
        gene_column=arguments.gene_column,
        library_size_key=arguments.library_size_key,
        pairing=arguments.pairing,
        genes=arguments.genes,
        batch_size=arguments.batch_size,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    for line in prediction.warnings:
        print(f"gppc predict: warning: {line}", file=sys.stderr)
    if not arguments.quiet:
        print(summary(prediction, mean_delta))
        print(f"{arguments.out} written in {time.perf_counter() - start:.1f} s")
    return 0


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
