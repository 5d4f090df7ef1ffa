"""The map of device-cloud collaboration after the survey of arXiv 2504.15300, and where it is in this package.

    python -m trainers.device_cloud.collaboration            # the tables, as Markdown

The survey names three classes of algorithms. Of its own tables nothing was read: which method is in which class is our
reading, and every row says from where it is known.
"""

import argparse
from collections.abc import Iterable, Sequence

from .collaboration_entries import (
    CLASSES,
    MARKS,
    NOT_HERE,
    Layer,
    Measure,
    Method,
    UserDataset,
    resolve,
    source_file,
)
from .collaboration_methods import METHODS
from .collaboration_tables import DATASETS, LAYERS, MEASURES


_ARXIV = "https://arxiv.org/abs/"


def markdown(*, base: str = "") -> str:
    """All tables as Markdown.

    Args:
        base (`str`): what goes before the files that rows link to: `"../"` for a page one folder down, or the address
            of a repository's files.
    """
    return "\n\n".join(
        [
            "## Device-cloud collaboration, and where it is here",
            f"The survey ([2504.15300]({_ARXIV}2504.15300)) names three classes of collaboration algorithms: "
            "data-based, feature-based and parameter-based. We have not read its tables: what crosses the wire as the "
            "question that tells the classes apart, and the class of every method below, are ours (I).",
            "\n".join(f"- **{mark}**: {meaning}" for mark, meaning in MARKS.items()),
            methods_table(base=base),
            "### Methods that are not in this package",
            absent_table(),
            "### Data sets with natural users",
            _table(
                ("data set", "users", "mark", "here", "note"),
                ([row.name, row.users, row.mark, _entries(row.entry_points, base), row.note] for row in DATASETS),
            ),
            "### Metrics",
            "The survey speaks of metrics of user level and device level (S); this list is ours.",
            _table(
                ("level", "metric", "mark", "here", "note"),
                ([row.level, row.name, row.mark, _entries(row.entry_points, base), row.note] for row in MEASURES),
            ),
            "### System and hardware",
            _table(
                ("layer", "name", "mark", "what", "here"),
                ([row.layer, row.name, row.mark, row.what, _entries(row.entry_points, base)] for row in LAYERS),
            ),
        ]
    )


def methods_table(methods: Sequence[Method] = METHODS, *, base: str = "") -> str:
    """What this package has, by class."""
    header = ("class", "method", "here", "built on", "down", "up", "on the device", "test data", "marks")
    return _table(
        header,
        (
            [
                f"{row.kind}",
                _name(row),
                _entries(row.entry_points, base),
                row.built_on,
                row.down,
                row.up,
                row.device_work,
                row.test_data,
                _marks(row),
            ]
            for row in methods
            if row.entry_points
        ),
    )


def absent_table(methods: Sequence[Method] = METHODS) -> str:
    """What is only named, so that nobody looks for it."""
    return _table(
        ("class", "method", "what it does", "source", "marks"),
        (
            [row.kind, row.name, row.does + (f"; {row.note}" if row.note else ""), _source(row.source), _marks(row)]
            for row in methods
            if not row.entry_points
        ),
    )


def _marks(row: Method) -> str:
    return f"method {row.method_mark}, class {row.class_mark}"


def _name(row: Method) -> str:
    note = f"; {row.note}" if row.note else ""
    return f"**{row.name}** ({_source(row.source)}): {row.does}{note}"


def _source(source: str) -> str:
    number = source.replace(".", "", 1)
    return f"[{source}]({_ARXIV}{source})" if number.isdigit() else source


def _entries(entry_points: Sequence[str], base: str) -> str:
    links = [f"[`{_label(entry)}`]({base}{source_file(entry)})" for entry in entry_points]
    return ", ".join(links) or NOT_HERE


def _label(entry_point: str) -> str:
    module, _, name = entry_point.partition(":")
    return f"python -m {module}" if name == "main" else name


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Print the map of device-cloud collaboration as Markdown.")
    parser.add_argument("--base", default="", help="What goes before the files that rows link to.")
    print(markdown(base=parser.parse_args(argv).base))


if __name__ == "__main__":
    main()

__all__ = [
    "CLASSES",
    "DATASETS",
    "LAYERS",
    "MARKS",
    "MEASURES",
    "METHODS",
    "Layer",
    "Measure",
    "Method",
    "UserDataset",
    "absent_table",
    "markdown",
    "methods_table",
    "resolve",
]
