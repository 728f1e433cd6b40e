"""Pushing a model: only what belongs there, one commit however often it is interrupted or repeated."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from tiny_model import write_model_folder

from hub_card.push import push_model

TOKEN = "hf_test_token"
CODE = {path.name for path in (Path(__file__).resolve().parents[2] / "modeling_gppc").glob("*_gppc.py")}
OTHERS = {
    "README.md",
    "config.json",
    "figures/scores.png",
    "model.safetensors",
    "preprocessor_config.json",
    "results.json",
}
EXPECTED = CODE | OTHERS


@pytest.fixture
def push(hub, in_process, monkeypatch):
    """Pushes to the loopback Hub; waiting is recorded in `waits`, not done."""

    def run(folder, repo_id="tester/model", token=TOKEN, **options):
        return push_model(folder, repo_id, token=token, endpoint=hub.url, **options)

    run.waits = []
    monkeypatch.setattr("hub_card.hub_upload.sleep", run.waits.append)
    return run


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_complete(hub, folder, name="tester/model", commits=2):
    files = hub.files("model", name)
    assert set(files) == EXPECTED | {".gitattributes"}
    for path in EXPECTED - {"README.md"}:
        assert files[path] == (folder / path).read_bytes(), path
    assert len(hub.history("model", name)) == commits


def test_only_what_belongs_there_is_uploaded(hub, push, model_folder):
    before = digest(model_folder)
    report = push(model_folder)
    assert_complete(hub, model_folder)
    assert set(report.uploaded) == EXPECTED
    assert "training_args.bin" in report.left_out and "checkpoint-5/model.safetensors" in report.left_out
    assert "run.json" in report.left_out
    assert report.url == f"{hub.url}/tester/model"
    assert hub.repository("model", "tester/model").private
    assert digest(model_folder) == before
    card = hub.files("model", "tester/model")["README.md"].decode()
    assert 'repository = "tester/model"' in card
    assert ModelCard(card).data.eval_results


def test_repeating_a_push_commits_nothing(hub, push, model_folder):
    first = push(model_folder)
    hub.requests.clear()
    again = push(model_folder)
    assert again.commit == first.commit
    assert again.uploaded == again.deleted == []
    assert_complete(hub, model_folder)
    assert {method for method, _, _ in hub.requests} == {"GET"}


def test_a_new_version_sends_what_changed_and_removes_what_is_gone(hub, push, model_folder, tmp_path):
    push(model_folder)
    newer = write_model_folder(tmp_path / "newer", seed=1)
    (newer / "figures" / "scores.png").unlink()
    report = push(newer, message="second run", tag="v2")
    assert set(report.uploaded) == {"README.md", "model.safetensors", "results.json"}
    assert report.deleted == ["figures/scores.png"]
    assert hub.history("model", "tester/model") == ["initial commit", "Upload with gppc push", "second run"]
    assert hub.files("model", "tester/model", "v2")["model.safetensors"] == (newer / "model.safetensors").read_bytes()


def wrapped(error, cause):
    error.__cause__ = cause
    return error


STAGES = {
    "info": "GET /api/models/tester/model$",
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST /api/models/.*/preupload",
    "batch": "POST /.*/objects/batch",
    "large file": "PUT /lfs/",
    "verify": "POST /lfs/.*/verify",
    "tree": "GET /api/models/.*/tree",
    "commit": "POST /api/models/.*/commit",
}
FAILURES = {
    "dropped before": {"drop": "before"},
    "dropped in the middle": {"drop": "middle"},
    "answer lost": {"drop": "after"},
    "429": {"status": 429, "headers": {"Retry-After": "3"}},
    "500": {"status": 500},
    "503": {"status": 503},
}


@pytest.mark.parametrize("failure", ["dropped before", "answer lost", "429", "500"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_push_completes_on_repetition(hub, push, model_folder, stage, failure):
    # More often than the client itself tries again, for both large files, so that the first push really fails.
    hub.fail(STAGES[stage], times=12 if stage in ("large file", "verify") else 6, **FAILURES[failure])
    before = digest(model_folder)
    failed = 0
    for _ in range(7):
        try:
            push(model_folder, attempts=1)
            break
        except ConnectionError as error:
            failed += 1
            message = str(error)
            assert "nothing is lost: run the same command again" in message
            assert "\n" not in message and TOKEN not in message
    assert failed >= 1
    assert_complete(hub, model_folder)
    assert digest(model_folder) == before


@pytest.mark.parametrize("failure", FAILURES)
def test_one_push_survives_failures_at_every_stage(hub, push, model_folder, failure):
    for pattern in STAGES.values():
        hub.fail(pattern, **FAILURES[failure])
    report = push(model_folder, attempts=12)
    assert_complete(hub, model_folder)
    assert set(report.uploaded) == EXPECTED
    assert push.waits and max(push.waits) <= 60
    if failure == "429":
        assert min(push.waits) >= 3


def test_a_lost_answer_to_the_commit_is_not_committed_again(hub, push, model_folder):
    hub.fail(STAGES["commit"], drop="after")
    report = push(model_folder)
    assert_complete(hub, model_folder)
    assert len(push.waits) == 1
    assert set(report.uploaded) == EXPECTED


def test_large_files_that_arrived_are_not_sent_again(hub, push, model_folder):
    hub.fail(STAGES["commit"], status=500, times=6)
    with pytest.raises(ConnectionError):
        push(model_folder, attempts=1)
    hub.failures.clear()
    hub.requests.clear()
    push(model_folder)
    assert not [path for method, path, _ in hub.requests if method == "PUT"]


@pytest.mark.parametrize(
    ("error", "completes"),
    [
        (RuntimeError("transfer failed"), True),
        (wrapped(RuntimeError("upload failed"), TimeoutError("slow")), True),
        (wrapped(RuntimeError("upload failed"), FileNotFoundError("model.safetensors")), False),
    ],
)
def test_failed_transfers_of_other_protocols(hub, push, model_folder, monkeypatch, error, completes):
    create_commit, errors = HfApi.create_commit, [error]

    def fail_once(*args, **kwargs):
        if errors:
            raise errors.pop()
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", fail_once)
    if completes:
        push(model_folder)
        assert_complete(hub, model_folder)
    else:
        with pytest.raises(RuntimeError, match="upload failed"):
            push(model_folder)
        assert push.waits == []


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_of_somebody_else_meanwhile_is_noticed(hub, push, model_folder, status):
    hub.fail(STAGES["commit"], status=status)
    push(model_folder)
    assert_complete(hub, model_folder)


def test_waits_grow_and_end(hub, push, model_folder):
    hub.fail("GET /api/models/tester/model$", status=503, times=99)
    with pytest.raises(ConnectionError, match=r"did not take the upload in 9 attempts .*503"):
        push(model_folder, attempts=9)
    assert push.waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_branch_and_a_tag(hub, push, model_folder):
    push(model_folder, revision="trial", tag="v1")
    assert set(hub.files("model", "tester/model")) == {".gitattributes"}
    assert set(hub.files("model", "tester/model", "trial")) == EXPECTED | {".gitattributes"}
    assert set(hub.files("model", "tester/model", "v1")) == EXPECTED | {".gitattributes"}
    push(model_folder, revision="trial", tag="v1")
    (model_folder / "results.json").write_text(json.dumps({"changed": True}))
    with pytest.raises(ValueError, match=r"`tag` v1 .* names another commit"):
        push(model_folder, revision="trial", tag="v1")


def test_a_name_without_namespace_is_the_users(hub, push, model_folder):
    report = push(model_folder, repo_id="model")
    assert report.repo_id == "tester/model"
    assert_complete(hub, model_folder)


def test_public_only_when_asked_for(hub, push, model_folder):
    push(model_folder, private=False)
    assert not hub.repository("model", "tester/model").private
    with pytest.raises(ValueError, match="is public, but a private upload was asked for; pass --public"):
        push(model_folder)


def prepare_gated(hub):
    hub.create("model", "other/model").gated = True
    hub.fail("GET /api/models/other/model", status=403, headers={"X-Error-Code": "GatedRepo"}, times=9)


ERRORS = {
    "wrong token": (None, "tester/model", {"token": "hf_wrong_one"}, "token was refused .* `?hf auth login"),
    "read-only token": (
        lambda hub: hub.tokens.update(hf_read=("tester", "read")),
        "tester/model",
        {"token": "hf_read"},
        "may not write to model `tester/model`",
    ),
    "namespace of another": (None, "other/new", {}, "may not write to model `other/new`.*repository of your own"),
    "gated": (prepare_gated, "other/model", {}, "`other/model` is gated: ask for access"),
    "missing repository": (None, "tester/model", {"create": False}, "was not found.*--no-create"),
    "private of another": (
        lambda hub: hub.create("model", "other/hidden", private=True),
        "other/hidden",
        {},
        "may not write to model `other/hidden`",
    ),
    "no quota": (
        lambda hub: hub.fail("POST /api/repos/create", status=402, message="storage limit reached"),
        "tester/model",
        {},
        "the Hub refused model `tester/model`: .*402.*storage limit",
    ),
    "bad name": (None, "tester/a model!", {}, "`repo_id` is 'tester/a model!'"),
    "other model": (
        lambda hub: (hub.create("model", "tester/model", True), hub.commit("model", "tester/model", {"config.json": b"{}"})),
        "tester/model",
        {},
        "holds other content .*`config.json`.*choose another name.*Nothing was changed",
    ),
    "other files": (
        lambda hub: (
            hub.create("model", "tester/model", True),
            hub.commit("model", "tester/model", {"configuration_gppc.py": b"", "vocab.txt": b"a"}),
        ),
        "tester/model",
        {},
        "holds other content .*`vocab.txt`.*Nothing was changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_in_one_line_what_to_do(hub, push, model_folder, case):
    prepare, name, options, message = ERRORS[case]
    if prepare:
        prepare(hub)
    local = digest(model_folder)
    remote = {key: [commit.sha for commit in value.history] for key, value in hub.repositories.items()}
    with pytest.raises(ValueError, match=message) as caught:
        push(model_folder, name, **options)
    assert "\n" not in str(caught.value)
    assert "hf_" not in str(caught.value).replace("hf_hub", "")
    assert digest(model_folder) == local
    assert {key: [commit.sha for commit in value.history] for key, value in hub.repositories.items()} == remote
    assert push.waits == []


def test_without_a_token_nothing_is_tried(hub, in_process, model_folder, monkeypatch):
    monkeypatch.setattr("hub_card.hub_upload.get_token", lambda: None)
    with pytest.raises(ValueError, match="no access token"):
        push_model(model_folder, "tester/model", endpoint=hub.url)
    assert hub.requests == []


def spoil_card(folder):
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nTrained in /scratch/someone/run5\n")


def spoil_config(folder, **change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


SPOILT = {
    "path in the card": (spoil_card, "`README.md` line .* absolute path `/scratch/someone/run5`"),
    "token": (lambda folder: spoil_config(folder, note="hf_" + "a" * 34), "`config.json` line .* Hugging Face token"),
    "own token": (lambda folder: spoil_config(folder, note=TOKEN), "holds your access token"),
    "other model": (lambda folder: spoil_config(folder, model_type="bert"), "holds a `bert` model"),
    "no code": (lambda folder: spoil_config(folder, auto_map={}), "saved without its code"),
    "no pipeline": (lambda folder: spoil_config(folder, custom_pipelines={}), "saved without its pipeline"),
    "code missing": (lambda folder: (folder / "pipeline_gppc.py").unlink(), "lacks `pipeline_gppc.py`"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "holds no `model.safetensors`"),
    "card missing": (lambda folder: (folder / "README.md").unlink(), "no `README.md`; render it"),
    "a pickle as weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(99)),
        "`model.safetensors` is not a safetensors file",
    ),
    "a script as figure": (
        lambda folder: (folder / "figures" / "x.png").write_bytes(b"#!/bin/sh"),
        "`figures/x.png` is not a .png file",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_refused_before_anything_is_sent(hub, push, model_folder, case):
    spoil, message = SPOILT[case]
    spoil(model_folder)
    with pytest.raises(ValueError, match=message):
        push(model_folder)
    assert hub.requests == []


def test_an_absent_folder_is_named(push, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        push(tmp_path / "absent")
