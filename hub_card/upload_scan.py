"""What may be uploaded: an allow-list of names, and a look into every file before it leaves."""

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

MODEL_FILES = (
    *("README.md", "LICENSE", "config.json", "preprocessor_config.json", "results.json", "transfer.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("*_gppc.py", "*.png", "figures/*.png"),
)
DATASET_FILES = (
    *("README.md", "manifest.json", "genes.parquet", "panels.parquet"),
    *(f"{split}/shard-*.parquet" for split in ("train", "validation", "test")),
)
SPACE_FILES = ("README.md", "requirements.txt", "*.py")

# Readable text is searched line by line; anything else must be what its ending says.
TEXT_SUFFIXES = (".json", ".md", ".py", ".txt", ".cff", "")
MAGIC = {".parquet": b"PAR1", ".png": b"\x89PNG"}
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
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    chosen = {name: path for name, path in paths.items() if is_allowed(name, patterns)}
    return chosen, [name for name in paths if name not in chosen]


def scan_files(files: Mapping[str, Path | bytes], secrets: Iterable[str] = ()) -> None:
    """Raises `ValueError`, naming file and line, for files (path in the repository -> file or content) that would give
    away a machine or a secret, such as the user's own token, and for files that are not what they are called."""
    for name, source in files.items():
        suffix = Path(name).suffix
        if suffix in TEXT_SUFFIXES:
            _scan_text(name, read_start(source), secrets)
        elif suffix == ".safetensors":
            length = min(int.from_bytes(read_start(source, 8), "little"), 2**27)
            header = read_start(source, 8 + length)[8:]
            try:
                json.loads(header)
            except ValueError as error:
                raise ValueError(f"`{name}` is not a safetensors file ({error}); nothing was uploaded.") from error
            _scan_text(name, header, secrets)
        elif suffix not in MAGIC or not read_start(source, 8).startswith(MAGIC[suffix]):
            raise ValueError(f"`{name}` is not a {suffix} file by its content; nothing was uploaded.")


def read_start(source: Path | bytes, size: int | None = None) -> bytes:
    """The first bytes of a file or of content, all of them by default."""
    if isinstance(source, bytes):
        return source[:size]
    with source.open("rb") as file:
        return file.read(size)


def _scan_text(name: str, content: bytes, secrets: Iterable[str]) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError(f"`{name}` is not readable text; nothing was uploaded.") from None
    patterns = [*SECRETS.items(), *(("your access token", re.escape(secret)) for secret in secrets)]
    for number, line in enumerate(text.splitlines(), start=1):
        for meaning, pattern in patterns:
            if re.search(pattern, line):
                raise ValueError(f"`{name}` line {number} holds {meaning}; remove it. Nothing was uploaded.")
        if found := re.search(ABSOLUTE_PATH, line):
            raise ValueError(
                f"`{name}` line {number} holds the absolute path `{found[0]}`, which names a machine; write it "
                "relative or leave it out. Nothing was uploaded."
            )
