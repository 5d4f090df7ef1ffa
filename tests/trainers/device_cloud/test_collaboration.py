"""The map of device-cloud collaboration: entry points are there, links lead somewhere, nothing is claimed."""

import re
from pathlib import Path

import pytest

from trainers.device_cloud import collaboration as the_map
from trainers.device_cloud.collaboration_entries import NOT_HERE, Method, source_file


ROOT = Path(__file__).parents[3]
ROWS = [*the_map.METHODS, *the_map.DATASETS, *the_map.MEASURES, *the_map.LAYERS]
ENTRY_POINTS = sorted({entry for row in ROWS for entry in row.entry_points})


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_every_entry_point_is_there(entry_point):
    found = the_map.resolve(entry_point)
    assert callable(found) and found.__doc__, f"{entry_point} is to be used, and says how"
    assert (ROOT / source_file(entry_point)).is_file()


def test_every_link_leads_somewhere():
    text = the_map.markdown()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > len(ENTRY_POINTS)
    for link in links:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link), link
        else:
            assert (ROOT / link).is_file(), link
    assert {link for link in links if not link.startswith("https://")} == {source_file(e) for e in ENTRY_POINTS}
    assert "](../trainers/device_cloud/budget.py)" in the_map.markdown(base="../")


def test_every_row_is_shown_and_what_is_absent_says_so():
    text = the_map.markdown()
    for row in ROWS:
        assert row.name in text
    absent = [row for row in the_map.METHODS if not row.entry_points]
    assert all(row.name in the_map.absent_table() for row in absent) and len(absent) > 8
    assert all(row.name not in the_map.methods_table() for row in absent)
    for row in (*the_map.DATASETS, *the_map.MEASURES, *the_map.LAYERS):
        (line,) = [line for line in text.splitlines() if f"| {row.name} |" in line]
        assert (NOT_HERE in line) == (not row.entry_points)


def test_no_class_is_presented_as_the_survey_s():
    assert all(row.class_mark == "I" for row in the_map.METHODS), "its tables were not read"
    text = the_map.markdown()
    assert "We have not read its tables" in text and "are ours (I)" in text
    assert text.count("class I |") == len(the_map.METHODS)
    assert all(f"**{mark}**: " in text for mark in "SKI")


def test_classes_papers_and_peers_of_this_package_are_all_there():
    here = {
        kind: [row for row in the_map.METHODS if row.kind == kind and row.entry_points] for kind in the_map.CLASSES
    }
    assert all(len(rows) >= 3 for rows in here.values())
    papers = {row.source for rows in here.values() for row in rows}
    assert {"2211.01163", "2501.06062", "2303.10361", "2109.07704"} <= papers
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.level for row in the_map.MEASURES} == {"user", "device", "cloud", "privacy"}
    assert {row.layer for row in the_map.LAYERS} == {"system", "hardware"}


def test_tables_are_whole():
    width = 0
    for line in the_map.markdown().splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not cells or not width or cells == width, line
        width = cells


def test_rows_that_do_not_hold_together_are_refused():
    fields = {"name": "x", "does": "y", "source": "z", "method_mark": "K"}
    with pytest.raises(ValueError, match="class 'weights' is not known. Choose one of data, feature, parameter"):
        Method(kind="weights", **fields)
    with pytest.raises(ValueError, match="mark 'X' is not known"):
        Method(kind="data", **(fields | {"method_mark": "X"}))
    with pytest.raises(ValueError, match="of what is in the package, and only of that"):
        Method(kind="data", entry_points=("a:b",), **fields)
    with pytest.raises(ValueError, match="only of that"):
        Method(kind="data", down="everything", **fields)
    with pytest.raises(ValueError, match="must be 'module:object'"):
        the_map.resolve("trainers.device_cloud.budget")
    with pytest.raises(FileNotFoundError, match="there is no module trainers/nowhere"):
        source_file("trainers.nowhere:main")


def test_it_is_printed(capsys):
    the_map.main(["--base", "x/"])
    assert capsys.readouterr().out.strip() == the_map.markdown(base="x/")
