"""Functions with docstrings out of Python sources: completion samples, and a small offline instruction dataset."""

import ast
import textwrap
import warnings
from collections.abc import Iterator

from datasets import Dataset, Features, Value

from .documents import require_column


_FUNCTION_FEATURES = Features(
    {name: Value("string") for name in ("prompt", "body", "name", "arguments", "docstring", "source")}
)
_CHAT_FEATURES = Features(
    {"messages": [{"role": Value("string"), "content": Value("string")}], "source": Value("string")}
)


def python_functions(dataset: Dataset) -> Dataset:
    """
    The documented functions, and methods of top-level classes, of a dataset of Python sources.

    Args:
        dataset: columns `text` (Python source) and `source`. Texts that do not parse are passed over.

    Returns:
        A row a function, in order: `prompt` (decorators, signature and docstring, indentation removed) and `body`
        (what follows; `prompt + body` is the function's source), `name`, `arguments` (as in the signature),
        `docstring` (cleaned as by `inspect.cleandoc`), and `source`
        ("json/decoder.py::JSONDecoder.decode"). Functions that are only a docstring are left out.

    Raises:
        ValueError: a column is missing, or there is no such function.
    """
    require_column(dataset, "text", argument="dataset")
    require_column(dataset, "source", argument="dataset")
    rows = [row for document in dataset for row in _functions_of(document["text"], document["source"])]
    if not rows:
        raise ValueError("dataset: no documented Python function in any `text`; give a dataset of Python sources.")
    return Dataset.from_list(rows, features=_FUNCTION_FEATURES)


def instruction_dataset(dataset: Dataset) -> Dataset:
    """
    Conversations of one turn: the user asks for a function by signature and docstring, the assistant writes it.

    Args:
        dataset: as for `python_functions`.

    Returns:
        Columns `messages` (list of {"role", "content"}) and `source`.

    Raises:
        ValueError: as `python_functions`.
    """
    rows = []
    for function in python_functions(dataset):
        task = first_sentence(function["docstring"])
        if not task:
            continue
        request = f"Write a Python function `{function['name']}({function['arguments']})` that does this: {task}"
        answer = (function["prompt"] + function["body"]).rstrip("\n")
        rows.append(
            {
                "messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}],
                "source": function["source"],
            }
        )
    return Dataset.from_list(rows, features=_CHAT_FEATURES)


def _parse(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            # Other people's invalid escapes are not the user's business.
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _functions_of(text: str, source: str) -> Iterator[dict[str, str]]:
    tree = _parse(text)
    if tree is None:
        return
    lines = text.splitlines(keepends=True)
    for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        prefix = f"{scope.name}." if isinstance(scope, ast.ClassDef) else ""
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                function = _prompt_and_body(node, lines)
                if function is not None:
                    yield {
                        "prompt": function[0],
                        "body": function[1],
                        "name": node.name,
                        "arguments": ast.unparse(node.args),
                        "docstring": ast.get_docstring(node),
                        "source": f"{source}::{prefix}{node.name}",
                    }


def _prompt_and_body(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    docstring = node.body[0]
    if len(node.body) < 2 or node.body[1].lineno <= docstring.end_lineno or docstring.lineno <= node.lineno:
        return None
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    function = textwrap.dedent("".join(lines[start : node.end_lineno]))
    if function[0].isspace():  # a string or comment in it reaches left of the function's own indentation
        return None
    dedented = function.splitlines(keepends=True)
    cut = docstring.end_lineno - start
    return "".join(dedented[:cut]), "".join(dedented[cut:])


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line; empty if there is none."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()
