"""Rounds on a disk: each is there as a whole or not at all.

    <folder>/round-00000007/<name>.safetensors ...   tensors, by name
    <folder>/round-00000007/record.json              what else is known of the round, and the hash of every file

A round is written into a folder beside, synced, and renamed: a kill leaves the rounds before it, and a folder that
nobody reads and that the next commit removes. One process writes; any number may read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ...reliability.checkpoints import sync_folder
from .wire import WireError, pack, unpack


logger = logging.get_logger(__name__)

RECORD_NAME = "record.json"
FORMAT = 1
_ROUND = re.compile(r"round-(\d{8,})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_UNFINISHED = ".unfinished-"


class RoundError(ValueError):
    """A round that is absent, damaged or there already; the message names it and the remedy."""


class RoundStore:
    """The rounds of a run in `folder`, which is made at the first commit.

    Example:
        >>> store = RoundStore("runs/mine/rounds", keep=3)
        >>> start = 0 if (last := store.latest()) is None else last + 1
        >>> store.commit(start, {"model": model.state_dict()}, {"accuracy": 0.9})

    Args:
        keep (`int`, *optional*): remove all but so many of the newest rounds after a commit; at least 2, so that one
            is left should the newest be damaged later.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int | None = None):
        if keep is not None and keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: one round to fall back on.")
        self.folder = Path(folder)
        self.keep = keep

    def commit(
        self, round: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], record: Mapping[str, Any] | None = None
    ) -> Path:
        """Write a round; when this returns it survives a kill and a loss of power.

        Args:
            round: its number, from 0 on. A damaged round of that number is replaced.
            tensors: `{name: {key: tensor}}`, one file a name.
            record: any JSON values.

        Raises:
            RoundError: the round is there already, and sound.
            ValueError: a negative round, a name that is no file name, a record that is not JSON.
            OSError: the disk refused; the rounds before are untouched.
        """
        if isinstance(round, bool) or not isinstance(round, int) or round < 0:
            raise ValueError(f"round={round!r}: a whole number from 0 on is expected.")
        for name in tensors:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no plain file name: letters, digits, `_`, `-` and `.` only.")
        target = self._path(round)
        if target.exists() and not self._problem(round):
            raise RoundError(f"Round {round} is committed already in {self.folder.name}; rounds are written once.")
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left)
        scratch = self.folder / f"{_UNFINISHED}{target.name}"
        scratch.mkdir()
        files = {}
        for name, values in tensors.items():
            content = pack(values)
            files[f"{name}.safetensors"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            write_synced(scratch / f"{name}.safetensors", content)
        description = {"format": FORMAT, "round": round, "files": files, "record": dict(record or {})}
        write_synced(scratch / RECORD_NAME, (json.dumps(description, indent=1, allow_nan=False) + "\n").encode())
        sync_folder(scratch)
        if target.exists():
            os.rename(target, self.folder / f"{_UNFINISHED}damaged-{target.name}")
        os.rename(scratch, target)
        sync_folder(self.folder)
        self._remove_old()
        return target

    def latest(self) -> int | None:
        """The newest round that is whole: every file is as it was written. Damaged ones are passed over, with a
        warning; `None` if there is none."""
        for round in reversed(self.rounds()):
            problem = self._problem(round)
            if not problem:
                return round
            logger.warning(f"{problem} Going back to the round before.")
        return None

    def load(self, round: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """`({name: {key: tensor}}, record)` of a round. `RoundError` if it is not there or not as it was written."""
        description = self._description(round)
        tensors = {}
        for file in description["files"]:
            try:
                tensors[file.removesuffix(".safetensors")] = unpack(self._content(round, file, description))[0]
            except WireError as error:
                raise RoundError(f"Round {round}: {file} cannot be read ({error}).") from error
        return tensors, description["record"]

    def rounds(self) -> list[int]:
        """The numbers of all rounds that were committed, in order, unread."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _ROUND.fullmatch(name)))

    def _path(self, round: int) -> Path:
        return self.folder / f"round-{round:08d}"

    def _description(self, round: int) -> dict[str, Any]:
        path = self._path(round) / RECORD_NAME
        try:
            description = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RoundError(f"Round {round}: {RECORD_NAME} cannot be read ({error}).") from error
        if not isinstance(description, dict):
            raise RoundError(f"Round {round}: {RECORD_NAME} is no JSON object.")
        if description.get("format") != FORMAT or description.get("round") != round:
            raise RoundError(f"Round {round}: {RECORD_NAME} is of another format or round.")
        files = description.get("files")
        if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
            raise RoundError(f"Round {round}: {RECORD_NAME} does not say which files belong to it.")
        if not isinstance(description.get("record"), dict):
            raise RoundError(f"Round {round}: {RECORD_NAME} has no record.")
        if not all(_NAME.fullmatch(name) for name in files):
            raise RoundError(f"Round {round}: {RECORD_NAME} names files outside its folder.")
        return description

    def _content(self, round: int, file: str, description: Mapping[str, Any]) -> bytes:
        try:
            content = (self._path(round) / file).read_bytes()
        except OSError as error:
            raise RoundError(f"Round {round}: {file} cannot be read ({error}).") from error
        if hashlib.sha256(content).hexdigest() != description["files"][file].get("sha256"):
            raise RoundError(f"Round {round}: {file} is not as it was written (its hash differs).")
        return content

    def _problem(self, round: int) -> str:
        try:
            description = self._description(round)
            for file in description["files"]:
                self._content(round, file, description)
        except RoundError as error:
            return str(error)
        return ""

    def _remove_old(self) -> None:
        for round in self.rounds()[: -self.keep] if self.keep else ():
            # renamed first: a kill in between leaves no round that lacks files
            doomed = self.folder / f"{_UNFINISHED}old-{self._path(round).name}"
            os.rename(self._path(round), doomed)
            shutil.rmtree(doomed)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file; when this returns its content survives a loss of power."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
