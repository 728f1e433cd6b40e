"""Which run a folder holds, and who may go on with it."""

import json
from dataclasses import asdict, replace

import pytest

from data_scripts.files import write_json
from gppc.run_options import RunOptions
from modeling_gppc.evaluation.score_options import EvaluationOptions
from modeling_gppc.training.arguments import DataOptions, TrainingOptions
from modeling_gppc.training.run_folder import OPTIONS_FILE, claim_folder, first_difference, holds_work


def options(folder, **changes) -> dict:
    return asdict(replace(RunOptions(output_dir=str(folder), data=DataOptions(pairs="pairs")), **changes))


@pytest.fixture
def used(tmp_path):
    """A folder in which a run has begun to work."""
    folder = tmp_path / "run"
    claim_folder(options(folder), resume=False)
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    return folder


def test_a_new_folder_is_taken(tmp_path):
    folder = tmp_path / "a" / "b"
    assert claim_folder(options(folder), resume=False) == folder
    assert json.loads((folder / OPTIONS_FILE).read_text())["processes"] == 1
    assert [path.name for path in folder.iterdir()] == [OPTIONS_FILE]


def test_resume_of_nothing_is_a_start(tmp_path):
    assert claim_folder(options(tmp_path / "run"), resume=True).is_dir()


@pytest.mark.parametrize(
    ("changes", "resume", "processes", "words"),
    [
        ({}, False, 1, "add `--resume`"),
        ({"seed": 1}, True, 1, "`seed` is 0 there and 1 here"),
        ({"seed": 1}, False, 1, "holds another run"),
        ({"training": TrainingOptions(max_steps=5)}, True, 1, "`training.max_steps` is 1000 there and 5 here"),
        ({"data": DataOptions(pairs="other")}, True, 1, "`data.pairs` is 'pairs' there and 'other' here"),
        ({}, True, 2, "`processes` is 1 there and 2 here"),
    ],
)
def test_another_run_is_refused(used, changes, resume, processes, words):
    with pytest.raises(ValueError, match="output_dir") as caught:
        claim_folder(options(used, **changes), resume, processes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert json.loads((used / OPTIONS_FILE).read_text())["seed"] == 0  # it is still the other run's


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": TrainingOptions(dataloader_num_workers=3, use_cpu=True)},
        {"data": DataOptions(pairs="pairs", num_proc=4)},
        {"evaluation": EvaluationOptions(max_pairs=7, floors=["mean"], perturbation="CST3=ko")},
    ],
)
def test_the_same_run_goes_on(used, changes):
    assert claim_folder(options(used, **changes), resume=True) == used


def test_a_moved_folder_goes_on(used, tmp_path):
    moved = used.rename(tmp_path / "moved")
    assert claim_folder(options(moved), resume=True) == moved


def test_a_run_that_failed_at_once_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "run"
    claim_folder(options(folder), resume=False)
    (folder / "pairs").mkdir()
    (folder / "pairs" / ".lock").touch()
    (folder / ".options.json.1.tmp").write_text("{")
    assert not holds_work(folder)
    claim_folder(options(folder, seed=3), resume=False)
    assert json.loads((folder / OPTIONS_FILE).read_text())["seed"] == 3


def test_other_files_and_damage(tmp_path, used):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match="other files and no run"):
        claim_folder(options(tmp_path / "thesis"), resume=True)
    with pytest.raises(ValueError, match="is a file"):
        claim_folder(options(tmp_path / "thesis" / "chapter.tex"), resume=False)
    (used / OPTIONS_FILE).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        claim_folder(options(used), resume=True)


def test_first_difference_is_named():
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "`a.b` is 1 there and 2 here"
    assert first_difference({"a": {}}, {"a": {"c": None}}) is None
    assert first_difference({"output_dir": "x"}, {"output_dir": "y"}) is None


def test_json_appears_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json({"a": 1}, path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
