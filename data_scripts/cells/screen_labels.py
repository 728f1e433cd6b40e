"""Labels of a screen read: controls, single genes, combinations, and what stands for no gene."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from data_scripts.cells.gene_symbols import current_symbol
from data_scripts.cells.screen_options import ScreenOptions
from modeling_gppc.normalization_gppc import bare_gene_name, close_matches

# Words for "no perturbation", case and separators aside: most also with a number behind, as guides are counted, or `sg`
# before; guides that cut where no gene is, or target a gene that no cell has, are controls too.
_SURE = (
    r"(sg|guide)?(nontargeting|nontarget|nontargetingcontrol|nontargetcontrol|ntc|nt|control|ctrl|negativecontrol|"
    r"negcontrol|negctrl|scrambled?|scr|safetargeting|safeharbou?r|safe|aavs1|rosa26|lacz|e?gfp|luciferase|luc)"
)
# Words that also say "no guide was found": controls only where no surer word is there.
_UNSURE = r"(none|negative|neg|noguide|unperturbed|untreated|uninfected|mock|vehicle|dmso|wildtype|wt)"
SURE_CONTROL, CONTROL_WORD = (re.compile(rf"{words}\d*") for words in (_SURE, rf"({_SURE}|{_UNSURE})"))
# A cell whose guide is not known: never a control, never a perturbation.
NOT_ASSIGNED = re.compile(r"nan|na|n/a|null|unassigned|unknown|undetermined|ambiguous|multiple|multiplets?|doublets?")
LOOKS_LIKE_CONTROL = re.compile(r"^(sg|guide)?(nt|non|neg|ctrl|control|scr|safe)|control|targeting|scramble|harbou?r")
NON_GENE_MODALITIES = ("cytokine", "drug", "compound", "chemical", "small molecule", "stimulation", "ligand")
CONTROL = "control"


@dataclasses.dataclass
class Perturbation:
    """One perturbation of a screen.

    Args:
        label (`str`): Genes in alphabetical order joined by `+`.
        genes (`tuple[str, ...]`): Symbols of its targets; ids where a symbol is missing or shared.
        gene_index (`np.ndarray`): Columns of the targets, one each; -1 where not measured.
        modality (`str`): One of `knock-out`, `CRISPRi`, `CRISPRa`, `overexpression`, `unknown`.
        n_cells (`int`): Cells that carry it.
        columns (`np.ndarray`, *optional*): Every column that a target's name stands for; those of `gene_index` if absent.
    """

    label: str
    genes: tuple[str, ...]
    gene_index: np.ndarray
    modality: str
    n_cells: int
    columns: np.ndarray | None = None

    def __post_init__(self):
        if self.columns is None:
            self.columns = self.gene_index[self.gene_index >= 0]

    @property
    def measured(self) -> bool:
        """Whether every target is among the measured genes."""
        return bool((self.gene_index >= 0).all())


def _fold(text: str) -> str:
    return re.sub(r"[\s_\-.]+", "", text).casefold()


def is_control_word(part: str, sure: bool = False) -> bool:
    """Whether a label means "no perturbation", whatever its case and separators; numbered controls included, and words
    that can mean "no guide was found" unless it must be `sure`."""
    return (SURE_CONTROL if sure else CONTROL_WORD).fullmatch(_fold(part)) is not None


def split_label(label: str) -> list[str]:
    """Parts of a combination: `A+B`, `A;B`, `A,B`, `A&B`, `A|B`; control parts (`A+ctrl`) are dropped."""
    return [part for part in _parts(label) if not is_control_word(part)]


def _parts(label: str) -> list[str]:
    return [part.strip() for part in re.split(r"[+;,&|]", label) if part.strip()]


def read_modality(text: str) -> str:
    """The modality of a [`Perturbation`] from free text such as `CRISPRko` or `dCas9-KRAB`."""
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


class TargetNames:
    """Finds the columns that a target's name stands for, by symbol or id, and names targets without doubt."""

    def __init__(self, symbols: Sequence[str], ids: Sequence[str]):
        self.symbols, self.ids = list(symbols), list(ids)
        self.by_symbol: dict[str, list[int]] = {}
        for column, symbol in enumerate(symbols):
            if symbol and not NOT_ASSIGNED.fullmatch(symbol.casefold()):
                self.by_symbol.setdefault(current_symbol(symbol).casefold(), []).append(column)
        self.by_id = {gene_id.casefold(): column for column, gene_id in enumerate(ids)}

    def columns(self, part: str) -> list[int]:
        """Columns of a target; empty where it is not measured."""
        by_id = self.by_id.get(bare_gene_name(part).casefold())
        return self.by_symbol.get(current_symbol(part).casefold(), []) if by_id is None else [by_id]

    def name(self, part: str) -> str:
        """The symbol, or the id where the symbol is missing or several genes have it."""
        columns = self.columns(part)
        if not columns:
            return bare_gene_name(part).upper()
        symbol = self.symbols[columns[0]]
        if len(columns) == 1 and len(self.by_symbol.get(current_symbol(symbol).casefold(), [])) != 1:
            return self.ids[columns[0]]
        return symbol


@dataclasses.dataclass
class ScreenLabels:
    """Labels of a screen, read: perturbation of each cell (`control`, or empty where the cell is set aside),
    perturbations by label, exclusions (reason, number of cells, examples) and notes for a person."""

    label: np.ndarray
    perturbations: dict[str, Perturbation]
    exclusions: list[tuple[str, int, str]]
    notes: list[str]

    def set_aside(self, reason: str, names: Sequence[str], count: int) -> None:
        """Notes cells that are not used."""
        shown = ", ".join(map(str, names[:4])) + (", ..." if len(names) > 4 else "")
        self.exclusions.append((reason, count, shown))

    def drop_unmatched(self, batch: np.ndarray, cell_line: np.ndarray) -> None:
        """Sets aside the cells of batches and cell lines with fewer than two controls, which nothing can be compared
        with; `ValueError` if no perturbed cell is left."""
        group = np.array([f"{one} / {line}" for one, line in zip(batch, cell_line)], dtype=str)
        names, place = np.unique(group, return_inverse=True)
        controls = np.bincount(place[self.label == CONTROL], minlength=len(names))
        lonely = np.isin(place, np.flatnonzero(controls < 2)) & (self.label != "")
        perturbed = (self.label != CONTROL) & (self.label != "")
        if not lonely.any():
            return
        if perturbed.any() and not (perturbed & ~lonely).any():
            raise ValueError(
                "`batch_column`: no batch holds perturbed cells and two control cells, so that responses cannot be told "
                f"from differences between batches (e.g. {', '.join(names[:3])}); name another column with "
                "`batch_column` or `cell_line_column`."
            )
        self.set_aside("in a batch without two control cells", np.unique(group[lonely]).tolist(), int(lonely.sum()))
        self.label[lonely] = ""

    def drop_rare(self, min_cells: int) -> None:
        """Sets aside perturbations with fewer cells; `ValueError` if no perturbation, or fewer control cells, are
        left."""
        for name in list(self.perturbations):
            count = int((self.label == name).sum())
            if count < min_cells:
                self.set_aside(f"fewer than {min_cells} cells of a perturbation", [name], count)
                self.label[self.label == name] = ""
                del self.perturbations[name]
            else:
                self.perturbations[name].n_cells = count
        if not self.perturbations:
            reasons = "; ".join(f"{reason} ({examples})" for reason, _, examples in self.exclusions)
            raise ValueError(f"`screen` has no perturbation left: {reasons or 'only controls'}.")
        n_controls = int((self.label == CONTROL).sum())
        if n_controls < min_cells:
            raise ValueError(f"`screen` has {n_controls} control cells; wanted at least `min_cells` = {min_cells}.")
        if not any(p.measured for p in self.perturbations.values()):
            self.set_aside(
                "no perturbation's targets are all measured: nothing can be imposed on the model", ["all"], 0
            )


def read_labels(
    text: np.ndarray, modalities: np.ndarray, names: TargetNames, options: ScreenOptions, column: str
) -> ScreenLabels:
    """Labels of cells, of any of the usual spellings, from the `text` and `modalities` of each; `column` of obs is
    what messages name. Raises `ValueError` if no cell is a control."""
    unique, first, inverse, times = np.unique(text, return_index=True, return_inverse=True, return_counts=True)
    is_control = control_labels(unique.tolist(), options.control_labels)
    if not is_control.any():
        shown = options.control_labels or "none of the usual words (control, ctrl, non-targeting, NTC, ...)"
        raise ValueError(
            f"`control_labels`: no control cells in obs[{column!r}] (looked for {shown})"
            f"{close_matches('control', unique.tolist())}; name them with `control_labels`."
        )
    canonical: dict[str, str] = {}
    found = ScreenLabels(np.zeros(0, dtype=str), {}, [], [])
    spelt: dict[str, set[str]] = {}
    reasons: dict[str, list[str]] = {}
    for position, label in enumerate(unique.tolist()):
        mapped = options.label_genes.get(label)
        parts = split_label(mapped or label)
        if is_control[position]:
            canonical[label] = CONTROL
        elif not _parts(label):
            reasons.setdefault("no label", []).append(label)
        elif mapped is None and any(NOT_ASSIGNED.fullmatch(part.casefold()) for part in _parts(label)):
            reasons.setdefault("guide not known", []).append(label)
        elif not parts:
            reasons.setdefault("may mean that no guide was found; surer control labels are there", []).append(label)
        else:
            parts = _halves(parts, names)
            looks_like_genes = all(
                names.columns(part) or re.fullmatch(r"[A-Za-z][A-Za-z0-9.\-]{0,24}", part) for part in parts
            )
            modality = modalities[first[position]]
            if mapped is None and (_fold(modality) in map(_fold, NON_GENE_MODALITIES) or not looks_like_genes):
                reason = "not a gene (map it with `label_genes` if it stands for one)"
                reasons.setdefault(reason, []).append(label)
                continue
            by_name = {names.name(part): names.columns(part) for part in parts}
            genes = tuple(sorted(by_name))
            name = "+".join(genes)
            canonical[label] = name
            spelt.setdefault(name, set()).add(label)
            index = np.array([(by_name[gene] or [-1])[0] for gene in genes], dtype=int)
            every = np.array(sorted(itertools.chain(*by_name.values())), dtype=int)
            found.perturbations[name] = Perturbation(name, genes, index, read_modality(modality), 0, every)
    found.label = np.array([canonical.get(name, "") for name in unique], dtype=str)[inverse]
    for reason, labels in reasons.items():
        found.set_aside(reason, labels, int(times[np.isin(unique, labels)].sum()))
    merged = [" = ".join(sorted(labels)) for labels in spelt.values() if len(labels) > 1]
    if merged:
        found.set_aside("labels spelt differently were merged, nothing was lost", merged, 0)
    controls = [f"{name!r} ({count})" for name, count in zip(unique[is_control].tolist(), times[is_control])]
    found.notes.append(f"controls: {', '.join(controls[:8])}{', ...' if len(controls) > 8 else ''}")
    odd = [label for label, name in canonical.items() if name != CONTROL and LOOKS_LIKE_CONTROL.search(_fold(label))]
    odd = [label for label in odd if not found.perturbations[canonical[label]].measured]
    if odd:
        found.notes.append(
            f"read as perturbations, name them with `control_labels` if they are none: {', '.join(odd)}"
        )
    return found


def control_labels(labels: Sequence[str], wanted: Sequence[str] | None) -> np.ndarray:
    """Which labels are controls, bool of shape `(len(labels),)`: those wanted, else those made of control words; words
    that may mean "no guide was found" only where there is no surer one."""
    if wanted:
        folded = {_fold(name) for name in wanted}
        return np.array([_fold(label) in folded for label in labels])
    for sure in (True, False):
        found = [bool(_parts(label)) and all(is_control_word(p, sure) for p in _parts(label)) for label in labels]
        if any(found):
            return np.array(found)
    return np.zeros(len(labels), dtype=bool)


def _halves(parts: list[str], names: TargetNames) -> list[str]:
    """`A_B` is a combination where both halves are genes and the whole is not."""
    if len(parts) == 1 and not names.columns(parts[0]) and parts[0].count("_") == 1:
        halves = [half for half in parts[0].split("_") if not is_control_word(half)]
        if all(names.columns(half) for half in halves):
            return halves
    return parts
