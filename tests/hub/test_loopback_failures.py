"""The loopback Hub when things go wrong: conflicts, cut connections, broken cards, clients that tell lies.

What is sent to it here without a client are the bytes that no real client would send.
"""

import base64
import hashlib
import http.client
import json
import os
import subprocess

import pytest

from tests.hub.client import call_client, run_client
from tests.hub.server import LoopbackHub, require_loopback


ALICE, BOB = "hf_fake_alice", "hf_fake_bob"
USERS = {ALICE: "alice", BOB: "bob"}
OBJECT = b"not really weights" * 10
OID = hashlib.sha256(OBJECT).hexdigest()


@pytest.fixture
def hub():
    with LoopbackHub(USERS, part_size=100) as hub:
        yield hub


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def ask(hub, method: str, path: str, body: bytes | dict = b"", token: str | None = ALICE, **headers: str):
    """Status, headers and body of the answer to one request."""
    connection = http.client.HTTPConnection(*hub.endpoint.removeprefix("http://").split(":"), timeout=10)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path.removeprefix(hub.endpoint), content, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def make_repository(hub, **files: bytes) -> str:
    status, _, _ = ask(hub, "POST", "/api/repos/create", {"name": "model", "private": True})
    assert status == 200
    if files:
        hub.commit("alice/model", files)
    return "alice/model"


def commit(hub, *lines: tuple[str, dict], token=ALICE, query="", **header) -> tuple[int, dict]:
    lines = [("header", {"summary": "Change", **header}), *lines]
    body = b"\n".join(json.dumps({"key": key, "value": value}).encode() for key, value in lines)
    status, _, answer = ask(hub, "POST", f"/api/models/alice/model/commit/main{query}", body, token)
    return status, json.loads(answer)


def file_line(path: str, content: bytes) -> tuple[str, dict]:
    return "file", {"path": path, "content": base64.b64encode(content).decode(), "encoding": "base64"}


def announce(hub, oid: str = OID, size: int | None = None) -> dict:
    """What the Hub says of an object that is to be uploaded."""
    size = len(OBJECT) if size is None else size
    body = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [{"oid": oid, "size": size}]}
    status, _, answer = ask(hub, "POST", "/alice/model.git/info/lfs/objects/batch", body)
    assert status == 200
    return json.loads(answer)["objects"][0]


# With real clients


def commit_on(parent):
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        operations = [CommitOperationAdd("mine.txt", b"mine"), CommitOperationAdd("w.bin", b"weights")]
        HfApi().create_commit("alice/model", operations, commit_message="Mine", parent_commit=parent)
    except HfHubHTTPError as error:
        return error.response.status_code, str(error)
    return 200, ""


def test_a_commit_on_a_stale_parent_publishes_nothing(hub, home):
    make_repository(hub)
    hub.before_commit(lambda: hub.commit("alice/model", {"theirs.txt": b"theirs"}, summary="Theirs"))
    status, message = call_client(commit_on, hub, hub.commits("alice/model")[0].oid, home=home, token=ALICE)
    assert (status, "A commit has happened since" in message) == (412, True)
    assert [item.summary for item in hub.commits("alice/model")] == ["Theirs", "initial commit"]
    assert set(hub.files("alice/model")) == {".gitattributes", "theirs.txt"}
    status, _ = call_client(commit_on, hub, hub.commits("alice/model")[0].oid, home=home, token=ALICE)
    assert (status, hub.files("alice/model")["w.bin"]) == (200, b"weights")


def upload_without_waiting(size):
    import time

    from huggingface_hub import CommitOperationAdd, HfApi

    waited = []
    time.sleep = waited.append
    operations = [CommitOperationAdd("a.txt", b"regular"), CommitOperationAdd("w.bin", bytes(size))]
    try:
        HfApi().create_commit("alice/model", operations, commit_message="Upload")
    except Exception as error:
        return [type(error).__name__, len(waited)]
    return ["ok", len(waited)]


@pytest.mark.parametrize("size", [90, 250], ids=["whole", "in parts"])
def test_a_cut_upload_is_tried_again_and_otherwise_commits_nothing(hub, home, size):
    make_repository(hub)
    hub.cut_upload_after(30, times=1000)
    result, waited = call_client(upload_without_waiting, hub, size, home=home, token=ALICE)
    assert result != "ok" and waited > 0
    assert [item.summary for item in hub.commits("alice/model")] == ["initial commit"]
    assert not hub.repositories["model", "alice/model"].large
    assert {len(item.body) for item in hub.requests if item.method == "PUT"} == {30}

    hub.cut_upload_after(30, times=2)
    assert call_client(upload_without_waiting, hub, size, home=home, token=ALICE) == ["ok", 2]
    assert hub.files("alice/model")["w.bin"] == bytes(size)
    assert len(hub.commits("alice/model")) == 2


def push_cards(good, broken):
    from huggingface_hub import ModelCard, upload_file

    ModelCard(good).push_to_hub("alice/model")
    loaded = ModelCard.load("alice/model")
    assert str(loaded) == good and loaded.data.license == "mit"
    loaded.validate()
    errors = []
    for text in broken:
        for attempt in (
            lambda text=text: upload_file(
                path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="alice/model"
            ),
            lambda text=text: ModelCard(text).push_to_hub("alice/model"),
        ):
            try:
                attempt()
                errors.append("none")
            except Exception as error:
                errors.append(type(error).__name__)
    return errors


def test_broken_cards_are_refused(hub, home):
    make_repository(hub)
    good = "---\nlicense: mit\ntags:\n- moe\n---\n\n# A model\n"
    broken = ["---\nlicense: [mit\n---\n# A\n", "---\nlicense: apache 2\n---\n# A\n"]
    errors = call_client(push_cards, hub, good, broken, home=home, token=ALICE)
    assert errors == ["ValueError", "ParserError", "ValueError", "ValueError"]  # the second by the client itself
    assert hub.files("alice/model")["README.md"].decode() == good
    for text in broken:  # also from clients that do not ask first
        status, answer = commit(hub, file_line("README.md", text.encode()))
        assert (status, "Invalid metadata in README.md" in answer["error"]) == (400, True)
    assert len(hub.commits("alice/model")) == 2


# Without clients


def test_objects_that_are_not_what_was_announced_are_refused(hub):
    make_repository(hub)
    small = b"small"
    href = announce(hub, hashlib.sha256(small).hexdigest(), 5)["actions"]["upload"]["href"]
    for body in (b"Small", b"small and more", b""):
        assert ask(hub, "PUT", href, body, token=None)[0] == 400
    assert ask(hub, "PUT", f"{href}/1", small, token=None)[0] == 400
    assert ask(hub, "PUT", f"{hub.endpoint}/uploads/guessed", small, token=None)[0] == 404
    verify = {"oid": hashlib.sha256(small).hexdigest(), "size": 5}
    assert ask(hub, "POST", "/alice/model.git/info/lfs/objects/verify", verify)[0] == 404
    assert ask(hub, "PUT", href, small, token=None)[0] == 200
    assert ask(hub, "POST", "/alice/model.git/info/lfs/objects/verify", verify)[0] == 200
    assert ask(hub, "POST", "/alice/model.git/info/lfs/objects/verify", {**verify, "size": 6})[0] == 404
    assert "actions" not in announce(hub, hashlib.sha256(small).hexdigest(), 5)
    for oid, size in (("short", 5), (OID, 0), (OID.upper(), 5)):
        assert announce(hub, oid, size)["error"]["code"] == 422


def test_parts_must_be_complete_and_in_order(hub):
    make_repository(hub)
    upload = announce(hub)["actions"]["upload"]
    assert upload["header"]["chunk_size"] == "100"
    assert {key for key in upload["header"] if key.isdecimal()} == {"1", "2"}
    assert ask(hub, "PUT", upload["href"], OBJECT, token=None)[0] == 400
    assert ask(hub, "PUT", upload["header"]["1"], OBJECT[:99], token=None)[0] == 400
    assert ask(hub, "PUT", f"{upload['href']}/3", OBJECT[:100], token=None)[0] == 400
    etags = []
    for number, part in enumerate((OBJECT[100:] + OBJECT[:20], OBJECT[100:]), 1):  # the first has wrong content
        status, headers, _ = ask(hub, "PUT", upload["header"][str(number)], part, token=None)
        assert status == 200
        etags.append(headers["ETag"])

    def complete(*named):
        parts = [{"partNumber": number, "etag": etag} for number, etag in named]
        return ask(hub, "POST", upload["href"], {"oid": OID, "parts": parts}, token=None)[0]

    assert complete(*enumerate(etags, 1)) == 400  # not the announced object
    _, headers, _ = ask(hub, "PUT", upload["header"]["1"], OBJECT[:100], token=None)
    first, second = (1, headers["ETag"]), (2, etags[1])
    for named in ([first], [second, first], [(1, etags[0]), second], [first, (2, "x")], []):
        assert complete(*named) == 400
    assert complete(first, second) == 200
    line = ("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": OID, "size": len(OBJECT)})
    assert commit(hub, line)[0] == 200
    assert hub.files("alice/model")["w.bin"] == OBJECT


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": OID, "size": len(OBJECT)})], 400),
        ([("lfsFile", {"path": "w.bin", "algo": "sha1", "oid": OID})], 400),
        ([file_line("../escape", b"x")], 400),
        ([file_line("/absolute", b"x")], 400),
        ([file_line("ok.txt", b"x"), ("deletedFile", {"path": "missing"})], 404),
        ([("file", {"path": "x", "content": "!", "encoding": "base64"})], 400),
        ([("file", {"content": ""})], 400),
        ([("copyFile", {"path": "x"})], 400),
        ([file_line("large.txt", b"x" * 11_000_000)], 400),
    ],
    ids=range(9),
)
def test_commits_that_must_not_succeed(hub, lines, status):
    make_repository(hub)
    before = hub.files("alice/model")
    assert commit(hub, *lines)[0] == status
    assert commit(hub, *lines, query="?create_pr=1")[0] == status
    assert (hub.files("alice/model"), len(hub.commits("alice/model"))) == (before, 1)
    assert not hub.repositories["model", "alice/model"].pull_requests


def test_a_commit_needs_a_header(hub):
    make_repository(hub)
    for body in (b"", b"{}", b"nonsense", json.dumps({"key": "file", "value": {}}).encode()):
        assert ask(hub, "POST", "/api/models/alice/model/commit/main", body)[0] == 400
    assert commit(hub, summary="")[0] == 400
    status, answer = commit(hub, file_line("x", b""))
    assert (status, answer["commitOid"]) == (200, hub.commits("alice/model")[0].oid)


def test_ranges_and_headers_of_files(hub):
    make_repository(hub, **{"x.txt": b"0123456789"})
    path, oid = "/alice/model/resolve/main/x.txt", hub.commits("alice/model")[0].oid
    for value, expected in {
        "bytes=2-4": (206, b"234", "bytes 2-4/10"),
        "bytes=7-": (206, b"789", "bytes 7-9/10"),
        "bytes=7-100": (206, b"789", "bytes 7-9/10"),
        "bytes=-3": (206, b"789", "bytes 7-9/10"),
        "bytes=10-": (416, None, "bytes */10"),
        "bytes=4-2": (416, None, "bytes */10"),
        "items=1-2": (200, b"0123456789", None),
    }.items():
        status, headers, body = ask(hub, "GET", path, Range=value)
        assert (status, body if status < 400 else None, headers["Content-Range"]) == expected
    for method in ("HEAD", "GET"):
        status, headers, body = ask(hub, method, path)
        assert (status, headers["X-Repo-Commit"], headers["Content-Length"]) == (200, oid, "10")
        assert headers["ETag"] == f'"{hub.commits("alice/model")[0].files["x.txt"].git_id}"'
        assert body == (b"" if method == "HEAD" else b"0123456789")
    status, headers, _ = ask(hub, "HEAD", "/alice/model/resolve/main/missing")
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", oid)
    assert ask(hub, "HEAD", "/alice/model/resolve/none/x.txt")[1]["X-Error-Code"] == "RevisionNotFound"
    assert ask(hub, "HEAD", path, token=BOB)[1]["X-Error-Code"] == "RepoNotFound"
    assert ask(hub, "HEAD", path, token=None)[0] == ask(hub, "HEAD", path, token="hf_fake_nobody")[0] == 401


def test_private_objects_need_a_signed_address(hub):
    make_repository(hub)
    upload = announce(hub, hashlib.sha256(b"w").hexdigest(), 1)["actions"]["upload"]["href"]
    assert ask(hub, "PUT", upload, b"w", token=None)[0] == 200
    line = ("lfsFile", {"path": "w.bin", "algo": "sha256", "oid": hashlib.sha256(b"w").hexdigest(), "size": 1})
    assert commit(hub, line)[0] == 200
    status, headers, _ = ask(hub, "HEAD", "/alice/model/resolve/main/w.bin")
    assert (status, headers["X-Linked-Size"], headers["X-Linked-ETag"]) == (302, "1", f'"{line[1]["oid"]}"')
    address = headers["Location"].removeprefix(hub.storage)
    assert ask(hub, "GET", address, token=None)[2] == b"w"
    sign = address.split("/")[2]
    assert ask(hub, "GET", address.replace(sign, sign[::-1]), token=None)[0] == 403
    assert ask(hub, "GET", address.replace("alice/model", "alice/other"), token=None)[0] == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/alice/model/xet-write-token/main"),
        ("GET", "/api/models/alice/model/discussions"),
        ("GET", "/api/spaces/alice/model"),
        ("GET", "/api/models/alice/model?securityStatus=true"),
        ("GET", "/api/models/alice/model?expand=trendingScore"),
        ("GET", "/api/models?pipeline_tag=text-generation"),
        ("POST", "/api/models/alice/model/commit/main?hot_reload=1"),
        ("PATCH", "/api/models/alice/model"),
        ("GET", "/"),
    ],
)
def test_what_it_does_not_implement_it_says(hub, method, path):
    make_repository(hub)
    status, headers, body = ask(hub, method, path)
    assert status == 501
    assert "loopback Hub" in json.loads(body)["error"] and "loopback Hub" in headers["X-Error-Message"]


def test_a_fault_of_the_server_is_no_answer(home):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        with LoopbackHub(USERS) as hub:
            make_repository(hub)
            hub.before_commit(lambda: 1 / 0)
            assert commit(hub, file_line("x", b""))[0] == 501
            assert len(hub.commits("alice/model")) == 1


# Loopback only


def test_clients_see_this_hub_and_no_other(hub, home, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HTTPS_PROXY", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "hf_real")
    monkeypatch.setenv("KEPT", "1")
    environment = hub.environment(home, ALICE)
    assert {name for name in environment if name.startswith(("HF_", "HUGGING"))} == {
        *("HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY")
    }
    assert "hf_real" not in environment.values()
    assert (environment["HF_TOKEN"], environment["HF_HOME"], environment["KEPT"]) == (ALICE, str(home), "1")
    assert "HF_TOKEN" not in hub.environment(home, None)
    require_loopback(environment)


@pytest.mark.parametrize(
    "change",
    [
        {"HF_ENDPOINT": "https://huggingface.co"},
        {"HF_ENDPOINT": "http://127.0.0.1.example.com"},
        {"HF_ENDPOINT": "http://example.com/127.0.0.1"},
        {"HF_ENDPOINT": ""},
        {"HF_TOKEN": "hf_" + "aB3" * 11},
        {"HUGGING_FACE_HUB_TOKEN": "hf_" + "aB3" * 11},
        {"HF_HOME": ""},
        {"HF_TOKEN_PATH": "token"},
    ],
    ids=lambda change: " ".join(map("=".join, change.items())),
)
def test_clients_of_anything_else_are_not_started(hub, home, change, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("was started"))
    with pytest.raises(RuntimeError):
        run_client("", hub, home=home, token=ALICE, env=change)


def test_a_stored_token_counts_too(hub, home):
    home.mkdir()
    (home / "token").write_text("hf_" + "aB3" * 11)
    with pytest.raises(RuntimeError, match="holds a token"):
        run_client("", hub, home=home, token=None)


def test_real_looking_tokens_are_not_taken():
    for users, read_only in (({"hf_" + "aB3" * 11: "alice"}, set()), (USERS, {"hf_fake_stranger"})):
        with pytest.raises(ValueError, match="tokens must"):
            LoopbackHub(users, read_only=read_only)


def test_a_failing_client_shows_what_it_said(hub, home):
    with pytest.raises(AssertionError, match="(?s)exit status 3.*some output.*some complaint"):
        run_client(
            "import sys; print('some output'); sys.stderr.write('some complaint'); sys.exit(3)",
            hub,
            home=home,
            token=None,
        )
    with pytest.raises(AssertionError, match="(?s)no end after 1 s.*started"):
        run_client("import time; print('started', flush=True); time.sleep(60)", hub, home=home, token=None, timeout=1)
    done = run_client("import sys; sys.exit(3)", hub, home=home, token=None, check=False)
    assert done.returncode == 3
    done = run_client(
        "import os; print(os.environ['EXTRA'], os.getcwd())",
        hub,
        home=home,
        token=None,
        cwd=home.parent,
        env={"EXTRA": "1"},
    )
    assert done.stdout.split() == ["1", os.path.realpath(home.parent)]
