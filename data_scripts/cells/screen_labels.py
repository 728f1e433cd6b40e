"""Labels of a screen read: controls, single genes, combinations, and what stands for no gene."""

import dataclasses
import re

import numpy as np

from data_scripts.cells.screen_options import ScreenOptions
from modeling_gppc.normalization_gppc import close_matches

# Words for "no perturbation", most of them also with a number behind, as guides are counted.
CONTROL_WORDS = re.compile(
    r"(control|ctrl|ntc|nontarget(ing)?|negative(control)?|negctrl|scrambled?|safetargeting|unperturbed|untreated|mock|"
    r"vehicle|dmso|wildtype)\d*|nt|neg|safe|none|wt"
)
NON_GENE_MODALITIES = ("cytokine", "drug", "compound", "chemical", "small molecule", "stimulation", "ligand")
MODALITIES = ("knock-out", "CRISPRi", "CRISPRa", "overexpression", "unknown")
CONTROL = "control"


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


def _fold(text: str) -> str:
    return re.sub(r"[\s_\-.]+", "", text).casefold()


def is_control_word(part: str) -> bool:
    """Whether a label means "no perturbation", whatever its case and separators; numbered controls included."""
    return CONTROL_WORDS.fullmatch(_fold(part)) is not None


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


def read_labels(text, modalities, symbols, ids, options: ScreenOptions, column: str):
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
    unique, first, inverse, times = np.unique(text, return_index=True, return_inverse=True, return_counts=True)
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
