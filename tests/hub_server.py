"""A loopback server that speaks the Hub's protocol over real HTTP, with failures on demand."""

import re
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_protocol import LFS_SUFFIXES, Commit, HubError, HubHandler, Repository, git_oid, new_commit


@dataclass
class Failure:
    """One scripted failure: hits the requests whose `"METHOD /path"` matches, after letting `skip` of them pass.

    `drop` closes the connection `"before"` the request is handled, `"after"` it took effect (the answer is lost) or
    in the `"middle"` of the body that is sent. Without it the server answers `status`.
    """

    match: str
    status: int = 500
    drop: str = ""
    times: int = 1
    skip: int = 0
    headers: dict = field(default_factory=dict)
    message: str = "scripted failure"


class HubServer:
    """The server; use it as a context manager.

    Args:
        root (`Path`): Folder for the stored objects.
        tokens (`dict`, *optional*): Token -> (user name, role), role one of `write`, `read`.
    """

    def __init__(self, root: Path, tokens: dict[str, tuple[str, str]] | None = None):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.tokens = {"hf_test_token": ("tester", "write")} if tokens is None else tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str, int]] = []
        self.page_size = 1000
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self._http.daemon_threads = True
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str = "hf_test_token") -> dict[str, str]:
        """Environment of a client process: this endpoint, this token, a cache folder of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }

    def fail(self, match: str, **options) -> Failure:
        """Scripts a [`Failure`]."""
        failure = Failure(match, **options)
        self.failures.append(failure)
        return failure

    def next_failure(self, request: str) -> Failure | None:
        """The failure that hits this request, if one does; counts it down."""
        with self.lock:
            for failure in self.failures:
                if failure.times > 0 and re.search(failure.match, request):
                    if failure.skip > 0:
                        failure.skip -= 1
                        continue
                    failure.times -= 1
                    return failure
        return None

    def repository(self, kind: str, name: str) -> Repository:
        """The repository, or the Hub's 404."""
        if (kind, name) not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[kind, name]

    def find_commit(self, repository: Repository, revision: str) -> Commit:
        """The commit a branch, tag, reference or commit id names, or the Hub's 404."""
        short = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for references in (repository.branches, repository.tags):
            if short in references:
                return references[short]
        for commit in repository.history:
            if commit.sha == revision:
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision with its content."""
        files = self.find_commit(self.repository(kind, name), revision).files
        return {path: self.read_object(oid) for path, (oid, _, _) in files.items()}

    def history(self, kind: str, name: str) -> list[str]:
        """Titles of all commits, oldest first."""
        return [commit.title for commit in self.repository(kind, name).history]

    def read_object(self, oid: str) -> bytes:
        """Content of a stored object."""
        return (self.root / oid).read_bytes()

    def store_object(self, oid: str, content: bytes) -> None:
        """Stores an object under its id."""
        (self.root / oid).write_bytes(content)

    def create(self, kind: str, name: str, private: bool = False) -> Repository:
        """Creates a repository with the Hub's first commit."""
        content = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
        oid = git_oid(content)
        self.store_object(oid, content)
        first = new_commit("initial commit", {".gitattributes": (oid, len(content), False)}, None, name)
        repository = Repository(kind, name, private, {"main": first}, history=[first])
        self.repositories[kind, name] = repository
        return repository

    def commit(self, kind: str, name: str, files: dict[str, bytes], title: str = "by hand") -> Commit:
        """Commits files as somebody else would."""
        repository = self.repository(kind, name)
        parent = repository.branches["main"]
        entries = dict(parent.files)
        for path, content in files.items():
            entries[path] = (git_oid(content), len(content), False)
            self.store_object(git_oid(content), content)
        commit = new_commit(title, entries, parent.sha, name)
        repository.branches["main"] = commit
        repository.history.append(commit)
        return commit
