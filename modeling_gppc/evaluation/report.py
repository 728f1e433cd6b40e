"""The table a person reads at the end of a run, and what its intervals allow to be said."""

from collections.abc import Mapping, Sequence

from modeling_gppc.evaluation.pair_floors import FLOORS
from modeling_gppc.evaluation.pair_scores import MODEL_METHOD, OPTIMUM

COLUMNS = ("method", "MSE", "95 % interval", "r2", "r2, nothing imposed", "pearson_delta", "MSE - best floor's")


def ordered(methods: Mapping[str, dict]) -> list[str]:
    """Names in table order: the model, its ceiling, floors from simple to strong."""
    order = [MODEL_METHOD, OPTIMUM, *FLOORS]
    return sorted(methods, key=lambda name: order.index(name) if name in order else len(order))


def _cell(value, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(bounds: Sequence[float] | None) -> str:
    if not bounds or any(bound is None for bound in bounds):
        return ""
    return f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"


def table_rows(split: dict) -> list[list[str]]:
    """Cells of one split's table, a row a method; `*` marks the best floor, `+` floors that read cell-type labels."""
    rows = []
    for name in ordered(split["methods"]):
        entry = split["methods"][name]
        difference = entry.get("difference_from_best_floor")
        marks = (" *" if name == split.get("best_floor") else "") + (" +" if entry.get("uses_labels") else "")
        rows.append(
            [
                name + marks,
                _cell(entry["mse"]),
                _interval(entry.get("mse_ci95")),
                _cell(entry.get("r2")),
                _cell(entry.get("r2_without_revealed")),
                _cell(entry.get("pearson_delta"), 3),
                f"{difference['mse']:+.4f} {_interval(difference['ci95'])}" if difference else "",
            ]
        )
    return rows


def verdict(split: dict) -> str:
    """One sentence on what the intervals of a split allow to be said of the model."""
    entry = split["methods"][MODEL_METHOD]
    if split["best_floor"] is None:
        return "There are no floors to beat."
    parts = []
    for key, readers in (("best_floor", ""), ("best_label_free_floor", " without labels")):
        difference = entry.get(f"difference_from_{key}")
        if difference is None or (parts and split[key] == split["best_floor"]):
            continue
        low, high = difference["ci95"]
        change = f"({difference['floor']}: MSE {difference['mse']:+.4f}, 95 % interval {_interval([low, high])})"
        if high < 0:
            parts.append(f"{MODEL_METHOD} beats every floor{readers}, the best too {change}; the interval excludes 0")
            break  # beating the best of all implies the rest
        verb = "is worse than" if low > 0 else "cannot be told apart from"
        parts.append(f"{MODEL_METHOD} {verb} the best floor{readers} {change}")
    sentence = "; but ".join(parts) if len(parts) > 1 and "beats" in parts[-1] else "; ".join(parts)
    optimum = split["methods"].get(OPTIMUM)
    if optimum and optimum.get("r2") and entry.get("r2") is not None:
        sentence += f"; it reaches {100 * entry['r2'] / optimum['r2']:.1f} % of the best possible r2"
    gain = entry.get("gain_from_revealed")
    if gain:
        sentence += f"; the imposed genes lower its MSE by {gain['mse']:.4f} {_interval(gain['ci95'])}"
    return sentence + "."


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: first column left, the others right."""
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]

    def line(cells):
        first, *rest = (str(cell) for cell in cells)
        return "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub-flavoured table."""
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def render_results(results: dict) -> str:
    """The whole of `results.json` as text: one table and one sentence a split, and a legend."""
    parts = []
    for name, split in results["splits"].items():
        heading = f"{name}: {split['n_pairs']} pairs, {split['n_targets']} target cells, {split['n_genes']} genes"
        parts.append(f"{heading}\n{text_table(COLUMNS, table_rows(split))}\n{verdict(split)}")
    legend = (
        "* best floor; + reads cell-type labels, which the model does not. Scores leave out imposed genes and genes "
        "not measured in the target; r2 is against `mean`; intervals: paired bootstrap over target cells."
    )
    return "\n\n".join([*parts, legend])
