"""How files come and go: LFS uploads in one piece or in parts, and downloads.

Uploads and downloads of large files go to addresses that need no token, as the Hub's storage does: an upload's is a
secret handed out once, a download's is signed.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

from tests.hub import repository
from tests.hub.call import Call, Response, as_json
from tests.hub.repository import Refused, Repository


PREFIX = r"/(?P<kind>datasets/|)(?P<name>[^/]+(?:/[^/]+)?)"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Upload:
    """An object that a client was told to send."""

    repo: Repository = field(repr=False)
    oid: str
    size: int
    part_size: int | None
    parts: dict[int, bytes] = field(default_factory=dict, repr=False)

    def store(self, content: bytes) -> None:
        if len(content) != self.size or hashlib.sha256(content).hexdigest() != self.oid:
            raise Refused(400, f"{len(content)} bytes that are not the announced object {self.oid}")
        self.repo.large[self.oid] = content


def kind_of(prefix: str) -> str:
    return "dataset" if prefix else "model"


def batch(call: Call, kind: str, name: str) -> Response:
    """Where to send each object; objects that are stored already need no action."""
    repo = call.readable(kind_of(kind), name)
    call.contributor()
    body = call.json()
    if body.get("operation") != "upload" or "basic" not in body.get("transfers", ["basic"]):
        raise Refused(501, "The loopback Hub implements LFS uploads of the basic and multipart transfers only")
    answer = []
    for item in body.get("objects", []):
        oid, size = str(item.get("oid")), item.get("size")
        listed = {"oid": oid, "size": size}
        if not SHA256.fullmatch(oid) or not isinstance(size, int) or size <= 0:
            listed["error"] = {"code": 422, "message": "An object needs a sha256 and a size above 0"}
        elif oid not in repo.large:
            verify = {"href": f"{call.hub.url(kind_of(kind), repo.name)}.git/info/lfs/objects/verify"}
            listed["actions"] = {"upload": upload_action(call, repo, oid, size), "verify": verify}
        answer.append(listed)
    return as_json({"transfer": "basic", "objects": answer})


def upload_action(call: Call, repo: Repository, oid: str, size: int) -> dict:
    secret = secrets.token_urlsafe(16)
    part_size = call.hub.part_size if size > call.hub.part_size else None
    call.hub.uploads[secret] = Upload(repo, oid, size, part_size)
    href = f"{call.hub.endpoint}/uploads/{secret}"
    if part_size is None:
        return {"href": href}
    count = -(-size // part_size)
    return {
        "href": href,
        "header": {"chunk_size": str(part_size)} | {str(n): f"{href}/{n}" for n in range(1, count + 1)},
    }


def upload_of(call: Call, secret: str) -> Upload:
    if secret not in call.hub.uploads:
        raise Refused(404, "No such upload")
    return call.hub.uploads[secret]


def put_object(call: Call, secret: str) -> Response:
    upload = upload_of(call, secret)
    if upload.part_size is not None:
        raise Refused(400, "This object is to be sent in parts")
    upload.store(call.body)
    return Response(200, headers={"ETag": part_etag(call.body)})


def put_part(call: Call, secret: str, part: str) -> Response:
    upload = upload_of(call, secret)
    number = int(part)
    if upload.part_size is None or not 1 <= number <= -(-upload.size // upload.part_size):
        raise Refused(400, f"There is no part {part} in this upload")
    expected = min(upload.part_size, upload.size - (number - 1) * upload.part_size)
    if len(call.body) != expected:
        raise Refused(400, f"Part {part} must have {expected} bytes, not {len(call.body)}")
    upload.parts[number] = call.body
    return Response(200, headers={"ETag": part_etag(call.body)})


def part_etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def complete(call: Call, secret: str) -> Response:
    upload, body = upload_of(call, secret), call.json()
    named = [(part.get("partNumber"), part.get("etag")) for part in body.get("parts", [])]
    have = [(number, part_etag(upload.parts[number])) for number in sorted(upload.parts)]
    if body.get("oid") != upload.oid or named != have:
        raise Refused(400, "The parts named are not the parts received")
    upload.store(b"".join(upload.parts[number] for number in sorted(upload.parts)))
    upload.parts.clear()
    return as_json({"success": True})


def verify(call: Call, kind: str, name: str) -> Response:
    repo, body = call.readable(kind_of(kind), name), call.json()
    if len(repo.large.get(body.get("oid"), b"")) != body.get("size"):
        raise Refused(404, f"The object {body.get('oid')} of {body.get('size')} bytes is not stored")
    return Response(200, b"OK")


def resolve_file(call: Call, kind: str, name: str, revision: str, path: str) -> Response:
    """A regular file itself; for a large one, the address of its content."""
    repo = call.readable(kind_of(kind), name)
    commit = repository.resolve(repo, revision)
    blob = repository.entry(repo, commit, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if not blob.lfs:
        return ranged(call, blob.content, headers)
    linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
    location = f"{call.hub.storage}/downloads/{signature(call, repo, blob.sha256)}/{repo.kind}s/{quote(repo.name)}"
    return Response(302, b"Found", {**headers, **linked, "Location": f"{location}/{blob.sha256}"})


def signature(call: Call, repo: Repository, sha256: str) -> str:
    return hmac.digest(call.hub.secret, f"{repo.kind}/{repo.name}/{sha256}".encode(), "sha256").hex()


def download(call: Call, sign: str, kind: str, name: str, sha256: str) -> Response:
    repo = call.hub.repositories.get((kind, name))
    if repo is None or not hmac.compare_digest(sign, signature(call, repo, sha256)) or sha256 not in repo.large:
        raise Refused(403, "The address is not signed, or what it named is gone")
    return ranged(call, repo.large[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


def ranged(call: Call, content: bytes, headers: dict[str, str]) -> Response:
    """All of the content, or the one range that the request asks for."""
    size = len(content)
    headers = {"Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if asked is None or asked[0] == "bytes=-":
        return Response(200, content, headers)
    first, last = asked.groups()
    if first:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, stop = max(size - int(last), 0), size
    if start >= stop:
        raise Refused(416, "The range is outside of the file", Content_Range=f"bytes */{size}")
    return Response(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


ENDPOINTS: list[tuple[str, re.Pattern, Callable[..., Response]]] = [
    (method, re.compile(path), function)
    for method, path, function in [
        ("POST", f"{PREFIX}\\.git/info/lfs/objects/batch", batch),
        ("POST", f"{PREFIX}\\.git/info/lfs/objects/verify", verify),
        ("PUT", r"/uploads/(?P<secret>[^/]+)", put_object),
        ("PUT", r"/uploads/(?P<secret>[^/]+)/(?P<part>\d+)", put_part),
        ("POST", r"/uploads/(?P<secret>[^/]+)", complete),
        (
            "GET",
            r"/downloads/(?P<sign>[^/]+)/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/(?P<sha256>\w+)",
            download,
        ),
        ("GET", f"{PREFIX}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve_file),
    ]
]
