"""Is a file what its name says, and does it hold what must not be published? Questions to the bytes of one file."""

import ast
import json
import os
import pickletools
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainers.redaction import TOKEN_SHAPE


_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Text of a model or of a corpus may well name `/usr/share`; everything else in such a file is ours to answer for.
_QUOTING = {"tokenizer.json", "vocab.json", "added_tokens.json", "chat_template.jinja"}
_QUOTED_FIELDS = {"samples", "chat_template"}
_ABSOLUTE = re.compile(r"(?:file:/*)?(?:~?/[^/\s]+/|[A-Za-z]:[\\/])\S*")


def not_what_its_name_says(name: str, content: bytes) -> str | None:
    """What is wrong with the content of a file of this name: a pickle under another one would pass a list of names."""
    if name.endswith(".png"):
        return None if _is_png(content) else "is not a PNG picture and nothing else"
    try:
        text = content.decode("utf-8")
        if name.endswith(".json"):
            json.loads(text)
        elif name.endswith(".py"):
            ast.parse(text)
    except (
        ValueError,
        SyntaxError,
        RecursionError,
    ) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        return f"is not valid ({error})"
    if "\0" in text:
        return "holds NUL bytes"
    return "is a pickle" if _is_pickle(content) else None


def secrets_and_paths(name: str, content: bytes, *, secrets: Iterable[str], roots: Iterable[str]) -> Iterator[str]:
    """What of the file must not be published, a phrase each.

    Args:
        secrets: known secrets, whatever their shape; those shaped like access tokens are found anyway.
        roots: folders of this machine. In JSON, values that are absolute paths are found anyway.
    """
    values = [value for field, value in _strings(content) if name not in _QUOTING and field not in _QUOTED_FIELDS]
    # JSON can spell any character as an escape: what is read in the end counts too.
    texts = [content.decode("utf-8", "replace"), *(value for _, value in _strings(content))]
    if any(TOKEN_SHAPE.search(text) or any(secret in text for secret in secrets) for text in texts):
        yield "holds an access token: remove it there, and revoke it if the file was ever shared"
    found = {value for value in values if _ABSOLUTE.fullmatch(value)}
    found |= {root for root in roots if any(spelling in text for text in texts for spelling in _spellings(root))}
    for path in sorted(found):
        yield f"holds a path of this machine ({path}): replace it by a relative path or a name"


def machine_roots(*paths: Path) -> set[str]:
    """The home, and the first two folders of `paths`; the first alone (`/usr`) names no machine."""
    roots = {str(Path(*path.parts[:3])) for path in paths if len(path.parts) > 2}
    return roots | {str(Path.home())} - {Path.home().anchor}


def safetensors_header(path: Path) -> bytes:
    """The JSON at the beginning of a file of weights; the rest are numbers."""
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _spellings(root: str) -> list[str]:
    """Where a path ends or goes on as a path; `/home/al` is not in `/home/alice`."""
    return [root + end for end in (os.sep, '"', "'", "\n", " ")]


def _strings(content: bytes) -> list[tuple[str, str]]:
    """Every string value of a JSON text, with the outermost field that it belongs to; none of another text."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return []
    found = []

    def walk(value: Any, field: str) -> None:
        if isinstance(value, str):
            found.append((field, value))
        elif isinstance(value, list):
            for item in value:
                walk(item, field)
        elif isinstance(value, dict):
            for key, item in value.items():
                found.append((field or key, key))
                walk(item, field or key)

    walk(value, "")
    return found


def _is_png(content: bytes) -> bool:
    """Whether the chunks of a PNG fill the file to its last byte."""
    if not content.startswith(_PNG_MAGIC):
        return False
    position = len(_PNG_MAGIC)
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        position += 12 + length
        if kind == b"IEND":
            return position == len(content)
    return False


def _is_pickle(content: bytes) -> bool:
    """Whether the whole is a program of the pickle machine; the oldest protocol is plain text."""
    try:
        operations = [position for _, _, position in pickletools.genops(content)]
    except Exception:  # whatever it stumbles on, it is no pickle
        return False
    return len(operations) > 1
