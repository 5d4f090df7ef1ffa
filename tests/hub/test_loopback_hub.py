"""The loopback Hub as the real clients see it: each test runs them in processes of their own, over HTTP.

Functions that are handed to `call_client` run in such a process, by their source text.
"""

from pathlib import Path

import pytest

from tests.hub.client import call_client
from tests.hub.server import LoopbackHub


ALICE, BOB, READER, STRANGER = "hf_fake_alice", "hf_fake_bob", "hf_fake_reader", "hf_fake_nobody"
USERS = {ALICE: "alice", BOB: "bob", READER: "alice"}
CARD = "---\nlicense: mit\ntags: [moe]\n---\n# Model\n"


@pytest.fixture
def hub():
    with LoopbackHub(USERS, read_only={READER}, page_size=3) as hub:
        yield hub


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    """A folder of regular, large, empty and nested files."""
    files = {
        "README.md": CARD.encode(),
        "config.json": b'{"a": 1}\n',
        "empty.txt": b"",
        "model.safetensors": bytes(range(256)) * 40,
        "binary-without-suffix": b"a\0b",
        "sub/folder/übung 1.txt": "ü\r\n".encode(),
    }
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def calls(hub, method: str, part: str = "", since: int = 0) -> list:
    return [item for item in hub.requests[since:] if item.method == method and part in item.path]


# Users and repositories


def meet_the_hub():
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api, answers = HfApi(), {}
    for token in (None, "hf_fake_reader"):
        me = api.whoami(token=token)
        answers[me["name"], me["auth"]["accessToken"]["role"]] = 1
    for token in ("hf_fake_nobody", False):
        try:
            api.whoami(token=token)
        except (HfHubHTTPError, LocalTokenNotFoundError, ValueError) as error:
            answers[type(error).__name__, getattr(getattr(error, "response", None), "status_code", 0)] = str(error)
    api.create_repo("seen")  # without a namespace it is the caller's
    try:
        api.model_info("alice/seen", token="hf_fake_nobody")
    except HfHubHTTPError as error:
        answers["bad token", error.response.status_code] = str(error)
    assert api.model_info("alice/seen", token=False).id == "alice/seen"
    return [[*key, value] for key, value in answers.items()]


def test_tokens_name_users(hub, home):
    answers = {tuple(key): value for *key, value in call_client(meet_the_hub, hub, home=home, token=ALICE)}
    assert list(answers)[:2] == [("alice", "write"), ("alice", "read")]
    assert "Invalid user token" in answers["HfHubHTTPError", 401]
    assert "Invalid credentials in Authorization header" in answers["bad token", 401]


def manage_repositories():
    from huggingface_hub import HfApi, RepoUrl
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    def status(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except HfHubHTTPError as error:
            return type(error).__name__, error.response.status_code
        return None

    api, found = HfApi(), {}
    url = api.create_repo("alice/one")
    assert isinstance(url, RepoUrl) and url.repo_id == "alice/one" and url.repo_type == "model"
    found["again"] = status(api.create_repo, "alice/one")
    assert api.create_repo("alice/one", exist_ok=True).repo_id == "alice/one"
    assert api.create_repo("alice/one", repo_type="dataset", private=True).repo_type == "dataset"
    found["space"] = status(api.create_repo, "alice/app", repo_type="space", space_sdk="static")
    found["foreign"] = status(api.create_repo, "bob/one")
    assert api.repo_info("alice/one", repo_type="dataset").private and not api.repo_info("alice/one").private
    api.update_repo_settings("alice/one", private=True)
    assert api.repo_exists("alice/one") and not api.repo_exists("alice/one", token="hf_fake_bob")
    api.update_repo_settings("alice/one", private=False)
    found["gated"] = status(api.update_repo_settings, "alice/one", gated="auto")
    for name in ("two", "three", "four", "five"):
        api.create_repo(f"alice/{name}", private=name == "four")
    found["listed"] = sorted(info.id for info in api.list_models(author="alice"))
    found["to bob"] = sorted(info.id for info in api.list_models(search="F", token="hf_fake_bob"))
    found["sorted by likes"] = status(lambda: list(api.list_models(sort="likes")))
    api.move_repo("alice/one", "alice/uno")
    assert api.repo_info("alice/one").id == api.repo_info("alice/uno").id == "alice/uno"
    assert api.file_exists("alice/one", ".gitattributes") and not api.file_exists("alice/one", "x")
    found["move to bob"] = status(api.move_repo, "alice/uno", "bob/uno")
    found["deleted by bob"] = status(api.delete_repo, "alice/uno", token="hf_fake_bob")
    api.delete_repo("alice/uno")
    found["deleted twice"] = status(api.delete_repo, "alice/uno")
    api.delete_repo("alice/uno", missing_ok=True)
    found["read-only"] = status(api.create_repo, "alice/six", token="hf_fake_reader")
    found["anonymous"] = status(api.create_repo, "alice/six", token=False)
    try:
        api.model_info("no-namespace")
    except RepositoryNotFoundError:
        found["no namespace"] = True
    return found


def test_repositories_are_made_listed_changed_and_deleted(hub, home):
    assert call_client(manage_repositories, hub, home=home, token=ALICE) == {
        "again": ["HfHubHTTPError", 409],
        "space": ["HfHubHTTPError", 501],
        "foreign": ["HfHubHTTPError", 403],
        "gated": ["HfHubHTTPError", 501],
        "listed": ["alice/five", "alice/four", "alice/one", "alice/three", "alice/two"],
        "to bob": ["alice/five"],
        "sorted by likes": ["HfHubHTTPError", 501],
        "move to bob": ["HfHubHTTPError", 403],
        "deleted by bob": ["HfHubHTTPError", 403],
        "deleted twice": ["RepositoryNotFoundError", 404],
        "read-only": ["HfHubHTTPError", 403],
        "anonymous": ["HfHubHTTPError", 401],
        "no namespace": True,
    }
    assert sorted(hub.repositories) == [("dataset", "alice/one")] + [
        ("model", f"alice/{name}") for name in ("five", "four", "three", "two")
    ]
    assert any("cursor=" in item.path for item in hub.requests)  # the list came in pages


def try_what_is_forbidden():
    import tempfile

    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    api, found = HfApi(), {}
    api.create_repo("alice/secret", private=True)
    api.create_repo("alice/open")
    for repo in ("alice/secret", "alice/open"):
        api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id=repo)
    for who, token in {"bob": "hf_fake_bob", "reader": "hf_fake_reader", "anonymous": False}.items():
        for repo in ("alice/secret", "alice/open"):
            for what, function in {
                "info": lambda repo, token: api.model_info(repo, token=token),
                "read": lambda repo, token: hf_hub_download(repo, "w.bin", token=token, cache_dir=tempfile.mkdtemp()),
                "refs": lambda repo, token: api.list_repo_refs(repo, token=token),
                "write": lambda repo, token: api.upload_file(
                    path_or_fileobj=b"x", path_in_repo="x", repo_id=repo, token=token
                ),
                "tag": lambda repo, token: api.create_tag(repo, tag="v1", token=token),
                "delete": lambda repo, token: api.delete_repo(repo, token=token),
            }.items():
                try:
                    function(repo, token)
                    answer = "ok"
                except HfHubHTTPError as error:
                    answer = error.response.status_code
                    if what == "write" and who == "bob" and repo == "alice/open":
                        assert "create_pr=1" in str(error), error
                found.setdefault(f"{who}, {repo}", []).append(answer)
    return found


def test_what_is_not_allowed_is_refused(hub, home):
    found = call_client(try_what_is_forbidden, hub, home=home, token=ALICE)
    assert found == {
        "bob, alice/secret": [404] * 6,
        "bob, alice/open": ["ok", "ok", "ok", 403, 403, 403],
        "reader, alice/secret": ["ok", "ok", "ok", 403, 403, 403],
        "reader, alice/open": ["ok", "ok", "ok", 403, 403, 403],
        "anonymous, alice/secret": [401] * 6,
        "anonymous, alice/open": ["ok", "ok", "ok", 401, 401, 401],
    }
    assert all(len(hub.commits(name)) == 2 for name in ("alice/secret", "alice/open"))


# Files


def upload_twice_and_fetch(folder, target):
    from huggingface_hub import create_repo, snapshot_download, upload_folder

    create_repo("alice/model")
    first = upload_folder(repo_id="alice/model", folder_path=folder, commit_message="All", commit_description="of it")
    second = upload_folder(repo_id="alice/model", folder_path=folder, commit_message="Again")
    snapshot_download("alice/model", local_dir=target)
    return [first.oid, second.oid, snapshot_download("alice/model"), first.commit_url]


def test_a_folder_comes_back_byte_by_byte_and_is_sent_once(hub, home, folder, tmp_path):
    arguments = str(folder), str(tmp_path / "target")
    first, second, snapshot, url = call_client(upload_twice_and_fetch, hub, *arguments, home=home, token=ALICE)
    assert first == second
    commits = hub.commits("alice/model")
    assert [commit.oid for commit in commits] == [first, commits[0].parent]
    assert [(commit.summary, commit.description) for commit in commits] == [("All", "of it"), ("initial commit", "")]
    assert url == f"{hub.endpoint}/alice/model/commit/{first}"
    assert len(calls(hub, "POST", "/commit/")) == 1
    assert sorted(len(item.body) for item in calls(hub, "PUT", "/uploads/")) == [3, 10240]

    uploaded = contents(folder)
    stored = hub.files("alice/model")
    assert {path: stored[path] for path in uploaded} == uploaded
    assert set(stored) - set(uploaded) == {".gitattributes"}
    assert contents(Path(snapshot)) == stored
    fetched = contents(tmp_path / "target")
    assert {path: content for path, content in fetched.items() if not path.startswith(".cache/")} == stored
    blobs = commits[0].files
    assert {path for path, blob in blobs.items() if blob.lfs} == {"model.safetensors", "binary-without-suffix"}
    assert all("authorization" not in item.headers for item in calls(hub, "GET", "/downloads/"))
    assert all("authorization" in item.headers for item in calls(hub, "POST"))


def walk_through_history():
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    def read(revision):
        return open(hf_hub_download("alice/model", "x.txt", revision=revision)).read()

    def put(text, **options):
        return api.create_commit(
            "alice/model", [CommitOperationAdd("x.txt", text.encode())], commit_message=f"Write {text}", **options
        )

    api = HfApi()
    api.create_repo("alice/model")
    one = put("one").oid
    api.create_tag("alice/model", tag="v1", tag_message="The first")
    api.create_branch("alice/model", branch="side/work")
    two = put("two").oid
    side = put("side", revision="side/work").oid
    pull = put("pull", create_pr=True, commit_description="Why")
    bobs = put("bob", create_pr=True, token="hf_fake_bob", parent_commit=one)
    assert (pull.pr_revision, pull.pr_num, bobs.pr_revision) == ("refs/pr/1", 1, "refs/pr/2")
    put("pull again", revision="refs/pr/1")
    api.create_tag("alice/model", tag="on-pr", revision="refs/pr/1")
    expected = {"main": "two", "v1": "one", "side/work": "side", "refs/pr/1": "pull again", "refs/pr/2": "bob"}
    expected |= {one: "one", two: "two", side: "side", bobs.oid: "bob", "on-pr": "pull again"}
    assert {revision: read(revision) for revision in expected} == expected
    for create, name in ((api.create_branch, {"branch": "side/work"}), (api.create_tag, {"tag": "v1"})):
        try:
            create("alice/model", **name)
            raise SystemExit("made twice")
        except HfHubHTTPError as error:
            assert error.response.status_code == 409, error
    api.create_branch("alice/model", branch="side/work", exist_ok=True)
    api.create_tag("alice/model", tag="v1", exist_ok=True)
    api.create_branch("alice/model", branch="from-tag", revision="v1")
    refs = api.list_repo_refs("alice/model", include_pull_requests=True)
    names = {kind: [ref.name for ref in getattr(refs, kind)] for kind in ("branches", "tags", "pull_requests")}
    api.delete_branch("alice/model", branch="side/work")
    api.delete_tag("alice/model", tag="v1")
    after = api.list_repo_refs("alice/model")
    names["left"] = [ref.name for ref in after.branches + after.tags]
    main, log = api.list_repo_commits("alice/model"), api.list_repo_commits("alice/model", revision="refs/pr/1")
    assert main[0].commit_id == two and main[0].authors == ["alice"] and log[1].message == "Why"
    assert api.list_repo_commits("alice/model", revision="refs/pr/2")[0].authors == ["bob"]
    return names, [commit.title for commit in main], [commit.title for commit in log]


def test_branches_tags_pull_requests_and_history(hub, home):
    names, main, log = call_client(walk_through_history, hub, home=home, token=ALICE)
    assert names == {
        "branches": ["main", "side/work", "from-tag"],
        "tags": ["v1", "on-pr"],
        "pull_requests": ["1", "2"],
        "left": ["main", "from-tag", "on-pr"],
    }
    assert main == ["Write two", "Write one", "initial commit"]
    assert log == ["Write pull again", "Write pull", *main]


def ask_for_what_is_not_there():
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    api.create_repo("alice/model")
    api.upload_file(path_or_fileobj=b"hi", path_in_repo="x.txt", repo_id="alice/model")
    for expected, function in [
        (EntryNotFoundError, lambda: hf_hub_download("alice/model", "missing.txt")),
        (EntryNotFoundError, lambda: list(api.list_repo_tree("alice/model", "missing"))),
        (RevisionNotFoundError, lambda: hf_hub_download("alice/model", "x.txt", revision="missing")),
        (RevisionNotFoundError, lambda: snapshot_download("alice/model", revision="missing")),
        (RevisionNotFoundError, lambda: api.create_tag("alice/model", tag="v1", revision="missing")),
        (RevisionNotFoundError, lambda: api.delete_tag("alice/model", tag="missing")),
        (RepositoryNotFoundError, lambda: hf_hub_download("alice/missing", "x.txt")),
        (RepositoryNotFoundError, lambda: api.list_repo_files("alice/model", repo_type="dataset")),
        (RepositoryNotFoundError, lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="a/b")),
    ]:
        try:
            function()
            raise SystemExit(f"no {expected.__name__}")
        except expected:
            pass
    path = hf_hub_download("alice/model", "x.txt")
    return path, str(try_to_load_from_cache("alice/model", "missing.txt"))


def load_offline():
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for revision in (None, "main"):
        assert open(hf_hub_download("alice/model", "x.txt", revision=revision)).read() == "hi"
    try:
        hf_hub_download("alice/other", "x.txt")
        raise SystemExit("no error")
    except LocalEntryNotFoundError:
        return snapshot_download("alice/model")


def test_absence_is_told_and_cached_and_the_cache_serves_offline(hub, home):
    path, absent = call_client(ask_for_what_is_not_there, hub, home=home, token=ALICE)
    assert absent.startswith("<object object")  # cached as absent, neither None nor a path
    asked = len(hub.requests)
    snapshot = call_client(load_offline, hub, home=home, token=None, env={"HF_HUB_OFFLINE": "1"})
    assert Path(snapshot) == Path(path).parent
    assert hub.requests[asked:] == []


def upload_bytes(size, name):
    from huggingface_hub import create_repo, hf_hub_download, upload_file

    create_repo("alice/model", exist_ok=True)
    upload_file(path_or_fileobj=bytes(range(256)) * (size // 256), path_in_repo=name, repo_id="alice/model")
    return open(hf_hub_download("alice/model", name), "rb").read().hex()


def test_large_objects_go_in_parts(home):
    with LoopbackHub(USERS, part_size=1000) as hub:
        content = call_client(upload_bytes, hub, 2560, "w.bin", home=home, token=ALICE)
        assert bytes.fromhex(content) == hub.files("alice/model")["w.bin"] == bytes(range(256)) * 10
        parts = calls(hub, "PUT", "/uploads/")
        assert [(item.path[-2:], len(item.body)) for item in parts] == [("/1", 1000), ("/2", 1000), ("/3", 560)]
        assert len(calls(hub, "POST", "/uploads/")) == 1


def fetch_in_small_chunks(chunk):
    import time

    from huggingface_hub import constants, hf_hub_download

    time.sleep = lambda seconds: None  # between retries
    constants.DOWNLOAD_CHUNK_SIZE = chunk
    return open(hf_hub_download("alice/model", "w.bin", force_download=True), "rb").read().hex()


def test_a_download_goes_on_where_it_was_cut(hub, home):
    call_client(upload_bytes, hub, 10240, "w.bin", home=home, token=ALICE)
    hub.cut_download_after(6000, times=2)
    asked = len(hub.requests)
    content = call_client(fetch_in_small_chunks, hub, 500, home=home, token=ALICE)
    assert bytes.fromhex(content) == hub.files("alice/model")["w.bin"]
    ranges = [item.headers.get("range") for item in calls(hub, "GET", "/downloads/", since=asked)]
    assert ranges == [None, "bytes=6000-"]  # what is left is short enough not to be cut


def delete_and_copy():
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api, repo = HfApi(), "alice/model"
    api.create_repo(repo)
    for path in ("a/1.txt", "a/2.txt", "b.txt", "w.bin", "old/x.txt"):
        api.upload_file(path_or_fileobj=f"content of {path}".encode(), path_in_repo=path, repo_id=repo)
    copies = [CommitOperationCopy("w.bin", "copy/w.bin"), CommitOperationCopy("b.txt", "copy/b.txt")]
    api.create_commit(repo, [*copies, CommitOperationDelete("w.bin")], commit_message="Move one, copy one")
    api.delete_file("b.txt", repo)
    api.delete_folder("a", repo)
    for function in (lambda: api.delete_file("b.txt", repo), lambda: api.delete_folder("a", repo)):
        try:
            function()
            raise SystemExit("deleted twice")
        except EntryNotFoundError:
            pass
    api.delete_files(repo, ["old/*"])
    infos = api.get_paths_info(repo, ["copy", "copy/w.bin", "missing"], expand=True)
    assert [(info.path, info.last_commit.title) for info in infos] == [
        ("copy", "Move one, copy one"),
        ("copy/w.bin", "Move one, copy one"),
    ]
    assert infos[1].lfs.size == 16
    return [item.path for item in api.list_repo_tree(repo, recursive=True)]


def test_files_are_deleted_and_copied(hub, home):
    tree = call_client(delete_and_copy, hub, home=home, token=ALICE)
    assert tree == [".gitattributes", "copy", "copy/b.txt", "copy/w.bin"]
    assert hub.files("alice/model")["copy/w.bin"] == b"content of w.bin"
    assert len(calls(hub, "PUT", "/uploads/")) == 1  # the copy of the large file was made by the Hub
