"""The page of what works with which model: from rows to cells, and that the committed page is that of its tables."""

from collections import Counter

import pytest

from model_cards import matrix as module
from model_cards.compatibility import Compatibility, Row
from model_cards.matrix import (
    CARDS,
    FEATURES,
    FOLDER,
    INAPPLICABLE,
    MODELS,
    PACKAGE,
    MatrixError,
    line_of,
    main,
    matrix,
    matrix_card,
    read_tables,
)
from tests.model_cards.test_build import INERT, structure


def row(feature="Beam search", outcome="passed", *, library="transformers", note=""):
    version = None if outcome == "not tested" else "1.0"
    return Row(feature=feature, library=library, version=version, outcome=outcome, note=note)


def table(*rows):
    return Compatibility(versions={"torch": "2"}, device="a CPU", rows=list(rows))


def cell_of(*rows, line="`generate`", method="mone"):
    return matrix({method: table(*rows)})[line, method]


@pytest.mark.parametrize(
    ("outcomes", "state", "text"),
    [
        (["passed", "passed"], "passed", "passed (2)"),
        (["passed", "not tested"], "passed", "passed (1 of 2)"),
        (["gloo", "gloo"], "gloo", "gloo (2)"),
        (["gloo", "passed"], "passed", "passed (2)"),
        (["passed", "gloo", "failed"], "failed", "failed (2 of 3)"),
        (["failed"], "failed", "failed"),
        (["not tested"], "not tested", "not tested"),
    ],
)
def test_a_cell_sums_up_its_rows(outcomes, state, text):
    names = ("Beam search", "Sampling", "Assisted generation")
    cell = cell_of(*(row(name, outcome) for name, outcome in zip(names, outcomes)))
    assert (cell.state, str(cell), len(cell.rows)) == (state, text, len(outcomes))


def test_a_cell_without_rows_is_not_tested_or_cannot_apply_and_says_why():
    cells = matrix({})
    assert cells.keys() == {(line, method) for line in FEATURES for method in MODELS}
    assert str(cells["TRL", "mone"]) == "not tested"
    assert str(cells["TRL", "m3bert"]) == "n/a: an encoder writes no text"
    assert sum(cell.state == "not applicable" for cell in cells.values()) == sum(
        len(lines) * len(methods) for lines, methods, _ in INAPPLICABLE
    )


def test_a_row_that_is_nowhere_or_contradicts_is_refused():
    with pytest.raises(MatrixError, match="'transformers: Telepathy' belongs to no line"):
        line_of(row("Telepathy"))
    with pytest.raises(MatrixError, match=r"\('TRL', 'm3bert'\) was tested: take it out of INAPPLICABLE"):
        matrix({"m3bert": table(row("SFTTrainer", library="trl"))})


def test_a_row_on_two_lines_is_refused(monkeypatch):
    monkeypatch.setitem(FEATURES, "Beams", ["transformers: Beam*"])
    with pytest.raises(MatrixError, match="Beams"):
        line_of(row())


def test_the_page_says_what_passed_what_did_not_and_what_was_left_out():
    tables = {
        "mone": table(row(), row("FSDP2", "gloo", library="torch"), row("Cache: static", "not tested", note="no | b")),
        "ctr": table(row("Padding", "failed", note="fails in test_x.py::t")),
    }
    text = matrix_card(tables)
    (generate,) = [line for line in text.splitlines() if line.startswith("| `generate` |")]
    assert generate.split(" | ")[2] == "passed (1)"
    (fsdp,) = [line for line in text.splitlines() if line.startswith("| FSDP2 |")]
    assert fsdp.split(" | ")[2] == "gloo (1)"
    assert "- Cache: static: no \\| b (MoNE)" in text and "(CTR)" in text
    assert "[CTR](../label_correction/README.md)" in text and "1 passed, 1 gloo, 1 failed" in text
    assert matrix_card(tables) == text


def test_no_field_can_inject():
    def page(text):
        rows = [row(f"pipeline {text}", "not tested", note=text), row()]
        tables = {"mone": Compatibility(versions={text: text}, device=text, rows=rows)}
        return f"\n---\n{matrix_card(tables)}"  # below the metadata that a card would have

    assert structure(page(INERT)) == structure(page("x"))


# --- what is committed -----------------------------------------------------------------------------------------------


def test_the_committed_page_is_that_of_the_committed_tables():
    tables = read_tables()
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == matrix_card(tables), (
        "run `python -m model_cards.matrix`"
    )
    assert tables.keys() == MODELS.keys()
    states = Counter(cell.state for cell in matrix(tables).values())
    assert states["failed"] == 0 and states["passed"] > states["not tested"]


def test_every_table_is_on_the_page():
    tables = {file.parent.name for file in PACKAGE.glob("*/compatibility.json")}
    assert tables == {CARDS.get(method, method) for method in MODELS}


def test_the_command_renders_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "FOLDER", tmp_path / "compatibility")
    assert main() == 0
    assert (tmp_path / "compatibility" / "README.md").read_text() == matrix_card(read_tables())
    assert "not applicable" in capsys.readouterr().out
