"""CRISPR screens in AnnData files: labels read, genes found, cells normalised, exclusions counted."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse

from modeling_gppc.feature_extraction_gppc import check_raw_counts, close_matches, normalize_counts

# Names by which the usual collections (scPerturb, pertpy, cell-eval, GEARS, Census) call their columns, best first.
STANDARD_COLUMNS = {
    "perturbation": (
        "perturbation",
        "perturbation_name",
        "target_gene",
        "target",
        "gene",
        "gene_target",
        "condition",
        "guide_target",
        "sgRNA_target",
        "gene_name",
        "treatment",
    ),
    "batch": ("batch", "batch_var", "gem_group", "gemgroup", "replicate", "sample", "lane", "donor_id"),
    "cell_line": ("cell_line", "cell_type", "celltype", "cellline"),
    "modality": ("perturbation_type", "modality", "crispr_type"),
    "library_size": ("n_counts_full", "total_counts_full", "ncounts_full"),
    "n_expressed": ("n_genes_full", "ngenes_full"),
    "p_mito": ("p_mito", "percent_mito", "pct_counts_mt", "percent.mt"),
}
CONTROL_WORDS = frozenset(
    [
        "control",
        "ctrl",
        "nt",
        "ntc",
        "nontargeting",
        "nontarget",
        "negative",
        "negativecontrol",
        "negctrl",
        "neg",
        "scramble",
        "scrambled",
        "safe",
        "safetargeting",
        "unperturbed",
        "untreated",
        "mock",
        "vehicle",
        "dmso",
        "none",
        "wt",
        "wildtype",
    ]
)
NON_GENE_MODALITIES = ("cytokine", "drug", "compound", "chemical", "small molecule", "stimulation", "ligand")
MODALITIES = ("knock-out", "CRISPRi", "CRISPRa", "overexpression", "unknown")
CONTROL = "control"


@dataclasses.dataclass
class ScreenOptions:
    """How to read a screen.

    Args:
        perturbation_column, batch_column, cell_line_column, library_size_column (`str`, *optional*): Columns of `obs`;
            found by their standard names when absent.
        symbol_column (`str`, *optional*): Column of `var` with symbols; `symbol`, `gene_symbol`, `gene_name` or
            `feature_name` is taken when absent, else the index.
        control_labels (`list[str]`, *optional*): Labels of control cells; found by their usual words when absent.
        layer (`str`, *optional*): Layer with the values; `X` when absent.
        value_kind (`str`, *optional*, defaults to `"counts"`): `"counts"`, or `"log"` for values that are normalised
            log values already. Never guessed.
        target_sum (`float`, *optional*, defaults to 10,000): See `normalize_counts`.
        label_genes (`dict[str, str]`, *optional*): Perturbation label -> gene (or `A+B`) that it stands for, e.g. for
            enhancers or cytokines.
        guide_efficiency (`dict[str, float]`, *optional*): Share of a target's expression that its guides remove,
            stated by the user; used only where the change cannot be measured.
        min_cells (`int`, *optional*, defaults to 10): Perturbations with fewer cells are set aside.
        max_cells (`int`, *optional*): At most so many cells a label, drawn with `seed`.
        seed (`int`, *optional*, defaults to 0): Of that draw.
    """

    perturbation_column: str | None = None
    batch_column: str | None = None
    cell_line_column: str | None = None
    library_size_column: str | None = None
    symbol_column: str | None = None
    control_labels: list[str] | None = None
    layer: str | None = None
    value_kind: str = "counts"
    target_sum: float = 10_000.0
    label_genes: dict[str, str] = dataclasses.field(default_factory=dict)
    guide_efficiency: dict[str, float] = dataclasses.field(default_factory=dict)
    min_cells: int = 10
    max_cells: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.value_kind not in ("counts", "log"):
            raise ValueError(f"`value_kind` is {self.value_kind!r}; wanted 'counts' or 'log'.")
        if self.min_cells < 2:
            raise ValueError(
                f"`min_cells` is {self.min_cells}; a mean of fewer than 2 cells has no error: wanted >= 2."
            )
        for gene, share in self.guide_efficiency.items():
            if not 0 <= share <= 1:
                raise ValueError(f"`guide_efficiency` of `{gene}` is {share}; wanted a share between 0 and 1.")


@dataclasses.dataclass
class Perturbation:
    """One perturbation of a screen.

    Args:
        label (`str`): Genes in alphabetical order joined by `+`.
        genes (`tuple[str, ...]`): Symbols (or ids) of its targets.
        gene_index (`np.ndarray`): Columns of the targets; -1 where not measured.
        modality (`str`): One of `knock-out`, `CRISPRi`, `CRISPRa`, `overexpression`, `unknown`.
        n_cells (`int`): Cells that carry it.
    """

    label: str
    genes: tuple[str, ...]
    gene_index: np.ndarray
    modality: str
    n_cells: int

    @property
    def measured(self) -> bool:
        """Whether every target is among the measured genes."""
        return bool((self.gene_index >= 0).all())


@dataclasses.dataclass
class Screen:
    """Cells of a screen, normalised.

    Args:
        values (`np.ndarray`): Log values, float32 of shape `(n_obs, n_vars)`.
        gene_ids, gene_symbols (`list[str]`): Of the columns.
        label (`np.ndarray` of str): Perturbation of each cell, `control` for controls.
        batch, cell_line (`np.ndarray` of str): Of each cell; one value throughout where the file names none.
        covariates (`np.ndarray`): Technical covariates *of the whole transcriptome*, shape `(n_obs, C)`: log library
            size, log number of expressed genes, mitochondrial share, batch. Those of a targeted panel are left out:
            they are themselves responses.
        covariate_names (`list[str]`): Of the columns of `covariates`.
        library_size (`np.ndarray`): Counts over all genes that the file knows of, shape `(n_obs,)`.
        perturbations (`dict[str, Perturbation]`): By label.
        barcodes (`np.ndarray` of str): Names of the cells.
        exclusions (`list[tuple[str, int, str]]`): Reason, number of cells, examples: everything that was set aside.
        library_is_complete (`bool`): Whether the library size counts all genes or only those of the file.
        guide_efficiency (`dict[str, float]`): Stated by the user; see [`ScreenOptions`].
        name (`str`): Of the file.
    """

    values: np.ndarray
    gene_ids: list[str]
    gene_symbols: list[str]
    label: np.ndarray
    batch: np.ndarray
    cell_line: np.ndarray
    covariates: np.ndarray
    covariate_names: list[str]
    library_size: np.ndarray
    perturbations: dict[str, Perturbation]
    barcodes: np.ndarray
    exclusions: list[tuple[str, int, str]] = dataclasses.field(default_factory=list)
    library_is_complete: bool = True
    guide_efficiency: dict[str, float] = dataclasses.field(default_factory=dict)
    name: str = "screen"

    @property
    def is_control(self) -> np.ndarray:
        """Bool of shape `(n_obs,)`."""
        return self.label == CONTROL

    def cells_of(self, label: str) -> np.ndarray:
        """Rows of the cells of one label."""
        return np.flatnonzero(self.label == label)

    @property
    def panel_targets(self) -> np.ndarray:
        """Columns of every measured target of any perturbation: genes that no score may count."""
        index = np.concatenate([p.gene_index for p in self.perturbations.values()] or [np.zeros(0, int)])
        return np.unique(index[index >= 0]).astype(int)

    def target_changes(self, label: str) -> list[tuple[int, float, str]]:
        """Change of log value at each target: `(column, change, "measured" or "stated")`.

        Measured as mean of the perturbed cells minus mean of controls of the same batches; where the gene was not
        measured there is nothing to impose and the target is left out. A knock-out whose transcript goes on being
        counted has a small measured change: a stated efficiency then says what the user knows, and is kept apart.
        """
        perturbation = self.perturbations[label]
        cells, controls = self.cells_of(label), self.matched_control_mean(label)
        changes = []
        for gene, column in zip(perturbation.genes, perturbation.gene_index):
            if column < 0:
                continue
            if gene in self.guide_efficiency:
                kept = np.log1p((1 - self.guide_efficiency[gene]) * np.expm1(controls[column]))
                changes.append((int(column), float(kept - controls[column]), "stated"))
            else:
                changes.append((int(column), float(self.values[cells, column].mean() - controls[column]), "measured"))
        return changes

    def matched_control_mean(self, label: str) -> np.ndarray:
        """Mean of the controls, batches and cell lines weighted as among the cells of `label`; shape `(n_vars,)`."""
        group = np.char.add(np.char.add(self.batch, "\x1f"), self.cell_line)
        cells = self.cells_of(label)
        controls = np.flatnonzero(self.is_control)
        groups, times = np.unique(group[cells], return_counts=True)
        total, weight = np.zeros(self.values.shape[1]), 0
        for name, count in zip(groups, times):
            rows = controls[group[controls] == name]
            if len(rows):
                total += count * self.values[rows].mean(axis=0, dtype=np.float64)
                weight += count
        if weight == 0:
            return self.values[controls].mean(axis=0, dtype=np.float64)
        return total / weight

    def summary(self) -> str:
        """What was read and what was set aside, for people."""
        measured = sum(p.measured for p in self.perturbations.values())
        lines = [
            f"{self.name}: {len(self.values)} cells x {len(self.gene_ids)} genes, {int(self.is_control.sum())} controls, "
            f"{len(self.perturbations)} perturbations ({measured} with every target measured)"
        ]
        lines += [f"  set aside: {count} cells, {reason} ({examples})" for reason, count, examples in self.exclusions]
        return "\n".join(lines)


def find_column(names: Sequence[str], kind: str, given: str | None, required: bool = False) -> str | None:
    """Column of a kind: the one given, or the first of its standard names that is there (case does not matter).

    Raises:
        ValueError: If the given column, or a required one, is not there.
    """
    names = [str(name) for name in names]
    if given is not None:
        if given not in names:
            raise ValueError(f"`{kind}_column` {given!r} is not a column of obs{close_matches(given, names)}.")
        return given
    folded = {name.casefold(): name for name in reversed(names)}
    for standard in STANDARD_COLUMNS[kind]:
        if standard.casefold() in folded:
            return folded[standard.casefold()]
    if required:
        wanted = ", ".join(STANDARD_COLUMNS[kind][:6])
        raise ValueError(f"`{kind}_column` is not given and obs has none of {wanted}{close_matches(wanted, names)}.")
    return None


def _fold(text: str) -> str:
    return re.sub(r"[\s_\-.]+", "", text).casefold()


def is_control_word(part: str) -> bool:
    """Whether a label means "no perturbation", whatever its case and separators; numbered controls included."""
    folded = _fold(part)
    return folded in CONTROL_WORDS or re.sub(r"\d+$", "", folded) in CONTROL_WORDS - {
        "nt",
        "wt",
        "neg",
        "safe",
        "none",
    }


def split_label(label: str) -> list[str]:
    """Parts of a combination: `A+B`, `A;B`, `A,B`, `A&B`, `A|B`; control parts (`A+ctrl`) are dropped."""
    parts = [part.strip() for part in re.split(r"[+;,&|]", label)]
    return [part for part in parts if part and not is_control_word(part)]


def read_modality(text: str) -> str:
    """One of [`MODALITIES`] from free text such as `CRISPRko` or `dCas9-KRAB`."""
    folded = _fold(text)
    for words, name in (
        (("crispri", "krab", "interference", "knockdown", "kd"), "CRISPRi"),
        (("crispra", "vp64", "vpr", "activation"), "CRISPRa"),
        (("crisprko", "knockout", "ko", "crispr", "cas9"), "knock-out"),
        (("overexpression", "orf", "oe", "cdna"), "overexpression"),
    ):
        if any(word in folded for word in words):
            return name
    return "unknown"


def read_screen(source: str | Path | anndata.AnnData, options: ScreenOptions | None = None) -> Screen:
    """Reads and checks a screen; see [`ScreenOptions`] for what is found and what must be said.

    Raises:
        ValueError: For no perturbation column, no controls, duplicate barcodes or genes, values that are no counts (or
            a mixture of counts and log values), or no perturbation left.
    """
    options = options or ScreenOptions()
    if isinstance(source, anndata.AnnData):
        adata, name = source, "screen"
    else:
        if not Path(source).is_file():
            raise ValueError(f"`screen` {source} is not a file; wanted an AnnData file (.h5ad).")
        adata, name = anndata.read_h5ad(source), Path(source).stem
    obs = adata.obs
    column = find_column(obs.columns, "perturbation", options.perturbation_column, required=True)
    barcodes = adata.obs_names.to_numpy(dtype=str)
    values, times = np.unique(barcodes, return_counts=True)
    if (times > 1).any():
        raise ValueError(
            f"`screen` has {int((times > 1).sum())} duplicate barcodes (e.g. `{values[times > 1][0]}`); the same cell "
            "could be in training and test: make them unique, e.g. with the batch's name."
        )
    symbols, ids = _gene_names(adata, options)
    matrix = adata.layers[options.layer] if options.layer else adata.X
    if options.layer and options.layer not in adata.layers:
        raise ValueError(f"`layer` {options.layer!r} is not there{close_matches(options.layer, list(adata.layers))}.")
    _check_values(matrix, options.value_kind)

    text = obs[column].astype(object).where(obs[column].notna(), "").astype(str).str.strip().to_numpy(dtype=object)
    modality_column = find_column(obs.columns, "modality", None)
    modalities = obs[modality_column].astype(str).to_numpy() if modality_column else np.full(len(obs), "")
    label, perturbations, exclusions = _read_labels(text.astype(str), modalities, symbols, ids, options, column)

    keep = np.flatnonzero(label != "")
    if options.max_cells is not None:
        generator = np.random.default_rng(options.seed)
        drawn = []
        for one in np.unique(label[keep]):
            rows = np.flatnonzero(label == one)
            drawn.append(generator.permutation(rows)[: options.max_cells])
        keep = np.sort(np.concatenate(drawn))
    label = label[keep]
    counts = matrix[keep]
    counts = np.asarray(counts.toarray() if scipy.sparse.issparse(counts) else counts)
    library_column = find_column(obs.columns, "library_size", options.library_size_column)
    own_sum = counts.sum(axis=1, dtype=np.float64)
    library = obs[library_column].to_numpy(dtype=np.float64)[keep] if library_column else own_sum
    if options.value_kind == "counts" and library_column and (library < own_sum - 1e-3).any():
        row = int(np.flatnonzero(library < own_sum - 1e-3)[0])
        raise ValueError(
            f"`library_size_column` {library_column!r} is {library[row]:g} for cell `{barcodes[keep][row]}`, less than "
            f"its {own_sum[row]:g} counts; it is the sum of counts over all genes."
        )
    if options.value_kind == "counts":
        normalised = normalize_counts(counts, library[:, None], target_sum=options.target_sum)
    else:
        normalised = counts.astype(np.float32)
    batch_column = find_column(obs.columns, "batch", options.batch_column)
    line_column = find_column(obs.columns, "cell_line", options.cell_line_column)
    batch = obs[batch_column].astype(str).to_numpy(dtype=str)[keep] if batch_column else np.full(len(keep), "batch")
    line = obs[line_column].astype(str).to_numpy(dtype=str)[keep] if line_column else np.full(len(keep), "line")
    covariates, covariate_names = _covariates(obs.iloc[keep], library if library_column else None, batch)
    for one in perturbations.values():
        one.n_cells = int((label == one.label).sum())
    return Screen(
        values=normalised,
        gene_ids=ids,
        gene_symbols=symbols,
        label=label,
        batch=batch,
        cell_line=line,
        covariates=covariates,
        covariate_names=covariate_names,
        library_size=library,
        perturbations=perturbations,
        barcodes=barcodes[keep],
        exclusions=exclusions,
        library_is_complete=library_column is not None,
        guide_efficiency=dict(options.guide_efficiency),
        name=name,
    )


def _gene_names(adata: anndata.AnnData, options: ScreenOptions) -> tuple[list[str], list[str]]:
    index = adata.var_names.astype(str).tolist()
    column = options.symbol_column
    if column is not None and column not in adata.var:
        raise ValueError(f"`symbol_column` {column!r} is not in var{close_matches(column, list(adata.var.columns))}.")
    for candidate in ("symbol", "gene_symbol", "gene_name", "feature_name", "gene_symbols"):
        if column is None and candidate in adata.var:
            column = candidate
    symbols = adata.var[column].astype(str).tolist() if column else index
    duplicated, times = np.unique(index, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"`screen` has gene `{duplicated[times > 1][0]}` more than once in var; sum or drop one.")
    return symbols, index


def _check_values(matrix, value_kind: str) -> None:
    stored = matrix.data if scipy.sparse.issparse(matrix) else np.asarray(matrix)
    if value_kind == "log":
        if not np.isfinite(stored).all():
            raise ValueError("`screen` holds NaN or infinite values; remove or repair those cells.")
        if stored.size and stored.max() > 50:
            raise ValueError(
                f"`value_kind` is 'log' but the largest value is {stored.max():g}; log values stay below about 20: "
                "these look like counts."
            )
        return
    whole = stored == np.rint(stored)
    if scipy.sparse.issparse(matrix) and stored.size and not whole.all() and np.isfinite(stored).all():
        sparse = matrix.tocsr()
        broken = np.add.reduceat(~whole, np.minimum(sparse.indptr[:-1], max(stored.size - 1, 0))) > 0
        broken &= np.diff(sparse.indptr) > 0
    elif stored.ndim == 2 and not whole.all():
        broken = (~whole).any(axis=1)
    else:
        broken = np.zeros(0, bool)
    if broken.any() and not broken.all() and (~broken).sum() > 0.01 * len(broken):
        raise ValueError(
            f"`screen` mixes raw and log values: {int(broken.sum())} cells hold non-integer values and "
            f"{int((~broken).sum())} hold counts; give one kind, e.g. the layer with the counts."
        )
    check_raw_counts(stored, "screen")


def _read_labels(text, modalities, symbols, ids, options: ScreenOptions, column: str):
    """Canonical label of each cell (empty where set aside), the perturbations, and what was set aside."""
    by_name = {}
    for position, (symbol, gene_id) in enumerate(zip(symbols, ids)):
        by_name.setdefault(symbol.casefold(), (position, symbol))
        by_name.setdefault(gene_id.casefold(), (position, symbol))
    wanted_controls = {_fold(name) for name in options.control_labels or ()}
    canonical: dict[str, str] = {}
    found: dict[str, Perturbation] = {}
    spelt: dict[str, set[str]] = {}
    reasons: dict[str, list[str]] = {}
    unique, inverse, times = np.unique(text, return_inverse=True, return_counts=True)
    inverse = inverse.ravel()
    first = np.zeros(len(unique), dtype=int)
    first[inverse[::-1]] = np.arange(len(text))[::-1]
    for position, label in enumerate(unique):
        modality = modalities[first[position]]
        if _fold(label) in wanted_controls if wanted_controls else (label != "" and not split_label(label)):
            canonical[label] = CONTROL
            continue
        mapped = options.label_genes.get(label)
        parts = split_label(mapped or label)
        if not parts:
            reasons.setdefault("no label", []).append(label)
            continue
        # `A_B` is a combination only where both halves are known genes and the whole is not.
        if len(parts) == 1 and parts[0].casefold() not in by_name and parts[0].count("_") == 1:
            halves = [half for half in parts[0].split("_") if not is_control_word(half)]
            if all(half.casefold() in by_name for half in halves):
                parts = halves
        looks_like_genes = all(re.fullmatch(r"[A-Za-z][A-Za-z0-9.\-]{0,24}", part) for part in parts)
        if mapped is None and (_fold(modality) in map(_fold, NON_GENE_MODALITIES) or not looks_like_genes):
            reasons.setdefault("not a gene (map it with `label_genes` if it stands for one)", []).append(label)
            continue
        genes = sorted({by_name.get(part.casefold(), (-1, part.upper()))[1] for part in parts})
        name = "+".join(genes)
        canonical[label] = name
        spelt.setdefault(name, set()).add(label)
        index = np.array([by_name.get(gene.casefold(), (-1, gene))[0] for gene in genes], dtype=int)
        found[name] = Perturbation(name, tuple(genes), index, read_modality(modality), 0)
    if CONTROL not in canonical.values():
        shown = options.control_labels or "none of the usual words (control, ctrl, non-targeting, NTC, ...)"
        raise ValueError(
            f"`control_labels`: no control cells in obs[{column!r}] (looked for {shown})"
            f"{close_matches('control', unique.tolist())}; name them with `control_labels`."
        )
    label = np.array([canonical.get(name, "") for name in unique], dtype=str)[inverse]
    exclusions = []
    for reason, names in reasons.items():
        count = int(times[np.isin(unique, names)].sum())
        exclusions.append((reason, count, ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")))
    merged = {name: sorted(names) for name, names in spelt.items() if len(names) > 1}
    if merged:
        example = "; ".join(f"{' = '.join(names)}" for names in list(merged.values())[:3])
        exclusions.append(("labels spelt differently were merged, nothing was lost", 0, example))
    for name in list(found):
        count = int((label == name).sum())
        if count < options.min_cells:
            exclusions.append((f"fewer than {options.min_cells} cells of a perturbation", count, name))
            label[label == name] = ""
            del found[name]
    if not found:
        raise ValueError(
            f"`screen` has no perturbation left: {'; '.join(f'{r} ({e})' for r, _, e in exclusions) or 'only controls'}."
        )
    n_controls = int((label == CONTROL).sum())
    if n_controls < options.min_cells:
        raise ValueError(
            f"`screen` has {n_controls} control cells; wanted at least `min_cells` = {options.min_cells}."
        )
    if not any(p.measured for p in found.values()):
        exclusions.append(
            ("no perturbation's targets are all measured: nothing can be imposed on the model", 0, "all")
        )
    return label, found, exclusions


def _covariates(obs, library: np.ndarray | None, batch: np.ndarray) -> tuple[np.ndarray, list[str]]:
    columns: list[tuple[str, np.ndarray]] = []
    if library is not None:
        columns.append(("log library size", np.log(np.maximum(library, 1.0))))
        expressed = find_column(obs.columns, "n_expressed", None)
        if expressed:
            columns.append(("log expressed genes", np.log(np.maximum(obs[expressed].to_numpy(dtype=float), 1.0))))
    mito = find_column(obs.columns, "p_mito", None)
    if mito:
        columns.append(("mitochondrial share", np.nan_to_num(obs[mito].to_numpy(dtype=float))))
    columns += [(f"batch {name}", (batch == name).astype(float)) for name in np.unique(batch)[1:]]
    if not columns:
        return np.zeros((len(obs), 0)), []
    return np.stack([values for _, values in columns], axis=1), [name for name, _ in columns]


def options_from_flags(**flags) -> ScreenOptions:
    """[`ScreenOptions`] from command-line values; `label_genes` and `guide_efficiency` as `LABEL=VALUE` texts."""
    pairs: Mapping[str, type] = {"label_genes": str, "guide_efficiency": float}
    for name, kind in pairs.items():
        entries = {}
        for text in flags.get(name) or ():
            key, equals, value = text.partition("=")
            try:
                entries[key] = kind(value)
            except ValueError:
                equals = ""
            if not equals or not key:
                raise ValueError(f"`{name}` {text!r} is not LABEL={'GENE' if kind is str else 'SHARE'}.")
        flags[name] = entries
    return ScreenOptions(**flags)
