"""The kernels of neuron experts compile for GPUs that are not here, and what is compiled is what runs."""

import json
from itertools import product

import pytest
import torch

from sigma_kernels import neuron_topk_mlp
from sigma_kernels.autotune import NEURON_KERNELS, Shape, Tile, forced_tile
from sigma_kernels.compile_report import LIMITS
from sigma_kernels.launches import neuron_launches, recorded
from sigma_kernels.neuron_topk import SELECT_ON
from tests.triton_kernels.fresh_process import uninterpreted


def test_the_shipped_tiles_spill_nothing_and_use_no_atomics(tmp_path):
    path = tmp_path / "report.json"
    done = uninterpreted(
        *("-m", "sigma_kernels.compile_report", "--arch", "80", "90", "100", "--models", "Mixtral-8x7B"),
        *("--dtypes", "bf16", "--loads", "1", "--kernels", *NEURON_KERNELS, "--jobs", "2", "--json", str(path)),
    )
    rows = json.loads(path.read_text())["compilations"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert {(row["role"], row["compiled"]["arch"]) for row in rows} == set(product(NEURON_KERNELS, (80, 90, 100)))
    for row in rows:
        compiled = row["compiled"]
        assert not compiled["error"] and compiled["spills"] == 0 and compiled["instructions"]["atomic"] == 0
        assert 0 < compiled["registers"] <= 255 and compiled["programs"] >= 1
        assert compiled["shared"] <= LIMITS[compiled["arch"]].shared_per_program
    select = {row["variant"] for row in rows if row["role"] == "neuron_select"}
    assert select == {f"SCORE={score}, BLOCK=16384" for score in SELECT_ON}


@pytest.mark.interpreter
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_compiled_is_what_the_function_launches(transposed):
    weights = [torch.randn(shape) for shape in ((4, 64, 32), (4, 32, 32))]
    copy = weights[1].transpose(1, 2).contiguous() if transposed else None

    with forced_tile(Tile(16, 32, 32)):
        offline = neuron_launches(Shape(4, 32, 32, "fp32", 1), 2, neuron_top_k=20, transposed=transposed)
        with recorded(perform=False) as real:
            neuron_topk_mlp(
                torch.randn(1, 32), *weights, torch.tensor([[0, 1]]), torch.rand(1, 2), 20, down_proj_t=copy
            )

    def described(launch):
        arguments = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
        return launch.name, launch.role, launch.grid, arguments, launch.options

    assert [launch.role for launch in real] == list(NEURON_KERNELS)
    assert [described(launch) for launch in real] == [described(launch) for launch in offline]


RUN_TIME_NUMBERS = """
from sigma_kernels.autotune import Shape
from sigma_kernels.compile_report import specialise
from sigma_kernels.launches import neuron_launches
found = set()
for experts, slots, neuron_top_k in ((4, 1, 16), (5, 2, 7), (16, 16, 1), (96, 3, 200)):
    for launch in neuron_launches(Shape(experts, 64, 256, "bf16", 1), slots, neuron_top_k=neuron_top_k):
        found.add(specialise(launch, 90))
print(len(found))
"""


def test_no_number_of_neurons_slots_or_experts_compiles_a_kernel_again():
    done = uninterpreted("-c", RUN_TIME_NUMBERS)

    assert done.stdout.split() == ["4"], done.stderr
