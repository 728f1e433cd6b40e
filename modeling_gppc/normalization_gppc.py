"""Counts to log values, what an action changes of them, and names that are near: numpy alone, for data and model."""

import difflib
import re
from collections.abc import Iterable

import numpy as np

NORMALIZATIONS = ("log1p", "log_tpm", "none")
VALUE_KINDS = ("counts", "estimated_counts", "log")
_GENOME_PREFIX = re.compile(r"(?:GRC[a-z]\d+|(?:hg|mm|rn)\d+)(?:\.p\d+)?_+(?=[^_])")
_VERSION = re.compile(r"(ENS[A-Z]*G\d+)\.\d+")


def close_matches(name: str, options: Iterable[str], n: int = 3) -> str:
    """Returns `"; did you mean `a` or `b`?"`-like text for error messages, or the first options when none is close."""
    options = [str(option) for option in options]
    folded: dict[str, str] = {}
    for option in options:
        folded.setdefault(option.casefold(), option)
    near = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=n, cutoff=0.6)]
    if near:
        return "; did you mean " + " or ".join(f"`{match}`" for match in near) + "?"
    shown = ", ".join(f"`{option}`" for option in options[:8]) + (", ..." if len(options) > 8 else "")
    return f"; there are {len(options)}: {shown}" if options else ""


def bare_gene_name(name: str) -> str:
    """A gene's name without the prefix of a genome (`GRCh38_STAT1`, `hg38_...`) and an Ensembl id's version."""
    prefix = _GENOME_PREFIX.match(name)
    name = name[prefix.end() :] if prefix else name
    versioned = _VERSION.fullmatch(name)
    return versioned.group(1) if versioned else name


def normalize_counts(
    counts: np.ndarray,
    library_size: np.ndarray | float,
    *,
    normalization: str = "log1p",
    target_sum: float = 10_000.0,
    gene_lengths: np.ndarray | float | None = None,
) -> np.ndarray:
    """Normalises raw counts; the only place where this is done, in training and in prediction.

    `log1p`: log(1 + target_sum x counts / library_size), library_size = counts summed over *all* genes of the cell.
    `log_tpm`: log(1 + target_sum x rate / library_size), rate = counts / (length in kilobases), library_size = the
    rates summed over all genes (with target_sum 1e6 this is log(TPM + 1); full-length assays only).
    `none`: the values are log values already and are returned unchanged.

    Args:
        counts (`np.ndarray`): Counts, of any shape; the other arguments broadcast against it.
        library_size (`np.ndarray` or `float`): See above; must be positive where counts are not zero.
        normalization (`str`, *optional*, defaults to `"log1p"`): One of `log1p`, `log_tpm`, `none`.
        target_sum (`float`, *optional*, defaults to 10,000): What a cell's values sum to before the logarithm.
        gene_lengths (`np.ndarray`, *optional*): Bases; `log_tpm` only.

    Returns:
        `np.ndarray` of float32, shaped like `counts`.
    """
    if normalization == "none":
        return np.asarray(counts, dtype=np.float32)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"`normalization` is {normalization!r}; wanted one of {', '.join(NORMALIZATIONS)}.")
    rate = np.asarray(counts, dtype=np.float64)
    if normalization == "log_tpm":
        if gene_lengths is None:
            raise ValueError("`gene_lengths` is missing; `normalization='log_tpm'` divides counts by gene length.")
        rate = rate / (np.asarray(gene_lengths, dtype=np.float64) / 1_000.0)
    library = np.asarray(library_size, dtype=np.float64)
    # A cell without counts has nothing to scale: all its values are zero.
    scale = np.divide(target_sum, library, out=np.zeros_like(library), where=library > 0)
    return np.log1p(rate * scale).astype(np.float32)


def check_raw_counts(values: np.ndarray, name: str = "counts", estimated: bool = False) -> None:
    """Refuses values that cannot be raw counts.

    Args:
        values (`np.ndarray`): Any shape; for a sparse matrix its stored values.
        name (`str`, *optional*): What the message calls them.
        estimated (`bool`, *optional*, defaults to `False`): Whether counts may have fractions, as those of RSEM,
            salmon or a correction for ambient RNA.

    Raises:
        ValueError: For NaN or infinite, negative or non-integer (most often log-transformed) values.
    """
    values = np.asarray(values)
    if values.size == 0 or values.dtype.kind in "ub":
        return
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(
            f"`{name}` holds NaN or infinite values; raw counts are wanted: remove or repair those cells."
        )
    if values.min() < 0:
        raise ValueError(
            f"`{name}` holds negative values (smallest {values.min():g}); raw counts are wanted, "
            "these look scaled: use the layer that holds the counts."
        )
    if not estimated and values.dtype.kind == "f" and (values != np.rint(values)).any():
        example = values[values != np.rint(values)].flat[0]
        raise ValueError(
            f"`{name}` holds non-integer values (e.g. {example:g}, largest {values.max():g}); raw counts are wanted, "
            "these look normalised or log-transformed: use the layer that holds the counts."
        )


def change_of_log_value(value: float | np.ndarray, action: str, amount: float) -> float | np.ndarray:
    """Change that an action means for a gene at log value `value`: `factor` scales expm1(value), `level` sets it.

    A log value below zero (possible for an estimate, not for counts) holds no expression to scale: a factor leaves it
    alone, except that a knock-out still ends at zero.
    """
    value = np.asarray(value, dtype=np.float64)
    if action == "delta":
        return np.full_like(value, amount)[()]
    if action == "level" or amount == 0:
        return (amount - value)[()]
    scaled = np.log1p(amount * np.expm1(np.maximum(value, 0.0)))
    return np.where(value < 0, 0.0, scaled - value)[()]
