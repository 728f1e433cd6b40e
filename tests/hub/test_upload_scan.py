"""What may leave the machine: names on the list, no paths, no secrets, nothing disguised."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_card.upload_scan import DATASET_FILES, MODEL_FILES, is_allowed, scan_files, select_files


@pytest.mark.parametrize(
    ("name", "patterns", "allowed"),
    [
        ("config.json", MODEL_FILES, True),
        ("model-00001-of-00002.safetensors", MODEL_FILES, True),
        ("figures/scores.png", MODEL_FILES, True),
        ("figures/deep/scores.png", MODEL_FILES, False),
        ("checkpoint-5/config.json", MODEL_FILES, False),
        ("optimizer.pt", MODEL_FILES, False),
        ("optimizer.safetensors", MODEL_FILES, False),
        ("training_args.bin", MODEL_FILES, False),
        ("rng_state.pth", MODEL_FILES, False),
        ("run.json", MODEL_FILES, False),
        ("helper.py", MODEL_FILES, False),
        (".env", MODEL_FILES, False),
        ("train/shard-00000.parquet", DATASET_FILES, True),
        ("train/shard-00000.arrow", DATASET_FILES, False),
        ("plan.json", DATASET_FILES, False),
        ("train/cache/shard-0.parquet", DATASET_FILES, False),
    ],
)
def test_the_allow_list(name, patterns, allowed):
    assert is_allowed(name, patterns) is allowed


def test_files_are_split_into_chosen_and_left(tmp_path):
    for name in ("config.json", "a/b.txt", "figures/x.png", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    chosen, left = select_files(tmp_path, MODEL_FILES)
    assert chosen == {name: tmp_path / name for name in ("config.json", "figures/x.png")}
    assert left == [".hidden", "a/b.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("store: /home/someone/cells.soma", "absolute path `/home/someone/cells.soma`"),
        ('"path": "/scratch/x/y"', "absolute path"),
        ("--out=/a/b", "absolute path"),
        ("file:///a", "absolute path"),
        (r"C:\Users\someone", "absolute path"),
        ("token hf_" + "Ab1" * 12, "a Hugging Face token"),
        ("ghp_" + "a" * 36, "a GitHub token"),
        ("AKIAABCDEFGHIJKLMNOP", "an AWS key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("https://me:secret@host.org", "a password in a URL"),
        ("my-very-own-token", "your access token"),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_paths_and_secrets_are_refused(tmp_path, line, message, as_file):
    content = f"first line\n{line}\n".encode()
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=f"`README.md` line 2 holds .*{message}|`README.md` line 2 holds {message}"):
        scan_files({"README.md": tmp_path / "x" if as_file else content}, ["my-very-own-token"])


@pytest.mark.parametrize(
    "line",
    [
        "see https://huggingface.co/docs/hub/repositories",
        "cells/s, tokens/s and/or 1/2",
        "modeling_gppc/training/configs/pbmc.yaml",
        "s3://bucket/census/2025-11-08/soma",
        "a / b / c",
        "x = rate / (lengths / 1_000.0)",
        "./relative/path and ../other/path and ~/home/path",
        "f'{folder}/sub/file'",
        "hf_hub_download and hf_api",
    ],
)
def test_ordinary_text_passes(line):
    scan_files({"README.md": line.encode()})


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="/\\")))
def test_text_without_slashes_names_no_path(text):
    scan_files({"README.md": text.encode()})


def safetensors(header: dict) -> bytes:
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content


def test_binary_files_are_what_they_are_called():
    scan_files({"model.safetensors": safetensors({"__metadata__": {"format": "pt"}}), "a.png": b"\x89PNG", "a.parquet": b"PAR1"})  # fmt: skip
    with pytest.raises(ValueError, match=r"`model.safetensors` line 1 holds the absolute path"):
        scan_files({"model.safetensors": safetensors({"__metadata__": {"from": "/a/b/c"}})})
    for name, content in {
        "model.safetensors": b"\x80\x04\x95pickle of something",
        "short.safetensors": b"abc",
        "a.parquet": b"\x80\x04\x95",
        "a.png": b"PAR1",
        "a.pkl": b"\x80\x04\x95",
        "README.md": b"\xff\xfe",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` is not"):
            scan_files({name: content})
