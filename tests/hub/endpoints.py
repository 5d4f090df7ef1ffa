"""The calls of the Hub's API, but for the transport of large files.

Each function is `(call, **parts of the path) -> Response`; `ENDPOINTS` says which requests it answers.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs

import yaml

from tests.hub import card_metadata, git_patterns, repository
from tests.hub.call import Call, Response, as_json, unauthenticated
from tests.hub.repository import Refused, Repository


LARGE = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx
    *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
    *.wasm *.xz *.zip *.zst *tfevents*
"""
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE.split())
REPO = r"(?P<kind>model|dataset)s/(?P<name>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"


def who_am_i(call: Call) -> Response:
    if call.user is None:
        raise unauthenticated()
    role = "write" if call.may_write else "read"
    token = {"displayName": f"token of {call.user}", "role": role}
    account = {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "orgs": []}
    return as_json({**account, "auth": {"type": "access_token", "accessToken": token}})


def validate_yaml(call: Call) -> Response:
    body = call.json()
    errors, warnings = card_metadata.review(body.get("content") or "", body.get("repoType") or "model")
    answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(answer | ({"error": "\n".join(errors)} if errors else {}), 400 if errors else 200)


# Repositories


def named_in(call: Call, body: dict) -> tuple[str, str]:
    """Kind and full name of the repository that the body of a request is about."""
    kind = body.get("type") or "model"
    if kind not in ("model", "dataset"):
        raise Refused(501, f"The loopback Hub has no repositories of type {kind}")
    name = body.get("name") or ""
    return kind, name if "/" in name else f"{body.get('organization') or call.user}/{name}"


def wants_private(body: dict) -> bool | None:
    """Newer clients send `visibility`, older ones `private`."""
    visibility = body.get("visibility")
    if visibility not in (None, "public", "private"):
        raise Refused(501, f"The loopback Hub has no repositories with visibility {visibility}")
    return body.get("private") if visibility is None else visibility == "private"


def create_repository(call: Call) -> Response:
    user, body = call.contributor(), call.json()
    kind, name = named_in(call, body)
    owner = name.split("/")[0]
    if owner != user:
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    url = call.hub.url(kind, name)
    if (kind, name) in call.hub.repositories:
        message = f"You already created this {kind} repo: {name}"
        return as_json({"error": message, "url": url}, 409, {"X-Error-Message": message})
    first = {".gitattributes": ATTRIBUTES.encode()}
    call.hub.repositories[kind, name] = repository.create(kind, name, bool(wants_private(body)), first)
    call.hub.moved.pop((kind, name), None)
    return as_json({"url": url, "name": name, "id": name})


def delete_repository(call: Call) -> Response:
    call.contributor()
    kind, name = named_in(call, call.json())
    del call.hub.repositories[kind, call.writable(kind, name).name]
    return Response(200, b"OK")


def change_settings(call: Call, kind: str, name: str) -> Response:
    repo, body = call.writable(kind, name), call.json()
    if strangers := sorted(set(body) - {"private", "visibility"}):
        raise Refused(501, f"The loopback Hub does not implement the settings {strangers}")
    private = wants_private(body)
    repo.private = repo.private if private is None else private
    return as_json({"private": repo.private})


def move_repository(call: Call) -> Response:
    body = call.json()
    kind, old = named_in(call, {**body, "name": body.get("fromRepo")})
    new = body.get("toRepo") or ""
    repo = call.writable(kind, old)
    if new.split("/")[0] != call.user:
        raise Refused(403, f"You don't have the rights to move a {kind} to {new}")
    if (kind, new) in call.hub.repositories:
        raise Refused(409, f"{new} exists")
    repository.checked_name(new)
    repo.name = new
    call.hub.repositories[kind, new] = call.hub.repositories.pop((kind, old))
    call.hub.moved = {key: target for key, target in call.hub.moved.items() if key != (kind, new)} | {(kind, old): new}
    return Response(200, b"OK")


def card_of(commit: repository.Commit) -> dict:
    readme = commit.files.get("README.md")
    try:
        return card_metadata.read(readme.content.decode("utf-8", errors="replace")) or {} if readme else {}
    except (yaml.YAMLError, ValueError):
        return {}


def describe(call: Call, repo: Repository, commit: repository.Commit) -> dict:
    """All that is known of a repository; what the Hub would infer from the files is not."""
    card = card_of(commit)
    tags = card.get("tags") or []
    licenses = [f"license:{card['license']}"] if isinstance(card.get("license"), str) else []
    described = {
        "_id": repository.git_object_id("repository", repo.name.encode())[:24],
        "id": repo.name,
        **({"modelId": repo.name} if repo.kind == "model" else {}),
        "author": repo.owner,
        "sha": commit.oid,
        "createdAt": time(repo.created),
        "lastModified": time(repository.resolve(repo, "main").date),
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [*tags, *(tag for tag in [card.get("library_name"), *licenses] if tag and tag not in tags)],
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        "usedStorage": sum(map(len, repo.large.values())),
    }
    described |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card and repo.kind == "model"}
    if card:
        described["cardData"] = json.loads(json.dumps(card, default=str))
    if call.flag("blobs"):
        described["siblings"] = [sibling(path, blob) for path, blob in sorted(commit.files.items())]
    return described


def sibling(path: str, blob: repository.Blob) -> dict:
    listed = repository.file_listing(path, blob)
    large = {"lfs": {"sha256": blob.sha256, **listed["lfs"]}} if blob.lfs else {}
    return {"rfilename": path, "size": blob.size, "blobId": blob.git_id, **large}


def expanded(call: Call, described: dict) -> dict:
    """Only the properties that `expand` names, if it names any."""
    wanted = call.query.get("expand", []) + call.query.get("expand[]", [])
    optional = {"cardData", "library_name", "pipeline_tag"}
    if strangers := sorted(set(wanted) - set(described) - optional):
        raise Refused(501, f"The loopback Hub does not know the properties {strangers}")
    return {key: described[key] for key in ("_id", "id", *wanted) if key in described} if wanted else described


def repository_info(call: Call, kind: str, name: str, revision: str = "main") -> Response:
    call.only_knows("blobs", "expand", "expand[]", "full")
    repo = call.readable(kind, name)
    return as_json(expanded(call, describe(call, repo, repository.resolve(repo, revision))))


def list_repositories(call: Call, kind: str) -> Response:
    call.only_knows("author", "search", "filter", "sort", "direction", "full", "cardData", "expand", "expand[]")
    sort = call.query.get("sort", ["lastModified"])[-1]
    if sort not in ("lastModified", "createdAt"):
        raise Refused(501, f"The loopback Hub cannot sort by {sort}")
    author, search = (call.query.get(key, [""])[-1] for key in ("author", "search"))
    found = []
    for repo in call.hub.repositories.values():
        visible = repo.kind == kind and (not repo.private or repo.owner == call.user)
        if visible and author in ("", repo.owner) and search.lower() in repo.name.lower():
            described = describe(call, repo, repository.resolve(repo, "main"))
            if set(call.query.get("filter", [])) <= set(described["tags"]):
                found.append(described)
    found.sort(key=lambda described: described[sort], reverse=True)
    hidden = set() if call.flag("full") or "expand" in call.query else {"siblings", "sha", "lastModified"}
    hidden |= set() if call.flag("cardData") or call.flag("full") or "expand" in call.query else {"cardData"}
    return call.page([expanded(call, {key: item[key] for key in item if key not in hidden}) for item in found])


# Content


def time(date) -> str:
    return date.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def with_last_commit(repo: Repository, commit: repository.Commit, items: list[dict]) -> list[dict]:
    changes = repository.last_changes(repo, commit)
    return [
        item | {"lastCommit": {"id": last.oid, "title": last.summary, "date": time(last.date)}}
        for item in items
        for last in [changes[item["path"]]]
    ]


def list_tree(call: Call, kind: str, name: str, revision: str, path: str = "") -> Response:
    call.only_knows("recursive", "expand")
    repo = call.readable(kind, name)
    commit = repository.resolve(repo, revision)
    items = repository.tree(commit, path.strip("/"), recursive=call.flag("recursive"))
    return call.page(with_last_commit(repo, commit, items) if call.flag("expand") else items)


def paths_info(call: Call, kind: str, name: str, revision: str) -> Response:
    """Paths that are not there are left out of the answer."""
    repo = call.readable(kind, name)
    commit = repository.resolve(repo, revision)
    if call.headers.get("content-type", "").startswith("application/json"):
        body = call.json()
        paths, expand = body.get("paths", []), bool(body.get("expand"))
    else:
        form = parse_qs(call.body.decode(), keep_blank_values=True)
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[-1].lower() == "true"
    listed = repository.listing(commit)
    items = [listed[path] for path in dict.fromkeys(path.strip("/") for path in paths) if path in listed]
    return as_json(with_last_commit(repo, commit, items) if expand else items)


def list_references(call: Call, kind: str, name: str) -> Response:
    repo = call.readable(kind, name)

    def references(prefix: str, targets: dict) -> list[dict]:
        return [{"name": str(key), "ref": f"{prefix}{key}", "targetCommit": targets[key]} for key in targets]

    answer = {
        "branches": references("refs/heads/", repo.branches),
        "converts": [],
        "tags": references("refs/tags/", repo.tags),
    }
    if call.flag("include_prs"):
        heads = {number: pull_request.head for number, pull_request in repo.pull_requests.items()}
        answer["pullRequests"] = references("refs/pr/", heads)
    return as_json(answer)


def list_commits(call: Call, kind: str, name: str, revision: str) -> Response:
    call.only_knows()
    return call.page(
        [
            {
                "id": commit.oid,
                "title": commit.summary,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": time(commit.date),
            }
            for commit in repository.history(call.readable(kind, name), revision)
        ]
    )


def create_branch(call: Call, kind: str, name: str, branch: str) -> Response:
    start = call.json().get("startingPoint") if call.body else None
    repository.create_branch(call.writable(kind, name), branch, start or "main")
    return Response(200, b"OK")


def delete_branch(call: Call, kind: str, name: str, branch: str) -> Response:
    repository.delete_branch(call.writable(kind, name), branch)
    return Response(200, b"OK")


def create_tag(call: Call, kind: str, name: str, revision: str) -> Response:
    repository.create_tag(call.writable(kind, name), call.json().get("tag") or "", revision)
    return Response(200, b"OK")


def delete_tag(call: Call, kind: str, name: str, tag: str) -> Response:
    repository.delete_tag(call.writable(kind, name), tag)
    return Response(200, b"OK")


# Commits


def target(call: Call, kind: str, name: str) -> Repository:
    """The repository that a commit is for: one's own, or any visible one if it is to become a pull request."""
    repo = call.readable(kind, name)
    if call.contributor() != repo.owner and not call.flag("create_pr"):
        raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return repo


def preupload(call: Call, kind: str, name: str, revision: str) -> Response:
    """How each file is to be sent, and the id of what stands there now."""
    commit = repository.resolve(target(call, kind, name), revision)
    body = call.json()
    attributes, ignore = (
        commit.files[path].content.decode() if path in commit.files else ""
        for path in (".gitattributes", ".gitignore")
    )
    ignore = body.get("gitIgnore", ignore)
    answer = []
    for file in body["files"]:
        path, size = repository.checked_path(file["path"]), file["size"]
        binary = b"\0" in base64.b64decode(file.get("sample") or "")
        large = size and (binary or size > call.hub.regular_limit or git_patterns.is_large(attributes, path))
        item = {"path": path, "uploadMode": "lfs" if large else "regular"}
        item["shouldIgnore"] = git_patterns.is_ignored(ignore, path)
        if path in commit.files:
            item["oid"] = commit.files[path].etag
        answer.append(item)
    return as_json({"files": answer, "commitOid": commit.oid})


def parsed_operations(lines: list[dict], regular_limit: int) -> Iterator[repository.Operation]:
    for line in lines:
        key, value = line["key"], line["value"]
        match key:
            case "file":
                encoded = value.get("encoding") == "base64"
                content = base64.b64decode(value["content"], validate=True) if encoded else value["content"].encode()
                if len(content) > regular_limit:
                    raise Refused(400, f"{value['path']} is too large for a regular file: send it with LFS")
                yield repository.Add(value["path"], content)
            case "lfsFile":
                if value.get("algo") != "sha256":
                    raise Refused(400, f"{value['path']}: only sha256 is known")
                yield repository.AddLarge(value["path"], value["oid"], value.get("size"))
            case "deletedFile":
                yield repository.Delete(value["path"])
            case "deletedFolder":
                yield repository.DeleteFolder(value["path"])
            case _:
                raise Refused(400, f"Unknown operation in a commit: {key}")


def check_card(kind: str, operations: list[repository.Operation]) -> None:
    for operation in operations:
        if isinstance(operation, repository.Add) and operation.path == "README.md":
            errors, _ = card_metadata.review(operation.content.decode("utf-8", errors="replace"), kind)
            if errors:
                raise Refused(400, f"Invalid metadata in README.md: {'; '.join(errors)}")


def commit_files(call: Call, kind: str, name: str, revision: str) -> Response:
    call.only_knows("create_pr")
    repo = target(call, kind, name)
    try:
        header, *lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        if header["key"] != "header":
            raise Refused(400, "The first line of a commit must be its header")
        operations = list(parsed_operations(lines, call.hub.regular_limit))
        about = {
            "author": call.user,
            "summary": header["value"]["summary"],
            "description": header["value"].get("description") or "",
            "revision": revision,
            "parent": header["value"].get("parentCommit"),
        }
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise Refused(400, f"Malformed commit: {error!r}") from None
    check_card(kind, operations)
    answer = {"success": True}
    if call.flag("create_pr"):
        pull_request, commit = repository.open_pull_request(repo, operations, **about)
        answer["pullRequestUrl"] = f"{call.hub.url(kind, repo.name)}/discussions/{pull_request.number}"
    else:
        commit = repository.commit(repo, operations, **about)
    url = f"{call.hub.url(kind, repo.name)}/commit/{commit.oid}"
    return as_json({**answer, "commitOid": commit.oid, "commitUrl": url})


ENDPOINTS: list[tuple[str, re.Pattern, Callable[..., Response]]] = [
    (method, re.compile(path), function)
    for method, path, function in [
        ("GET", "/api/whoami-v2", who_am_i),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("POST", "/api/repos/create", create_repository),
        ("DELETE", "/api/repos/delete", delete_repository),
        ("POST", "/api/repos/move", move_repository),
        ("GET", "/api/(?P<kind>model|dataset)s", list_repositories),
        ("PUT", f"/api/{REPO}/settings", change_settings),
        ("GET", f"/api/{REPO}/revision/{REVISION}", repository_info),
        ("GET", f"/api/{REPO}/tree/{REVISION}", list_tree),
        ("GET", f"/api/{REPO}/tree/{REVISION}/(?P<path>.*)", list_tree),
        ("POST", f"/api/{REPO}/paths-info/{REVISION}", paths_info),
        ("GET", f"/api/{REPO}/refs", list_references),
        ("GET", f"/api/{REPO}/commits/{REVISION}", list_commits),
        ("POST", f"/api/{REPO}/branch/(?P<branch>[^/]+)", create_branch),
        ("DELETE", f"/api/{REPO}/branch/(?P<branch>[^/]+)", delete_branch),
        ("POST", f"/api/{REPO}/tag/{REVISION}", create_tag),
        ("DELETE", f"/api/{REPO}/tag/(?P<tag>[^/]+)", delete_tag),
        ("POST", f"/api/{REPO}/preupload/{REVISION}", preupload),
        ("POST", f"/api/{REPO}/commit/{REVISION}", commit_files),
        ("GET", f"/api/{REPO}", repository_info),
    ]
]
