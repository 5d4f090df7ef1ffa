"""The kernels of the linear cross-entropy compile for GPUs that are not here, and what is compiled is what runs."""

import json

import pytest
import torch

from sigma_kernels import linear_cross_entropy, linear_cross_entropy_grid
from sigma_kernels.autotune import HEAD_KERNELS, Tile, forced_tile
from sigma_kernels.compile_report import LIMITS
from sigma_kernels.launches import head_launches, recorded
from tests.triton_kernels.fresh_process import uninterpreted


@pytest.mark.parametrize(
    "arch", [80, pytest.param(90, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_the_shipped_tiles_spill_nothing_and_multiply_on_tensor_cores(arch, tmp_path):
    path = tmp_path / "report.json"
    quick = ("--loads", "512", "--dtypes", "bf16") if arch == 80 else ("--loads", "64", "512", "--dtypes", "bf16")
    done = uninterpreted(
        *("-m", "sigma_kernels.compile_report", "--arch", str(arch), "--models", "m3BERT", *quick),
        *("--jobs", "2", "--json", str(path)),
    )
    rows = json.loads(path.read_text())["compilations"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["role"] for row in rows} == set(HEAD_KERNELS)
    for row in rows:
        compiled = row["compiled"]
        assert not compiled["error"] and compiled["spills"] == 0 and compiled["instructions"]["atomic"] == 0
        assert compiled["instructions"][{80: "mma", 90: "wgmma", 100: "tcgen05"}[arch]] > 0
        assert 0 < compiled["registers"] <= 255 and compiled["programs"] >= 1
        assert compiled["shared"] <= LIMITS[arch].shared_per_program


def described(launch):
    def shown(argument):
        tensor = isinstance(argument, torch.Tensor)
        return (argument.shape, argument.stride(), argument.dtype) if tensor else argument

    return launch.name, launch.role, launch.grid, [shown(a) for a in launch.arguments], launch.options


@pytest.mark.interpreter
@pytest.mark.parametrize("cells", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_compiled_is_what_the_function_launches(bias, cells):
    weight = torch.randn(70, 24, requires_grad=True)
    hidden = torch.randn(20, 24)[:, :16].requires_grad_()
    offset = torch.randn(70, requires_grad=True) if bias else None
    labels = torch.randint(70, (20,))

    with forced_tile(Tile(16, 32, 16)):
        offline = head_launches(16, 70, 20, "fp32", full_width=24, cells=cells, bias=bias)
        with recorded(perform=False) as real:
            if cells == 1:
                linear_cross_entropy(hidden, weight[:, :16], offset, labels).backward()
            else:
                linear_cross_entropy_grid([hidden] * cells, weight, offset, labels).sum().backward()

    assert [launch.role for launch in real] == ["head_lse"] * cells + list(HEAD_KERNELS[1:]) * cells
    assert [described(launch) for launch in real] == [described(launch) for launch in offline]


RUN_TIME_NUMBERS = """
from sigma_kernels.compile_report import specialise
from sigma_kernels.launches import head_launches
found = set()
for tokens, classes in ((100, 1000), (512, 250002), (777, 4096), (4096, 33)):
    for launch in head_launches(64, classes, tokens, "bf16", full_width=768):
        found.add(specialise(launch, 90))
print(len(found))
"""


def test_no_number_of_tokens_or_classes_compiles_a_kernel_again():
    done = uninterpreted("-c", RUN_TIME_NUMBERS)

    assert done.stdout.split() == ["4"], done.stderr
