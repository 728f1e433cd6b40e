"""What `gppc evaluate` leaves behind: tables, files that its peers read, and a page that opens without a server."""

import base64
import csv
import html
import io
import json
from pathlib import Path

import numpy as np

from data_scripts.files import write_text
from modeling_gppc.evaluation.pair_scores import write_results
from modeling_gppc.evaluation.peer_files import write_peer_files
from modeling_gppc.evaluation.report import markdown_table, text_table
from modeling_gppc.evaluation.screen_evaluation import ScreenEvaluation
from modeling_gppc.evaluation.screen_figures import plot_calibration, plot_responses, plot_screen_scores
from modeling_gppc.evaluation.screen_scores import METRICS

# Columns beside pearson_delta, with their decimals.
TABLE_METRICS = (
    ("systema_pearson", 3),
    ("direction_accuracy", 2),
    ("normalised_squared_error", 3),
    ("mae_delta", 4),
    ("discrimination_cosine", 2),
    ("de_overlap", 2),
    ("coverage90", 2),
)


def table_rows(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table; the model first, the others by pearson_delta."""
    subject = summary["subject"]
    names = sorted(summary["methods"], key=lambda n: (n != subject, -(summary["methods"][n]["pearson_delta"] or 0)))
    header = [
        "method",
        "pearson_delta",
        "95 % interval",
        *(name for name, _ in TABLE_METRICS),
        "matched - shuffled",
        "shuffled labels",
        *([f"{subject} - method"] if subject else []),
    ]
    rows = []
    for name in names:
        entry = summary["methods"][name]
        cells = [name + (" *" if entry["reads_perturbed_cells"] else ""), f"{entry['pearson_delta']:.3f}"]
        cells.append(_interval(entry["pearson_delta_ci95"]))
        for metric, digits in TABLE_METRICS:
            value = entry.get(metric)
            cells.append("" if value is None else f"{value:.{digits}f}")
        matched, nothing = entry.get("matched_minus_shuffled_ci95"), entry.get("nothing_pearson_ci95")
        cells.append(f"{entry['matched_minus_shuffled']:+.3f} {_interval(matched)}" if any(matched or ()) else "")
        cells.append(f"{entry['nothing_pearson']:+.3f} {_interval(nothing, 2)}" if nothing else "")
        if subject:
            comparison = summary["comparisons"].get(name)
            cells.append(f"{comparison['difference']:+.3f} {_interval(comparison['ci95'])}" if comparison else "")
        rows.append(cells)
    return header, rows


def _interval(bounds: list[float], digits: int = 3) -> str:
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def sentences(summary: dict) -> list[str]:
    """What the numbers allow to be said, one sentence each."""
    ceiling = summary["ceiling"]
    said = [
        *summary.get("notes", ()),
        f"A replicate of half the cells would score {ceiling['split_half_pearson']:.3f} in pearson_delta; for "
        f"{ceiling['n_above_half']} of {summary['n_perturbations']} perturbations it would exceed 0.5.",
    ]
    if any(summary.get("files", {}).get("negative_means", {}).values()):
        counts = ", ".join(f"{count} in {name}" for name, count in summary["files"]["negative_means"].items())
        said.append(f"Means of a gene in a perturbation that would be below 0 are 0 in the files for peers: {counts}.")
    subject = summary["subject"]
    if subject is None:
        return said
    entry = summary["methods"][subject]
    rivals = {n: m for n, m in summary["methods"].items() if n != subject and n in summary["comparisons"]}
    if rivals:
        best = max(rivals, key=lambda n: rivals[n]["pearson_delta"])
        comparison = summary["comparisons"][best]
        low, high = comparison["ci95"]
        verdict = "beats" if low > 0 else "is below" if high < 0 else "cannot be told apart from"
        said.append(
            f"{subject} {verdict} the best baseline, {best}, in pearson_delta: {comparison['difference']:+.3f}, paired "
            f"95 % interval over perturbations and cells [{low:.3f}, {high:.3f}]."
        )
    if entry.get("matched_minus_shuffled") is not None and summary["mode"] != "fine-tuned":
        low, high = entry["matched_minus_shuffled_ci95"]
        verdict = "matters" if low > 0 else "is not shown to matter"
        said.append(
            f"Which gene is perturbed {verdict}: matched minus target-shuffled {entry['matched_minus_shuffled']:+.3f} "
            f"[{low:.3f}, {high:.3f}]."
        )
    if "nothing_pearson" in entry:
        low, high = entry["nothing_pearson_ci95"]
        said.append(
            f"With labels shuffled, when there is nothing to predict, {subject} scores {entry['nothing_pearson']:+.3f} "
            f"[{low:.3f}, {high:.3f}]{'' if low <= 0 <= high else ': this evaluation is not clean'}."
        )
    size = entry["normalised_squared_error"]
    said.append(
        f"Size: normalised squared error {size:.3f} a perturbation ({entry['pooled_normalised_squared_error']:.3f} over "
        f"all together), {'better' if size < 1 else 'worse'} than predicting no response (1)."
    )
    for title, part in (("all perturbations", None), ("those with a ceiling above 0.5", "strong_responses")):
        entries = {name: m if part is None else m.get(part) for name, m in summary["methods"].items()}
        shown = [
            f"{name} {found['strong_coverage90']:.2f}, {found['strong_width90']:.3f}, {found['strong_crps']:.4f}"
            for name, found in entries.items()
            if found and found.get("strong_crps") is not None
        ]
        if shown:
            said.append(
                f"Intervals on the 50 genes whose predicted change is largest, {title} (coverage of 90 %, width, CRPS; "
                f"coverage and CRPS with the error of the observation): {'; '.join(shown)}."
            )
    return said


def render_evaluation(summary: dict, markdown: bool = False) -> str:
    """The run as readable text, for a terminal or in Markdown."""
    header, rows = table_rows(summary)
    title = (
        f"{summary['screen']}, {summary['mode']}: {summary['n_perturbations']} perturbations, "
        f"{summary['n_scored_genes']} of {summary['n_genes']} genes scored (targets of the panel removed)"
    )
    table = markdown_table(header, rows) if markdown else text_table(header, rows)
    legend = "* reads perturbed cells of other perturbations; intervals: bootstrap over perturbations."
    return "\n".join([title, "", table, "", *sentences(summary), legend.replace("*", "\\*") if markdown else legend])


def write_per_perturbation(evaluation: ScreenEvaluation, path: Path) -> None:
    """One row a perturbation and method, every metric a column."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    metrics = [m for m in METRICS if any(m in scores for scores in evaluation.scores.values())]
    writer.writerow(["perturbation", "method", "n_cells", "target_measured", "ceiling", "unlike_others", *metrics])
    truth = evaluation.truth
    unlike = truth.unlike_others
    for row, label in enumerate(truth.labels):
        measured = evaluation.screen.perturbations[label].measured
        for name, scores in evaluation.scores.items():
            values = [f"{scores[m][row]:.6g}" if m in scores and np.isfinite(scores[m][row]) else "" for m in metrics]
            facts = [truth.n_cells[row], measured, f"{evaluation.ceiling[row]:.4f}", f"{unlike[row]:.4f}"]
            writer.writerow([label, name, *facts, *values])
    write_text(buffer.getvalue(), path)


def write_evaluation(evaluation: ScreenEvaluation, folder: str | Path) -> Path:
    """Writes everything a run leaves into a folder; each file appears whole or not at all.

    `evaluation.json`, `per_perturbation.csv`, `predicted.h5ad` and `observed.h5ad` (for cell-eval and cell-eval2),
    `figures/*.png`, `report.html`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = evaluation.summary
    method = summary["subject"] or "covariance"
    summary["files"] = write_peer_files(evaluation, method, folder)
    write_results(summary, folder / "evaluation.json")
    write_per_perturbation(evaluation, folder / "per_perturbation.csv")
    figures = {
        "Scores beside baselines, null and ceiling": plot_screen_scores(summary, folder / "figures" / "scores.png"),
        f"Predicted ({method}) against observed responses": plot_responses(
            evaluation, method, folder / "figures" / "responses.png"
        ),
    }
    if summary["calibration"]:
        figures["Coverage of intervals"] = plot_calibration(summary, folder / "figures" / "calibration.png")
    write_text(render_page(evaluation, figures), folder / "report.html")
    return folder


def render_page(evaluation: ScreenEvaluation, figures: dict[str, Path]) -> str:
    """One HTML page with its figures inside; no server, script or network needed."""
    summary = evaluation.summary
    header, rows = table_rows(summary)
    subject = summary["subject"]

    def table(head, body, mark=None) -> str:
        # Long names may break after an underscore, so that every column is seen without scrolling.
        cells = "".join(f"<th>{html.escape(str(c)).replace('_', '_&#8203;')}</th>" for c in head)
        lines = [
            f"<tr{' class=model' if mark and r[0].split()[0] == mark else ''}>"
            + "".join(f"<td>{html.escape(str(c))}</td>" for c in r)
            + "</tr>"
            for r in body
        ]
        return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"

    truth = evaluation.truth
    methods = [row[0].split()[0] for row in rows]
    detail = [
        [label, int(truth.n_cells[i]), f"{evaluation.ceiling[i]:.2f}"]
        + [f"{evaluation.scores[name]['pearson_delta'][i]:.2f}" for name in methods]
        for i, label in enumerate(truth.labels)
    ]
    excluded = [[e["reason"], e["cells"], e["examples"]] for e in summary["exclusions"]]
    images = "".join(
        f"<h2>{html.escape(name)}</h2><img alt='{html.escape(name)}' src='data:image/png;base64,"
        f"{base64.b64encode(path.read_bytes()).decode()}'>"
        for name, path in figures.items()
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;font-size:13px}th,td{padding:.25rem .6rem;text-align:right;"
        "border-bottom:1px solid #ddd}td{white-space:nowrap}th{vertical-align:bottom}th:first-child,td:first-child{text-align:left}"
        ".model{background:#e6f2f7;font-weight:600}.scroll{overflow-x:auto}img{max-width:min(100%,62rem)}"
    )
    title = f"{summary['screen']}: {summary['mode']}"
    said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(summary))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
        f"<h1>{html.escape(title)}</h1><p>{summary['n_perturbations']} perturbations, {summary['n_cells']} cells, "
        f"{summary['n_controls']} controls; {summary['n_scored_genes']} of {summary['n_genes']} genes scored, every "
        f"target of the panel removed.</p><ul>{said}</ul>{table(header, rows, subject)}"
        "<p>* reads perturbed cells of other perturbations. Intervals: bootstrap over perturbations.</p>"
        f"{images}<h2>Correlation of the response, by perturbation</h2>"
        f"{table(['perturbation', 'cells', 'ceiling', *methods], detail)}"
        + (f"<h2>Set aside</h2>{table(['reason', 'cells', 'examples'], excluded)}" if excluded else "")
        + f"<h2>Options</h2><pre>{html.escape(json.dumps(summary['options'], indent=2))}</pre></html>\n"
    )
