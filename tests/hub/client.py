"""Real clients of the loopback Hub, each in a process of its own.

huggingface_hub reads its settings when it is imported, so that one process can know one Hub only.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.hub.server import LoopbackHub, require_loopback


# The interpreters of both ends of the supported range; `make test-oldest` names that of the lower bounds, and what
# needs it is marked `oldest`.
PYTHONS = {
    "newest": sys.executable,
    "oldest": os.environ.get("OLDEST_PYTHON", "OLDEST_PYTHON is not set: use make test-oldest"),
}


def call_client(function: Callable, hub: LoopbackHub, *arguments, home: Path, token: str | None, **options) -> Any:
    """Call `function(*arguments)` in a client process and return its value; both travel as JSON.

    The function runs there by its source text: whatever it uses it must import itself. `options` go to `run_client`.
    """
    code = f"""{textwrap.dedent(inspect.getsource(function))}
import json, sys
print("\\n" + json.dumps({function.__name__}(*json.loads(sys.argv[1]))))"""
    done = run_client(code, hub, home=home, token=token, arguments=[json.dumps(arguments)], **options)
    return json.loads(done.stdout.splitlines()[-1])


def run_client(
    code: str,
    hub: LoopbackHub,
    *,
    home: Path,
    token: str | None,
    python: str | Path = sys.executable,
    arguments: Sequence[str | Path] = (),
    cwd: Path | None = None,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `code` with `python -c`, `arguments` in `sys.argv[1:]`; see `run_command`."""
    command = [python, "-c", code, *arguments]
    return run_command(command, hub, home=home, token=token, cwd=cwd, timeout=timeout, env=env, check=check)


def run_command(
    command: Sequence[str | Path],
    hub: LoopbackHub,
    *,
    home: Path,
    token: str | None,
    cwd: Path | None = None,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command that knows only this Hub; `env` adds to its environment.

    With `check`, a command that fails is an `AssertionError` that shows its output.
    """
    environment = hub.environment(home, token) | dict(env or {})
    require_loopback(environment)
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env=environment,
            cwd=cwd,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"no end after {timeout} s\n{report(error.stdout, error.stderr, hub)}") from None
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode}\n{report(done.stdout, done.stderr, hub)}")
    return done


def report(stdout: str | bytes | None, stderr: str | bytes | None, hub: LoopbackHub) -> str:
    streams = [text.decode(errors="replace") if isinstance(text, bytes) else text or "" for text in (stdout, stderr)]
    return "\n".join(["--- stdout", streams[0], "--- stderr", streams[1], "--- faults of the Hub", *hub.errors])
