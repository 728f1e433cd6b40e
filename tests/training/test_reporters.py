"""Loggers by flag: what reaches them is what the run logs; one that is not installed is refused at once."""

import importlib.util
import json
import sqlite3
import struct
import sys

import pytest
from tiny_runs import ROOT, arguments, logged, run, train_module, write_run_pairs

from modeling_gppc.training.arguments import REPORTERS

VALUES = ("loss", "grad_norm", "cells_per_second", "data_wait_share", "eval_mse", "eval_linear_mse")


def from_tensorboard(out, home) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (out / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        split, name = tag.split("/", 1)
        name = f"eval_{name}" if split == "eval" else name
        found[name] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def by_step(entries) -> dict[str, dict[int, float]]:
    """Entries as trackio and Weights & Biases get them: `train/...` and `eval/...` with the step among them."""
    found: dict = {}
    for entry in entries:
        for name, value in entry.items():
            split, _, rest = name.partition("/")
            name = {"train": rest, "eval": f"eval_{rest}"}.get(split, name)
            found.setdefault(name, {})[entry["train/global_step"]] = value
    return found


def from_trackio(out, home) -> dict[str, dict[int, float]]:
    with sqlite3.connect(home / "trackio" / "gppc.db") as database:
        rows = database.execute("SELECT metrics FROM metrics WHERE run_name = ?", (out.name,))
        return by_step(json.loads(metrics) for (metrics,) in rows)


def from_wandb(out, home) -> dict[str, dict[int, float]]:
    from wandb.proto import wandb_internal_pb2

    (path,) = (home / "wandb" / "wandb").glob("offline-run-*/run-*.wandb")
    entries = []
    for data in records_of(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            entries.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return by_step(entries)


def records_of(content: bytes) -> list[bytes]:
    """Records of a LevelDB log: a header of 7 bytes, then blocks of 32 KiB with chunks of checksum, length and kind."""
    records, parts, place = [], b"", 7
    while place + 7 <= len(content):
        if 32_768 - place % 32_768 < 7:  # no chunk begins so near to a block's end
            place += 32_768 - place % 32_768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


READERS = {"tensorboard": from_tensorboard, "trackio": from_trackio, "wandb": from_wandb}


INSTALLED = [name for name in REPORTERS if importlib.util.find_spec(name) is not None]


def flags_for(folder, reporters: list[str]) -> list[str]:
    steps = {"training__max_steps": 20, "training__eval_steps": 10, "training__save_steps": 10}
    reporters = f"[{', '.join(reporters)}]"
    return arguments(write_run_pairs(folder / "pairs"), folder / "run", training__report_to=reporters, **steps)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder of a run that every installed logger follows, and of what they write."""
    home = tmp_path_factory.mktemp("loggers")
    places = {"TRACKIO_DIR": str(home / "trackio"), "WANDB_MODE": "offline", "WANDB_DIR": str(home / "wandb")}
    (home / "wandb").mkdir()
    done = run([sys.executable, str(ROOT / "train.py"), *flags_for(home, INSTALLED)], **places)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.mark.parametrize("name", INSTALLED)
def test_a_logger_gets_what_the_run_logs(home, name):
    found = READERS[name](home / "run", home)
    for value in VALUES:
        assert found[value] == pytest.approx(logged(home / "run", value), rel=1e-5), value


@pytest.mark.parametrize("name", REPORTERS)
def test_a_logger_that_is_absent_is_refused(tmp_path, monkeypatch, capsys, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda found, *more: None if found == name else find(found, *more)
    )
    assert train_module().main(flags_for(tmp_path, [name])) == 2
    assert f"names {name!r}, which is not installed; `pip install {name}`" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
