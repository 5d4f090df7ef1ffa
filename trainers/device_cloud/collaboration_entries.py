"""What a row of the map of device-cloud collaboration is, and how it names code and papers."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


CollaborationClass = Literal["data", "feature", "parameter"]
Mark = Literal["S", "K", "I"]
CLASSES: dict[str, str] = {
    "data": "samples, real or synthetic, or what is known of their labels",
    "feature": "intermediate results: embeddings, activations, logits, tokens",
    "parameter": "weights, updates, or weights that were generated",
}
MARKS: dict[str, str] = {
    "S": "seen in a source: of a method its abstract, readme, title or code",
    "K": "known from memory, not checked again",
    "I": "inferred or proposed by us",
}
NOT_HERE = "not in this package"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way for a device's small model and a cloud's large one to learn or to answer together.

    Args:
        name, does: for people.
        kind (`str`): which of the survey's three classes; see `CLASSES`.
        source (`str`): an arXiv number, or the name of the peer.
        method_mark, class_mark (`str`): of what is said of the method, and of its class; see `MARKS`.
        entry_points (`tuple[str, ...]`): `"module:object"`, the first is where to begin; empty where the package does
            not have it.
        built_on, down, up, device_work, test_data (`str`): only of what is here.
        note (`str`): what a reader must know.
    """

    name: str
    kind: CollaborationClass
    does: str
    source: str
    method_mark: Mark
    class_mark: Mark = "I"
    entry_points: tuple[str, ...] = ()
    built_on: str = ""
    down: str = ""
    up: str = ""
    device_work: str = ""
    test_data: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        _require("class", self.kind, CLASSES)
        _require("mark", self.method_mark, MARKS)
        _require("mark", self.class_mark, MARKS)
        described = (self.built_on, self.down, self.up, self.device_work, self.test_data)
        if bool(self.entry_points) != all(described) or (not self.entry_points and any(described)):
            raise ValueError(f"{self.name}: wire, work and data are told of what is in the package, and only of that.")


@dataclass(frozen=True, kw_only=True)
class UserDataset:
    """A data set whose rows belong to users by nature; `users` says who they are."""

    name: str
    users: str
    mark: Mark
    entry_points: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        _require("mark", self.mark, MARKS)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric, and whose point of view it takes: `level` is user, device, cloud or privacy."""

    name: str
    level: Literal["user", "device", "cloud", "privacy"]
    mark: Mark
    entry_points: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        _require("mark", self.mark, MARKS)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A part of the system or of the hardware below the algorithms."""

    name: str
    layer: Literal["system", "hardware"]
    mark: Mark
    what: str
    entry_points: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require("mark", self.mark, MARKS)


def _require(what: str, value: str, known: dict[str, str]) -> None:
    if value not in known:
        raise ValueError(f"{what} {value!r} is not known. Choose one of {', '.join(known)}.")


def resolve(entry_point: str) -> Any:
    """The object that `"module:object"` names; attributes of it by dots.

    Raises:
        ValueError: the text has another form.
        ImportError, AttributeError: there is no such module or object.
    """
    module, separator, name = entry_point.partition(":")
    if not (module and separator and name):
        raise ValueError(f"{entry_point!r} must be 'module:object'.")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def source_file(entry_point: str) -> str:
    """The file of an entry point's module, relative to the repository's root, `/` as separator; nothing is imported.

    Raises:
        FileNotFoundError: no such module beside this package.
    """
    root = Path(__file__).parents[2]
    path = Path(*entry_point.partition(":")[0].split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (root / candidate).is_file():
            return candidate.as_posix()
    raise FileNotFoundError(f"{entry_point}: there is no module {path.as_posix()} in this package.")


__all__ = [
    "CLASSES",
    "MARKS",
    "NOT_HERE",
    "CollaborationClass",
    "Layer",
    "Mark",
    "Measure",
    "Method",
    "UserDataset",
    "resolve",
    "source_file",
]
