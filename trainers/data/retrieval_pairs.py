"""Queries and the pages that answer them, split by page: what a contrastive stage is trained and measured on."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value
from transformers.utils import logging

from .documents import document_digest, is_held_out, require_column
from .functions import first_sentence, python_functions
from .libreoffice import help_pages
from .standard_library import read_standard_library


logger = logging.get_logger(__name__)

# A page with less text than this beside its heading (a list of links, a stub) answers nothing.
MIN_DOCUMENT_CHARACTERS = 40
# "Syntax", "Example": headings of more pages than this name none of them.
MAX_PAGES_OF_A_HEADING = 3
PAIR_KINDS = ("title", "anchor", "keyword", "heading", "cross")

_PAIR_FEATURES = Features({name: Value("string") for name in ("query", "document", "kind", "language", "group")})


@dataclass(frozen=True)
class RetrievalSet:
    """Queries against a pool: `relevant[i]` are the positions in `documents` that answer `queries[i]`."""

    queries: list[str]
    documents: list[str]
    relevant: list[list[int]]
    languages: list[str]  # of the queries


@dataclass(frozen=True)
class RetrievalPairs:
    """`train` has the columns `query`, `document`, `kind`, `language` and `group`; no group of it is in the others."""

    train: Dataset
    validation: RetrievalSet
    test: RetrievalSet


def load_retrieval_pairs(
    name: str,
    *,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.05,
    kinds: Iterable[str] = PAIR_KINDS,
    max_document_characters: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> RetrievalPairs:
    """
    Query-document pairs by name, split by page into train, validation and test.

    A page is held out by its name alone, as `load_text_dataset(..., held_out_fraction=test_fraction +
    validation_fraction)` holds it out: a model pre-trained there has seen no page, in no language, that is asked for
    here.

    Args:
        name: "libreoffice-help:en-us,de" (queries are titles, anchor texts of links, entries of the printed index and,
            for training, section headings and titles in another language; documents are pages without their heading);
            "python-stdlib" (first sentences of docstrings, and the code that they describe; no network is needed); a
            .jsonl or .parquet file or a Hub dataset with the columns `query` and `document`, and optionally
            `language` and `group` (what must not be torn apart; the document itself by default).
        kinds: of the pairs to train on, among `PAIR_KINDS`; LibreOffice Help only.
        max_document_characters: cut documents there; encoders read a few dozen tokens of them.

    Returns:
        Each set's pool are all documents of its own pages, in all languages; a query is answered by the pages that
        bear it in its language, and where several languages spell it alike, by the pages of all of them. Documents
        equal up to white space are one. "heading" and "cross" pairs are trained on, not measured.

    Raises:
        ValueError: a fraction outside (0, 1), an unknown kind, a column that is missing, or a split left empty.
        RuntimeError, ConnectionError: as the loaders of the texts.
    """
    kinds = tuple(kinds)
    _check(kinds, test_fraction, validation_fraction)
    held_out = test_fraction + validation_fraction
    rows = {"train": [], "validation": [], "test": []}
    for row in _read_pairs(name, cache_dir):
        document = row["document"][:max_document_characters]
        # A larger fraction holds out a superset, so what is held out and not tested validates.
        split = "train" if not is_held_out(row["group"], held_out) else None
        split = split or ("test" if is_held_out(row["group"], test_fraction) else "validation")
        if row["kind"] in (kinds if split == "train" else PAIR_KINDS[:3]):
            rows[split].append(row | {"document": document})
    for split, own in rows.items():
        if not own:
            raise ValueError(
                f"{name}: the {split} split has no pairs (test_fraction={test_fraction}, "
                f"validation_fraction={validation_fraction}). Give more pairs or other fractions."
            )
    train = Dataset.from_list(_without_repeats(rows["train"]), features=_PAIR_FEATURES)
    pairs = RetrievalPairs(train, _retrieval_set(rows["validation"]), _retrieval_set(rows["test"]))
    logger.info(
        f"{name}: {len(train)} pairs to train on, {len(pairs.validation.queries)} + {len(pairs.test.queries)} queries"
    )
    return pairs


def _check(kinds: tuple[str, ...], test_fraction: float, validation_fraction: float) -> None:
    if unknown := sorted(set(kinds) - set(PAIR_KINDS)):
        raise ValueError(f"kinds={unknown}: not known. Choose from {', '.join(PAIR_KINDS)}.")
    if not (0 < test_fraction < 1 and 0 < validation_fraction < 1 and test_fraction + validation_fraction < 1):
        raise ValueError(
            f"test_fraction={test_fraction} and validation_fraction={validation_fraction} must be positive and "
            "together below 1, e.g. 0.2 and 0.05."
        )


def _read_pairs(name: str, cache_dir: str | os.PathLike | None) -> Iterator[dict[str, str]]:
    corpus, _, choice = name.partition(":")
    if corpus == "libreoffice-help":
        return _help_pairs(choice.split(",") if choice else ["en-us"], cache_dir)
    if name == "python-stdlib":
        return _docstring_pairs(read_standard_library())
    return _stored_pairs(name, cache_dir)


# LibreOffice Help


def _help_pairs(languages: list[str], cache_dir: str | os.PathLike | None) -> Iterator[dict[str, str]]:
    pages = {
        language: {row["page"]: row for row in help_pages(language, cache_dir=cache_dir)} for language in languages
    }
    bodies = {
        language: {page: body for page, row in rows.items() if len(body := page_body(row)) >= MIN_DOCUMENT_CHARACTERS}
        for language, rows in pages.items()
    }
    for language in languages:
        for kind, query, page, document in _queries_of(pages[language], bodies[language]):
            yield {"kind": kind, "query": query, "document": document, "language": language, "group": page}
        for other in languages:
            if other != language:
                yield from _crossings(language, pages, bodies[language], bodies[other])


def page_body(row: dict[str, Any]) -> str:
    """The text of a page of [`help_pages`] below its heading, which is what most queries for it say."""
    units = row["units"]
    if units and units[0][0] != "p":
        units = units[1:]
    return "\n".join(text for _, text in units)


def _queries_of(pages: dict[str, Any], bodies: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """Kind, query, page, document."""
    sections = {page: sections_of(pages[page]) for page in bodies}
    counts = Counter(heading for own in sections.values() for heading, _ in own)
    for page, body in bodies.items():
        row = pages[page]
        if row["title"]:
            yield "title", row["title"], page, body
        for keyword in row["keywords"]:
            # "deleting,models/instances": an entry and what is indented below it
            yield "keyword", " ".join(keyword.replace(",", " ").split()), page, body
        for heading, passage in sections[page]:
            if counts[heading] <= MAX_PAGES_OF_A_HEADING:
                yield "heading", heading, page, passage
    for row in pages.values():
        for anchor, target in row["links"]:
            if target in bodies and re.search(r"\w", anchor) and not anchor.startswith("text/"):
                yield "anchor", anchor, target, bodies[target]


def sections_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Headings of a page below its first one, with the paragraphs up to the next heading; short sections left out."""
    sections: list[tuple[str, list[str]]] = []
    for tag, text in row["units"][1:]:
        if tag != "p":
            sections.append((text, []))
        elif sections:
            sections[-1][1].append(text)
    passages = [(heading, "\n".join(paragraphs)) for heading, paragraphs in sections]
    return [(heading, passage) for heading, passage in passages if len(passage) >= MIN_DOCUMENT_CHARACTERS]


def _crossings(
    language: str, pages: dict[str, dict[str, Any]], own: dict[str, str], others: dict[str, str]
) -> Iterator[dict[str, str]]:
    """A title in one language, the page in another. Pages that were never translated are English in both."""
    for page, body in others.items():
        title = pages[language].get(page, {}).get("title")
        if title and page in own and own[page] != body:
            yield {"kind": "cross", "query": title, "document": body, "language": language, "group": page}


# Other sources


def _docstring_pairs(library: Dataset) -> Iterator[dict[str, str]]:
    for function in python_functions(library):
        query = first_sentence(function["docstring"])
        document = f"def {function['name']}({function['arguments']}):\n{function['body']}"
        if query and len(document) >= MIN_DOCUMENT_CHARACTERS:
            group = function["source"].split("::")[0]
            yield {"kind": "title", "query": query, "document": document, "language": "python", "group": group}


def _stored_pairs(name: str, cache_dir: str | os.PathLike | None) -> Iterator[dict[str, str]]:
    path = Path(name).expanduser()
    builder = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    cache = cache_dir and str(cache_dir)
    if builder is None:
        stored = datasets.load_dataset(name, split="train", cache_dir=cache)
    elif not path.exists():
        raise FileNotFoundError(f"{name}: no such file. Check the path; it is taken from the working folder.")
    else:
        stored = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=cache)
    for column in ("query", "document"):
        require_column(stored, column, argument="pairs")
    for row in stored:
        if row["query"] and row["document"]:
            group = str(row.get("group") or document_digest(row["document"]))
            language = row.get("language") or "unknown"
            yield {
                "kind": "title",
                "query": row["query"],
                "document": row["document"],
                "language": language,
                "group": group,
            }


# Sets


def _without_repeats(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row a query and document; the first kind stays."""
    chosen = {}
    for row in rows:
        chosen.setdefault((row["query"], document_digest(row["document"])), row)
    return list(chosen.values())


def _retrieval_set(rows: list[dict[str, str]]) -> RetrievalSet:
    """Each query once, with every document that it stands for."""
    positions: dict[str, int] = {}
    documents: list[str] = []
    queries: dict[str, dict[str, str]] = {}
    relevant: dict[str, set[int]] = {}
    for row in rows:
        digest = document_digest(row["document"])
        if digest not in positions:
            positions[digest] = len(documents)
            documents.append(row["document"])
        key = row["query"].casefold()
        queries.setdefault(key, row)
        relevant.setdefault(key, set()).add(positions[digest])
    return RetrievalSet(
        queries=[row["query"] for row in queries.values()],
        documents=documents,
        relevant=[sorted(answers) for answers in relevant.values()],
        languages=[row["language"] for row in queries.values()],
    )
