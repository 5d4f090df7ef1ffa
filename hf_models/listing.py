"""What exists, a line each: names with the first sentence of their docstrings, for `python -m hf_models` and
`python -m trainers`."""

import ast
import inspect
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path


# A full stop, and what begins the next sentence; `et al.` and the like end none.
_END = re.compile(r"(?<=[.?!])(?<! al\.)\s+(?=[A-Z`\[(])")
_LINK = re.compile(r"\[`~?([^`]+)`\]")


def summary(docstring: str | None) -> str:
    """The first sentence of a docstring on one line, links as plain names; empty if it begins with its arguments."""
    first = inspect.cleandoc(docstring or "").split("\n\n")[0]
    sentence = _END.split(" ".join(first.split()))[0]
    opening = re.match(r"(Args|Returns|Raises):|\w+ \(`", sentence)
    return "" if opening else _LINK.sub(r"`\1`", sentence)


def public_names(package: types.ModuleType) -> dict[str, str]:
    """The summary of every class and function in `package.__all__`."""
    found = {name: getattr(package, name) for name in package.__all__}
    return {name: summary(each.__doc__) for name, each in found.items() if isinstance(each, type) or callable(each)}


def commands(folder: Path, package: str) -> Iterator[tuple[str, str]]:
    """The modules below `folder`, which is `package`, that run by `python -m`, with their summaries; imports none."""
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = any(
            isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body
        )
        if guarded:
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__main__" else parts
            yield ".".join((package, *parts)), summary(ast.get_docstring(tree))


def section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """A heading and its rows, the summaries one below the other."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)])
