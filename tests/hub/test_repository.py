"""The state of the loopback Hub, compared with git where git has an opinion."""

import shutil
import subprocess

import pytest

from tests.hub import card_metadata, git_patterns, repository
from tests.hub.repository import Add, AddLarge, Blob, Delete, DeleteFolder, Refused


FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "a.txt": b"1",
    "a/b.txt": b"2",
    "a-b/c.txt": b"3",
    "a/deep/er/d.txt": b"",
}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="compares with git, which is not installed")


def git(*words, cwd, input=None, check=True) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, input=input, capture_output=True, check=check)
    return done.stdout.decode().strip()


@pytest.fixture
def repo():
    return repository.create("model", "alice/model", False, {"old.txt": b"old"})


def change(repo, *operations, **options):
    return repository.commit(repo, operations, author="alice", **{"summary": "Change"} | options)


def test_blob_ids_are_those_of_git():
    assert Blob(b"").git_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert Blob(b"hello\n").git_id == "ce013625030ba8dba906f756967f9e9ca394464a"
    large = Blob(b"hello\n", lfs=True)
    assert large.etag == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert large.pointer.splitlines()[1:] == [b"oid sha256:" + large.etag.encode(), b"size 6"]
    assert large.git_id == Blob(large.pointer).git_id != Blob(b"hello\n").git_id


@needs_git
def test_tree_and_commit_ids_are_those_of_git(tmp_path):
    git("init", "--quiet", cwd=tmp_path)
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content) if not (tmp_path / path).is_dir() else None
    git("-c", "core.autocrlf=false", "add", "--all", cwd=tmp_path)
    ids = repository.tree_ids({path: Blob(content) for path, content in FILES.items()})
    assert ids[""] == git("write-tree", cwd=tmp_path)
    assert ids["a/deep"] == git("write-tree", "--prefix=a/deep", cwd=tmp_path)
    assert set(ids) == {"", "a", "a-b", "a/deep", "a/deep/er"}

    repo = repository.create("model", "alice/model", False, FILES)
    first = repository.resolve(repo, "main")
    child = change(repo, Add("a.txt", b"new"), summary="Say: ü", description="Two\nlines")
    for commit in (first, child):
        time = str(int(commit.date.timestamp()))
        person = f"alice <alice@users.noreply.invalid> {time} +0000"
        tree, parent = repository.tree_ids(commit.files)[""], f"parent {commit.parent}\n" if commit.parent else ""
        text = f"tree {tree}\n{parent}author {person}\ncommitter {person}\n\n{commit.summary}\n\n{commit.description}"
        assert commit.oid == git(
            "hash-object", "-t", "commit", "--stdin", "--literally", cwd=tmp_path, input=text.encode()
        )


def test_a_commit_is_a_snapshot_that_does_not_change(repo):
    first = repository.resolve(repo, "main")
    second = change(repo, Add("new.txt", b"new"), Delete("old.txt"))
    assert dict(first.files) == {"old.txt": Blob(b"old")}
    assert dict(second.files) == {"new.txt": Blob(b"new")}
    with pytest.raises(TypeError):
        second.files["more"] = Blob(b"")
    assert [commit.oid for commit in repository.history(repo)] == [second.oid, first.oid]
    assert second.parent == first.oid


def test_operations_apply_in_order_and_all_or_none(repo):
    change(repo, Add("a/1", b"1"), Add("a/2", b"2"), DeleteFolder("a/"), Add("a/3", b"3"))
    assert sorted(repository.resolve(repo, "main").files) == ["a/3", "old.txt"]
    before = repository.resolve(repo, "main").oid
    for operations, status, code in [
        ([Add("b", b""), Delete("missing")], 404, "EntryNotFound"),
        ([Add("b", b""), DeleteFolder("missing")], 404, "EntryNotFound"),
        ([Add("b", b""), Delete("a")], 404, "EntryNotFound"),  # a folder
        ([Add("b", b""), AddLarge("c", "0" * 64, 1)], 400, None),
        ([Add("a", b"")], 400, None),
        ([Add("old.txt/below", b"")], 400, None),
    ]:
        with pytest.raises(Refused) as refused:
            change(repo, *operations)
        assert (refused.value.status, refused.value.code) == (status, code)
        assert repository.resolve(repo, "main").oid == before


def test_a_large_file_must_have_been_uploaded_with_that_size(repo):
    blob = Blob(b"weights", lfs=True)
    repo.large[blob.sha256] = blob.content
    with pytest.raises(Refused, match="says 8 bytes"):
        change(repo, AddLarge("w.bin", blob.sha256, 8))
    commit = change(repo, AddLarge("w.bin", blob.sha256, 7), AddLarge("copy.bin", blob.sha256))
    assert commit.files["w.bin"] == commit.files["copy.bin"] == blob
    assert repository.file_listing("w.bin", blob) == {
        "type": "file",
        "oid": blob.git_id,
        "size": 7,
        "path": "w.bin",
        "lfs": {"oid": blob.sha256, "size": 7, "pointerSize": len(blob.pointer)},
    }


@pytest.mark.parametrize(
    "path", ["../x", "a/../b", "/etc/passwd", "", "a//b", "./a", "a/", ".git/config", "a/.GIT/x", "a\\b", "a\0", None]
)
@pytest.mark.parametrize("operation", [lambda path: Add(path, b""), Delete, lambda path: AddLarge(path, "0" * 64)])
def test_paths_that_may_lead_out_of_the_repository_are_refused(repo, path, operation):
    with pytest.raises(Refused) as refused:
        change(repo, operation(path))
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "name", ["alice", "alice/", "/x", "a/b/c", "alice/..", "alice/x.git", "alice/-x", "alice/a--b"]
)
def test_names_that_the_hub_does_not_take(name):
    with pytest.raises(Refused, match="Invalid repository name"):
        repository.create("model", name, False, {})


def test_a_stale_parent_is_refused(repo):
    first = repository.resolve(repo, "main").oid
    second = change(repo, Add("x", b"1"), parent=first[:7]).oid
    with pytest.raises(Refused) as refused:
        change(repo, Add("x", b"2"), parent=first)
    assert refused.value.status == 412
    assert repository.resolve(repo, "main").oid == second
    change(repo, Add("x", b"2"), parent=second)


def test_revisions(repo):
    first = repository.resolve(repo, "main")
    repository.create_branch(repo, "next")
    repository.create_tag(repo, "v1", "next")
    second = change(repo, Add("x", b""), revision="next")
    pull_request, third = repository.open_pull_request(repo, [Add("y", b"")], author="bob", summary="Please")
    for revision, commit in {
        "main": first,
        "refs/heads/main": first,
        "v1": first,
        "refs/tags/v1": first,
        "next": second,
        second.oid: second,
        second.oid[:7]: second,
        f"refs/pr/{pull_request.number}": third,
    }.items():
        assert repository.resolve(repo, revision) is commit
    fourth = change(repo, Add("z", b""), revision="refs/pr/1")
    assert repository.history(repo, "refs/pr/1") == [fourth, third, first]
    for revision in ("v2", "refs/pr/2", "refs/pr/x", "0" * 40, second.oid[:6], ""):
        with pytest.raises(Refused, match="Invalid rev id") as refused:
            repository.resolve(repo, revision)
        assert refused.value.code == "RevisionNotFound"
    for revision in ("v1", first.oid):
        with pytest.raises(Refused, match="Commits go to a branch"):
            change(repo, Add("x", b""), revision=revision)


def test_branches_and_tags_are_made_and_deleted_once(repo):
    change(repo, Add("x", b""))
    for create in (repository.create_branch, repository.create_tag):
        create(repo, "name")
        with pytest.raises(Refused) as refused:
            create(repo, "name")
        assert refused.value.status == 409
        for invalid in ("refs/pr/5", "a..b", "", "a b", "a/"):
            with pytest.raises(Refused) as refused:
                create(repo, invalid)
            assert refused.value.status == 400
    for delete in (repository.delete_branch, repository.delete_tag):
        delete(repo, "name")
        with pytest.raises(Refused) as refused:
            delete(repo, "name")
        assert refused.value.status == 404
    with pytest.raises(Refused, match="Cannot delete refs/heads/main"):
        repository.delete_branch(repo, "main")


def test_trees_and_last_changes():
    repo = repository.create("model", "alice/model", False, {"a/b/c.txt": b"1", "d.txt": b"2"})
    first = repository.resolve(repo, "main")
    second = change(repo, Add("a/e.txt", b"3"))
    assert [(item["type"], item["path"]) for item in repository.tree(second)] == [
        ("directory", "a"),
        ("file", "d.txt"),
    ]
    assert [item["path"] for item in repository.tree(second, "a")] == ["a/b", "a/e.txt"]
    paths = ["a", "a/b", "a/b/c.txt", "a/e.txt", "d.txt"]
    assert [item["path"] for item in repository.tree(second, recursive=True)] == paths
    assert repository.last_changes(repo, second) == dict(zip(paths, [second, first, first, second, first]))
    for folder in ("x", "d.txt"):
        with pytest.raises(Refused) as refused:
            repository.tree(second, folder)
        assert refused.value.code == "EntryNotFound"


IGNORE = [
    "*.bin",
    "/top.txt",
    "logs/",
    "a/*.txt",
    "**/cache",
    "a/**/z",
    "deep/**",
    "!keep.bin",
    "wei?d[0-9].md",
    "x[!y]z",
]
PATHS = [
    *("w.bin", "a/w.bin", "keep.bin", "a/keep.bin", "top.txt", "a/top.txt", "logs", "logs/1", "a/logs/b/c", "a/b.txt"),
    *(
        "a/b/c.txt",
        "cache",
        "a/cache/x",
        "a/z",
        "a/b/c/z",
        "deep",
        "deep/er/x",
        "weird1.md",
        "weirdx.md",
        "xaz",
        "xyz",
    ),
]


@needs_git
def test_ignored_files_are_those_that_git_ignores(tmp_path):
    git("init", "--quiet", cwd=tmp_path)
    (tmp_path / ".gitignore").write_text("# comment\n\n" + "\n".join(IGNORE) + "\n")
    ignored = git("check-ignore", "--no-index", "--stdin", cwd=tmp_path, input="\n".join(PATHS).encode(), check=False)
    text = (tmp_path / ".gitignore").read_text()
    assert {path for path in PATHS if git_patterns.is_ignored(text, path)} == set(ignored.splitlines())


def test_the_last_attribute_decides_what_is_large():
    text = "*.bin filter=lfs -text\nsmall/*.bin -filter\nsaved/**/* filter=lfs\n*tfevents* filter=lfs\n*.txt text\n"
    paths = ["a.bin", "x/a.bin", "small/a.bin", "saved/a", "saved/b/c", "run/events.out.tfevents.1", "a.txt", "bin"]
    assert [path for path in paths if git_patterns.is_large(text, path)] == [*paths[:2], *paths[3:6]]


RESULT = {"task": "{type: t}", "dataset": "{type: d, name: D}", "metrics": "[{type: m, value: 0.5}]"}


def card(**fields) -> str:
    return (
        "---\n" + "".join(f"{key.replace('_index', '-index')}: {value}\n" for key, value in fields.items()) + "---\n"
    )


def index(**changes) -> str:
    return (
        "[{name: x, results: [{" + ", ".join(f"{key}: {value}" for key, value in (RESULT | changes).items()) + "}]}]"
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (card(license="apache-2.0", language="[en, code]", tags="[moe]", datasets="[a/b]", model_index=index()), None),
        (card(license="[mit, other]", base_model="a/b"), None),
        ("\ufeff---\r\nlicense: mit\r\n---\r\nText\r\n", None),
        ("---\nlicense: [mit\n---\n", "YAML metadata error"),
        ("---\n- a\n---\n", "must be a mapping"),
        (card(license="apache2"), '"license" with value "apache2"'),
        (card(license="3"), '"license" must be a string'),
        (card(language="English"), '"language" with value "English"'),
        (card(language="[no]"), r'"language\[0\]" must be a string'),  # YAML 1.1 reads `no` as false
        (card(base_model="./runs/my model"), '"base_model" with value'),
        (card(datasets="[The standard library]"), "use a dataset id"),
        (card(tags="moe"), '"tags" must be an array'),
        (card(model_index="{name: x}"), '"model-index" must be an array'),
        (card(model_index="[{results: []}]"), r'"model-index\[0\].name" is required'),
        (card(model_index="[{name: x}]"), "results. is required"),
        (card(model_index=index(task="{}")), "task.type. is required"),
        (card(model_index=index(dataset="{type: d}")), "dataset.name. is required"),
        (card(model_index=index(metrics="{}")), "metrics. must be a list"),
        (card(model_index=index(metrics="[{type: m}]")), "value. is required"),
    ],
)
def test_broken_metadata_is_seen(text, error):
    errors, warnings = card_metadata.review(text)
    assert warnings == []
    if error is None:
        assert errors == []
    else:
        with pytest.raises(ValueError, match=error):
            raise ValueError("; ".join(errors))


@pytest.mark.parametrize("text", ["", "# Title\n", "---\n---\n# Title\n", "Text\n---\nlicense: x\n---\n"])
def test_a_card_without_metadata_is_worth_a_warning(text):
    assert card_metadata.review(text) == ([], ["empty or missing yaml metadata in repo card"])
