"""Files are whole or not there, and as readable as the umask lets them be."""

import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_scripts.files import write_atomically, write_json, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def written_by_owner_alone(path):
    path.write_text("x")
    path.chmod(0o600)


WRITERS = {
    "text": lambda path: path.write_text("x"),
    "safetensors": lambda path: save_file({"a": np.ones(2)}, path),
    "a writer with permissions of its own": written_by_owner_alone,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_permissions_are_those_of_the_umask(writer, umask, tmp_path):
    with write_atomically(tmp_path / "new") as temporary:
        WRITERS[writer](temporary)
    neighbour = tmp_path / "neighbour"
    neighbour.write_text("y")
    assert mode_of(tmp_path / "new") == mode_of(neighbour) == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = write_text("old", tmp_path / "folder" / "file.txt")
    with pytest.raises(error), write_atomically(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(".") and temporary.suffix == ".tmp"
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_reader_sees_the_old_file_until_the_end_and_what_is_there_is_on_disk(tmp_path, monkeypatch):
    path = write_text("old", tmp_path / "file.txt")
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: steps.append("sync") or fsync(file))
    monkeypatch.setattr("os.replace", lambda *names: steps.append("name") or replace(*names))
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and steps == ["sync", "name"]


def test_two_writers_at_once_do_not_meet(tmp_path):
    with write_atomically(tmp_path / "a") as first, write_atomically(tmp_path / "a") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_json_round_trip(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "ä"}}
    path = write_json(content, tmp_path / "a.json")
    assert json.loads(path.read_text()) == content and path.read_text().endswith("}\n")
