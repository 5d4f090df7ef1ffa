"""What of a run may be shown to strangers: no secret, no path of the machine."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath, PureWindowsPath


REDACTED = "REDACTED"

_SECRET_NAME = re.compile(r"token(?!iz)|key|secret|passw|credential|authorization|bearer", re.IGNORECASE)
_COUNT_NAME = re.compile(r"(?:^|[^a-z])(?:num|max|min|per|n|id|ids|tokens)(?:[^a-z]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"([\w.\-]+)[\"']?\s*[=:]\s*")
_SCALAR = re.compile(r"[\"']?([^\"',}\]\s]*)")
TOKEN_SHAPE = re.compile(
    r"(?:hf|hf_oauth|api_org|gh[pousr])_[A-Za-z0-9]{16,}|\bgithub_pat_\w{20,}|\bsk-[A-Za-z0-9_-]{20,}"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_PATH_END = r"[^\s\"',;:=\[\](){}]+"
_POSIX_PATH = re.compile(r"(?:file:/+|(?<![\w.~/\-])(?:(?<!:)/+|/(?!/)))" + _PATH_END)
_WINDOWS_PATH = re.compile(r"(?<![A-Za-z])[A-Za-z]:[\\/]+" + _PATH_END)


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as one line for a shell, fit to be published.

    The value of every option, environment assignment or JSON/YAML field whose name contains token, key, secret,
    password or credential is replaced, and so is everything shaped like an access token and the login inside a URL.
    Tokenizers and counts (`--max_tokens 1024`) stay. Absolute paths become relative to the working directory, or,
    outside of it, their last part.

    Args:
        argv (`Sequence[str]`, *optional*): the words; by default those of this process, interpreter included.
    """
    words = list(sys.orig_argv if argv is None else argv)
    if argv is None:
        words[0] = "python"
    shown: list[str] = []
    hiding = False  # inside the values of an option that holds a secret
    for position, word in enumerate(words):
        if hiding and not word.startswith("--" if shown[-1] != REDACTED else "-"):
            shown.append(REDACTED)
            continue
        following = words[position + 1] if position + 1 < len(words) else ""
        hiding = word.startswith("-") and "=" not in word and _is_secret(word, following)
        shown.append(_without_paths(_without_secrets(word)))
    return shlex.join(shown)


def without_tokens(text: str) -> str:
    """`text` with everything replaced that is shaped like an access token."""
    return TOKEN_SHAPE.sub(REDACTED, text)


def environment_secrets() -> list[str]:
    """The values of this process' environment variables whose names say that they are secret (`WANDB_API_KEY`)."""
    # Shorter ones are settings (`KEYBOARD=us`), and would be found in any text.
    return [value for name, value in os.environ.items() if len(value) >= 16 and _is_secret(name, value)]


def _is_secret(name: str, value: str) -> bool:
    counted = _COUNT_NAME.search(name) and _NUMBER.fullmatch(value)
    return bool(_SECRET_NAME.search(name)) and not counted


def _without_secrets(word: str) -> str:
    for match in _ASSIGNMENT.finditer(word):
        if _is_secret(match.group(1), _SCALAR.match(word, match.end()).group(1)):
            # the rest of the word goes too: where a secret ends inside quotes and escapes is a guess
            word = word[: match.end()] + REDACTED
            break
    return _URL_LOGIN.sub(f"{REDACTED}@", without_tokens(word))


def _without_paths(word: str) -> str:
    # --option=PATH, NAME=PATH, -I/usr/include
    option = re.match(r"-*[\w.\-]+=|-[A-Za-z](?=/)|", word).group()
    value = word[len(option) :]
    if value.startswith("/"):
        value = _short_path(value)  # as a whole: a path may contain spaces
    value = _POSIX_PATH.sub(lambda match: _short_path(match.group()), value)
    value = _WINDOWS_PATH.sub(lambda match: PureWindowsPath(match.group()).name, value)
    return option + value


def _short_path(path: str) -> str:
    path = os.path.normpath("/" + path.removeprefix("file:").lstrip("/"))
    here = Path.cwd()
    if path.startswith(f"{here}{os.sep}") and here.name:
        return os.path.relpath(path, here)
    return PurePath(path).name or "."
