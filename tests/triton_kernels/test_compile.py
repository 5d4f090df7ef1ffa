"""The shipped kernels compile for GPUs that are not here, and the report that says so notices when they do not."""

import json
import re

import pytest
import torch

from sigma_kernels import moe_mlp
from sigma_kernels.autotune import KERNELS, NEURON_KERNELS, Shape, Tile, forced_tile
from sigma_kernels.compile_report import LIMITS, Compiled
from sigma_kernels.launches import layer_launches, recorded
from tests.triton_kernels.fresh_process import python, uninterpreted


def compile_report(*arguments, **environment):
    return uninterpreted("-m", "sigma_kernels.compile_report", *arguments, **environment)


@pytest.mark.parametrize("arch, loads", [(80, ("16", "1024")), (90, ("64", "1024"))])
def test_the_shipped_tiles_spill_nothing_and_multiply_on_tensor_cores(arch, loads, tmp_path):
    path = tmp_path / "report.json"
    done = compile_report(
        *("--arch", str(arch), "--models", "Sigma-MoE-Tiny", "--dtypes", "bf16"),
        *("--jobs", "2", "--loads", *loads, "--json", str(path)),
    )
    rows = json.loads(path.read_text())["compilations"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["role"] for row in rows} == set(KERNELS + NEURON_KERNELS)
    for row in rows:
        compiled = row["compiled"]
        assert not compiled["error"]
        assert compiled["spills"] == 0
        assert 0 < compiled["registers"] <= 255
        assert compiled["shared"] <= LIMITS[arch].shared_per_program
        assert compiled["programs"] >= 1
        assert compiled["instructions"]["atomic"] == 0
        if row["role"] not in ("decode", *NEURON_KERNELS):
            wide = arch == 90 and row["tile"]["rows"] >= 64
            assert compiled["instructions"]["wgmma" if wide else "mma"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_model_dtype_and_load_compiles_without_spills(arch):
    done = compile_report("--arch", str(arch), "--jobs", "2")

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "kernel, tile, problem",
    [
        ("up", "128x128x64,4,3", r"spills \d{4,} bytes"),
        ("dx", "128x128x64,8,9", "bytes of shared memory and may have 232448"),
        ("dx", "64x64x8,4,3", "Error"),  # tensor cores take sixteen bf16 numbers at a time
    ],
)
def test_a_tile_that_spills_or_lacks_shared_memory_or_does_not_compile_fails_the_report(kernel, tile, problem):
    done = compile_report(
        *("--arch", "90", "--models", "Sigma-MoE-Tiny", "--dtypes", "bf16", "--loads", "64", "--kernels", kernel),
        *("--tile", tile),
    )

    assert done.returncode == 1, done.stderr
    assert re.search(problem, done.stdout), done.stdout


def test_products_without_tensor_cores_are_a_problem_only_for_kernels_that_multiply():
    compiled = Compiled(90, registers=40, instructions={"mma": 0, "wgmma": 0, "tcgen05": 0})

    assert compiled.problems(multiplies=True) == ["multiplies without tensor cores"]
    assert compiled.problems(multiplies=False) == []


def test_the_report_refuses_to_run_where_kernels_are_interpreted():
    done = python("-m", "sigma_kernels.compile_report", "--loads", "16", "--arch", "90", interpret=True)

    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize("slots", [1, 2])
def test_what_is_compiled_is_what_the_operator_launches(slots):
    shape, tile = Shape(4, 64, 32, "fp32", 24), Tile(16, 32, 32)
    tokens = shape.rows * shape.experts // slots
    tensors = [torch.randn(s, requires_grad=True) for s in ((tokens, 64), (4, 64, 64), (4, 64, 32), (tokens, slots))]
    index = torch.arange(tokens * slots).remainder(4).view(tokens, slots)

    with forced_tile(tile):
        offline = layer_launches(shape, slots, learning=True) + layer_launches(shape, slots, learning=False)
        with recorded(perform=False) as real:
            x, w1, w2, weights = tensors
            moe_mlp(x, w1, w2, index, weights).backward(torch.ones(tokens, 64))
            with torch.no_grad():
                moe_mlp(x, w1, w2, index, weights)

    def described(launch):
        arguments = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
        return launch.name, launch.role, launch.grid, arguments, launch.options

    assert len(real) == 8
    assert [described(launch) for launch in real] == [described(launch) for launch in offline]


NUMBERS_OF_TOKENS = """
from sigma_kernels.autotune import Shape, Tile, forced_tile
from sigma_kernels.compile_report import specialise
from sigma_kernels.launches import layer_launches
found = set()
with forced_tile(Tile(16, 32, 32)):
    for rows, slots, experts in ((24, 1, 4), (25, 2, 4), (32, 16, 16), (1000, 3, 5)):
        for learning in (True, False):
            launches = layer_launches(Shape(experts, 64, 32, "bf16", rows), slots, learning=learning)
            found |= {specialise(launch, 90) for launch in launches}
print(len(found))
"""


def test_no_number_of_tokens_slots_or_experts_compiles_a_kernel_again():
    done = uninterpreted("-c", NUMBERS_OF_TOKENS)

    # up with and without z, down, dz, dw2, dw1, dx
    assert done.stdout.split() == ["7"], done.stderr
