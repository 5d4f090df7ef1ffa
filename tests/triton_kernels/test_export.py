"""The kernels as a Hub kernel, loaded by the `kernels` library from a local folder."""

import json
import os
import subprocess
import sys

import pytest

from sigma_kernels import export
from tests.bare_environment import bare_python


LOAD = """
import sys
from pathlib import Path
import torch
from kernels import get_kernel, get_local_kernel

folder = sys.argv[1]
exported = get_kernel("somebody/sigma-moe", version=1) if sys.argv[2] == "get" else get_local_kernel(Path(folder))
assert Path(exported.__file__).is_relative_to(folder), exported.__file__
alone = "sigma_kernels" not in sys.modules
import sigma_kernels

torch.manual_seed(0)
index, weights = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.rand(3, 2)
tensors = [torch.randn(3, 16), torch.randn(3, 16, 16), torch.randn(3, 16, 8)]
results = []
for package in (exported, sigma_kernels, exported):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = package.moe_mlp(*leaves, index, weights)
    out.square().sum().backward()
    results.append([out.detach(), *(leaf.grad for leaf in leaves)])
same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
names = {package.moe_mlp.__module__ for package in (exported, sigma_kernels)}
print(alone, same, len(names), sorted(exported.__all__) == sorted(sigma_kernels.__all__))
"""


def exported(folder, *backends):
    assert export.main([str(folder), "--backends", *backends]) == 0
    return folder


def test_a_variant_has_what_the_package_imports_and_its_metadata(tmp_path, capsys):
    folder = exported(tmp_path / "kernel", "cuda", "cpu")

    cuda, cpu = (folder / "build" / name for name in ("torch-cuda", "torch-cpu"))
    files = {path.name for path in cuda.iterdir()} - {"tuned"}
    assert {"__init__.py", "grouped_mlp.py", "grouped_mlp_kernels.py", "routing.py", "metadata.json"} <= files
    assert not files & {"tune.py", "compile_report.py", "launches.py", "export.py"}
    metadata = json.loads((cuda / "metadata.json").read_text())
    assert metadata["name"] == "sigma-moe"
    assert metadata["backend"] == {"type": "cuda"}
    # The same code under two names of operators.
    ours, theirs = (json.loads((variant / "metadata.json").read_text())["id"] for variant in (cuda, cpu))
    assert ours != theirs
    for path in cuda.glob("*.py"):
        assert path.read_text().replace(ours, theirs) == (cpu / path.name).read_text()
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")
    assert "hf upload" in capsys.readouterr().out


def test_no_operator_keeps_the_name_of_the_installed_package(tmp_path):
    folder = exported(tmp_path / "kernel", "cuda")

    text = "".join(path.read_text() for path in (folder / "build" / "torch-cuda").glob("*.py"))
    assert "sigma_kernels::" not in text
    assert "ops.sigma_kernels" not in text
    assert text.count("::moe_mlp") >= 3


def test_an_existing_export_is_not_written_over(tmp_path, capsys):
    folder = exported(tmp_path / "kernel", "cuda")

    assert export.main([str(folder)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.fixture(scope="module")
def beside_kernels(tmp_path_factory):
    """An interpreter that has the Hub's `kernels` library, which would change transformers in our own environment."""
    folder = tmp_path_factory.mktemp("environment")
    interpreter = bare_python(folder / "venv", sys.executable)
    command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--retries", "0"]
    done = subprocess.run([*command, "kernels>=0.17,<0.18"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index within reach: {done.stderr.strip().splitlines()[-1]}")
    (folder / "sigma_kernels").symlink_to(export.PACKAGE)
    return interpreter, folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["local", "get"])
@pytest.mark.compatibility(
    "The expert layer as a Hub kernel",
    method=["sigma_moe", "mone", "m_moe"],
    library="hf-sigma",
    note="by the library kernels 0.17, in an environment of its own",
)
def test_the_kernels_library_loads_the_same_functions_beside_the_package(beside_kernels, how, tmp_path):
    interpreter, path = beside_kernels
    folder = exported(tmp_path / "kernel", "cpu")
    settings = {"TRITON_INTERPRET": "1", "LOCAL_KERNELS": f"somebody/sigma-moe={folder}", "PYTHONPATH": str(path)}
    done = subprocess.run(
        [interpreter, "-c", LOAD, folder, how], env=os.environ | settings, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["True", "True", "2", "True"], done.stderr
