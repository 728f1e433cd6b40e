"""The Hub's protocol, one request at a time: routes, rights, references, large files, commits, ranges."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"
# What the Hub's default .gitattributes keeps in large-file storage.
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".pkl", ".pt", ".npz", ".zip", ".h5ad", ".png")
SAMPLE_LIMIT = 10 * 2**20


@dataclass
class Commit:
    """A commit: path -> (object id, size, is it in large-file storage)."""

    sha: str
    title: str
    files: dict[str, tuple[str, int, bool]]
    parent: str | None = None


@dataclass
class Repository:
    """A repository with its references."""

    kind: str
    name: str
    private: bool
    branches: dict[str, Commit]
    tags: dict[str, Commit] = field(default_factory=dict)
    history: list[Commit] = field(default_factory=list)
    gated: bool = False


class HubError(Exception):
    """An error answer: status, the Hub's error code and message."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def git_oid(content: bytes) -> str:
    """Git's object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def new_commit(title: str, files: dict, parent: str | None, salt: str) -> Commit:
    """A commit whose id follows from its content."""
    text = json.dumps([title, sorted(files.items()), parent, salt])
    return Commit(hashlib.sha1(text.encode()).hexdigest(), title, files, parent)


class HubHandler(BaseHTTPRequestHandler):
    """One request: find the route, check the token, answer."""

    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("DELETE", r"/api/repos/delete", "delete_repository"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/(?:(?P<kind>dataset|space)s/)?(?P<name>[^/]+/[^/]+)/(?:resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )  # fmt: skip

    @property
    def hub(self):
        """The server with its repositories."""
        return self.server.hub

    def log_message(self, format, *args):
        """Requests are kept in `hub.requests` instead."""

    def do_GET(self):
        self.handle_request("GET")

    def do_HEAD(self):
        self.handle_request("HEAD")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def do_DELETE(self):
        self.handle_request("DELETE")

    def handle_request(self, method: str) -> None:
        """Reads the body, applies a scripted failure, finds the route and answers."""
        self.drop_middle = False
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{method} {url.path}"
        failure = self.hub.next_failure(request)
        if failure and failure.drop == "before":
            return self.drop(request)
        self.body = self.read_body()
        if failure and failure.drop == "middle" and method not in ("GET", "HEAD"):
            return self.drop(request)
        if failure and not failure.drop:
            error = HubError(failure.status, failure.headers.get("X-Error-Code", ""), failure.message, failure.headers)
            return self.answer_error(request, error)
        self.drop_middle = failure is not None and failure.drop == "middle"
        try:
            with self.hub.lock:
                answer = self.dispatch("GET" if method == "HEAD" else method, url.path)
        except HubError as error:
            return self.answer_error(request, error)
        if failure and failure.drop == "after":
            return self.drop(request)
        return self.answer(request, *answer)

    def dispatch(self, method: str, path: str) -> tuple[int, dict, bytes]:
        """Calls the route of a request and returns status, headers and body."""
        self.user = self.authenticate()
        for route_method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                if "kind" in match.groupdict():
                    arguments.setdefault("kind", "model")
                result = getattr(self, name)(**arguments)
                return result if isinstance(result, tuple) else (200, {}, json.dumps(result).encode())
        raise HubError(404, "", f"no route for {method} {path}")

    def authenticate(self) -> tuple[str, str] | None:
        """(user, role) of the token; the Hub's 401 for one it does not know."""
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        token = header.removeprefix("Bearer ")
        if token.startswith("Basic "):
            token = base64.b64decode(token.removeprefix("Basic ")).decode().partition(":")[2]
        if token not in self.hub.tokens:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def readable(self, kind: str, name: str) -> Repository:
        """The repository if this user may see it; private ones look missing to others, as on the Hub."""
        if (kind, name) not in self.hub.repositories and self.user is None:
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        repository = self.hub.repository(kind, name)
        owner = self.user is not None and self.user[0] == name.split("/")[0]
        if repository.private and not owner:
            raise HubError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, kind: str, name: str) -> Repository:
        """The repository if this user may write to it."""
        repository = self.readable(kind, name)
        self.check_rights(name.split("/")[0])
        return repository

    def check_rights(self, namespace: str) -> None:
        """Refuses users without a write token of the namespace."""
        if self.user is None:
            raise HubError(401, "", "Invalid username or password.")
        if self.user[0] != namespace or self.user[1] != "write":
            raise HubError(403, "", f"You don't have the rights to write under the namespace {namespace}")

    # Repositories and references

    def create_repository(self):
        payload = json.loads(self.body)
        kind = payload.get("type") or "model"
        if kind == "space" and not payload.get("sdk"):
            raise HubError(400, "", "a Space needs an sdk")
        namespace = payload.get("organization") or (self.user[0] if self.user else "")
        self.check_rights(namespace)
        name = f"{namespace}/{payload['name']}"
        answer = {"url": f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}", "name": name}
        if (kind, name) in self.hub.repositories:
            return 409, {}, json.dumps(answer | {"error": "You already created this repo"}).encode()
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        self.hub.create(kind, name, private)
        return answer

    def delete_repository(self):
        payload = json.loads(self.body)
        kind = payload.get("type") or "model"
        name = f"{payload.get('organization') or self.user[0]}/{payload['name']}"
        self.writable(kind, name)
        del self.hub.repositories[kind, name]
        return {}

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata block"}]
        if errors:
            return 400, {}, json.dumps({"errors": errors, "warnings": []}).encode()
        return {"errors": [], "warnings": []}

    def whoami(self):
        if self.user is None:
            raise HubError(401, "", "Invalid username or password.")
        name, role = self.user
        access = {"accessToken": {"displayName": "test", "role": role}}
        return {"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": access}

    def branch(self, kind, name, branch):
        repository = self.writable(kind, name)
        if branch in repository.branches:
            raise HubError(409, "", f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[branch] = self.hub.find_commit(repository, start)
        return {}

    def tag(self, kind, name, revision):
        repository = self.writable(kind, name)
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise HubError(409, "", f"Tag reference exists already: {tag}")
        repository.tags[tag] = self.hub.find_commit(repository, revision)
        return {}

    def refs(self, kind, name):
        repository = self.readable(kind, name)

        def listing(references, prefix):
            return [
                {"name": key, "ref": f"{prefix}{key}", "targetCommit": commit.sha}
                for key, commit in references.items()
            ]

        return {
            "branches": listing(repository.branches, "refs/heads/"),
            "tags": listing(repository.tags, "refs/tags/"),
            "converts": [],
            "pullRequests": [],
        }

    # Reading

    def info(self, kind, name, revision="main"):
        repository = self.readable(kind, name)
        commit = self.hub.find_commit(repository, revision)
        siblings = [
            {"rfilename": path, "size": size, "blobId": oid} | ({"lfs": _lfs(oid, size)} if large else {})
            for path, (oid, size, large) in commit.files.items()
        ]
        return {
            "_id": commit.sha[:24],
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit.sha,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "likes": 0,
            "downloads": 0,
            "lastModified": DATE,
            "createdAt": DATE,
            "siblings": siblings,
        }

    def tree(self, kind, name, revision, path=""):
        commit = self.hub.find_commit(self.readable(kind, name), revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path.rstrip('/')}/" if path else ""
        if prefix and not any(entry.startswith(prefix) for entry in commit.files):
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        entries = list(_listing(commit, prefix, recursive))
        start = int(self.query.get("cursor", ["0"])[0])
        page = entries[start : start + self.hub.page_size]
        headers = {"Content-Type": "application/json"}
        if start + len(page) < len(entries):
            flag = "true" if recursive else "false"
            url = f"{self.hub.url}{urlsplit(self.path).path}?recursive={flag}&cursor={start + len(page)}"
            headers["Link"] = f'<{url}>; rel="next"'
        return 200, headers, json.dumps(page).encode()

    def paths_info(self, kind, name, revision):
        commit = self.hub.find_commit(self.readable(kind, name), revision)
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in _listing(commit, "", recursive=True)}
        return [entries[path.strip("/")] for path in wanted if path.strip("/") in entries]

    def resolve(self, kind, name, revision, path):
        repository = self.readable(kind, name)
        if repository.gated and (self.user is None or self.user[0] != name.split("/")[0]):
            raise HubError(403 if self.user else 401, "GatedRepo", f"Access to {kind} {name} is restricted")
        commit = self.hub.find_commit(repository, revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
        oid, size, large = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(size)}
        content = self.hub.read_object(oid)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not any(wanted.groups()):
            return 200, headers, content
        if wanted[1]:
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        else:
            start, end = max(size - int(wanted[2]), 0), size - 1
        if start > end:
            return 416, {"Content-Range": f"bytes */{size}"}, b""
        return 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"}, content[start : end + 1]

    # Writing

    def preupload(self, kind, name, revision):
        commit = self.hub.find_commit(self.writable(kind, name), revision)
        files = []
        for entry in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(entry.get("sample", ""))
            large = entry["path"].endswith(LFS_SUFFIXES) or entry["size"] > SAMPLE_LIMIT or binary
            remote = commit.files.get(entry["path"])
            files.append(
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": remote[0] if remote else None,
                }
            )
        return {"files": files}

    def lfs_batch(self, kind, name):
        self.writable(kind, name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            item = {"oid": entry["oid"], "size": entry["size"]}
            if not (self.hub.root / entry["oid"]).exists():
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/lfs/{entry['oid']}/verify", "header": {}},
                }
            objects.append(item)
        return 200, {}, json.dumps({"transfer": "basic", "objects": objects}).encode()

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "", "content does not match its sha256")
        self.hub.store_object(oid, self.body)
        return 200, {"ETag": f'"{oid}"'}, b""

    def lfs_verify(self, oid):
        payload = json.loads(self.body)
        stored = self.hub.root / oid
        if not stored.exists() or stored.stat().st_size != payload["size"]:
            raise HubError(404, "", "object not found")
        return {}

    def commit(self, kind, name, revision):
        repository = self.writable(kind, name)
        if revision not in repository.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        parent = repository.branches[revision]
        files = dict(parent.files)
        title = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.sha):
                    raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = (git_oid(content), len(content), False)
                self.hub.store_object(git_oid(content), content)
            elif key == "lfsFile":
                stored = self.hub.root / value["oid"]
                if not stored.exists():
                    raise HubError(400, "", f"large file {value['path']} was not uploaded")
                files[value["path"]] = (value["oid"], stored.stat().st_size, True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {path: entry for path, entry in files.items() if not path.startswith(prefix)}
        commit = new_commit(title, files, parent.sha, name)
        repository.branches[revision] = commit
        repository.history.append(commit)
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}/commit/{commit.sha}"
        return {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""}

    # The wire

    def read_body(self) -> bytes:
        """The request's body, of known length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def drop(self, request: str) -> None:
        """Closes the connection without an answer."""
        self.hub.requests.append((*request.split(" ", 1), 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def answer_error(self, request: str, error: HubError) -> None:
        """Answers as the Hub does: the code and message in headers, a JSON body."""
        headers = {"X-Error-Message": error.message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        self.answer(request, error.status, headers, json.dumps({"error": error.message}).encode())

    def answer(self, request: str, status: int, headers: dict, body: bytes) -> None:
        """Sends an answer, or half of it where a failure says so."""
        self.hub.requests.append((*request.split(" ", 1), status))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Type" not in headers:
            self.send_header("Content-Type", "application/json" if body[:1] in (b"{", b"[") else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body[: len(body) // 2] if self.drop_middle else body)
            self.wfile.flush()
        if self.drop_middle:
            self.drop(request)


def _lfs(oid: str, size: int) -> dict:
    return {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}


def _listing(commit: Commit, prefix: str, recursive: bool) -> Iterator[dict]:
    """Entries below a folder as the tree endpoint lists them: folders too, files in path order."""
    folders = set()
    for path in sorted(commit.files):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if folder not in folders and (recursive or depth == 1):
                folders.add(folder)
                oid = hashlib.sha1(folder.encode()).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            oid, size, large = commit.files[path]
            entry = {"type": "file", "oid": oid[:40], "size": size, "path": path}
            yield entry | ({"lfs": _lfs(oid, size)} if large else {})
