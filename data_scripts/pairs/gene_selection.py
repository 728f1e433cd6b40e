"""The gene panel: which genes become the vocabulary, from one bounded pass over the training cells."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from data_scripts.pairs.pair_options import PanelOptions
from data_scripts.store.cell_stream import CellStream, check_values, normalize_block
from modeling_gppc.normalization_gppc import close_matches

DISPERSION_BINS = 20


@dataclass
class PanelPart:
    """
    Statistics of some cells, by data set: codes of the data sets and numbers of their cells, `(n_datasets,)`; how many
    express each gene, sums and sums of squares of normalised values, `(n_datasets, n_vars)` (no columns of sums for
    rules that need none).
    """

    datasets: np.ndarray
    n_cells: np.ndarray
    n_expressed: np.ndarray
    sums: np.ndarray
    squares: np.ndarray


def count_genes(
    stream: CellStream,
    dataset: np.ndarray,
    library_size: np.ndarray,
    gene_lengths: np.ndarray | None,
    n_vars: int,
    moments: bool,
) -> PanelPart:
    """Statistics of the cells of a stream of all genes; sums of normalised values only with `moments`."""
    datasets, n_cells = np.unique(dataset, return_counts=True)
    expressed = np.zeros((len(datasets), n_vars), dtype=np.int32)
    sums, squares = (np.zeros((len(datasets), n_vars if moments else 0)) for _ in range(2))
    for block in stream if len(datasets) else ():
        check_values(block.values, stream.options, block.joinids)
        inside = slice(block.start, block.start + block.n_cells)
        values = normalize_block(block, stream.options, library_size, gene_lengths) if moments else None
        for index, code in enumerate(datasets):
            chosen = dataset[inside] == code
            if not chosen.any():
                continue
            entries = slice(None) if chosen.all() else np.flatnonzero(chosen[block.rows])
            genes = block.genes[entries]
            expressed[index] += np.bincount(genes, minlength=n_vars).astype(np.int32)
            if moments:
                part = values[entries].astype(np.float64)
                sums[index] += np.bincount(genes, weights=part, minlength=n_vars)
                squares[index] += np.bincount(genes, weights=part**2, minlength=n_vars)
    return PanelPart(datasets, n_cells, expressed, sums, squares)


def choose_genes(
    parts: Iterable[PanelPart],
    cells_per_dataset: np.ndarray,
    measured: np.ndarray,
    selected: np.ndarray,
    options: PanelOptions,
    var: pd.DataFrame,
) -> tuple[np.ndarray, dict[str, int]]:
    """Applies any rule: arguments and result are those of [`select_genes`]; `parts` are asked for only where needed."""
    if options.rule in ("common", "variable"):
        if not cells_per_dataset.sum():
            raise ValueError("`splits` leave no cell for training, so no gene panel can be chosen; change the rules.")
        return select_genes(parts, cells_per_dataset, measured, selected, options)
    if options.rule == "file":
        genes = find_genes(
            read_gene_list(options.file), var["feature_id"].tolist(), var["feature_name"].tolist(), "file"
        )
    else:
        genes = np.flatnonzero(selected & measured.any(0))
    if not len(genes):
        raise ValueError("`panel` leaves no gene: the data sets measure none of those that `var_filter` keeps.")
    return genes, {}


def select_genes(
    parts: Iterable[PanelPart],
    cells_per_dataset: np.ndarray,
    measured: np.ndarray,
    selected: np.ndarray,
    options: PanelOptions,
) -> tuple[np.ndarray, dict[str, int]]:
    """The rule `common` or `variable`: chosen genes, ascending, and how many genes each step kept; `ValueError` for
    none. A data set joins the scores as soon as all its training cells were seen, so memory is bounded. `measured`
    `(n_datasets, n_vars)` says what each measured, `selected` `(n_vars,)` what may be chosen."""
    n_vars = measured.shape[1]
    n_measured = cells_per_dataset @ measured
    n_expressed = np.zeros(n_vars, dtype=np.int64)
    score, weight_sum = np.zeros(n_vars), 0.0
    open_sets: dict[int, list] = {}
    for part in parts:
        for index, code in enumerate(part.datasets.tolist()):
            own = (
                int(part.n_cells[index]),
                part.n_expressed[index].astype(np.int64),
                part.sums[index],
                part.squares[index],
            )
            state = [seen + new for seen, new in zip(open_sets.pop(code, (0, 0, 0.0, 0.0)), own)]
            if state[0] < cells_per_dataset[code]:
                open_sets[code] = state
                continue
            n, expressed, sums, squares = state
            n_expressed += expressed
            weight = float(n) if options.dataset_weighting == "cells" else 1.0
            weight_sum += weight
            if options.rule == "variable":
                score += weight * standardized_dispersion(n, expressed, sums, squares)
            else:
                score += weight * expressed / n
    score /= max(weight_sum, 1.0)
    share_measured = n_measured / max(cells_per_dataset.sum(), 1)
    share_expressed = n_expressed / np.maximum(n_measured, 1)
    kept = selected & (n_expressed > 0)
    steps = {"genes of the store": n_vars, "kept by `var_filter` and expressed in a training cell": int(kept.sum())}
    kept &= share_measured >= options.min_measured
    steps[f"measured in at least {options.min_measured:g} of the cells"] = int(kept.sum())
    kept &= share_expressed >= options.min_expressed
    steps[f"expressed in at least {options.min_expressed:g} of the cells that measure it"] = int(kept.sum())
    genes = np.flatnonzero(kept)
    if options.n_genes is not None and len(genes) > options.n_genes:
        genes = np.sort(genes[np.argsort(-score[genes], kind="stable")[: options.n_genes]])
    steps["chosen"] = len(genes)
    if not len(genes):
        counts = "; ".join(f"{name}: {count}" for name, count in steps.items())
        raise ValueError(f"`panel` leaves no gene ({counts}); lower `min_measured` or `min_expressed`.")
    return genes, steps


def standardized_dispersion(n: int, n_expressed: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Log variance-to-mean ratio of each gene over `n` cells, standardised among genes of similar mean; else 0."""
    result = np.zeros(len(sums))
    mean = sums / n
    variance = np.maximum(squares / n - mean**2, 0)
    genes = np.flatnonzero((n_expressed > 0) & (mean > 0) & (variance > 0))
    if len(genes) < 2:
        return result
    dispersion = np.log(variance[genes] / mean[genes])
    rank = np.argsort(np.argsort(mean[genes], kind="stable"), kind="stable")
    bins = rank * min(DISPERSION_BINS, max(1, len(genes) // 5)) // len(genes)
    size = np.bincount(bins)
    center = np.bincount(bins, weights=dispersion) / size
    spread = np.sqrt(np.bincount(bins, weights=(dispersion - center[bins]) ** 2) / size)
    result[genes] = (dispersion - center[bins]) / np.maximum(spread[bins], 1e-12)
    return result


def read_gene_list(path: str | Path) -> list[str]:
    """Genes from a text file: the first column of each line, without empty lines and `#` comments."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`file` {path} does not exist; wanted a text file with a gene id or symbol a line.")
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    genes = [line.split()[0].split(",")[0] for line in lines if line]
    if not genes:
        raise ValueError(f"`file` {path} names no gene; wanted a gene id or symbol a line.")
    return genes


def find_genes(names: Sequence[str], gene_ids: Sequence[str], gene_symbols: Sequence[str], option: str) -> np.ndarray:
    """Positions of genes given by id or symbol, ascending and distinct; raises `ValueError` for an unknown one."""
    by_name = {symbol: index for index, symbol in reversed(list(enumerate(gene_symbols)))}
    by_name.update({gene: index for index, gene in enumerate(gene_ids)})
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(
            f"`{option}` names {len(unknown)} unknown genes, first {unknown[0]!r}{close_matches(unknown[0], by_name)}"
        )
    return np.unique([by_name[name] for name in names])


def gene_lengths_of(var: pd.DataFrame) -> np.ndarray:
    """Gene lengths in bases, `(n_vars,)`; `ValueError` if the store does not hold a positive one for each."""
    if "feature_length" not in var:
        raise ValueError("`normalization` is 'log_tpm'; the store's var has no column feature_length: use 'log1p'.")
    lengths = var["feature_length"].to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~(lengths > 0))
    if len(bad):
        raise ValueError(
            f"`normalization` is 'log_tpm'; {len(bad)} genes have no feature_length, first "
            f"{var['feature_id'].iloc[bad[0]]}: use 'log1p'."
        )
    return lengths
