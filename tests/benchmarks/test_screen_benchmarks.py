"""The tables of screens are made, on cells of seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("screen_tables", "## smoke, fine-tuned, features: 6 rows"),
        ("external_interventions", "| smoke | gppc | 6 | 0.9"),
    ],
)
def test_smoke(name, words):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout


def test_annotation_becomes_features_of_symbols(monkeypatch):
    """Tables in NCBI's layout: species and gene id in both, terms in one, symbols in the other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from screen_tables import annotation_table

    gene2go = pd.DataFrame({"#tax_id": 9606, "GeneID": [1, 1, 2, 3], "GO_ID": ["x", "x", "x", "y"]})
    gene_info = pd.DataFrame({"#tax_id": 9606, "GeneID": [1, 2], "Symbol": ["A", "B"]})
    found = annotation_table(gene2go, gene_info)
    assert found.to_dict("list") == {"gene": ["A", "B"], "term": ["x", "x"]}
    with pytest.raises(ValueError, match="`names` has none of the columns"):
        annotation_table(gene2go, gene_info.drop(columns="Symbol"))
