"""To the Hub and back: `gppc push`, then everything loaded in a fresh process that has no package and an empty cache."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tiny_model import tiny_model, tiny_pipeline, write_model_folder

from data_scripts.pairs.pair_folder import PairFolder
from gppc.cli import main
from hub_card.upload_scan import ABSOLUTE_PATH, SECRETS
from modeling_gppc.evaluation.transfer_scorecard import weights_digest

ROOT = Path(__file__).resolve().parents[2]
WITH_PACKAGE = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# The packages of this project cannot be imported, however they are installed.
WITHOUT_PACKAGE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_gppc", "data_scripts", "hub_card"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import modeling_gppc
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")
"""
COUNTS = np.random.default_rng(1).poisson(2.0, size=(3, 12)).tolist()
LOAD_MODEL = f"""
import numpy as np, torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, pipeline

def load_and_predict(revision):
    options = dict(trust_remote_code=True, revision=revision)
    config = AutoConfig.from_pretrained("tester/model", **options)
    extractor = AutoFeatureExtractor.from_pretrained("tester/model", **options)
    model = AutoModel.from_pretrained("tester/model", **options).eval()
    state = extractor(np.array({COUNTS!r}))
    change = extractor.perturbation_features("STAT1=level:3+IRF1=x2", np.zeros((3, config.vocab_size)))
    with torch.no_grad():
        output = model(**state, **change)
    predict = pipeline("perturbation-prediction", model="tester/model", device="cpu", **options)
    results = predict({{"counts": {COUNTS!r}, "perturbation": ["STAT1=ko", "LYZ=x3", ""]}})
    return dict(
        model_type=config.model_type,
        classes=[type(thing).__module__.split(".")[0] for thing in (config, extractor, model, predict)],
        logits=output.logits.tolist(),
        logvar=output.logvar.tolist(),
        pipeline=[[result[name].tolist() for name in ("expression", "change", "std")] for result in results],
    )

answer["main"] = load_and_predict("main")
"""
STRANGER = f"""
from transformers import Trainer, TrainingArguments

extractor = AutoFeatureExtractor.from_pretrained("tester/model", trust_remote_code=True)
model = AutoModel.from_pretrained("tester/model", trust_remote_code=True)
model.push_to_hub("tester/copy")
extractor.push_to_hub("tester/copy")
arguments = TrainingArguments("run", hub_model_id="tester/trained", use_cpu=True, report_to="none")
Trainer(model, arguments, processing_class=extractor).push_to_hub()
for name in ("tester/copy", "tester/trained"):
    predict = pipeline("perturbation-prediction", model=name, device="cpu", trust_remote_code=True)
    results = predict({{"counts": {COUNTS!r}, "perturbation": ["STAT1=ko", "LYZ=x3", ""]}})
    answer[name] = [[result[key].tolist() for key in ("expression", "change", "std")] for result in results]
"""
LOAD_REVISION = 'answer["v1"] = load_and_predict("v1")'
LOAD_DATASET = """
from datasets import load_dataset

def load_all(streaming):
    pairs = load_dataset("tester/pairs", "default", streaming=streaming)
    genes = load_dataset("tester/pairs", "genes", split="train", streaming=streaming)
    panels = load_dataset("tester/pairs", "panels", split="train", streaming=streaming)
    return dict(rows={split: list(pairs[split]) for split in pairs}, genes=list(genes), panels=list(panels))

answer["local"] = load_all(streaming=False)
"""
STREAM_DATASET = """
answer["streamed"] = load_all(streaming=True)
answer["unnamed"] = list(load_dataset("tester/pairs", split="test", streaming=True))
"""
LOAD_METRIC = """
import evaluate

metric = evaluate.load("tester/gppc_metrics")
answer["scores"] = metric.compute(predictions=[[1.0, 2.0, 3.0]], references=[[1.0, 2.5, -100.0]], sources=[[0.0, 2.0, 1.0]])
"""
PRINT = "print(json.dumps(answer))"


def script(*parts):
    """The script of a fresh process without the package."""
    return "\n".join([WITHOUT_PACKAGE, "answer = {}", *parts, PRINT])


def expected(seed):
    model, predict = tiny_model(seed), tiny_pipeline(seed)
    extractor = predict.feature_extractor
    change = extractor.perturbation_features("STAT1=level:3+IRF1=x2", np.zeros((3, 12)))
    with torch.no_grad():
        output = model(**extractor(np.array(COUNTS)), **change)
    results = predict({"counts": COUNTS, "perturbation": ["STAT1=ko", "LYZ=x3", ""]})
    pipeline = [[result[name] for name in ("expression", "change", "std")] for result in results]
    return {"logits": output.logits.numpy(), "logvar": output.logvar.numpy(), "pipeline": np.array(pipeline)}


def assert_predicts(answer, seed):
    for name, values in expected(seed).items():
        np.testing.assert_allclose(np.array(answer[name]), values, rtol=0, atol=1e-6, err_msg=name)


def assert_rows(answer, folder):
    local = PairFolder(folder)
    assert sorted(answer["rows"]) == sorted(local.splits)
    for split in local.splits:
        assert answer["rows"][split] == json.loads(json.dumps(local.split(split).to_pylist()))
    assert answer["genes"] == json.loads(json.dumps(local.genes.to_pylist()))
    assert [row["gene_ids"] for row in answer["panels"]] == [np.flatnonzero(row).tolist() for row in local.panels]


@pytest.fixture
def commands(client):
    """Runs several `gppc push ...` in one process, then code; returns exit status, output and errors of each, and `answer`."""

    def run(*commands, then):
        code = f"""
import contextlib, io, json
from gppc.cli import main
from modeling_gppc import GppcConfig  # the package's classes are used in place of the repository's code

results = []
for arguments in {[["push", *map(str, arguments)] for arguments in commands]!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    results.append([status, out.getvalue(), err.getvalue()])
answer = {{}}
{then}
print(json.dumps([results, answer]))
"""
        return client(code, home="pusher", PYTHONPATH=WITH_PACKAGE)

    return run


def scan(hub):
    """Nothing that was uploaded names a machine, holds a secret or is a pickle."""
    for (kind, name), repository in hub.repositories.items():
        for commit in repository.history:
            for path, (oid, _, _) in commit.files.items():
                content = hub.read_object(oid)
                where = f"{kind} {name} {path}"
                assert not re.search(rb"^\x80[\x02-\x05]", content), where
                assert b"hf_test_token" not in content, where
                if path.endswith((".parquet", ".png")):
                    assert content.startswith((b"PAR1", b"\x89PNG")), where
                    continue
                text = content.decode(errors="replace") if not path.endswith(".safetensors") else ""
                assert not re.search(ABSOLUTE_PATH, text), where
                for pattern in SECRETS.values():
                    assert not re.search(pattern, text), where


@pytest.mark.timeout(600)
def test_everything_loads_without_the_package(hub, client, commands, model_folder, pairs_folder, tmp_path):
    newer = write_model_folder(tmp_path / "newer", seed=1)
    results, with_package = commands(
        ["tester/model", model_folder, "--tag", "v1"],
        ["tester/model", newer],
        ["tester/pairs", pairs_folder],
        ["tester/gppc_metrics", "--kind", "metric"],
        ["tester/pairs", pairs_folder],
        then=LOAD_MODEL,
    )
    assert [status for status, _, _ in results] == [0] * 5, results
    # Card, config, preprocessor, results, weights and licence, and all code that travels: what lies in the package's root.
    n_files = 6 + len(list((ROOT / "modeling_gppc").glob("*_gppc.py")))
    assert f"{n_files} files sent" in results[0][1]
    assert "not uploaded: checkpoint-5/model.safetensors" in results[0][1]
    assert "nothing to change" in results[4][1]
    scan(hub)
    assert with_package["main"]["classes"] == ["modeling_gppc"] * 3 + ["transformers_modules"]
    assert_predicts(with_package["main"], seed=1)

    answer = client(script(LOAD_MODEL, LOAD_REVISION, LOAD_DATASET, STREAM_DATASET, LOAD_METRIC, STRANGER))
    assert answer["main"]["model_type"] == "gppc"
    assert answer["main"]["classes"] == ["transformers_modules"] * 4
    assert_predicts(answer["main"], seed=1)
    assert_predicts(answer["v1"], seed=0)
    assert_rows(answer["streamed"], pairs_folder)
    assert_rows(answer["local"], pairs_folder)
    assert answer["unnamed"] == answer["streamed"]["rows"]["test"]
    assert answer["scores"]["mse"] == pytest.approx(0.125)
    for name in ("tester/copy", "tester/trained"):  # pushed by somebody who loaded the model
        assert "tester/model" not in hub.files("model", name)["config.json"].decode()
        np.testing.assert_allclose(answer.pop(name), expected(1)["pipeline"], rtol=0, atol=1e-6)

    hub.requests.clear()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    cached = client(script(LOAD_MODEL, LOAD_REVISION, LOAD_DATASET, LOAD_METRIC), **offline)
    assert cached == {name: content for name, content in answer.items() if name not in ("streamed", "unnamed")}
    assert hub.requests == []


@pytest.fixture
def command(hub, in_process, monkeypatch, capsys):
    """Runs one `gppc push ...` in this process."""

    def run(*arguments, token="hf_test_token"):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", token)
        capsys.readouterr()
        status = main(["push", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_an_interrupted_command_is_completed_by_repeating_it(hub, command, model_folder):
    hub.fail("POST /api/models/tester/model/commit", drop="before", times=20)
    hub.fail("PUT /lfs/", status=429)
    status, out, err = command("tester/model", model_folder, "--attempts", "1")
    assert status == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("gppc push: error: the Hub at ")
    assert "nothing is lost: run the same command again" in last
    hub.failures.clear()
    assert command("tester/model", model_folder)[0] == 0
    assert hub.history("model", "tester/model") == ["initial commit", "Upload with gppc push"]


def test_an_evaluation_goes_into_the_card(hub, command, model_folder, pairs_folder, tmp_path):
    scores = {"pearson_delta": 0.25, "pearson_delta_ci95": [0.125, 0.375], "reads_perturbed_cells": False}
    summary = {
        "screen": "papalexi",
        "mode": "zero-shot",
        "weights": [weights_digest(model_folder)],
        "n_perturbations": 25,
        "n_scored_genes": 1975,
        "subject": "gppc",
        "ceiling": {"split_half_pearson": 0.5},
        "methods": {"gppc": scores, "no_change": {**scores, "pearson_delta": None}},
    }
    scored = tmp_path / "scored"
    scored.mkdir()
    (scored / "evaluation.json").write_text(json.dumps(summary))
    assert command("tester/model", model_folder)[0] == 0
    assert "was not scored on a real" in hub.files("model", "tester/model")["README.md"].decode()
    status, out, err = command("tester/model", model_folder, "--evaluation", scored)
    assert status == 0 and "2 files sent" in out, err
    files = hub.files("model", "tester/model")
    assert json.loads(files["transfer.json"])["screens"][0]["methods"]["gppc"]["pearson_delta"] == 0.25
    assert "| **gppc** | 0.2500 [0.1250, 0.3750] |" in files["README.md"].decode()
    scan(hub)
    assert "nothing to change" in command("tester/model", model_folder)[1]  # a later push keeps it
    status, out, err = command("tester/pairs", pairs_folder, "--evaluation", scored)
    assert status == 2 and "`--evaluation` is for the card of a model; this is a dataset" in err
    (scored / "evaluation.json").write_text(json.dumps({**summary, "weights": ["0" * 64]}))
    status, out, err = command("tester/model", model_folder, "--evaluation", scored)
    assert status == 2 and err.count("\n") == 1 and "scored another model" in err
    assert hub.files("model", "tester/model") == files


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["tester/model", "{model}"], "hf_wrong", "the token was refused by"),
        (["other/model", "{model}"], "hf_test_token", "the token may not write to model `other/model`"),
        (["tester/model", "{model}", "--no-create"], "hf_test_token", "model `tester/model` was not found"),
        (["tester/model"], "hf_test_token", "`folder` is missing"),
        (["tester/model", "absent"], "hf_test_token", "`folder` absent is not a folder"),
        (["tester/model", "{empty}"], "hf_test_token", "neither a config.json"),
        (["tester/demo", "--kind", "demo"], "hf_test_token", "`--model` is missing"),
    ],
)
def test_the_command_fails_in_one_line(hub, command, model_folder, tmp_path, arguments, token, message):
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(model=model_folder, empty=tmp_path / "empty") for argument in arguments]
    status, out, err = command(*arguments, token=token)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("gppc push: error: ") and message in err
    assert hub.repositories == {}
