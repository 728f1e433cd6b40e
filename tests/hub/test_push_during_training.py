"""`train.py --push_to_hub REPO --hub_strategy every_save`: commits while training goes on, and failures that do not end it."""

import itertools
import json
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load
from tiny_runs import arguments, distance, last_weights, logged, train_module, write_run_pairs

from data_scripts.files import write_json
from hub_card.model_card import render_model_card
from hub_card.push_during_training import STAGED, HubPush
from hub_card.upload_scan import ABSOLUTE_PATH, SECRETS
from modeling_gppc.training.trainer import GppcTrainer

FLAGS = {
    "training__max_steps": 30,
    "training__eval_steps": 10,
    "training__save_steps": 10,
    "model__hidden_dropout_prob": 0.2,
}
PUSH = ["--push_to_hub", "tester/model", "--hub_strategy", "every_save"]
CODE = {"configuration_gppc.py", "feature_extraction_gppc.py", "modeling_gppc.py", "pipeline_gppc.py"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def unpushed(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("unpushed") / "run"
    assert train_module().main(arguments(pairs, out, **FLAGS)) == 0
    return out


@pytest.fixture
def train(hub, in_process, pairs, tmp_path, monkeypatch):
    """Trains in this process against the loopback Hub; every upload ends before training goes on, unless told."""
    original = HubPush.on_save

    def on_save(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self._upload is not None:
            self._upload.join()

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(HubPush, "on_save", on_save)

    def run(*more, token="hf_test_token"):
        monkeypatch.setenv("HF_TOKEN", token)
        return train_module().main([*arguments(pairs, tmp_path / "run", **FLAGS), *PUSH, *more])

    return run


def commits(hub):
    """Title and files of every commit after the Hub's own."""
    repository = hub.repository("model", "tester/model")
    return [
        (commit.title, {path: hub.read_object(oid) for path, (oid, _, _) in commit.files.items()})
        for commit in repository.history[1:]
    ]


def test_every_checkpoint_becomes_a_commit(hub, train, unpushed, tmp_path):
    assert train() == 0
    out = tmp_path / "run"
    found = commits(hub)
    assert [title for title, _ in found] == [
        *(f"Training, step {step}" for step in (10, 20, 30)),
        "Upload with gppc push",
    ]
    for (_, files), step in zip(found, (10, 20, 30)):
        names = set(files) - {".gitattributes"}
        # modules that others of the package import may travel too
        assert {"README.md", "config.json", "preprocessor_config.json", "model.safetensors", *CODE} <= names
        assert "results.json" not in names and not any(name.endswith(".png") for name in names)
        card = ModelCard(files["README.md"].decode())
        assert card.data.eval_results is None and 'repository = "tester/model"' in card.text
        assert f"this is step {step} of 30" in card.text
        mse = logged(out, "eval_mse")[step]
        assert f"mean squared error {mse:.4f}" in card.text
    assert distance(load(found[2][1]["model.safetensors"]), last_weights(out)) == 0
    assert distance(load(found[0][1]["model.safetensors"]), load(found[2][1]["model.safetensors"])) > 1e-5
    last = found[-1][1]
    assert "results.json" in last and "Training is not finished" not in last["README.md"].decode()
    assert not (out / STAGED).exists()
    # Pushing moves no number of training.
    assert distance(last_weights(out), last_weights(unpushed)) == 0
    assert logged(out, "loss") == logged(unpushed, "loss")
    nothing_was_uploaded_that_was_not_meant_to_be(hub)


def nothing_was_uploaded_that_was_not_meant_to_be(hub):
    uploaded = [(name, content) for _, files in commits(hub) for name, content in files.items()]
    # The store of the server holds every byte that ever came, also what no commit names.
    uploaded += [(path.name, path.read_bytes()) for path in hub.root.iterdir()]
    assert len(uploaded) > 40
    for name, content in uploaded:
        assert not re.match(r"(optimizer|scheduler|rng_state|training_args|trainer_state|run\.json|options)", name)
        assert not re.search(rb"^\x80[\x02-\x05]", content), name  # a pickle
        assert not content.startswith(b"PK"), name  # what torch.save writes
        text = content.decode("utf-8", errors="replace") if b"\x00" not in content[:64] else ""
        assert not re.search(ABSOLUTE_PATH, text), name
        assert not any(re.search(pattern, text) for pattern in SECRETS.values()), name
        assert b"hf_test_token" not in content, name


@pytest.mark.parametrize(
    "failure", [{"drop": "before"}, {"drop": "middle"}, {"status": 500}, {"status": 429}, {"status": 503}]
)
def test_a_network_that_fails_does_not_end_training(hub, train, unpushed, tmp_path, caplog, failure):
    scripted = hub.fail(".", **failure, times=10**6)
    original = HubPush.on_train_end

    def on_train_end(self, *args, **kwargs):  # the network is back
        scripted.times = 0
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubPush, "on_train_end", on_train_end)
        assert train() == 0
    assert [title for title, _ in commits(hub)] == ["Upload with gppc push"]
    told = [record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage()]
    assert [re.search(r"step (\d+)", line)[1] for line in told] == ["10", "20", "30"]
    assert all("training goes on" in line and "\n" not in line for line in told)
    assert distance(last_weights(tmp_path / "run"), last_weights(unpushed)) == 0


def test_a_refused_token_does_not_end_training_either(hub, train, tmp_path, caplog, capsys):
    assert train(token="hf_wrong") == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert "the token was refused" in caplog.text
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: error: the token was refused by")
    assert train("--resume") == 0  # all that is left to do is the push
    assert [title for title, _ in commits(hub)] == ["Upload with gppc push"]


def test_a_killed_run_goes_on_pushing(hub, train, unpushed, tmp_path):
    class Killed(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        original, calls = GppcTrainer.training_step, itertools.count(1)

        def counted(*args, **kwargs):
            if next(calls) == 15:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(GppcTrainer, "training_step", counted)
        train()
    assert [title for title, _ in commits(hub)] == ["Training, step 10"]
    assert train("--resume") == 0
    assert [title for title, _ in commits(hub)][1:] == [
        "Training, step 20",
        "Training, step 30",
        "Upload with gppc push",
    ]
    assert distance(last_weights(tmp_path / "run"), last_weights(unpushed)) == 0


def test_an_upload_that_is_still_under_way_is_not_joined_by_another(tmp_path, caplog):
    push = HubPush("tester/model", None, dict)
    push.stage = None  # is not reached
    release = threading.Event()
    push._upload = threading.Thread(target=release.wait, daemon=True)
    push._upload.start()

    class State:
        is_world_process_zero, global_step = True, 7

    push.on_save(None, State, None)
    assert "step 7 is not pushed: the upload before it is still under way" in caplog.text
    release.set()
    push.on_train_end(SimpleNamespace(output_dir=tmp_path), None, None)
    assert not push._upload.is_alive()


def test_only_the_main_process_pushes():
    class State:
        is_world_process_zero, global_step = False, 7

    push = HubPush("tester/model", None, dict)
    push.on_save(None, State, None)
    assert push._upload is None


def test_a_disk_that_is_full_does_not_end_training(monkeypatch, tmp_path, caplog):
    class State:
        is_world_process_zero, global_step = True, 7

    class Arguments:
        output_dir = str(tmp_path)

    push = HubPush("tester/model", None, dict)

    def stage(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(push, "stage", stage)
    push.on_save(Arguments, State, None)
    assert "step 7 is not pushed: [Errno 28] No space left" in caplog.text and push._upload is None


def test_the_strategy_needs_a_repository(pairs, tmp_path, capsys):
    assert train_module().main([*arguments(pairs, tmp_path / "run"), "--hub_strategy", "every_save"]) == 2
    assert "`--hub_strategy` every_save needs `--push_to_hub REPO`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_trainer_pushes_and_describes_as_gppc_does(hub, in_process, unpushed, tmp_path):
    """Not with the card and the choice of files of transformers."""
    trainer = GppcTrainer.__new__(GppcTrainer)
    trainer.args = type("Arguments", (), {"output_dir": str(unpushed)})
    readme = unpushed / "model" / "README.md"
    readme.write_text("something else")
    trainer.create_model_card(model_name="x", tags=["generated_from_trainer"])
    assert readme.read_text() == render_model_card(unpushed / "model")
    report = trainer.push_to_hub("tester/model", token="hf_test_token", endpoint=hub.url)
    files = hub.files("model", "tester/model")
    assert set(report.uploaded) == set(files) - {".gitattributes"} and "results.json" in files
    assert b"generated_from_trainer" not in files["README.md"]
    assert hub.history("model", "tester/model") == ["initial commit", "Upload with gppc push"]


def test_staging_draws_no_random_number(unpushed, tmp_path):
    from modeling_gppc.feature_extraction_gppc import GppcFeatureExtractor

    newest = max(unpushed.glob("checkpoint-*"))
    extractor = GppcFeatureExtractor([f"ENSG{index:011d}" for index in range(12)], normalization="log1p")
    run = json.loads((unpushed / "model" / "run.json").read_text())
    state = type("State", (), {"global_step": 30, "max_steps": 30, "log_history": []})
    before = torch.random.get_rng_state()
    HubPush("tester/model", extractor, lambda: run).stage(newest, tmp_path / "staged", state)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert json.loads((tmp_path / "staged" / "run.json").read_text())["unfinished"] == {"step": 30, "max_steps": 30}
    write_json({}, tmp_path / "staged" / "old.json")
    HubPush("tester/model", extractor, lambda: run).stage(newest, tmp_path / "staged", state)
    assert not (tmp_path / "staged" / "old.json").exists()
