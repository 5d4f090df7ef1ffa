"""The transport kernel compiles for GPUs that are not here, and what is compiled is what runs."""

import json

import pytest
import torch

from sigma_kernels import sinkhorn
from sigma_kernels.autotune import Tile, forced_tile
from sigma_kernels.compile_report import LIMITS, TRANSPORTS
from sigma_kernels.launches import recorded, transport_launches
from tests.triton_kernels.fresh_process import uninterpreted


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_shipped_tiles_spill_nothing_and_add_without_atomics(arch, tmp_path):
    path = tmp_path / "report.json"
    done = uninterpreted(
        *("-m", "sigma_kernels.compile_report", "--arch", str(arch), "--models", "DOT-CBM"),
        *("--loads", "128", "--dtypes", "bf16", "fp32", "--json", str(path)),
    )
    rows = json.loads(path.read_text())["compilations"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == 2 * len(TRANSPORTS["DOT-CBM"].columns)
    for row in rows:
        compiled = row["compiled"]
        assert row["role"] == "sinkhorn" and not compiled["error"]
        assert compiled["spills"] == 0 and compiled["instructions"]["atomic"] == 0
        assert 0 < compiled["registers"] <= 255 and compiled["programs"] >= 1
        assert compiled["shared"] <= LIMITS[arch].shared_per_program


def described(launch):
    def shown(argument):
        tensor = isinstance(argument, torch.Tensor)
        return (argument.shape, argument.stride(), argument.dtype) if tensor else argument

    return launch.name, launch.role, launch.grid, [shown(a) for a in launch.arguments], launch.options


@pytest.mark.interpreter
@pytest.mark.parametrize("gradient, kept", [("detached", 1), ("implicit", 1), ("unrolled", 30)])
def test_what_is_compiled_is_what_the_function_launches(gradient, kept):
    with forced_tile(Tile(4, 16, 1)):
        offline = transport_launches(2, 9, 7, "fp32", kept=kept)
        with recorded(perform=False) as real:
            sinkhorn(torch.rand(2, 9, 7), torch.rand(9), torch.rand(7), gradient=gradient)

    assert [launch.role for launch in real] == ["sinkhorn"]
    assert [described(launch) for launch in real] == [described(launch) for launch in offline]


RUN_TIME_NUMBERS = """
from sigma_kernels.compile_report import specialise
from sigma_kernels.launches import transport_launches
sizes = (1, 324, 312, 1), (128, 324, 312, 30), (7, 196, 312, 1), (16, 20, 312, 50)
print(len({specialise(one, 90) for *size, kept in sizes for one in transport_launches(*size, "fp32", kept=kept)}))
"""


def test_no_number_of_images_rows_or_iterations_compiles_it_again():
    done = uninterpreted("-c", RUN_TIME_NUMBERS)

    assert done.stdout.split() == ["1"], done.stderr
