"""LibreOffice Help: the same 2 561 pages in 34 languages, from Debian packages (MPL-2.0), no data hub needed."""

import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import datasets
from datasets import Dataset, concatenate_datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)

LIBREOFFICE_LANGUAGES = tuple(
    "ca cs da de dz el en-gb en-us es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sk sl sv tr vi "
    "zh-cn zh-tw".split()
)

# Every unit of text, and nothing of the navigation around it, carries an id.
_UNIT = re.compile(r'<(p|h[1-6])\s[^>]*?\bid="[^"]+"[^>]*>(.*?)</\1>', re.DOTALL)
_TAG = re.compile(r"<[^>]+>")


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
    unknown = sorted(set(languages) - set(LIBREOFFICE_LANGUAGES))
    if unknown or not languages:
        raise ValueError(
            f"libreoffice-help: unknown language {', '.join(unknown) or '(none given)'}; "
            f"choose from {', '.join(LIBREOFFICE_LANGUAGES)}."
        )
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "libreoffice-help"
    folder.mkdir(parents=True, exist_ok=True)
    return concatenate_datasets([_read_language(language, folder) for language in languages])


def page_text(page: str) -> str:
    """The paragraphs and headings of one HTML help page, in order, one a line."""
    units = (" ".join(html.unescape(_TAG.sub("", match[2])).split()) for match in _UNIT.finditer(page))
    return "\n".join(unit for unit in units if unit)


def _read_language(language: str, folder: Path) -> Dataset:
    pages, checksum = folder / f"{language}.jsonl", folder / f"{language}.jsonl.sha256"
    if not (pages.exists() and checksum.exists() and _sha256(pages) == checksum.read_text()):
        if pages.exists():
            logger.warning(f"{pages.name} does not match its checksum: fetching it again")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            extracted = _fetch(language, Path(scratch))
            # The checksum goes last: an interrupted extraction leaves none and is done again.
            checksum.unlink(missing_ok=True)
            os.replace(extracted, pages)
            checksum.write_text(_sha256(pages))
    logger.info(f"libreoffice-help {language}: sha256 {checksum.read_text()}")
    with pages.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return Dataset.from_dict(
        {
            "text": [row["text"] for row in rows],
            "source": [f"{language}/{row['page']}" for row in rows],
            "group": [row["page"] for row in rows],
        }
    )


def _fetch(language: str, scratch: Path) -> Path:
    package = f"libreoffice-help-{language}"
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"{package} comes from a Debian package, but {' and '.join(missing)} cannot be found. "
            "Use a Debian or Ubuntu machine, or name another dataset (python-stdlib needs nothing)."
        )
    _run(["apt-get", "download", package], scratch, package)
    unpacked = scratch / "unpacked"
    _run(["dpkg", "-x", str(next(scratch.glob("*.deb"))), str(unpacked)], scratch, package)

    # Below this folder there is exactly one for the language, in its own spelling: en-US, de, zh-CN.
    (root,) = (unpacked / "usr/share/libreoffice/help").glob("*/text")
    extracted = scratch / "pages.jsonl"
    with extracted.open("w", encoding="utf-8") as out:
        for path in sorted(root.rglob("*.html")):
            page = path.relative_to(root.parent).as_posix()
            text = page_text(path.read_text(encoding="utf-8"))
            out.write(json.dumps({"page": page, "text": text}, ensure_ascii=False) + "\n")
    return extracted


def _run(command: list[str], folder: Path, package: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(
            f"{package}: `{' '.join(command[:2])}` failed with {result.stderr.strip() or result.returncode}. "
            "Run `apt-get update` as root, check the network, or name another dataset (python-stdlib needs nothing)."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
