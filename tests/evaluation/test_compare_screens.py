"""Several evaluations in one statement: differences by hand, strata, what cannot be pooled."""

import json

import numpy as np
import pytest

from gppc.cli import main
from modeling_gppc.evaluation.compare_screens import compare_screens, pooled


def write(folder, screen, gaps, mode="fine-tuned", ceiling=None, subject="gppc"):
    folder.mkdir()
    options = {"controls": "disjoint", "split": "perturbations", "seen": 2, "hold_out": None, "change": "measured"}
    summary = {"screen": screen, "subject": subject, "mode": mode, "options": options | {"shuffle_labels": False}}
    (folder / "evaluation.json").write_text(json.dumps(summary))
    lines = ["perturbation,method,n_cells,target_measured,ceiling,unlike_others,pearson_delta"]
    for row, gap in enumerate(gaps):
        facts = f"20,{row % 2 == 0},{(ceiling or [0.3] * len(gaps))[row]},{row / len(gaps)}"
        lines += [f"G{row},gppc,{facts},{0.2 + gap}", f"G{row},mean,{facts},0.2"]
    (folder / "per_perturbation.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_differences_are_pooled_by_hand(tmp_path, capsys):
    first = write(tmp_path / "a", "A", [0.1, 0.2, 0.3, 0.4], ceiling=[0.1, 0.3, 0.6, 0.7])
    second = write(tmp_path / "b", "B", [-0.1, 0.1])
    out = tmp_path / "compare.json"
    assert main(["compare", str(first), str(second), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    entry = result["comparisons"]["mean"]
    assert entry["n"] == 6 and entry["difference"] == pytest.approx(1 / 6)
    assert entry["by_screen"] == {"A": pytest.approx(0.25), "B": pytest.approx(0.0)}
    assert entry["ci95"][0] < 1 / 6 < entry["ci95"][1]
    strata = {name: (part["n"], part["difference"]) for name, part in entry["strata"].items()}
    assert strata["ceiling above 0.5"] == (2, pytest.approx(0.35))
    assert strata["target measured"] == (3, pytest.approx(0.1)) and strata["ceiling below 0.2"] == (1, None)
    assert strata["response unlike the others"] == (3, pytest.approx((0.3 + 0.4 + 0.1) / 3))
    printed = capsys.readouterr().out
    assert "+0.167" in printed and "ceiling above 0.5" in printed


def test_the_interval_draws_screens_too():
    """Within each screen nothing varies: all that is uncertain is which screens there are."""
    low, high = pooled([np.full(50, 0.1), np.full(50, 0.3)])["ci95"]
    assert low == pytest.approx(0.1) and high == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: [t / "nothing", t / "a"], "holds no evaluation.json"),
        (lambda t: [t / "a"], "wanted at least two, of different screens"),
        (lambda t: [t / "a", write(t / "same", "A", [0.1, 0.2])], "are of A, A; wanted"),
        (lambda t: [t / "a", write(t / "c", "C", [0.1, 0.2], mode="in-context")], "differ in `mode`"),
        (lambda t: [t / "a", write(t / "d", "D", [0.1, 0.2], subject=None)], "scored baselines only"),
    ],
)
def test_what_cannot_be_pooled(tmp_path, make, words, capsys):
    write(tmp_path / "a", "A", [0.1, 0.2])
    with pytest.raises(ValueError, match=words):
        compare_screens(make(tmp_path))
    with pytest.raises(ValueError, match="`metric` is 'nope'"):
        compare_screens([tmp_path / "a"], metric="nope")
    assert main(["compare", str(tmp_path / "a"), "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert "lies in a folder that does not exist" in capsys.readouterr().err
