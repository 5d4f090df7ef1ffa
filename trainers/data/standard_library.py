"""The embedded corpus: the sources of the Python standard library, which are there wherever Python is."""

import sysconfig
from pathlib import Path

from datasets import Dataset


# Tests, other people's packages, and what the build wrote for one machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
# Generated tables: no one would call them written Python, and a model that learns them learns nothing else.
_TABLES = ("encodings/", "pydoc_data/", "html/entities.py", "msilib/schema.py", "msilib/sequence.py", "stringprep.py")
_MACHINE_SPECIFIC = ("_sysconfigdata", "config-", "sitecustomize.py", "usercustomize.py")


def read_standard_library(folder: Path | None = None) -> Dataset:
    """
    The standard library's modules, sorted by path; tests, generated tables and files that are not UTF-8 are left out.

    Args:
        folder: where to look; the running interpreter's library if None.

    Returns:
        Columns `text`, `source` (path below the folder, e.g. "json/decoder.py") and `group` (equal to `source`).

    Raises:
        FileNotFoundError: the folder holds no Python sources (some minimal installations ship byte code only).
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    texts, sources = [], []
    for path in folder.rglob("*.py"):
        source = path.relative_to(folder).as_posix()
        if _SKIPPED_FOLDERS.intersection(source.split("/")[:-1]) or source.startswith(_TABLES + _MACHINE_SPECIFIC):
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        sources.append(source)
    if not texts:
        raise FileNotFoundError(
            f"python-stdlib: no .py files below {folder}. This interpreter was installed without its sources: "
            "use a full CPython, or name another dataset."
        )
    order = sorted(range(len(sources)), key=sources.__getitem__)
    sources = [sources[i] for i in order]
    return Dataset.from_dict({"text": [texts[i] for i in order], "source": sources, "group": sources})
