"""What happened in each round, a line of JSON each: written as it happens, cut back where a run goes on."""

import json
import os
from pathlib import Path
from typing import Any


class RoundLog:
    """`history`, a record for each round, and `logs`, what callbacks were told; both in one file, if there is one.

    A file is appended to, so that a round costs the same however many there were before.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)
        self.history: list[dict[str, Any]] = []
        self.logs: list[dict[str, Any]] = []

    def begin(self, size: int = 0) -> None:
        """Keep the first `size` bytes of the file, and read them. `ValueError` if it has fewer; it stays as it is."""
        self.history, self.logs = [], []
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < size:
            raise ValueError(
                f"{self.path.name} has {there} bytes, and had {size} when its round was committed. Put it back as it "
                "was, or begin anew in another output_dir."
            )
        with open(self.path, "a+b") as file:
            file.truncate(size)
            file.seek(0)
            for line in file:
                self._remember(json.loads(line))

    def add(self, kind: str, values: dict[str, Any]) -> None:
        """A record of a `"round"`, or a `"log"`."""
        line = {"kind": kind} | values
        self._remember(line)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=float) + "\n")

    def sync(self) -> int:
        """The size of the file, of which all is on the disk now."""
        if self.path is None:
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def _remember(self, line: dict[str, Any]) -> None:
        known = {name: value for name, value in line.items() if name != "kind"}
        (self.history if line["kind"] == "round" else self.logs).append(known)
