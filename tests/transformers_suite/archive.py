"""transformers' own common tests, from the source archive of the installed release, as the package `hf_tests`."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

import transformers


BUILD = pathlib.Path(__file__).parents[2] / ".build" / "transformers_suite"
# What the archive's test files import and the archive lacks, each in its one-page version of ours.
STAND_INS = {
    "distributed_testing_utils.py": "ranks.py",
    "exporters/test_export.py": "export.py",
    "generation/test_utils.py": "generation.py",
    "utils/test_configuration_utils.py": "configuration_values.py",
}


def unpack() -> pathlib.Path:
    """Folder that holds `hf_tests`; fetched once per release."""
    folder = BUILD / transformers.__version__
    if not (folder / "hf_tests").is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as temporary:
            package = pathlib.Path(temporary, "unpacked", "hf_tests")
            for name, ours in STAND_INS.items():
                (package / name).parent.mkdir(parents=True, exist_ok=True)
                (package / name).parent.joinpath("__init__.py").touch()
                shutil.copy(pathlib.Path(__file__).parent / "stand_ins" / ours, package / name)
            # Second, so that a file that a later release does carry wins over ours.
            _extract_tests(_download(temporary), package)
            # One rename, so that a killed run leaves nothing that looks complete.
            package.parent.rename(folder)
    return folder


def _download(folder: str) -> pathlib.Path:
    requirement = f"transformers=={transformers.__version__}"
    # Without isolation pip asks the setuptools at hand for the archive's metadata and downloads no build environment.
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", folder]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    found = list(pathlib.Path(folder).glob("transformers-*.tar.gz"))
    if result.returncode != 0 or len(found) != 1:
        raise RuntimeError(
            f"The source archive of {requirement}, which carries transformers' common tests, could not be fetched. "
            f"Check with `pip download {' '.join(options[:4])} {requirement}`, set PIP_INDEX_URL if another index is "
            f"meant, then run `make test-transformers` again.\n{result.stderr}"
        )
    return found[0]


def _extract_tests(archive: pathlib.Path, package: pathlib.Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = pathlib.PurePosixPath(member.name).parts  # transformers-X.Y.Z/tests/test_*.py
            if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                (package / parts[2]).write_bytes(tar.extractfile(member).read())
