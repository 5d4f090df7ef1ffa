"""Processes that are forked from one server for each pytest worker, which has done the imports once.

A process that imports torch and transformers anew spends longer on that than on most jobs. A test of what happens when
something is imported, or of what an environment variable does then, needs an interpreter of its own nevertheless.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


# What is installed only, so that the server finds it wherever it is started.
IMPORTED = ["transformers.trainer", "transformers.models.llama", "triton", "hf_models", "trainers.callbacks"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)


def _prepare(environment: dict[str, str]) -> None:
    gc.freeze()  # else a collection copies every page that is shared with the server
    os.environ.clear()  # the server's
    os.environ.update(environment)


def start_ranks(function: Callable[..., None], *arguments: Any, world_size: int = 2, join: bool = True):
    """`function(rank, *arguments)` in each of `world_size` processes, which have the environment of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": str(world_size), "ACCELERATE_USE_CPU": "true"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = {"nprocs": world_size, "join": join, "start_method": "forkserver"}
    return mp.start_processes(_as_rank, args=(environment, function, arguments), **options)


def _as_rank(rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple) -> None:
    _prepare(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    function(rank, *arguments)


class Python:
    """`python -m MODULE *arguments` or `python -c CODE *arguments`, what it needs imported already; its output goes to
    files in `folder`. `cwd` and `env` are those of this process unless given."""

    def __init__(
        self,
        *command: str | Path,
        folder: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.command = [str(word) for word in command]
        self.files = [folder / "stdout", folder / "stderr"]
        options = (list(map(str, self.files)), str(cwd or Path.cwd()), dict(os.environ if env is None else env))
        self._process = SERVER.Process(target=_as_python, args=(self.command, *options))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> list[str]:
        """What it wrote to stdout and stderr; it is killed where it does not end."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.command, timeout)
        return [file.read_text(errors="replace") for file in self.files]


def run_python(*command: str | Path, timeout: float = 600, **options) -> subprocess.CompletedProcess[str]:
    """Run [`Python`] to its end."""
    with tempfile.TemporaryDirectory() as folder:
        process = Python(*command, folder=Path(folder), **options)
        said = process.communicate(timeout)
    return subprocess.CompletedProcess(process.command, process.returncode, *said)


def _as_python(command: list[str], files: list[str], cwd: str, environment: dict[str, str]) -> None:
    _prepare(environment)
    for stream, name in enumerate(files, start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(cwd)
    option, value, *arguments = command
    if option == "-m":
        sys.argv = [value, *arguments]
        runpy.run_module(value, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(value, "<string>", "exec"), {"__name__": "__main__"})
