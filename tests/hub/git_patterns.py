"""The pattern language that .gitignore and .gitattributes share."""

import re
from collections.abc import Iterator


def expression(pattern: str) -> re.Pattern:
    """A pattern without `!` and trailing slash, as a regular expression on whole paths."""
    anchored = "/" in pattern
    pieces = [] if anchored else ["(?:.*/)?"]
    tokens = re.split(r"(\*\*/|/\*\*$|\*|\?|\[[^]]+\]|\\.)", pattern.removeprefix("/"))
    for token in tokens:
        match token:
            case "**/":
                pieces.append("(?:.*/)?")
            case "/**":
                pieces.append("/.+")
            case "*":
                pieces.append("[^/]*")
            case "?":
                pieces.append("[^/]")
            case _ if token.startswith("[") and token.endswith("]"):
                pieces.append("[" + token[1:-1].replace("!", "^", 1) + "]" if token[1] == "!" else token)
            case _:
                pieces.append(re.escape(token.removeprefix("\\")))
    return re.compile("".join(pieces), flags=re.DOTALL)


def lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if (line := line.strip()) and not line.startswith("#"):
            yield line


def is_large(attributes: str, path: str) -> bool:
    """Whether .gitattributes hands the file to LFS; the last line that matches decides."""
    large = False
    for line in lines(attributes):
        pattern, *values = line.split()
        if expression(pattern).fullmatch(path):
            filters = [value for value in values if value.lstrip("-!").partition("=")[0] == "filter"]
            large = filters[-1] == "filter=lfs" if filters else large
    return large


def is_ignored(ignore: str, path: str) -> bool:
    """Whether .gitignore hides the file: itself, or a folder above it."""
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        hidden = False
        for line in lines(ignore):
            negated, pattern = line.startswith("!"), line.removeprefix("!")
            if pattern.endswith("/") and depth == len(parts):
                continue  # folders only
            if expression(pattern.rstrip("/")).fullmatch("/".join(parts[:depth])):
                hidden = not negated
        if hidden:
            return True
    return False
