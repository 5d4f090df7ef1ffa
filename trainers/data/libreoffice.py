"""LibreOffice Help: the same 2 561 pages in 34 languages, from Debian packages (MPL-2.0), no data hub needed."""

import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers.utils import logging

from .debian import unpack_package


logger = logging.get_logger(__name__)

LIBREOFFICE_LANGUAGES = tuple(
    "ca cs da de dz el en-gb en-us es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sk sl sv tr vi "
    "zh-cn zh-tw".split()
)

# Every unit of text, and nothing of the navigation around it, carries an id.
_UNIT = re.compile(r'<(p|h[1-6])\s[^>]*?\bid="[^"]+"[^>]*>(.*?)</\1>', re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.DOTALL)
_KEYWORDS = re.compile(r'<meta itemprop="keywords" content="([^"]*)"')
_LINK = re.compile(r'<a\s[^>]*?href="[^"#/]+/(text/[^"#]+\.html)[^"]*"[^>]*>(.*?)</a>', re.DOTALL)
_CONTENT = 'id="DisplayArea"'  # what comes before it is navigation


def read_libreoffice_help(languages: list[str], *, cache_dir: str | os.PathLike | None = None) -> Dataset:
    """
    The help pages of some languages, one document a page, one line a paragraph.

    Packages are fetched with `apt-get download`, unpacked with `dpkg -x` and never installed. The extracted text
    stays below `cache_dir` (datasets' own cache folder if None) as `<language>.jsonl`, its sha256 beside it.

    Returns:
        Columns `text`, `source` ("de/text/scalc/01/04060101.html") and `group`, the page without the language, so
        that all translations of a page fall on one side of a split.

    Raises:
        ValueError: an unknown language.
        RuntimeError: apt-get or dpkg are missing, or the package index cannot be reached.
    """
    _require_known(languages)
    rows = [(language, row) for language in languages for row in help_pages(language, cache_dir=cache_dir)]
    return Dataset.from_dict(
        {
            "text": ["\n".join(text for _, text in row["units"]) for _, row in rows],
            "source": [f"{language}/{row['page']}" for language, row in rows],
            "group": [row["page"] for _, row in rows],
        }
    )


def help_pages(language: str, *, cache_dir: str | os.PathLike | None = None) -> list[dict[str, Any]]:
    """
    Every help page of a language with what the retrieval pairs need beyond its text, in the order of the paths.

    Returns:
        Dicts of `page` ("text/scalc/01/04060101.html", the same in all languages) and of what `parse_page` finds.

    Raises:
        As `read_libreoffice_help`.
    """
    _require_known([language])
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "libreoffice-help"
    folder.mkdir(parents=True, exist_ok=True)
    return _read_language(language, folder)


def parse_page(page: str) -> dict[str, Any]:
    """
    What one HTML help page says.

    Returns:
        `title`; `keywords`, the entries of the printed index that name the page; `units`, pairs of a tag ("h1", "p",
        ...) and the text of a paragraph or heading, in order; `links`, pairs of an anchor text and the page that it
        leads to.
    """
    title, content = _TITLE.search(page), page.partition(_CONTENT)[2] or page
    units = [(match[1], _clean(match[2])) for match in _UNIT.finditer(page)]
    links = [(_clean(match[2]), match[1]) for match in _LINK.finditer(content)]
    return {
        "title": _clean(title[1]) if title else "",
        "keywords": [_clean(keyword) for keyword in _KEYWORDS.findall(page)],
        "units": [unit for unit in units if unit[1]],
        "links": [link for link in links if link[0]],
    }


def page_text(page: str) -> str:
    """The paragraphs and headings of one HTML help page, in order, one a line."""
    return "\n".join(text for _, text in parse_page(page)["units"])


def _clean(markup: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", markup)).split())


def _require_known(languages: list[str]) -> None:
    unknown = sorted(set(languages) - set(LIBREOFFICE_LANGUAGES))
    if unknown or not languages:
        raise ValueError(
            f"libreoffice-help: unknown language {', '.join(unknown) or '(none given)'}; "
            f"choose from {', '.join(LIBREOFFICE_LANGUAGES)}."
        )


def _read_language(language: str, folder: Path) -> list[dict[str, Any]]:
    pages, checksum = folder / f"{language}.jsonl", folder / f"{language}.jsonl.sha256"
    if not (pages.exists() and checksum.exists() and _is_intact(pages, checksum)):
        if pages.exists():
            logger.warning(f"{pages.name} does not match its checksum or is of an older form: fetching it again")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            extracted = _fetch(language, Path(scratch))
            # The checksum goes last: an interrupted extraction leaves none and is done again.
            checksum.unlink(missing_ok=True)
            os.replace(extracted, pages)
            checksum.write_text(_sha256(pages))
    logger.info(f"libreoffice-help {language}: sha256 {checksum.read_text()}")
    return list(_rows(pages))


def _is_intact(pages: Path, checksum: Path) -> bool:
    return _sha256(pages) == checksum.read_text() and "units" in next(_rows(pages), {})


def _rows(pages: Path) -> Iterator[dict[str, Any]]:
    with pages.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _fetch(language: str, scratch: Path) -> Path:
    instead = "name another dataset (python-stdlib needs nothing)"
    unpacked = unpack_package(f"libreoffice-help-{language}", scratch, instead=instead)
    # Below this folder there is exactly one for the language, in its own spelling: en-US, de, zh-CN.
    (root,) = (unpacked / "usr/share/libreoffice/help").glob("*/text")
    extracted = scratch / "pages.jsonl"
    with extracted.open("w", encoding="utf-8") as out:
        for path in sorted(root.rglob("*.html")):
            page = path.relative_to(root.parent).as_posix()
            row = {"page": page} | parse_page(path.read_text(encoding="utf-8"))
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return extracted


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
