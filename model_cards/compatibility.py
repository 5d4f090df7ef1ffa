"""What the tests found out about a model family and other libraries, in one schema: `compatibility.json`.

`make compatibility` runs the tests that carry the mark `compatibility`, which writes
`model_cards/<card>/compatibility.json` for each family. The card shows it as a table, so that no card calls a feature
working which no test has tried; [`model_cards.matrix`] puts those of all families on one page.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from markupsafe import Markup

from model_cards.markdown import inline
from trainers.report import write_text_atomically


COMPATIBILITY_NAME = "compatibility.json"
COMMAND = "make compatibility"

Outcome = Literal["passed", "gloo", "failed", "not tested"]


class CompatibilityError(ValueError):
    """A `compatibility.json` that is malformed or outside the schema; the message names file, field and remedy."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}. Write the file again with `{COMMAND}`.")


@dataclass(kw_only=True)
class Row:
    """One feature.

    Args:
        feature (`str`): for people, such as `"Beam search"`; unique in its table.
        library (`str`): distribution name of the library whose feature it is (`"transformers"`).
        version (`str`, *optional*): its version in the test; None where it was not installed.
        outcome (`str`): `"passed"` if every test of the feature passed, `"gloo"` if they did by gloo processes alone,
            `"failed"` if one failed, else `"not tested"`.
        note (`str`): what a user must know, or why it was not tested.
    """

    feature: str
    library: str
    version: str | None
    outcome: Outcome
    note: str


@dataclass(kw_only=True)
class Compatibility:
    """The table of one family; `versions` and `device` as in [`~trainers.report.Results`]."""

    versions: dict[str, str]
    device: str
    rows: list[Row]


def write_compatibility(folder: str | Path, table: Compatibility) -> Path:
    """Validates `table` and writes `folder/compatibility.json`; makes the folder if there is none.

    Raises:
        CompatibilityError: a value outside the schema; the old file stays.
    """
    path = Path(folder) / COMPATIBILITY_NAME
    payload = asdict(table)
    _parse(payload, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(payload, indent=2) + "\n")
    return path


def read_compatibility(folder: str | Path) -> Compatibility | None:
    """Reads and validates `folder/compatibility.json`; None if there is no such file.

    Raises:
        CompatibilityError: the file is not JSON or outside the schema.
    """
    path = Path(folder) / COMPATIBILITY_NAME
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CompatibilityError(path, f"not valid JSON ({error})") from error
    return _parse(payload, path)


def compatibility_table(table: Compatibility) -> Markup:
    """The rows as a Markdown table."""
    lines = ["| Feature | Library | Outcome | Note |", "|---|---|---|---|"]
    for row in table.rows:
        library = f"{row.library} {row.version or '(not installed)'}"
        lines.append(f"| {inline(row.feature)} | {inline(library)} | {row.outcome} | {inline(row.note)} |")
    return Markup("\n".join(lines))


def _parse(payload: Any, path: Path) -> Compatibility:
    _check_fields(Compatibility, payload, "", path)
    for name, kind in (("versions", dict), ("device", str), ("rows", list)):
        _check_type(payload[name], kind, name, path)
    for name, version in payload["versions"].items():
        _check_type(version, str, f"versions.{name}", path)
    for index, row in enumerate(payload["rows"]):
        _check_row(row, f"rows[{index}]", path)
    features = Counter(row["feature"] for row in payload["rows"])
    if twice := [feature for feature, number in features.items() if number > 1]:
        raise CompatibilityError(path, f"feature {twice[0]!r} has more than one row")
    return Compatibility(**payload | {"rows": [Row(**row) for row in payload["rows"]]})


def _check_row(row: Any, where: str, path: Path) -> None:
    _check_fields(Row, row, where, path)
    for name, value in row.items():
        if name != "version" or value is not None:
            _check_type(value, str, f"{where}.{name}", path)
    if row["outcome"] not in get_args(Outcome):
        known = list(get_args(Outcome))
        raise CompatibilityError(path, f"field `{where}.outcome` must be one of {known}, got {row['outcome']!r}")
    if row["outcome"] in ("passed", "gloo") and row["version"] is None:
        raise CompatibilityError(path, f"field `{where}.version` is null, but the feature passed")


def _check_fields(kind: type, value: Any, where: str, path: Path) -> None:
    """An object with exactly the fields of the dataclass `kind`."""
    _check_type(value, dict, where or "top level", path)
    prefix, known = f"{where}." if where else "", {item.name for item in fields(kind)}
    for problem, names in (("unknown", set(value) - known), ("missing", known - set(value))):
        if names:
            raise CompatibilityError(path, f"{problem} field `{prefix}{min(names)}`; known are {sorted(known)}")


def _check_type(value: Any, kind: type, where: str, path: Path) -> None:
    if not isinstance(value, kind) or (kind in (dict, list) and not value):
        got = type(value).__name__ if value or not isinstance(value, kind) else "an empty one"
        raise CompatibilityError(path, f"field `{where}` must be a {kind.__name__}, got {got}")
