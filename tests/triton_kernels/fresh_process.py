"""Python in a process of its own: whether Triton interprets kernels is decided before it is imported."""

import os
import subprocess
import sys

from tests.forked import run_python


def uninterpreted(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `python *arguments` with compilable kernels where the imports need not be made anew."""
    if "TRITON_INTERPRET" in os.environ:
        return python(*arguments, interpret=False, **environment)
    return run_python(*arguments, env=os.environ | environment)


def python(*arguments: str, interpret: bool, **environment: str) -> subprocess.CompletedProcess:
    """Run `python *arguments`, with kernels interpreted or compilable, whatever this process does."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= environment | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=600)
