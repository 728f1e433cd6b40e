"""What may be uploaded: an allow-list of names, and a look into every file before it leaves."""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

MODEL_FILES = (
    "README.md",
    "LICENSE",
    "config.json",
    "preprocessor_config.json",
    "results.json",
    "transfer.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*_gppc.py",
    "*.png",
    "figures/*.png",
)
DATASET_FILES = (
    "README.md",
    "manifest.json",
    "genes.parquet",
    "panels.parquet",
    "train/shard-*.parquet",
    "validation/shard-*.parquet",
    "test/shard-*.parquet",
)
SPACE_FILES = ("README.md", "app.py", "requirements.txt", "*.py")

# Readable text is searched line by line; anything else must be what its ending says.
TEXT_SUFFIXES = (".json", ".md", ".py", ".txt", ".cff", "")
MAGIC = {".parquet": (b"PAR1",), ".png": (b"\x89PNG",)}
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"://[^/\s:@]+:[^/\s:@]+@",
}
ABSOLUTE_PATH = r"(?<![\w:/.~*<)\]}-])/[A-Za-z0-9_.+-]+(?:/[A-Za-z0-9_.+-]+)+|\b[A-Za-z]:\\\\?[A-Za-z]|\bfile:///"


def is_allowed(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path inside a repository matches the allow-list; `*` does not cross folders."""
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def select_files(folder: Path, patterns: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    """Splits the files of a folder into those that may be uploaded and the names of those that stay."""
    chosen: dict[str, Path] = {}
    left_out = []
    for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        name = path.relative_to(folder).as_posix()
        if is_allowed(name, patterns):
            chosen[name] = path
        else:
            left_out.append(name)
    return chosen, left_out


def scan_files(files: Mapping[str, Path | bytes], secrets: Iterable[str] = ()) -> None:
    """Refuses files that would give away a machine or a secret, and files that are not what they are called.

    Args:
        files (`Mapping[str, Path | bytes]`): Path in the repository -> file or content.
        secrets (`Iterable[str]`, *optional*): Texts that must not occur anywhere, such as the user's own token.

    Raises:
        ValueError: Naming the file, the line and what is wrong with it.
    """
    secrets = [secret for secret in secrets if secret]
    for name, source in files.items():
        suffix = Path(name).suffix
        head = source[:8] if isinstance(source, bytes) else _read(source, 8)
        if suffix in TEXT_SUFFIXES:
            content = source if isinstance(source, bytes) else source.read_bytes()
            _scan_text(name, content, secrets)
        elif suffix == ".safetensors":
            _scan_safetensors(name, source, head, secrets)
        elif suffix not in MAGIC or not head.startswith(MAGIC[suffix]):
            raise ValueError(f"`{name}` is not a {suffix or 'known'} file by its content; nothing was uploaded.")


def _read(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _scan_text(name: str, content: bytes, secrets: list[str]) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"`{name}` is not readable text; nothing was uploaded.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        for meaning, pattern in SECRETS.items():
            if re.search(pattern, line):
                raise ValueError(f"`{name}` line {number} holds {meaning}; remove it. Nothing was uploaded.")
        if any(secret in line for secret in secrets):
            raise ValueError(f"`{name}` line {number} holds your access token; remove it. Nothing was uploaded.")
        if found := re.search(ABSOLUTE_PATH, line):
            raise ValueError(
                f"`{name}` line {number} holds the absolute path `{found[0]}`, which names a machine; write it "
                "relative or leave it out. Nothing was uploaded."
            )


def _scan_safetensors(name: str, source: Path | bytes, head: bytes, secrets: list[str]) -> None:
    try:
        length = struct.unpack("<Q", head)[0]
        total = len(source) if isinstance(source, bytes) else source.stat().st_size
        if length > min(total, 2**27):
            raise ValueError("header longer than the file")
        header = source[8 : 8 + length] if isinstance(source, bytes) else _read(source, 8 + length)[8:]
        json.loads(header)
    except (struct.error, ValueError) as error:
        raise ValueError(f"`{name}` is not a safetensors file ({error}); nothing was uploaded.") from error
    _scan_text(name, header, secrets)
