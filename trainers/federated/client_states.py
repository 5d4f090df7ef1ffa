"""What clients keep between their rounds, as each would on its own disk."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..reliability.checkpoints import sync_folder
from .core import ClientMemory, pack, unpack


_RECORD = "record"


class ClientStates:
    """The memories of clients: in files, written before an upload leaves, or in this process if there is no folder.

    A file holds what one client has, so that the memory of a process does not grow with their number.

    Args:
        folder: made when it is needed.
        keep: see [`ClientMemory`][trainers.federated.core.ClientMemory].
    """

    def __init__(self, folder: str | os.PathLike | None, *, keep: int = 2):
        self.folder, self.keep = None if folder is None else Path(folder), keep
        self._here: dict[str, ClientMemory] = {}
        self._unsynced: list[Path] = []

    def __getitem__(self, client: str) -> ClientMemory:
        if self.folder is None:
            return self._here.setdefault(client, ClientMemory(keep=self.keep))
        memory, path = ClientMemory(keep=self.keep), self._path(client)
        if path.exists():
            tensors, metadata = unpack(path.read_bytes())
            memory.load_state_dict(tensors, json.loads(metadata[_RECORD]) | {"keep": self.keep})
        return memory

    def __setitem__(self, client: str, memory: ClientMemory) -> None:
        if self.folder is None:
            self._here[client] = memory
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, record = memory.state_dict()
        path = self._path(client)
        scratch = path.with_suffix(".unfinished")
        scratch.write_bytes(pack(tensors, {_RECORD: json.dumps(record)}))
        os.replace(scratch, path)
        self._unsynced.append(path)

    def sync(self) -> None:
        """When this returns, what was set survives a loss of power; call it before uploads leave."""
        for path in self._unsynced:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if self._unsynced:
            sync_folder(self.folder)
            self._unsynced = []

    def clear(self) -> None:
        """Forget all."""
        self._here = {}
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, client: str) -> Path:
        # a name may be anything, a file name may not
        return self.folder / f"{hashlib.sha256(client.encode()).hexdigest()[:32]}.safetensors"
