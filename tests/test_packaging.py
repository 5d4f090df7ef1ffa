"""What gets installed: its contents, its names, its cost, and the pins that it was tested with."""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.bare_environment import bare_python


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# folder -> import name
PACKAGES = {
    "hf_models": "hf_models",
    "trainers": "trainers",
    "model_cards": "model_cards",
    "triton_kernels": "sigma_kernels",
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
BUILD = ["--no-deps", "--no-build-isolation"]


def run(*command, **options) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tracked_files() -> list[str]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy: setuptools writes into the tree that it builds, and takes what an earlier build left there."""
    copy = tmp_path_factory.mktemp("source")
    for name in tracked_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    run(*PIP, "wheel", *BUILD, "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture
def environment(tmp_path) -> Path:
    return bare_python(tmp_path / "venv", sys.executable)


def install(python: Path, *arguments) -> None:
    run(*PIP, "--python", python, "install", *BUILD, "--ignore-installed", *arguments)


def origins(python: Path, *names: str) -> dict[str, Path]:
    """File that each name is imported from, asked outside the repository."""
    code = f"import json; print(json.dumps({{n: __import__(n).__file__ for n in {names!r}}}))"
    return {name: Path(file) for name, file in json.loads(run(python, "-c", code, cwd=python.parent)).items()}


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = set()
    for name in tracked_files():
        folder, _, rest = name.partition("/")
        if folder in PACKAGES:
            expected.add(f"{PACKAGES[folder]}/{rest}")
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == expected


def test_kernels_live_beside_openais_triton_kernels(wheel, environment, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "triton_kernels").mkdir(parents=True)
    (foreign / "triton_kernels" / "__init__.py").write_text("OWNER = 'someone else'")
    (foreign / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "triton-kernels"\nversion = "1"\n'
    )
    run(*PIP, "wheel", *BUILD, "--wheel-dir", tmp_path, foreign)
    install(environment, wheel, next(tmp_path.glob("triton_kernels-*.whl")))

    found = origins(environment, "sigma_kernels", "triton_kernels")
    assert found["sigma_kernels"].parent.name == "sigma_kernels"
    assert found["triton_kernels"].read_text() == "OWNER = 'someone else'"


def test_editable_install_serves_the_tree_under_the_import_names(source, environment):
    install(environment, "--editable", source)
    expected = {name: source / folder / "__init__.py" for folder, name in PACKAGES.items()}
    assert origins(environment, *expected) == expected
    # A folder that comes later is there without another install.
    (source / "trainers" / "later").mkdir()
    (source / "trainers" / "later" / "__init__.py").touch()
    assert origins(environment, "trainers.later")
    shutil.rmtree(source / "trainers" / "later")


def test_import_is_cheap():
    # CPU seconds, those of child processes too: the clock on the wall belongs to whatever else runs on this machine.
    # What it builds on is imported once; three children import it.
    code = """
import os, torch, transformers.modeling_utils
for _ in range(3):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        start = sum(os.times()[:4])
        import hf_models
        print(sum(os.times()[:4]) - start, flush=True)
        os._exit(0)
"""
    seconds = [float(line) for line in run(sys.executable, "-c", code, cwd=ROOT).split()]
    assert len(seconds) == 3 and statistics.median(seconds) < 1.0


def pins() -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}


def test_every_named_dependency_is_pinned_within_its_range():
    extras = PROJECT["optional-dependencies"] | {"flower": []}  # which is not part of the tested set
    named = PROJECT["dependencies"] + [line for extra in extras.values() for line in extra]
    for requirement in map(Requirement, named):
        if requirement.name != PROJECT["name"]:
            (pin,) = pins()[canonicalize_name(requirement.name)].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement.name


def index_answers(tmp_path: Path) -> bool:
    probe = [*PIP, "download", "--no-deps", "--retries", "0", "--timeout", "10", "--dest", tmp_path, "iniconfig"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.slow
def test_pins_resolve_together(source, tmp_path):
    if not index_answers(tmp_path):
        pytest.skip("no package index within reach: the pins cannot be resolved")
    report = tmp_path / "report.json"
    options = ["--dry-run", "--ignore-installed", "--no-build-isolation", "--report", report]
    run(*PIP, "install", *options, "-c", source / "constraints.txt", f"{source}[test,gpu]")

    resolved = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    applicable = {
        name: pin for name, pin in pins().items() if not pin.marker or pin.marker.evaluate(default_environment())
    }
    # CUDA builds of torch bring their own libraries, a set of its own for each build.
    unpinned = {name for name in resolved if not re.match(r"nvidia-|cuda-|hf-sigma$", name)} - set(applicable)
    assert unpinned == set()
    for name, version in resolved.items():
        if name in applicable:
            assert applicable[name].specifier.contains(version), name
