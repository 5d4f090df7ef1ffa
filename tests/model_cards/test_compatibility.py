"""The compatibility table: its file, its place in a card, how test outcomes become rows, and that it is not stale."""

import json
import os
import re
import shutil
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from model_cards import build
from model_cards.build import OLDEST_TRANSFORMERS, build_card, main
from model_cards.compatibility import (
    COMMAND,
    Compatibility,
    CompatibilityError,
    Row,
    compatibility_table,
    read_compatibility,
    write_compatibility,
)
from model_cards.markdown import split_fences
from model_cards.matrix import CARDS
from tests.ecosystem.declarations import PROPERTY, SUITE_ROWS, SUITES, rows_declared
from tests.ecosystem.outcomes import GLOO, CompatibilityReport
from tests.forked import run_python
from tests.model_cards.test_build import INERT, make_run, structure


ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "model_cards").glob("*/compatibility.json"))
MARKED = "compatibility and not (gpu or oldest or interpreter)"


def make_table(**changes) -> Compatibility:
    rows = [
        Row(feature="Beam search", library="transformers", version="5.23.0", outcome="passed", note=""),
        Row(feature="SFTTrainer", library="trl", version=None, outcome="not tested", note="needs trl"),
    ]
    return Compatibility(
        **{"versions": {"torch": "2.13.0", "peft": "1"}, "device": "a CPU, 1 threads", "rows": rows} | changes
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run whose method has no committed files yet."""
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "package")
    make_run(tmp_path / "demo")
    return tmp_path / "demo"


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_table_survives_its_file(tmp_path):
    path = write_compatibility(tmp_path / "new", make_table())
    assert path == tmp_path / "new/compatibility.json"
    assert read_compatibility(tmp_path / "new") == make_table()
    assert read_compatibility(tmp_path) is None


DEFECTS = {
    "list": (lambda t: [t], "field `top level` must be a dict, got list"),
    "unknown": (lambda t: t | {"cpu": 1}, "unknown field `cpu`; known are"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "device"}, "missing field `device`"),
    "versions": (lambda t: t | {"versions": {"torch": 2}}, "field `versions.torch` must be a str, got int"),
    "no rows": (lambda t: t | {"rows": []}, "field `rows` must be a list, got an empty one"),
    "row": (lambda t: t | {"rows": ["x"]}, r"field `rows\[0\]` must be a dict, got str"),
    "row field": (lambda t: t | {"rows": [t["rows"][0] | {"x": 1}]}, r"unknown field `rows\[0\].x`"),
    "row type": (lambda t: t | {"rows": [t["rows"][0] | {"note": None}]}, r"`rows\[0\].note` must be a str"),
    "outcome": (lambda t: t | {"rows": [t["rows"][0] | {"outcome": "works"}]}, "'not tested'], got 'works'"),
    "no version": (lambda t: t | {"rows": [t["rows"][0] | {"version": None}]}, "null, but the feature passed"),
    "twice": (lambda t: t | {"rows": t["rows"][:1] * 2}, "feature 'Beam search' has more than one row"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_names_file_field_and_remedy(tmp_path, name):
    break_it, message = DEFECTS[name]
    path = write_compatibility(tmp_path, make_table())
    path.write_text(json.dumps(break_it(json.loads(path.read_text()))))
    with pytest.raises(CompatibilityError, match=message) as error:
        read_compatibility(tmp_path)
    assert str(path) in str(error.value) and f"`{COMMAND}`" in str(error.value)


def test_a_bad_table_is_not_written(tmp_path):
    before = write_compatibility(tmp_path, make_table()).read_text()
    with pytest.raises(CompatibilityError):
        write_compatibility(tmp_path, make_table(rows=[]))
    assert (tmp_path / "compatibility.json").read_text() == before


# --- the card --------------------------------------------------------------------------------------------------------


def test_a_card_shows_the_table_of_its_method(run):
    assert COMMAND not in build_card(run)
    write_compatibility(build.PACKAGE / "sigma_moe", make_table())
    text = build_card(run)
    section = text.split("## Compatibility")[1].split("\n## ")[0]
    for fact in (
        "| Beam search | transformers 5.23.0 | passed |  |",
        "| SFTTrainer | trl (not installed) | not tested | needs trl |",
        "tiny models with random weights, **not** on these weights, on a CPU, 1 threads, with torch 2.13.0, peft 1:",
        compatibility_table(make_table()),
    ):
        assert fact in section, fact
    assert ("bash", COMMAND) in split_fences(text)[1]
    assert structure(text).count("table_open") == structure(text.replace(section, "")).count("table_open") + 2
    assert build_card(run) == text


def test_no_field_of_the_table_can_inject(run):
    def card(text):
        rows = [Row(feature=text, library=text, version=text, outcome="passed", note=text)]
        table = make_table(versions={text: text}, device=text, rows=rows)
        write_compatibility(build.PACKAGE / "sigma_moe", table)
        return build_card(run)

    assert structure(card(INERT)) == structure(card("x"))


def test_a_bad_table_is_an_error_of_the_command_line(run, capsys):
    write_compatibility(build.PACKAGE / "sigma_moe", make_table()).write_text("{")
    assert main([str(run)]) == 2
    assert "compatibility.json: not valid JSON" in capsys.readouterr().err


# --- from outcomes to rows -------------------------------------------------------------------------------------------


def report(name, outcome, *, when="call", reason="because", **declared):
    """What pytest, or a worker of xdist, reports of one phase of a test."""
    row = {"method": "m", "feature": "F", "library": "transformers", "note": "", "gloo": False} | declared
    return SimpleNamespace(
        nodeid=f"tests/ecosystem/test_x.py::{name}",
        when=when,
        passed=outcome == "passed",
        failed=outcome == "failed",
        skipped=outcome == "skipped",
        longrepr=("file", 1, f"Skipped: {reason}") if outcome == "skipped" else None,
        user_properties=[(PROPERTY, [row])],
    )


def rows_of(folder, *reports):
    plugin = CompatibilityReport(folder)
    for item in reports:
        plugin.pytest_runtest_logreport(item)
    plugin.pytest_sessionfinish()
    return read_compatibility(folder / "m").rows


def test_a_feature_passes_only_if_all_its_tests_do(tmp_path):
    phases = [report("a", "passed", when=when) for when in ("setup", "call", "teardown")]
    [row] = rows_of(tmp_path, *phases, report("b", "passed", note="but"))
    assert row == Row(
        feature="F", library="transformers", version=metadata.version("transformers"), outcome="passed", note="but"
    )
    [row] = rows_of(tmp_path, *phases, report("b", "skipped", when="setup"))
    assert (row.outcome, row.note) == ("not tested", "because")
    [row] = rows_of(tmp_path, *phases, report("b", "skipped"), report("c", "failed"))
    assert (row.outcome, row.note) == ("failed", "fails in test_x.py::c")
    for when in ("setup", "teardown"):
        [row] = rows_of(tmp_path, *phases, report("a", "failed", when=when))
        assert row.outcome == "failed"


def test_a_test_that_never_ended_has_not_passed(tmp_path):
    [row] = rows_of(tmp_path, report("a", "passed", when="setup"))
    assert row.outcome == "not tested"


def test_rows_are_in_one_order_whatever_worker_was_first(tmp_path):
    libraries = {"F0": "torch", "F1": "peft", "F2": "torch"}
    reports = [report(name, "passed", feature=name, library=library) for name, library in libraries.items()]
    assert rows_of(tmp_path, *reports) == rows_of(tmp_path, *reversed(reports))
    assert [row.feature for row in rows_of(tmp_path, *reports)] == ["F1", "F0", "F2"]


def test_a_library_that_is_not_installed_has_no_version(tmp_path):
    [row] = rows_of(tmp_path, report("a", "skipped", library="no-such-library"))
    assert row.version is None


def test_what_only_gloo_processes_showed_is_called_so(tmp_path):
    [row] = rows_of(tmp_path, report("a", "passed", gloo=True), report("b", "passed", gloo=True, note="but"))
    assert (row.outcome, row.note) == ("gloo", f"but; {GLOO}")
    [row] = rows_of(tmp_path, report("a", "passed", gloo=True), report("b", "passed"))
    assert row.outcome == "passed"
    [row] = rows_of(tmp_path, report("a", "passed", gloo=True), report("b", "failed", gloo=True))
    assert row.outcome == "failed"


def test_a_model_whose_card_has_another_name_has_its_table_beside_that_card(tmp_path):
    plugin = CompatibilityReport(tmp_path)
    plugin.pytest_runtest_logreport(report("a", "passed", method="ctr"))
    plugin.pytest_sessionfinish()
    assert [row.feature for row in read_compatibility(tmp_path / CARDS["ctr"]).rows] == ["F"]


# --- from marks to declarations --------------------------------------------------------------------------------------


def item(*marks, **parameters):
    return SimpleNamespace(
        nodeid="t.py::t",
        iter_markers=lambda name: [each.mark for each in marks],
        callspec=SimpleNamespace(params=parameters),
    )


def test_a_mark_declares_a_row_of_each_of_its_methods():
    mark = pytest.mark.compatibility
    found = rows_declared(
        item(mark("F", method=["a", "b"], gloo=True), mark("G", library="peft", method="a", note="n"))
    )
    assert [(row["method"], row["feature"], row["library"]) for row in found] == [
        ("a", "F", "transformers"),
        ("b", "F", "transformers"),
        ("a", "G", "peft"),
    ]
    assert [(row["note"], row["gloo"]) for row in found] == [("", True), ("", True), ("n", False)]
    (row,) = rows_declared(item(mark("F"), family=SimpleNamespace(method="c")))
    assert row["method"] == "c"


def test_only_names_the_parameters_under_which_it_declares():
    mark = pytest.mark.compatibility("F", method="a", only={"kind": "x"})
    assert len(rows_declared(item(mark, kind="x", other=1))) == 1 and rows_declared(item(mark, kind="y")) == []
    assert rows_declared(item(kind="x")) == []


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (pytest.mark.compatibility("F"), "needs `method`"),
        (pytest.mark.compatibility(method="a"), "the mark is"),
        (pytest.mark.compatibility("F", method="a", only={"kind": 1}), "the mark is"),
        (pytest.mark.compatibility("F", method="a", family="b"), "the mark is"),
    ],
)
def test_a_mark_that_says_too_little_or_too_much_is_refused(mark, message):
    with pytest.raises(pytest.UsageError, match=message):
        rows_declared(item(mark))


# --- what is committed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """Folder with the table of each family as its tests declare it."""
    folder = tmp_path_factory.mktemp("declared")
    # Only those that carry the mark: collecting all takes many times as long.
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.compatibility" in file.read_text()]
    command = ["-m", "pytest", "-m", MARKED, "--collect-only", "-p", "no:cacheprovider", *map(str, sorted(files))]
    environment = os.environ | {"HF_SIGMA_COMPATIBILITY": str(folder)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # what this worker of xdist is told is not meant for the other pytest
    done = run_python(*command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_the_committed_table_has_a_row_for_every_feature_that_the_tests_declare(file, declared):
    tables = [read_compatibility(folder / file.parent.name) for folder in (ROOT / "model_cards", declared)]
    tested, installed = ({row.library: row.version for row in table.rows} for table in tables)
    if tested != installed:
        pytest.skip("the libraries are not those of the table, and what there is to test depends on them")
    committed, expected = ([(row.library, row.feature) for row in table.rows] for table in tables)
    # transformers' common tests, which are fetched from the package index, declare these.
    suites = {("torch", feature) for feature in SUITE_ROWS if file.parent.name in SUITES.values()}
    assert [row for row in committed if row in expected] == expected, f"run `{COMMAND}`"
    assert set(committed) - set(expected) <= suites, f"run `{COMMAND}`"


def test_the_command_runs_the_tests_with_the_mark():
    assert f'-m "{MARKED}"' in (ROOT / "Makefile").read_text()


def test_every_family_of_the_tests_has_a_committed_table(declared):
    assert {file.parent.name for file in COMMITTED} == {folder.name for folder in declared.iterdir()}


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_the_committed_table_was_made_with_the_pinned_versions_and_nothing_failed(file):
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    table = read_compatibility(file.parent)
    assert [row.feature for row in table.rows if row.outcome == "failed"] == []
    used = table.versions | {row.library: row.version for row in table.rows}
    ours = {name: used.pop(name) for name in ("python", "hf-sigma")}
    assert all(ours.values())
    tested = {name.replace("_", "-"): version and version.split("+")[0] for name, version in used.items()}
    assert tested == {name: pins.get(name) for name in tested}


def test_the_committed_cards_are_those_that_their_files_make(tmp_path):
    cards = [file.with_name("README.md") for file in (ROOT / "model_cards").glob("*/results.json")]
    assert cards
    for card in cards:
        folder = shutil.copytree(card.parent, tmp_path / card.parent.name)
        assert build_card(folder) == card.read_text(encoding="utf-8"), card.parent.name


def test_the_card_names_the_lower_bound_of_transformers():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={OLDEST_TRANSFORMERS},<6" in dependencies
