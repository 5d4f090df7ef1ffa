"""Queries and pages: which pairs there are, that no page is on two sides in any language, and what answers a query."""

import json

import pytest

from trainers.data import load_retrieval_pairs, load_text_dataset, retrieval_pairs
from trainers.data.documents import is_held_out
from trainers.data.libreoffice import parse_page, read_libreoffice_help
from trainers.data.retrieval_pairs import page_body, sections_of


LONG = "This paragraph is long enough to answer something about it."
PAGE = f"""<title>Sorting &amp; lists</title><header><a href="en-US/text/shared/main.html">Help</a></header>
<div id="DisplayArea"><meta itemprop="keywords" content="lists,sorting"><meta itemprop="keywords" content="order">
<h1 id="h1" dir="auto">Sorting lists</h1><p id="p1">{LONG} See <a href="en-US/text/calc/a.html#x" class="l">the
<b>filter</b></a> or <a href="https://example.org">this</a>.</p>
<h2 id="h2">Ties</h2><p id="p2">{LONG}</p><p id="p3">More.</p><h2 id="h3">Stub</h2><p id="p4">No.</p></div>"""


def page(name: str, language: str, links=()) -> dict:
    """A help page as the reader gives it, in its own words."""
    units = [["h1", f"Title {name} {language}"], ["p", f"{language} body of {name}. " + LONG]]
    units += [["h2", f"Section {name} {language}"], ["p", f"{language} section of {name}. " + LONG], ["h2", "Syntax"]]
    units += [["p", f"{language} syntax of {name}. " + LONG]]
    keywords = [f"index,{name},{language}"]
    return {
        "page": name,
        "title": f"Title {name} {language}",
        "keywords": keywords,
        "units": units,
        "links": list(links),
    }


@pytest.fixture
def help_of_80_pages(monkeypatch):
    names = [f"text/{i}.html" for i in range(80)]

    def pages(language, *, cache_dir=None):
        rows = [page(name, language, [(f"link to {names[i - 1]}", names[i - 1])]) for i, name in enumerate(names)]
        if language == "fr":  # the last ten were never translated
            rows[-10:] = pages("en-us")[-10:]
        return rows

    monkeypatch.setattr(retrieval_pairs, "help_pages", pages)
    monkeypatch.setattr("trainers.data.libreoffice.help_pages", pages)
    return names


def test_what_a_page_says():
    row = parse_page(PAGE)
    assert row["title"] == "Sorting & lists" and row["keywords"] == ["lists,sorting", "order"]
    assert row["links"] == [("the filter", "text/calc/a.html")], "neither navigation nor the world outside"
    assert [tag for tag, _ in row["units"]] == ["h1", "p", "h2", "p", "p", "h2", "p"]
    assert "Sorting lists" not in page_body(row) and page_body(row).startswith("This paragraph")
    assert sections_of(row) == [("Ties", f"{LONG}\nMore.")], "short sections answer nothing"


def test_no_page_is_on_two_sides_in_any_language(help_of_80_pages):
    pairs = load_retrieval_pairs("libreoffice-help:en-us,de,fr", test_fraction=0.3, validation_fraction=0.1)
    train = set(pairs.train["group"])
    named = {
        split: {name for name in help_of_80_pages for text in queries.documents if f"body of {name}." in text}
        for split, queries in (("validation", pairs.validation), ("test", pairs.test))
    }
    assert train | named["validation"] | named["test"] == set(help_of_80_pages)
    assert not (train & named["validation"] or train & named["test"] or named["validation"] & named["test"])
    assert all(is_held_out(name, 0.4) for name in named["validation"] | named["test"])
    assert named["test"] == {name for name in help_of_80_pages if is_held_out(name, 0.3)}
    seen = {text for text in pairs.train["document"]}
    assert not any(f"body of {name}." in text for name in named["test"] for text in seen)


def test_text_to_mask_is_of_the_same_pages_as_the_pairs(help_of_80_pages):
    texts = load_text_dataset("libreoffice-help:en-us,de", held_out_fraction=0.4)
    pairs = load_retrieval_pairs("libreoffice-help:en-us,de", test_fraction=0.3, validation_fraction=0.1)
    assert {source.split("/", 1)[1] for source in texts["train"]["source"]} == set(pairs.train["group"])


def test_kinds_of_pairs(help_of_80_pages):
    train = load_retrieval_pairs("libreoffice-help:en-us,de", test_fraction=0.3, validation_fraction=0.1).train
    kinds = {kind: [row for row in train if row["kind"] == kind] for kind in retrieval_pairs.PAIR_KINDS}
    assert all(kinds.values())
    (row, *_) = kinds["keyword"]
    assert row["query"] == f"index {row['group']} {row['language']}"
    assert all(row["query"] == f"link to {row['group']}" for row in kinds["anchor"])
    assert {row["query"].split()[0] for row in kinds["heading"]} == {"Section"}, "Syntax names no page"
    for row in kinds["cross"]:
        assert row["query"].endswith(row["language"]) and not row["document"].startswith(row["language"])
    only = load_retrieval_pairs(
        "libreoffice-help:en-us,de", test_fraction=0.3, validation_fraction=0.1, kinds=["title"]
    )
    assert set(only.train["kind"]) == {"title"}


def test_pages_left_in_english_are_one_document_and_no_crossing(help_of_80_pages):
    both = load_retrieval_pairs("libreoffice-help:en-us,fr", test_fraction=0.3, validation_fraction=0.1)
    tested = [name for name in help_of_80_pages if is_held_out(name, 0.3)]
    left = set(help_of_80_pages[-10:]) & set(tested)
    assert left and len(both.test.documents) == 2 * len(tested) - len(left)
    crossed = {row["group"] for row in both.train if row["kind"] == "cross"}
    assert crossed and not crossed & set(help_of_80_pages[-10:])


def test_a_query_is_answered_by_every_page_that_bears_it(help_of_80_pages):
    test = load_retrieval_pairs("libreoffice-help:en-us,de", test_fraction=0.3, validation_fraction=0.1).test
    assert len(set(test.queries)) == len(test.queries) == len(test.relevant) == len(test.languages)
    for query, answers in zip(test.queries, test.relevant):
        name = query.split()[2] if query.startswith("link") else query.split()[1]
        languages = {"en-us", "de"} if query.startswith("link") else {query.split()[-1]}
        assert {test.documents[i].split()[0] for i in answers} == languages, "links are spelt alike in both"
        assert all(f"body of {name}." in test.documents[i] for i in answers)


def test_docstrings_of_the_standard_library_need_no_network():
    pairs = load_retrieval_pairs("python-stdlib", max_document_characters=300)
    assert len(pairs.train) > 1000 and len(pairs.test.queries) > 200
    assert max(map(len, pairs.train["document"])) <= 300
    assert all(row["document"].startswith("def ") for row in pairs.train)
    assert not any(is_held_out(row["group"], 0.25) for row in pairs.train)


def test_pairs_of_a_file(tmp_path):
    rows = [{"query": f"q{i}", "document": f"answer {i}", "group": f"g{i // 2}"} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_retrieval_pairs(str(tmp_path / "pairs.jsonl"), test_fraction=0.3, validation_fraction=0.2)
    total = len(pairs.train) + len(pairs.validation.queries) + len(pairs.test.queries)
    assert total == 100 and set(pairs.train["language"]) == {"unknown"}
    assert [pairs.test.documents[i] for (i,) in pairs.test.relevant] == [
        f"answer {query[1:]}" for query in pairs.test.queries
    ]


def test_what_is_refused(tmp_path, help_of_80_pages):
    with pytest.raises(ValueError, match=r"kinds=\['body'\]"):
        load_retrieval_pairs("python-stdlib", kinds=["body"])
    with pytest.raises(ValueError, match="together below 1"):
        load_retrieval_pairs("python-stdlib", test_fraction=0.9, validation_fraction=0.2)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_retrieval_pairs(str(tmp_path / "none.jsonl"))
    (tmp_path / "pairs.jsonl").write_text('{"question": "q", "document": "d"}\n')
    with pytest.raises(ValueError, match="query.*question"):
        load_retrieval_pairs(str(tmp_path / "pairs.jsonl"))
    (tmp_path / "one.jsonl").write_text('{"query": "q", "document": "d"}\n')
    with pytest.raises(ValueError, match="split has no pairs"):
        load_retrieval_pairs(str(tmp_path / "one.jsonl"))


@pytest.mark.slow
def test_real_pages(tmp_path):
    try:
        read_libreoffice_help(["de"], cache_dir=tmp_path)
    except RuntimeError as error:
        pytest.skip(str(error))
    pairs = load_retrieval_pairs("libreoffice-help:de", cache_dir=tmp_path)
    assert len(set(pairs.train["group"])) > 1500 and len(pairs.test.queries) > 1500
    assert {"title", "anchor", "keyword", "heading"} == set(pairs.train["kind"])
    (pages,) = tmp_path.glob("*/de.jsonl")
    assert "units" in json.loads(pages.read_text(encoding="utf-8").splitlines()[0])
