"""The metric Space scores as the package does, offline; the demo answers from a table."""

import importlib.util
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from huggingface_hub import SpaceCard
from tiny_model import GENES, SYMBOLS, tiny_pipeline

import hub_card
from hub_card.push import push_demo, push_metric
from modeling_gppc.evaluation.metrics import row_pearson

SPACES = Path(hub_card.__file__).parent / "spaces"
RNG = np.random.default_rng(3)
PREDICTIONS, REFERENCES, SOURCES = RNG.normal(size=(3, 6, 9))
MEANS = RNG.normal(size=9)


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return evaluate.load(str(SPACES / "gppc_metrics"), cache_dir=str(tmp_path_factory.mktemp("evaluate")))


def test_scores_equal_the_packages(metric):
    scored = RNG.random(REFERENCES.shape) < 0.7
    references = np.where(scored, REFERENCES, -100.0)
    references[0, 0], scored[0, 0] = np.nan, False
    found = metric.compute(predictions=PREDICTIONS, references=references, sources=SOURCES, means=MEANS.tolist())
    error = (PREDICTIONS - REFERENCES)[scored]
    floor = (MEANS[None] - REFERENCES)[scored]
    correlation = row_pearson(PREDICTIONS - SOURCES, REFERENCES - SOURCES, scored)
    assert found["mse"] == pytest.approx(np.mean(error**2), abs=1e-12)
    assert found["r2"] == pytest.approx(1 - np.sum(error**2) / np.sum(floor**2), abs=1e-12)
    assert found["pearson_delta"] == pytest.approx(np.nanmean(correlation), abs=1e-12)
    assert found["n_scored"] == scored.sum()


def test_a_mask_leaves_entries_out(metric):
    mask = RNG.random(REFERENCES.shape) < 0.5
    given = {"predictions": PREDICTIONS, "sources": SOURCES}
    masked = metric.compute(references=REFERENCES, mask=mask.tolist(), **given)
    assert masked == metric.compute(references=np.where(mask, REFERENCES, -100.0), **given)
    assert masked["n_scored"] == mask.sum()


def test_an_exact_prediction_and_rows_without_variance(metric):
    references = np.concatenate([REFERENCES, SOURCES[:1]])
    sources = np.concatenate([SOURCES, SOURCES[:1]])
    found = metric.compute(predictions=references, references=references, sources=sources)
    assert found["mse"] == 0
    assert found["pearson_delta"] == pytest.approx(1)


def test_nothing_to_score_is_refused(metric):
    with pytest.raises(ValueError, match="no scored value"):
        metric.compute(predictions=[[1.0]], references=[[-100.0]], sources=[[0.0]])


@pytest.mark.parametrize("name", ["gppc_metrics", "gppc_demo"])
def test_space_cards_are_valid(name):
    card = SpaceCard.load(SPACES / name / "README.md")
    assert card.data.sdk == "gradio"
    assert (SPACES / name / card.data.app_file).is_file()
    compile((SPACES / name / card.data.app_file).read_text(), "app.py", "exec")


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo_prediction", SPACES / "gppc_demo" / "demo_prediction.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_prediction", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("heading", [True, False])
def test_the_demo_answers_from_a_table(demo, tmp_path, separator, heading):
    counts = np.arange(12)
    lines = [f"gene{separator}count"] * heading + [f"{gene}{separator}{n}" for gene, n in zip(GENES, counts)]
    (tmp_path / "cell.csv").write_text("\n".join(lines))
    predict = tiny_pipeline()
    rows = demo.predict_table(predict, tmp_path / "cell.csv", "STAT1=level:3", 4)
    wanted = predict({"counts": counts, "perturbation": "STAT1=level:3"}, top_k=4)
    assert [row[0] for row in rows] == [record["gene_symbol"] for record in wanted]
    assert [row[1] for row in rows] == [round(record["change"], 4) for record in wanted]
    assert all(len(row) == len(demo.COLUMNS) for row in rows) and rows[0][0] in SYMBOLS


@pytest.mark.parametrize(
    ("text", "message"), [("", "holds no counts"), ("gene,count\na,x", "Line 2"), (None, "No file")]
)
def test_the_demo_says_what_is_wrong(demo, tmp_path, text, message):
    path = None if text is None else tmp_path / "cell.csv"
    if path:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        demo.predict_table(tiny_pipeline(), path, "STAT1=ko", 4)


def test_spaces_are_pushed_under_any_name(hub, in_process):
    options = {"token": "hf_test_token", "endpoint": hub.url}
    push_metric("tester/gppc_metrics", **options)
    push_metric("tester/scores", **options)
    push_demo("tester/demo", model="tester/model", **options)
    again = push_demo("tester/demo", model="tester/model", **options)
    assert again.uploaded == []
    common = {".gitattributes", "README.md", "app.py", "requirements.txt"}
    assert set(hub.files("space", "tester/gppc_metrics")) == common | {"gppc_metrics.py"}
    renamed = hub.files("space", "tester/scores")
    assert set(renamed) == common | {"scores.py"}
    assert b'"scores.py"' in renamed["app.py"]
    assert b'evaluate.load("tester/scores")' in renamed["README.md"]
    demo = hub.files("space", "tester/demo")
    assert set(demo) == common | {"demo_prediction.py"}
    assert b'MODEL = "tester/model"' in demo["app.py"] and b"- tester/model" in demo["README.md"]
