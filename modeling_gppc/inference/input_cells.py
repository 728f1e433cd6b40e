"""What a model can use of an AnnData: which columns are its genes, the counts, the library sizes."""

import dataclasses
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from data_scripts.cells.anndata_file import open_cells
from data_scripts.cells.gene_mapping import FileGenes
from data_scripts.cells.read_options import ReadOptions
from data_scripts.cells.technical_covariates import technical_covariates
from modeling_gppc.feature_extraction_gppc import LOG_LIBRARY_SIZE, GppcFeatureExtractor
from modeling_gppc.normalization_gppc import close_matches

# Close matches are sought for so many of the unknown genes; every search compares against the whole vocabulary.
MAX_SEARCHED = 100


@dataclasses.dataclass
class InputCells:
    """
    Cells as a model reads them.

    Args:
        obs (`pd.DataFrame`), counts (`csr_matrix`): Of the cells; columns are those of known genes, `(n, n_known)`.
        value_kind (`str`): What the counts are; see [`ReadOptions`].
        gene_index (`np.ndarray`): Vocabulary id of each of these columns, shape `(n_known,)`.
        library_size (`np.ndarray`, *optional*): Counts over all genes, shape `(n,)`; absent for log values and where
            the extractor sums rates.
        library_source (`str`): Column of obs it comes from, `"sum"`, or `"none"` for log values.
        unknown (`pd.DataFrame`): Genes of the input that the model does not know: `gene`, `close_match`.
        covariates (`dict[str, np.ndarray]`): Technical covariates that the model takes out, by name, as far as obs has
            them; see [`technical_covariates`].
        warnings (`list[str]`): What a person should know, a line each.
    """

    obs: pd.DataFrame
    counts: sparse.csr_matrix
    value_kind: str
    gene_index: np.ndarray
    library_size: np.ndarray | None
    library_source: str
    unknown: pd.DataFrame
    covariates: dict[str, np.ndarray]
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def features(self, extractor: GppcFeatureExtractor, rows: slice):
        """Model inputs of some of the cells."""
        names = [extractor.gene_ids[index] for index in self.gene_index]
        return extractor(
            self.counts[rows],
            names,
            library_size=None if self.library_size is None else self.library_size[rows],
            covariates={name: values[rows] for name, values in self.covariates.items()},
            value_kind=self.value_kind,
        )


def input_cells(
    source: str | Path | anndata.AnnData, extractor: GppcFeatureExtractor, options: ReadOptions | None = None
) -> InputCells:
    """Checks cells with raw counts (log values if the model's normalisation is `"none"`) and picks out what a model
    can use of them; `ValueError` for cells that cannot be read (see [`open_cells`]), or no known gene."""
    options = options or ReadOptions()
    if extractor.normalization == "none":
        options = dataclasses.replace(options, value_kind="log")
    rates = extractor.normalization == "log_tpm"
    if rates and options.library_size_column is not None:
        raise ValueError(
            f"`library_size_column` is {options.library_size_column!r}, but the model's normalisation is `log_tpm`, which "
            "divides by the sum of rates, not of counts; leave the option out."
        )
    with open_cells(source, options) as cells:
        index, warnings = _match_genes(cells.genes, extractor)
        known = np.flatnonzero(index >= 0)
        library = cells.check()
        counts = sparse.vstack([block for _, block in cells.blocks(known)], format="csr")
        warnings += cells.notes
    covariates, absent = {}, []
    if extractor.covariate_names:
        found = technical_covariates(cells.obs, library.sizes if library.is_complete else None, "`cells`")
        covariates = {name: values for name, values in found.items() if name in extractor.covariate_names}
        absent = [name for name in extractor.covariate_names if name not in {LOG_LIBRARY_SIZE, *covariates}]
    if absent:
        warnings.append(
            f"the model takes out what technical covariates explain, of which obs lacks {', '.join(absent)}; taken to be "
            "at the mean of the training cells."
        )
    if len(known) / extractor.vocab_size < 0.5:
        warnings.append(f"only {len(known)} of the {extractor.vocab_size} genes of the model are among the input's.")
    return InputCells(
        obs=cells.obs,
        counts=counts,
        value_kind=options.value_kind,
        gene_index=index[known],
        library_size=None if rates or library.source == "none" else library.sizes,
        library_source="sum" if rates else library.source,
        unknown=_unknown_genes(cells.genes.table["name"][index < 0].tolist(), extractor),
        covariates=covariates,
        warnings=warnings,
    )


def _match_genes(genes: FileGenes, extractor: GppcFeatureExtractor) -> tuple[np.ndarray, list[str]]:
    """Vocabulary id of each gene of the file (-1 where unknown), and warnings."""
    times = Counter(extractor.gene_symbols)
    index = np.full(len(genes), -1, dtype=np.int64)
    own = genes.table["name"].tolist()
    taken, shared, repeated = set(), set(), {}
    # Ids are surer than names, names surer than symbols.
    for names in (genes.table["id"], own, genes.table["symbol"]):
        # A symbol that stands for several genes of the model does not say which one was counted.
        shared.update(name for name in names if times[name] > 1)
        found = extractor.find_genes(["" if times[name] > 1 else name for name in names])
        for column in np.flatnonzero((index < 0) & (found >= 0)):
            if found[column] in taken:
                repeated[own[column]] = None
                continue
            taken.add(found[column])
            index[column] = found[column]
    warnings = []
    if shared:
        warnings.append(
            f"{len(shared)} symbols stand for several genes of the model and are not used without an id: "
            f"{_examples(sorted(shared))}."
        )
    if repeated:
        warnings.append(
            f"{len(repeated)} columns name a gene that another column names already; the first counts: "
            f"{_examples(list(repeated))}."
        )
    if (index < 0).all():
        folded = {symbol.casefold() for symbol in [*extractor.gene_symbols, *extractor.gene_ids]}
        other_case = any(name.casefold() in folded for name in [*own, *genes.table["symbol"]])
        fix = "name the column of var with Ensembl ids or symbols (`gene_column`)."
        raise ValueError(
            f"none of the {len(genes)} genes of the cells (e.g. `{own[0]}`) is among the {extractor.vocab_size} genes of "
            f"the model (e.g. `{extractor.gene_ids[0]}`, `{extractor.gene_symbols[0]}`; {extractor.organism}); "
            f"{'some differ in capitals only: are the cells of another species?' if other_case else fix}"
        )
    return index, warnings


def _unknown_genes(names: list[str], extractor: GppcFeatureExtractor) -> pd.DataFrame:
    folded = {symbol.casefold(): symbol for symbol in [*extractor.gene_ids, *extractor.gene_symbols]}
    matches = []
    for position, name in enumerate(names):
        match = folded.get(name.casefold(), "")
        if not match and position < MAX_SEARCHED and not name.startswith("ENS"):
            hint = close_matches(name, extractor.gene_symbols)
            match = hint.split("`")[1] if "did you mean" in hint else ""
        matches.append(match)
    return pd.DataFrame({"gene": names, "close_match": matches}, dtype=str)


def _examples(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (", ..." if len(names) > 5 else "")
