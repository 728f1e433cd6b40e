"""The way to the public Census over a loopback copy: release directory, mirrors and an S3 bucket over real HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from cellxgene_census import _release_directory
from pair_store import make_store

from data_scripts.options import from_mapping
from data_scripts.pairs.census_pairs import build_pairs
from data_scripts.pairs.pair_options import PairOptions
from data_scripts.store import census_query

RELEASE = "2025-01-30"
DIRECTORY = {
    "stable": RELEASE,
    "latest": RELEASE,
    RELEASE: {
        "release_date": RELEASE,
        "release_build": RELEASE,
        "soma": {"uri": "s3://old/", "relative_uri": f"/cell-census/{RELEASE}/soma/", "s3_region": "us-west-2"},
        "h5ads": {"uri": "s3://old/", "relative_uri": f"/cell-census/{RELEASE}/h5ads/", "s3_region": "us-west-2"},
        "flags": {"lts": True, "retracted": False},
    },
}
MIRRORS = {
    "default": "loopback",
    "loopback": {"provider": "S3", "base_uri": "s3://census/", "region": "us-west-2"},
}


class Bucket(BaseHTTPRequestHandler):
    """Just enough of S3 (path style, unsigned) to read a TileDB store, and the two JSON files of the Census."""

    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        documents = {"/release.json": DIRECTORY, "/mirrors.json": MIRRORS}
        if url.path in documents:
            return self.answer(200, json.dumps(documents[url.path]).encode(), {"Content-Type": "application/json"})
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        if bucket != "census":
            return self.answer(404, b"")
        query = parse_qs(url.query)
        if not key:
            return self.answer(200, self.listing(query) if "list-type" in query else b"")
        path = self.root / key
        if not path.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        content = path.read_bytes()
        if "Range" not in self.headers:
            return self.answer(200, content)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        last = min(int(last or len(content) - 1), len(content) - 1)
        part = content[int(first) : last + 1]
        return self.answer(206, part, {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def listing(self, query: dict) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        limit = int(query.get("max-keys", ["1000"])[0])
        keys = sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())
        keys = [key for key in keys if key.startswith(prefix)]
        files = [key for key in keys if not delimiter or delimiter not in key[len(prefix) :]]
        folders = {prefix + key[len(prefix) :].split(delimiter)[0] + delimiter for key in keys if key not in files}
        entries = [
            f"<Contents><Key>{escape(key)}</Key><Size>{(self.root / key).stat().st_size}</Size></Contents>"
            for key in files
        ]
        entries += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        body = "".join(entries[:limit])
        count = len(entries[:limit])
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>census</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount>"
            f"<MaxKeys>{limit}</MaxKeys><IsTruncated>false</IsTruncated>{body}</ListBucketResult>"
        ).encode()


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    root = tmp_path_factory.mktemp("bucket")
    store = make_store(root / "cell-census" / RELEASE / "soma")
    handler = type("Handler", (Bucket,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RELEASE", "MIRRORS"):
            file = {"RELEASE": "release", "MIRRORS": "mirrors"}[name]
            patch.setattr(_release_directory, f"CELL_CENSUS_{name}_DIRECTORY_URL", f"http://{address}/{file}.json")
        loopback = {
            "vfs.s3.endpoint_override": address,
            "vfs.s3.scheme": "http",
            "vfs.s3.use_virtual_addressing": "false",
            "vfs.s3.no_sign_request": "true",
        }
        patch.setattr(census_query, "TILEDB_CONFIG", census_query.TILEDB_CONFIG | loopback)
        yield store
    server.shutdown()


def options(**query) -> PairOptions:
    rules = [{"by": "cell", "fractions": {"test": 0.2}}]
    return from_mapping(PairOptions, {"query": query, "splits": {"rules": rules}})


@pytest.mark.parametrize("version", ["stable", RELEASE])
def test_a_pinned_version_gives_the_rows_of_a_local_copy(census, tmp_path, version):
    remote = build_pairs(options(census_version=version), tmp_path / "remote", progress=False)
    local = build_pairs(options(uri=str(census)), tmp_path / "local", progress=False)
    assert remote.manifest["digest"] == local.manifest["digest"]
    # The alias is resolved, so that the rows can be built again when it points elsewhere.
    assert remote.manifest["source"]["census_version"] == RELEASE


def test_unknown_version(census, tmp_path):
    with pytest.raises(ValueError, match="`census_version` is '2099-01-01'") as caught:
        build_pairs(options(census_version="2099-01-01"), tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)


def test_no_network(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/release.json"
    monkeypatch.setattr(_release_directory, "CELL_CENSUS_RELEASE_DIRECTORY_URL", url)
    with pytest.raises(ValueError, match="`census_version` 'stable' cannot be looked up"):
        build_pairs(options(), tmp_path / "out", progress=False)
