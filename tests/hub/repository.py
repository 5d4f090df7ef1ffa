"""What a Hub stores: repositories as git sees them, in memory, without any HTTP.

Blobs, trees and commits carry the ids that git would give them; a commit is an immutable snapshot of all its files.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple


NAME = re.compile(r"(?!.*(?:--|\.\.))(?![-.])[\w.-]{1,96}(?<![-.])(?<!\.git)")
BRANCH = re.compile(r"(?!refs/)(?!.*(?:\.\.|//|@\{))[\w.][\w./@+-]*(?<![/.])")
HEX = re.compile(r"[0-9a-f]{7,40}")


class Refused(Exception):
    """A request that the Hub answers with an error: status, message, and the code that clients dispatch on."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Blob:
    """The bytes of one file; a large file (`lfs`) stands in the tree as a pointer to its sha256."""

    content: bytes = field(repr=False)
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def git_id(self) -> str:
        return git_object_id("blob", self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id

    @property
    def size(self) -> int:
        return len(self.content)


Files = Mapping[str, Blob]


@dataclass(frozen=True)
class Commit:
    files: Files = field(repr=False)
    parent: str | None
    summary: str
    description: str
    author: str
    date: datetime

    @cached_property
    def oid(self) -> str:
        person = f"{self.author} <{self.author}@users.noreply.invalid> {int(self.date.timestamp())} +0000"
        lines = [f"tree {tree_ids(self.files)['']}", *([f"parent {self.parent}"] if self.parent else [])]
        lines += [f"author {person}", f"committer {person}", "", self.summary, "", self.description]
        return git_object_id("commit", "\n".join(lines).encode())


class Add(NamedTuple):
    path: str
    content: bytes


class AddLarge(NamedTuple):
    path: str
    sha256: str
    size: int | None = None  # not sent with a copy


class Delete(NamedTuple):
    path: str


class DeleteFolder(NamedTuple):
    path: str


Operation = Add | AddLarge | Delete | DeleteFolder


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    head: str


@dataclass
class Repository:
    kind: str  # "model" or "dataset"
    name: str  # "user/name"
    private: bool = False
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # uploaded objects by sha256, published or not

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]


def git_object_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def tree_ids(files: Files) -> dict[str, str]:
    """Folder -> id of its git tree; "" is the root."""
    children: dict[str, dict[str, tuple[str, str]]] = {"": {}}  # folder -> name -> (mode, id)
    for path, blob in files.items():
        children.setdefault(folder_of(path), {})[path.rpartition("/")[2]] = ("100644", blob.git_id)
        for folder in folders_above(path):
            children.setdefault(folder, {})
    ids = {}
    for folder in sorted(children, key=lambda name: (name != "", name.count("/")), reverse=True):  # deepest first
        # Git sorts a folder as if its name ended in a slash.
        entries = sorted(children[folder].items(), key=lambda item: item[0] + "/" * (item[1][0] == "40000"))
        listing = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for name, (mode, oid) in entries)
        ids[folder] = git_object_id("tree", listing)
        if folder:
            children[folder_of(folder)][folder.rpartition("/")[2]] = ("40000", ids[folder])
    return ids


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def folders_above(path: str) -> list[str]:
    """`a/b/c` -> ["a/b", "a"]"""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]


def checked_path(path: str) -> str:
    """The path itself, or 400 if it could mean something outside the repository."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if {"", ".", ".."} & set(parts) or ".git" in {part.lower() for part in parts} or re.search(r"[\\\0-\x1f]", path):
        raise Refused(400, f"Invalid path in repository: {path!r}")
    return path


def checked_name(name: str) -> str:
    user, _, short = name.partition("/")
    if not (NAME.fullmatch(user) and NAME.fullmatch(short)):
        raise Refused(400, f"Invalid repository name: {name!r}")
    return name


def create(kind: str, name: str, private: bool, files: Mapping[str, bytes]) -> Repository:
    """A repository with one commit by its owner."""
    repo = Repository(kind, checked_name(name), private)
    first = Commit(
        MappingProxyType({path: Blob(content) for path, content in files.items()}),
        parent=None,
        summary="initial commit",
        description="",
        author=repo.owner,
        date=repo.created,
    )
    repo.commits[first.oid] = first
    repo.branches["main"] = first.oid
    return repo


def resolve(repo: Repository, revision: str) -> Commit:
    """A branch, a tag, a pull request (`refs/pr/1`), a full reference or a commit id of at least 7 digits."""
    found = repo.branches.get(revision.removeprefix("refs/heads/")) or repo.tags.get(
        revision.removeprefix("refs/tags/")
    )
    if found is None and (pull_request := pull_request_of(repo, revision)):
        found = pull_request.head
    if found is None and HEX.fullmatch(revision):
        candidates = [oid for oid in repo.commits if oid.startswith(revision)]
        found = candidates[0] if len(candidates) == 1 else None
    if found is None:
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return repo.commits[found]


def pull_request_of(repo: Repository, revision: str) -> PullRequest | None:
    number = revision.removeprefix("refs/pr/")
    return repo.pull_requests.get(int(number)) if revision != number and number.isdecimal() else None


def history(repo: Repository, revision: str = "main") -> list[Commit]:
    """Newest first."""
    commits = [resolve(repo, revision)]
    while commits[-1].parent:
        commits.append(repo.commits[commits[-1].parent])
    return commits


def entry(repo: Repository, commit: Commit, path: str) -> Blob:
    if path not in commit.files:
        raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    return commit.files[path]


def changed(repo: Repository, files: Files, operations: Iterable[Operation]) -> Files:
    """The snapshot after `operations`, in their order."""
    result = dict(files)
    for operation in operations:
        path = checked_path(operation.path.rstrip("/") if isinstance(operation, DeleteFolder) else operation.path)
        match operation:
            case Add():
                result[path] = Blob(operation.content)
            case AddLarge():
                result[path] = Blob(large_object(repo, operation), lfs=True)
            case Delete():
                if result.pop(path, None) is None:
                    raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            case DeleteFolder():
                inside = [name for name in result if name.startswith(f"{path}/")]
                if not inside:
                    raise Refused(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
                for name in inside:
                    del result[name]
    for path in result:
        if folder := next((folder for folder in folders_above(path) if folder in result), None):
            raise Refused(400, f"{folder} would be a file and a folder")
    return MappingProxyType(result)


def large_object(repo: Repository, operation: AddLarge) -> bytes:
    path, sha256, size = operation
    content = repo.large.get(sha256)
    if content is None:
        raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path} ({sha256})")
    if size not in (None, len(content)):
        raise Refused(400, f"LFS pointer of {path} says {size} bytes, the object has {len(content)}")
    return content


def commit(
    repo: Repository,
    operations: Iterable[Operation],
    *,
    author: str,
    summary: str,
    description: str = "",
    revision: str = "main",
    parent: str | None = None,
) -> Commit:
    """Move a branch or a pull request one commit on; all operations or none."""
    head = resolve(repo, revision)
    branch = revision.removeprefix("refs/heads/")
    pull_request = pull_request_of(repo, revision)
    if branch not in repo.branches and pull_request is None:
        raise Refused(400, f"Commits go to a branch or a pull request, not to {revision}")
    if parent and not head.oid.startswith(parent):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    new = snapshot(repo, head, operations, author, summary, description)
    if branch in repo.branches:
        repo.branches[branch] = new.oid
    else:
        pull_request.head = new.oid
    return new


def open_pull_request(
    repo: Repository,
    operations: Iterable[Operation],
    *,
    author: str,
    summary: str,
    description: str = "",
    revision: str = "main",
    parent: str | None = None,
) -> tuple[PullRequest, Commit]:
    """A pull request with one commit on top of `parent`, or of the head of `revision`."""
    new = snapshot(repo, resolve(repo, parent or revision), operations, author, summary, description)
    number = len(repo.pull_requests) + 1
    repo.pull_requests[number] = PullRequest(number, summary, author, new.oid)
    return repo.pull_requests[number], new


def snapshot(
    repo: Repository, base: Commit, operations: Iterable[Operation], author: str, summary: str, description: str
) -> Commit:
    if not summary:
        raise Refused(400, "A commit needs a summary")
    files = changed(repo, base.files, operations)
    new = Commit(files, base.oid, summary, description, author, datetime.now(UTC))
    repo.commits[new.oid] = new
    return new


def create_branch(repo: Repository, branch: str, start: str = "main") -> None:
    if not BRANCH.fullmatch(branch):
        raise Refused(400, f"Invalid reference for a branch: {branch}")
    if branch in repo.branches:
        raise Refused(409, f"Reference already exists: refs/heads/{branch}")
    repo.branches[branch] = resolve(repo, start).oid


def delete_branch(repo: Repository, branch: str) -> None:
    if branch == "main":
        raise Refused(403, "Cannot delete refs/heads/main")
    if repo.branches.pop(branch, None) is None:
        raise Refused(404, f"Reference does not exist: refs/heads/{branch}", "RevisionNotFound")


def create_tag(repo: Repository, tag: str, revision: str = "main") -> None:
    if not BRANCH.fullmatch(tag):
        raise Refused(400, f"Invalid reference for a tag: {tag}")
    target = resolve(repo, revision).oid
    if tag in repo.tags:
        raise Refused(409, f"Tag already exists: refs/tags/{tag}")
    repo.tags[tag] = target


def delete_tag(repo: Repository, tag: str) -> None:
    if repo.tags.pop(tag, None) is None:
        raise Refused(404, f"Tag does not exist: refs/tags/{tag}", "RevisionNotFound")


def file_listing(path: str, blob: Blob) -> dict:
    listed = {"type": "file", "oid": blob.git_id, "size": blob.size, "path": path}
    if blob.lfs:
        listed["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return listed


def listing(commit: Commit) -> dict[str, dict]:
    """Every file and folder of a commit, by path, as the Hub describes them."""
    listed = {path: file_listing(path, blob) for path, blob in commit.files.items()}
    for folder, oid in tree_ids(commit.files).items():
        if folder:
            listed[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
    return dict(sorted(listed.items()))


def tree(commit: Commit, folder: str = "", recursive: bool = False) -> list[dict]:
    listed = listing(commit)
    if folder and listed.get(folder, {}).get("type") != "directory":
        raise Refused(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound", X_Repo_Commit=commit.oid)
    prefix = f"{folder}/" if folder else ""
    return [
        item
        for path, item in listed.items()
        if path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))
    ]


def last_changes(repo: Repository, commit: Commit) -> dict[str, Commit]:
    """Path -> the commit that last changed the file or folder."""
    found = {}
    commits = history(repo, commit.oid)
    for new, old in zip(commits, [*commits[1:], None]):
        before = listing(old) if old else {}
        for path, item in listing(new).items():
            if path not in found and before.get(path, {}).get("oid") != item["oid"]:
                found[path] = new
    return {path: found[path] for path in listing(commit)}
