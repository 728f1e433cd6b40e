"""Uploads a set of files as one commit: resumable, repeatable, nothing half done."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from hub_card.model_card import PLACEHOLDER
from hub_card.upload_scan import is_allowed, read_start, scan_files

logger = logging.getLogger(__name__)
# The client's own base class of connection errors, whichever HTTP library this version of the client uses.
HTTP_ERROR = HfHubHTTPError.__bases__[0]
# 409 and 412 mean that somebody else committed meanwhile: compare again, then commit.
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0  # seconds between two attempts
# Files the Hub itself, or its form for new repositories, puts into an empty repository.
NEUTRAL_FILES = (".gitattributes", "README.md")


@dataclass(frozen=True)
class PushReport:
    """What a push did: the commit that holds the files, and which files changed (none when all was there already)."""

    repo_id: str
    kind: str
    revision: str
    commit: str
    url: str
    uploaded: list[str]
    deleted: list[str]
    left_out: list[str]


def check_target(repo_id: str, token: str | None = None) -> None:
    """Finds out, without the network, whether something could be pushed to a repository.

    Raises:
        ValueError: For a malformed name, a client that is offline, or a missing access token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is {repo_id!r}: {one_line(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError("the client is offline; unset HF_HUB_OFFLINE to push.")
    if not (token or get_token()):
        raise ValueError("no access token: run `hf auth login` or set HF_TOKEN to a token with write access.")


@dataclass
class Push:
    """
    Brings a repository to the given files with at most one commit; [`run`] does it.

    The remote state is read before every attempt: what is there already is not sent again, and a commit whose answer
    was lost is recognised instead of being repeated. Nothing local is changed.

    Args:
        files (`Mapping[str, Path | bytes]`): Path in the repository -> file or content; the card is among them.
        repo_id (`str`): `name` or `namespace/name`.
        kind (`str`): `model`, `dataset` or `space`.
        patterns (`tuple[str, ...]`): The allow-list; remote files that match it and are no longer local are removed.
        marker (`str`): File by which a repository is known to be of this sort; others that hold content are refused.
        left_out (`list[str]`, *optional*): Names of the files that stay, for the report.
        private, revision, tag, create, message, token, endpoint, attempts: See [`~push.push_model`].
    """

    files: Mapping[str, Path | bytes]
    repo_id: str
    kind: str
    patterns: tuple[str, ...]
    marker: str
    left_out: list[str] = field(default_factory=list)
    private: bool = True
    revision: str = "main"
    tag: str | None = None
    create: bool = True
    message: str = "Upload with gppc push"
    token: str | None = None
    endpoint: str | None = None
    attempts: int = 6

    def run(self) -> PushReport:
        """Checks the files, then uploads them.

        Raises:
            ValueError: If a file may not be uploaded, the token is refused, the repository is gated, absent or holds
                other content, or is public where a private one was asked for. One line that says what to do.
            ConnectionError: If the Hub did not answer until the last attempt.
        """
        strangers = [name for name in self.files if not is_allowed(name, self.patterns)]
        if strangers:
            raise ValueError(f"`{strangers[0]}` is not a file of a {self.kind} repository; nothing was uploaded.")
        card = read_start(self.files["README.md"]).replace(PLACEHOLDER.encode(), self.repo_id.encode())
        self.files = {**self.files, "README.md": card}
        token = self.token or get_token()
        scan_files(self.files, [token] if token else [])
        check_target(self.repo_id, token)
        self.api = HfApi(endpoint=self.endpoint, token=token)
        # What was sent stays in the report when the answer to the commit was lost.
        self.uploaded, self.deleted = [], []
        if "/" not in self.repo_id:
            self.repo_id = f"{self.attempt(self.api.whoami)['name']}/{self.repo_id}"
        self.where = {"repo_id": self.repo_id, "repo_type": self.kind}
        self.attempt(self.open_repository)
        commit = self.attempt(self.commit_once)
        if self.tag is not None:
            self.attempt(lambda: self.set_tag(commit))
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        url = f"{self.api.endpoint}/{prefix}{self.repo_id}"
        changes = (sorted(self.uploaded), sorted(self.deleted), self.left_out)
        return PushReport(self.repo_id, self.kind, self.revision, commit, url, *changes)

    def attempt(self, step: Callable):
        """Runs a step, again after failures that pass, and turns the others into one line."""
        wait = 1.0
        for number in range(1, self.attempts + 1):
            try:
                return step()
            except (HTTP_ERROR, OSError, RuntimeError) as error:
                cause = http_cause(error)
                if cause is None:
                    raise
                answer = cause.response if isinstance(cause, HfHubHTTPError) else None
                if answer is not None and answer.status_code not in TRANSIENT:
                    raise ValueError(self.explain(cause, answer.status_code)) from error
                if number == self.attempts:
                    raise ConnectionError(
                        f"the Hub at {self.api.endpoint} did not take the upload in {number} attempts (last: "
                        f"{one_line(cause)}); nothing is lost: run the same command again."
                    ) from error
                asked = "" if answer is None else answer.headers.get("Retry-After", "")
                pause = min(max(wait, float(asked) if asked.isdigit() else 0.0), LONGEST_WAIT)
                logger.warning("%s; attempt %d in %.0f s", one_line(cause), number + 1, pause)
                sleep(pause)
                wait *= 2

    def open_repository(self) -> None:
        """Finds or creates the repository and the branch."""
        try:
            info = self.api.repo_info(**self.where)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError) or not self.create:
                raise
            sdk = "gradio" if self.kind == "space" else None
            self.api.create_repo(**self.where, private=self.private, exist_ok=True, space_sdk=sdk)
            info = self.api.repo_info(**self.where)
        if self.private and not info.private:
            raise ValueError(
                f"`repo_id` {self.repo_id} exists and is public, but a private upload was asked for; pass --public "
                "(`private=False`) if that is meant, or choose another name."
            )
        if self.revision not in ("main", *(branch.name for branch in self.api.list_repo_refs(**self.where).branches)):
            self.api.create_branch(**self.where, branch=self.revision, exist_ok=True)

    def commit_once(self) -> str:
        """Compares the branch with the local files and commits the difference, if there is one."""
        head = self.api.repo_info(**self.where, revision=self.revision).sha
        entries = self.api.list_repo_tree(**self.where, recursive=True, revision=head)
        remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        self.check_content(remote)
        added = [CommitOperationAdd(name, source) for name, source in self.files.items()]
        added = [operation for operation in added if not same_content(operation, remote.get(operation.path_in_repo))]
        gone = [name for name in remote if is_allowed(name, self.patterns) and name not in self.files]
        if not added and not gone:
            return head
        self.uploaded, self.deleted = [operation.path_in_repo for operation in added], gone
        operations = [*added, *map(CommitOperationDelete, gone)]
        commit = {"commit_message": self.message, "revision": self.revision, "parent_commit": head}
        return self.api.create_commit(**self.where, operations=operations, **commit).oid

    def check_content(self, remote: Iterable[str]) -> None:
        """Refuses a repository that holds something else, so that no push writes over it."""
        others = sorted(name for name in remote if name not in NEUTRAL_FILES)
        if self.marker in others:
            others = [name for name in others if not is_allowed(name, self.patterns)]
        if others:
            raise ValueError(
                f"`repo_id` {self.repo_id} holds other content (e.g. `{others[0]}`, wanted that of a gppc push, with "
                f"`{self.marker}`); choose another name, or delete that content there first if it is not needed. "
                "Nothing was changed."
            )

    def set_tag(self, commit: str) -> None:
        """Tags the commit; a tag that is there already must name the same one."""
        tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(**self.where).tags}
        if self.tag not in tags:
            self.api.create_tag(**self.where, tag=self.tag, revision=commit)
        elif tags[self.tag] != commit:
            raise ValueError(
                f"`tag` {self.tag} of {self.repo_id} names another commit ({tags[self.tag][:8]}); choose another tag. "
                f"The files are uploaded as {commit[:8]}."
            )

    def explain(self, error: Exception, status: int) -> str:
        """One line for an answer that trying again will not change."""
        where = f"{self.kind} `{self.repo_id}`"
        if isinstance(error, GatedRepoError):
            return f"{where} is gated: ask for access on {self.api.endpoint}/{self.repo_id}, then push again."
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{where} was not found, or your token may not see it: create it, allow its creation (without "
                "--no-create), or check the name and the token (`hf auth whoami`)."
            )
        if status == 401:
            return f"the token was refused by {self.api.endpoint} (401): run `hf auth login`, or set HF_TOKEN anew."
        if status == 403:
            return (
                f"the token may not write to {where} (403): use a token with write access, or a repository of your "
                "own (`hf auth whoami`)."
            )
        return f"the Hub refused {where}: {one_line(error)}"


def same_content(operation: CommitOperationAdd, remote: RepoFile | None) -> bool:
    """Whether a remote file holds the bytes that would be added, by the hash that the Hub keeps of it."""
    if remote is None or remote.size != operation.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def http_cause(error: BaseException) -> Exception | None:
    """The HTTP or connection error behind an error of the client; also a `RuntimeError` with nothing local behind it,
    which is how the client's own storage protocol reports a failed transfer."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, (HTTP_ERROR, ConnectionError, TimeoutError)):
            return current
        if isinstance(current, OSError):
            return None
        current = current.__cause__ or current.__context__
    return error if isinstance(error, RuntimeError) else None


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
