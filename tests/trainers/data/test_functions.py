import ast
import textwrap

import pytest
from datasets import Dataset

from trainers.data import instruction_dataset, load_text_dataset, python_functions


SOURCE = textwrap.dedent(
    '''
    def documented(a, *, b=1):
        """Add two numbers. Then say so.

        More.
        """
        return a + b

    def undocumented(): return 1

    def only_a_docstring():
        """Nothing else."""

    class Thing:
        @property
        def name(self) -> str:
            """The name of the thing"""
            # why
            return """
    left of the indentation"""

        @staticmethod
        async def wait(
            seconds,
        ):
            """Wait."""
            await sleep(seconds)
    '''
)


@pytest.fixture
def dataset():
    return Dataset.from_dict({"text": [SOURCE, "not python at all"], "source": ["pkg/mod.py", "README"]})


def test_functions_and_methods(dataset):
    functions = {row["source"]: row for row in python_functions(dataset)}
    assert list(functions) == ["pkg/mod.py::documented", "pkg/mod.py::Thing.wait"]
    first, method = functions.values()
    assert first["prompt"].startswith("def documented(a, *, b=1):\n") and first["prompt"].endswith('    """\n')
    assert first["body"] == "    return a + b\n" and first["arguments"] == "a, *, b=1"
    assert method["prompt"].startswith("@staticmethod\nasync def wait(\n")
    assert method["body"].strip() == "await sleep(seconds)"


def test_instructions(dataset):
    row = instruction_dataset(dataset)[0]
    assert row["messages"][0] == {
        "role": "user",
        "content": "Write a Python function `documented(a, *, b=1)` that does this: Add two numbers.",
    }
    assert row["messages"][1]["content"].endswith("return a + b")


def test_every_function_of_the_standard_library_parses():
    functions = python_functions(load_text_dataset("python-stdlib", max_documents=60, held_out_fraction=0.3)["train"])
    assert len(functions) > 50
    for row in functions:
        (node,) = ast.parse(row["prompt"] + row["body"]).body
        assert node.name == row["name"] and ast.get_docstring(node)


def test_bad_input():
    with pytest.raises(ValueError, match="no documented Python function"):
        python_functions(Dataset.from_dict({"text": ["x = 1"], "source": ["a"]}))
    with pytest.raises(ValueError, match="no such column"):
        python_functions(Dataset.from_dict({"text": ["x = 1"]}))
