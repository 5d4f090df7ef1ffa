"""The environment of somebody who never installed us: everything that an interpreter has, except this package."""

import subprocess
from pathlib import Path


def bare_python(folder: Path, python: str | Path) -> Path:
    """An interpreter in a new virtual environment in `folder` that sees the packages of `python`'s.

    Its site-packages joins the path by a .pth file, and .pth files are not followed from there: editable installs,
    which are such files, stay out. A test that uses it asserts that `hf_models` cannot be imported.
    """
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs, ours = (
        subprocess.run([interpreter, "-I", "-c", query], check=True, capture_output=True, text=True).stdout.strip()
        for interpreter in (python, folder / "bin" / "python")
    )
    Path(ours, "installed.pth").write_text(f"{theirs}\n")
    return folder / "bin" / "python"
