"""Tuning without a GPU: everything but the times, which a function gives that knows them."""

import json

import pytest

from sigma_kernels import autotune, tune
from sigma_kernels.autotune import KERNELS, Shape, Tile, default_tile, read_tuned
from sigma_kernels.compile_report import LIMITS, Compiled
from tests.triton_kernels.fresh_process import uninterpreted


SHAPE = Shape(8, 64, 32, "bf16", 16)
GOOD = Compiled(90, registers=64, instructions={"mma": 1, "wgmma": 0, "tcgen05": 0})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "TUNED", tmp_path)
    autotune._tiles_for.cache_clear()
    yield tmp_path
    autotune._tiles_for.cache_clear()


def area(launches):
    """Microseconds of a device that likes large tiles."""
    options = launches[0].options
    return 1e6 / (options["BM"] * options["BN"])


def find(kernel, shape, *, timer=area, compiled=lambda launch: GOOD):
    return tune.fastest(
        kernel,
        shape,
        arch=90,
        launches_of=lambda kernel, shape, tile: tune.kernel_launches(kernel, shape, tile, slots=2),
        timer=timer,
        compiled=compiled,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 32, 4096])
def test_candidates_have_at_most_twice_the_rows_of_an_expert_and_fit_in_shared_memory(kernel, rows):
    shape = Shape(96, 1536, 768, "bf16", rows)
    tiles = list(tune.candidates(kernel, shape, 80))

    assert len(tiles) == len(set(tiles)) > 10
    for tile in tiles if kernel != "decode" else ():
        blocks = 2 if kernel == "up" else 1
        operands = tile.num_stages * tile.depth * (tile.rows + blocks * tile.columns) * 2
        assert operands <= LIMITS[80].shared_per_program
        assert (tile.depth if kernel.startswith("dw") else tile.rows) <= max(16, 2 * rows)


def test_the_fastest_candidate_wins_and_is_read_back_by_the_layer(folder):
    entry = find("dw1", SHAPE)
    tune.tune([("dw1", SHAPE)], "Fake GPU", lambda kernel, shape: entry, seconds=60, say=lambda line: None)

    best = max(tile.rows * tile.columns for tile in tune.candidates("dw1", SHAPE, 90))
    found = read_tuned("Fake GPU")[("dw1", SHAPE)]
    assert found.rows * found.columns == best
    assert entry["microseconds"] < entry["default_microseconds"]
    assert set(entry["versions"]) == {"torch", "triton"}
    tiles = autotune._tiles_for(SHAPE, "Fake GPU")
    assert tiles["dw1"] == found
    assert tiles["dz"] == default_tile("dz", SHAPE)


def test_candidates_that_spill_are_never_timed():
    timed = []

    def compiled(launch):
        spills = 8 if launch.options["num_warps"] == 8 else 0
        return Compiled(90, registers=64, spills=spills, instructions=GOOD.instructions)

    def timer(launches):
        timed.append(launches[0].options["num_warps"])
        return area(launches)

    entry = find("dw2", SHAPE, timer=timer, compiled=compiled)

    assert set(timed) == {4}
    assert entry["tile"]["num_warps"] == 4


def test_decoding_is_timed_with_both_of_its_kernels_and_left_out_where_it_does_not_occur():
    seen = set()

    def timer(launches):
        seen.add(tuple(launch.name for launch in launches))
        return 1.0

    assert find("decode", Shape(8, 64, 32, "bf16", 1), timer=timer)["kernel"] == "decode"
    assert seen == {("decode_up_kernel", "decode_down_kernel")}
    assert find("decode", SHAPE) is None


def test_tuning_continues_where_the_time_ran_out_and_measures_nothing_twice(folder):
    calls = []

    def found(kernel, shape):
        calls.append(kernel)
        tile = {"rows": 16, "columns": 64, "depth": 64, "num_warps": 4, "num_stages": 3}
        return {"kernel": kernel, "shape": vars(shape), "tile": tile, "microseconds": 1.0}

    def run(seconds):
        work = ((kernel, SHAPE) for kernel in ("up", "down", "dz"))
        return tune.tune(work, "Fake GPU", found, seconds=seconds, say=lambda line: None)

    assert not run(-1)
    assert calls == []
    tune.tune([("down", SHAPE)], "Fake GPU", found, seconds=60, say=lambda line: None)
    assert run(60)
    assert calls == ["down", "up", "dz"]
    assert run(60)
    assert len(calls) == 3
    content = json.loads((folder / "fake-gpu.json").read_text())
    assert [entry["kernel"] for entry in content["tiles"]] == ["up", "down", "dz"]
    assert [path.name for path in folder.iterdir()] == ["fake-gpu.json"]


def test_a_write_that_fails_leaves_the_file_as_it_was(folder):
    entry = {"kernel": "up", "shape": vars(SHAPE), "tile": vars(Tile(16, 64, 64)), "microseconds": 1.0}
    tune.tune([("up", SHAPE)], "Fake GPU", lambda *_: entry, seconds=60, say=lambda line: None)
    before = (folder / "fake-gpu.json").read_text()

    broken = entry | {"kernel": "dz", "microseconds": object()}
    with pytest.raises(TypeError):
        tune.tune([("dz", SHAPE)], "Fake GPU", lambda *_: broken, seconds=60, say=lambda line: None)

    assert (folder / "fake-gpu.json").read_text() == before


def test_without_a_gpu_tuning_says_so_and_changes_nothing():
    done = uninterpreted(
        *("-m", "sigma_kernels.tune", "--experts", "8", "--hidden", "64", "--inner", "32"),
        CUDA_VISIBLE_DEVICES="",
    )

    assert done.returncode == 2
    assert "there is none here" in done.stderr


def test_loads_that_are_no_powers_of_two_are_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--experts", "8", "--hidden", "64", "--inner", "32", "--loads", "48"])
    assert "powers of two" in capsys.readouterr().err


REAL_COMPILER = """
from functools import partial
from sigma_kernels import tune
from sigma_kernels.autotune import Shape
from sigma_kernels.compile_report import compile_launch
shape = Shape(8, 64, 32, "bf16", 4096)
tune.candidates = lambda *_: [tune.Tile(128, 128, 64, num_warps=4, num_stages=3)]
entry = tune.fastest("up", shape, arch=90, launches_of=partial(tune.kernel_launches, slots=1),
                     timer=lambda launches: 1.0, compiled=partial(compile_launch, arch=90), jobs=2)
print(entry["candidates"], entry["tile"]["num_warps"])
"""


def test_a_candidate_that_really_spills_is_pruned_by_the_compiler():
    done = uninterpreted("-c", REAL_COMPILER)

    assert done.stdout.split() == ["1", "8"], done.stderr  # the default is left
