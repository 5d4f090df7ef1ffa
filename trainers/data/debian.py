"""Files out of a Debian package, fetched and unpacked but never installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)


def unpacked_package(
    package: str, subfolder: str, *, cache_dir: str | os.PathLike | None = None, instead: str
) -> Path:
    """
    The folder `subfolder` of a Debian package, below `cache_dir` (datasets' own cache folder if None).

    Fetched with `apt-get download` and unpacked with `dpkg -x` the first time. The folder appears in one move at the
    end, so that an interrupted call leaves nothing half done.

    Args:
        instead: what an error offers to who has no Debian, as the end of a sentence.

    Raises:
        RuntimeError: apt-get or dpkg are missing, the package index cannot be reached, or the package has no such
            folder.
    """
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "debian"
    target = root / package
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        found = unpack_package(package, Path(scratch), instead=instead) / subfolder
        if not found.is_dir():
            raise RuntimeError(f"{package}: no folder {subfolder} in the package; its layout has changed.")
        try:
            os.rename(found, target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    return target


def unpack_package(package: str, scratch: Path, *, instead: str) -> Path:
    """The root of the files of a Debian package, fetched and unpacked into the empty folder `scratch`; the rest as in
    [`unpacked_package`]."""
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"{package} is a Debian package, but {' and '.join(missing)} cannot be found. "
            f"Use a Debian or Ubuntu machine, or {instead}."
        )
    logger.info(f"{package}: fetching the package")
    _run(["apt-get", "download", package], scratch, package, instead)
    (archive,) = scratch.glob("*.deb")
    _run(["dpkg", "-x", str(archive), "unpacked"], scratch, package, instead)
    return scratch / "unpacked"


def _run(command: list[str], folder: Path, package: str, instead: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(
            f"{package}: `{' '.join(command[:2])}` failed with {result.stderr.strip() or result.returncode}. "
            f"Run `apt-get update` as root, check the network, or {instead}."
        )


__all__ = ["unpack_package", "unpacked_package"]
