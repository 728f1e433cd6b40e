"""The loopback Hub answers the real huggingface_hub client as the Hub does."""

import hashlib

import pytest

LIFE_OF_A_REPOSITORY = """
import json, os
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download

api = HfApi()
kind, name = {kind!r}, "tester/thing"
url = api.create_repo(name, repo_type=kind, private=True, space_sdk="static" if kind == "space" else None)
api.create_repo(name, repo_type=kind, private=True, exist_ok=True, space_sdk="static" if kind == "space" else None)
first = api.create_commit(
    name,
    [
        CommitOperationAdd("config.json", b"{{}}"),
        CommitOperationAdd("weights/model.safetensors", bytes(range(256)) * 40),
        CommitOperationAdd("old.txt", b"old"),
        CommitOperationAdd("README.md", b"---\\nlicense: mit\\n---\\nhello"),
    ],
    commit_message="first",
    repo_type=kind,
)
api.create_branch(name, branch="trial", repo_type=kind)
api.create_tag(name, tag="v1", repo_type=kind)
second = api.create_commit(
    name,
    [CommitOperationAdd("config.json", b'{{"a": 1}}'), CommitOperationDelete("old.txt")],
    commit_message="second",
    repo_type=kind,
)
again = api.create_commit(name, [CommitOperationAdd("config.json", b'{{"a": 1}}')], commit_message="third", repo_type=kind)
refs = api.list_repo_refs(name, repo_type=kind)
tree = list(api.list_repo_tree(name, recursive=True, repo_type=kind))
info = api.repo_info(name, repo_type=kind, files_metadata=True)
paths = api.get_paths_info(name, ["config.json", "weights", "absent"], repo_type=kind)
read = lambda path, revision=None: Path(hf_hub_download(name, path, repo_type=kind, revision=revision)).read_text()
folder = Path(snapshot_download(name, repo_type=kind, revision="v1"))
print(json.dumps(dict(
    whoami=api.whoami()["name"],
    private=info.private,
    head=info.sha == second.oid == again.oid,
    files=sorted(entry.path for entry in tree if hasattr(entry, "size")),
    folders=[entry.path for entry in tree if not hasattr(entry, "size")],
    sha256={{entry.path: entry.lfs.sha256 for entry in tree if getattr(entry, "lfs", None)}},
    branches={{entry.name: entry.target_commit == first.oid for entry in refs.branches}},
    tags={{entry.name: entry.target_commit == first.oid for entry in refs.tags}},
    paths=[entry.path for entry in paths],
    now=read("config.json"),
    then=read("config.json", "v1"),
    by_commit=read("old.txt", first.oid),
    snapshot=sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
    bytes=hash(Path(folder, "weights/model.safetensors").read_bytes() == bytes(range(256)) * 40),
)))
"""


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_life_of_a_repository(client, hub, kind):
    hub.page_size = 2
    seen = client(LIFE_OF_A_REPOSITORY.format(kind=kind))
    assert seen == {
        "whoami": "tester",
        "private": True,
        "head": True,
        "files": [".gitattributes", "README.md", "config.json", "weights/model.safetensors"],
        "folders": ["weights"],
        "sha256": {"weights/model.safetensors": hashlib.sha256(bytes(range(256)) * 40).hexdigest()},
        "branches": {"main": False, "trial": True},
        "tags": {"v1": True},
        "paths": ["config.json", "weights"],
        "now": '{"a": 1}',
        "then": "{}",
        "by_commit": "old",
        "snapshot": [".gitattributes", "README.md", "config.json", "old.txt", "weights/model.safetensors"],
        "bytes": 1,
    }
    assert hub.history(kind, "tester/thing") == ["initial commit", "first", "second"]
    uploads = [request for request in hub.requests if request[0] == "PUT" and request[1].startswith("/lfs/")]
    assert len(uploads) == 1
    assert not any(status == 404 and "no route" in path for _, path, status in hub.requests)


ERRORS = """
import json, os
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

api = HfApi()
seen = {}
def attempt(name, function, *arguments, **options):
    try:
        function(*arguments, **options)
        seen[name] = "no error"
    except Exception as error:
        seen[name] = [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
add = [CommitOperationAdd("a.txt", b"a")]
attempt("missing repository", api.repo_info, "tester/absent")
attempt("missing file", hf_hub_download, "tester/mine", "absent.txt")
attempt("missing revision", hf_hub_download, "tester/mine", "a.txt", revision="absent")
attempt("private of another", api.repo_info, "other/hidden")
attempt("gated", hf_hub_download, "other/gated", "a.txt")
attempt("write to another", api.create_commit, "other/gated", add, commit_message="x")
attempt("create for another", api.create_repo, "other/new")
attempt("exists", api.create_repo, "tester/mine")
attempt("wrong token", HfApi(token="hf_wrong").whoami)
attempt("moved on", api.create_commit, "tester/mine", add, commit_message="x", parent_commit="0" * 40)
api.delete_repo("tester/mine")
attempt("deleted", api.repo_info, "tester/mine")
print(json.dumps(seen))
"""


def test_errors_are_those_of_the_hub(client, hub):
    hub.create("model", "tester/mine")
    hub.create("model", "other/hidden", private=True)
    hub.create("model", "other/gated").gated = True
    hub.commit("model", "other/gated", {"a.txt": b"a"})
    assert client(ERRORS) == {
        "missing repository": ["RepositoryNotFoundError", 404],
        "missing file": ["RemoteEntryNotFoundError", 404],
        "missing revision": ["RevisionNotFoundError", 404],
        "private of another": ["RepositoryNotFoundError", 404],
        "gated": ["GatedRepoError", 403],
        "write to another": ["HfHubHTTPError", 403],
        "create for another": ["HfHubHTTPError", 403],
        "exists": ["HfHubHTTPError", 409],
        "wrong token": ["HfHubHTTPError", 401],
        "moved on": ["HfHubHTTPError", 412],
        "deleted": ["RepositoryNotFoundError", 404],
    }


RANGES = """
import json
from huggingface_hub import HfApi, HfFileSystem

HfApi().upload_file(path_or_fileobj=bytes(range(256)) * 8, path_in_repo="a/b.parquet", repo_id="tester/d", repo_type="dataset")
files = HfFileSystem()
with files.open("datasets/tester/d/a/b.parquet", block_size=64) as file:
    file.seek(-10, 2)
    tail = list(file.read())
    file.seek(300)
    middle = list(file.read(5))
print(json.dumps([tail, middle, files.glob("datasets/tester/d/**/*.parquet")]))
"""


def test_ranges_are_served(client, hub):
    hub.create("dataset", "tester/d")
    tail, middle, found = client(RANGES)
    assert tail == list(range(246, 256))
    assert middle == list(range(44, 49))
    assert found == ["datasets/tester/d/a/b.parquet"]
    assert 206 in {status for method, path, status in hub.requests if "/resolve/" in path}


FAILURES = """
import json, time
time.sleep = lambda seconds: None
from huggingface_hub import HfApi, hf_hub_download

api = HfApi()
seen = []
for _ in range(2):
    try:
        seen.append(api.whoami()["name"])
    except Exception as error:
        seen.append(getattr(getattr(error, "response", None), "status_code", type(error).__name__))
path = hf_hub_download("tester/mine", "big.bin")
seen.append(open(path, "rb").read() == b"\\0" * 100_000)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("failure", "first"),
    [
        ({"status": 503}, 503),
        ({"status": 429, "headers": {"Retry-After": "0"}}, 429),
        ({"status": 401}, 401),
        ({"drop": "before"}, "RemoteProtocolError"),
        ({"drop": "after"}, "RemoteProtocolError"),
    ],
)
def test_failures_on_demand(client, hub, failure, first):
    hub.create("model", "tester/mine")
    hub.commit("model", "tester/mine", {"big.bin": b"\0" * 100_000})
    hub.fail("GET /api/whoami", **failure)
    broken = hub.fail("GET /tester/mine/resolve", drop="middle")
    assert client(FAILURES) == [first, "tester", True]
    assert broken.times == 0
