"""Uploads a set of files as one commit: resumable, repeatable, nothing half done."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hub_card.upload_scan import is_allowed, scan_files

logger = logging.getLogger(__name__)
# The client's own base class of connection errors, whichever HTTP library this version of the client uses.
HTTP_ERROR = HfHubHTTPError.__bases__[0]
# 409 and 412 mean that somebody else committed meanwhile: compare again, then commit.
TRANSIENT = {408, 409, 412, 425, 429, 500, 502, 503, 504}
# Files the Hub itself, or its form for new repositories, puts into an empty repository.
NEUTRAL_FILES = (".gitattributes", "README.md")
NO_TOKEN = "no access token: run `hf auth login` or set HF_TOKEN to a token with write access."
OFFLINE = "the client is offline; unset HF_HUB_OFFLINE to push."


@dataclass(frozen=True)
class Retries:
    """How often and how patiently to try again after dropped connections, 429 and 5xx."""

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        if self.attempts < 1:
            raise ValueError(f"`attempts` is {self.attempts}; wanted at least 1.")


@dataclass(frozen=True)
class Upload:
    """What to put where.

    Args:
        files (`Mapping[str, Path | bytes]`): Path in the repository -> file or content.
        repo_id (`str`): `name` or `namespace/name`.
        kind (`str`): `model`, `dataset` or `space`.
        patterns (`tuple[str, ...]`): The allow-list; remote files that match it and are no longer local are removed.
        marker (`str`): File by which a repository is known to be of this sort; one that holds other content is
            refused.
        private (`bool`, *optional*, defaults to `True`): Visibility of a new repository.
        revision (`str`, *optional*, defaults to `"main"`): Branch; created when absent.
        tag (`str`, *optional*): Tag for the result.
        create (`bool`, *optional*, defaults to `True`): Create the repository when it is absent.
        message (`str`, *optional*): Title of the commit.
        space_sdk (`str`, *optional*): For Spaces.
    """

    files: Mapping[str, Path | bytes]
    repo_id: str
    kind: str
    patterns: tuple[str, ...]
    marker: str
    private: bool = True
    revision: str = "main"
    tag: str | None = None
    create: bool = True
    message: str = "Upload with gppc push"
    space_sdk: str | None = None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class PushReport:
    """What a push did: the commit that holds the files, and which files changed (none when all was there already)."""

    repo_id: str
    kind: str
    revision: str
    commit: str
    url: str
    uploaded: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def check_target(repo_id: str) -> None:
    """Finds out, without the network, whether something could be pushed to a repository.

    Raises:
        ValueError: For a malformed name, a client that is offline, or a missing access token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is {repo_id!r}: {one_line(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise ValueError(OFFLINE)
    if get_token() is None:
        raise ValueError(NO_TOKEN)


def push(upload: Upload, *, token: str | None = None, endpoint: str | None = None, retries: Retries | None = None):
    """Brings a repository to the given files with at most one commit.

    The remote state is read before every attempt: what is there already is not sent again, and a commit whose answer
    was lost is recognised instead of being repeated. Nothing local is changed.

    Args:
        upload ([`Upload`]): The files and their place.
        token (`str`, *optional*): Access token; defaults to the one of `hf auth login` or `HF_TOKEN`.
        endpoint (`str`, *optional*): The Hub; defaults to `HF_ENDPOINT`.
        retries ([`Retries`], *optional*): Patience.

    Returns:
        [`PushReport`]

    Raises:
        ValueError: If a file may not be uploaded, the token is refused, the repository is gated, absent or holds other
            content, or is public where a private one was asked for. One line that says what to do.
        ConnectionError: If the Hub did not answer until the last attempt.
    """
    token = token or get_token()
    strangers = [name for name in upload.files if not is_allowed(name, upload.patterns)]
    if strangers:
        raise ValueError(f"`{strangers[0]}` is not a file of a {upload.kind} repository; nothing was uploaded.")
    scan_files(upload.files, [token] if token else [])
    if token is None:
        raise ValueError(NO_TOKEN)
    session = _Session(upload, HfApi(endpoint=endpoint, token=token), retries or Retries())
    return session.run()


class _Session:
    """One push; every step is repeatable."""

    def __init__(self, upload: Upload, api: HfApi, retries: Retries):
        self.upload, self.api, self.retries = upload, api, retries
        self.repo_id = upload.repo_id
        # What was sent stays in the report when the answer to the commit was lost.
        self.uploaded: list[str] = []
        self.deleted: list[str] = []

    def run(self) -> PushReport:
        upload = self.upload
        if "/" not in self.repo_id:
            self.repo_id = f"{self.attempt(self.api.whoami)['name']}/{self.repo_id}"
        self.attempt(self.open_repository)
        commit = self.attempt(self.commit_once)
        if upload.tag is not None:
            self.attempt(lambda: self.set_tag(commit))
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[upload.kind]
        url = f"{self.api.endpoint}/{prefix}{self.repo_id}"
        return PushReport(
            self.repo_id,
            upload.kind,
            upload.revision,
            commit,
            url,
            sorted(self.uploaded),
            sorted(self.deleted),
            list(upload.left_out),
        )

    def attempt(self, step: Callable):
        """Runs a step, again after failures that pass, and turns the others into one line."""
        wait = self.retries.first_wait
        for number in range(1, self.retries.attempts + 1):
            try:
                return step()
            except HFValidationError as error:
                raise ValueError(f"`repo_id` is {self.repo_id!r}: {one_line(error)}") from error
            except OfflineModeIsEnabled as error:
                raise ValueError(OFFLINE) from error
            except (HTTP_ERROR, OSError, RuntimeError) as error:
                cause = http_cause(error)
                if cause is None:
                    raise
                if not is_transient(cause):
                    raise ValueError(self.explain(cause)) from error
                if number == self.retries.attempts:
                    raise ConnectionError(
                        f"the Hub at {self.api.endpoint} did not take the upload in {number} attempts (last: "
                        f"{one_line(cause)}); nothing is lost: run the same command again."
                    ) from error
                pause = min(max(wait, retry_after(cause)), self.retries.longest_wait)
                logger.warning("%s; attempt %d in %.0f s", one_line(cause), number + 1, pause)
                self.retries.sleep(pause)
                wait *= 2

    def open_repository(self) -> None:
        """Finds or creates the repository and the branch."""
        upload, kind = self.upload, self.upload.kind
        try:
            info = self.api.repo_info(self.repo_id, repo_type=kind)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            if not upload.create:
                raise
            self.api.create_repo(
                self.repo_id, repo_type=kind, private=upload.private, exist_ok=True, space_sdk=upload.space_sdk
            )
            info = self.api.repo_info(self.repo_id, repo_type=kind)
        if upload.private and not info.private:
            raise ValueError(
                f"`repo_id` {self.repo_id} exists and is public, but a private upload was asked for; pass --public "
                "(`private=False`) if that is meant, or choose another name."
            )
        if upload.revision != "main":
            branches = {branch.name for branch in self.api.list_repo_refs(self.repo_id, repo_type=kind).branches}
            if upload.revision not in branches:
                self.api.create_branch(self.repo_id, repo_type=kind, branch=upload.revision, exist_ok=True)

    def commit_once(self) -> str:
        """Compares the branch with the local files and commits the difference, if there is one."""
        upload, kind = self.upload, self.upload.kind
        head = self.api.repo_info(self.repo_id, repo_type=kind, revision=upload.revision).sha
        entries = self.api.list_repo_tree(self.repo_id, recursive=True, repo_type=kind, revision=head)
        # Folders have no blob.
        remote = {entry.path: entry for entry in entries if getattr(entry, "blob_id", None)}
        self.check_content(remote)
        changed = [name for name, source in upload.files.items() if not same_content(source, remote.get(name))]
        gone = [name for name in remote if is_allowed(name, upload.patterns) and name not in upload.files]
        if not changed and not gone:
            return head
        self.uploaded, self.deleted = changed, gone
        operations = [
            CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
            for name, source in ((name, upload.files[name]) for name in changed)
        ]
        operations += [CommitOperationDelete(name) for name in gone]
        return self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=upload.message,
            repo_type=kind,
            revision=upload.revision,
            parent_commit=head,
        ).oid

    def check_content(self, remote: Iterable[str]) -> None:
        """Refuses a repository that holds something else, so that no push writes over it."""
        others = sorted(name for name in remote if name not in NEUTRAL_FILES)
        if others and self.upload.marker not in others:
            raise ValueError(
                f"`repo_id` {self.repo_id} holds other content (e.g. `{others[0]}`, and no `{self.upload.marker}`); "
                "choose another name, or delete that repository first if it is not needed. Nothing was changed."
            )
        strangers = [name for name in others if not is_allowed(name, self.upload.patterns)]
        if strangers:
            raise ValueError(
                f"`repo_id` {self.repo_id} holds other content (e.g. `{strangers[0]}`, no file of a gppc push); choose "
                "another name, or remove that file there first. Nothing was changed."
            )

    def set_tag(self, commit: str) -> None:
        """Tags the commit; a tag that is there already must name the same one."""
        tags = {tag.name: tag for tag in self.api.list_repo_refs(self.repo_id, repo_type=self.upload.kind).tags}
        found = tags.get(self.upload.tag)
        if found is None:
            self.api.create_tag(self.repo_id, tag=self.upload.tag, revision=commit, repo_type=self.upload.kind)
        elif found.target_commit != commit:
            raise ValueError(
                f"`tag` {self.upload.tag} of {self.repo_id} names another commit ({found.target_commit[:8]}); choose "
                f"another tag. The files are uploaded as {commit[:8]}."
            )

    def explain(self, error: Exception) -> str:
        """One line for an answer that trying again will not change."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        where = f"{self.upload.kind} `{self.repo_id}`"
        if isinstance(error, GatedRepoError):
            return f"{where} is gated: ask for access on {self.api.endpoint}/{self.repo_id}, then push again."
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{where} was not found, or your token may not see it: create it, allow its creation (without "
                "--no-create), or check the name and the token (`hf auth whoami`)."
            )
        if isinstance(error, RevisionNotFoundError):
            return f"`revision` {self.upload.revision} of {where} was not found; check its name."
        if status == 401:
            return (
                f"the token was refused by {self.api.endpoint} (401): run `hf auth login`, or set HF_TOKEN to a valid "
                "token with write access."
            )
        if status == 403:
            return (
                f"the token may not write to {where} (403): use a token with write access, or a repository of your "
                "own (`hf auth whoami`)."
            )
        return f"the Hub refused {where}: {one_line(error)}"


def same_content(source: Path | bytes, remote) -> bool:
    """Whether a remote file holds these bytes, by the hash that the Hub keeps of it."""
    if remote is None:
        return False
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size != remote.size:
        return False
    if remote.lfs is not None:
        digest = hashlib.sha256()
        wanted = remote.lfs.sha256
    else:
        digest = hashlib.sha1(b"blob %d\0" % size)
        wanted = remote.blob_id
    if isinstance(source, bytes):
        digest.update(source)
    else:
        with source.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest() == wanted


def http_cause(error: BaseException) -> Exception | None:
    """The HTTP or connection error behind an error of the client, which wraps those of its upload threads.

    A `RuntimeError` with nothing local behind it is how the client's own storage protocol reports a failed transfer.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, (HTTP_ERROR, ConnectionError, TimeoutError)):
            return current
        if isinstance(current, OSError):
            return None
        current = current.__cause__ or current.__context__
    return error if isinstance(error, RuntimeError) else None


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, "status_code", None) in TRANSIENT
    return True


def retry_after(error: Exception) -> float:
    """Seconds the server asked to wait, 0 where it did not say."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isdigit() else 0.0


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
