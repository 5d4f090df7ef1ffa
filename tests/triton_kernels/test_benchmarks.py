"""The benchmark of the experts: its floors, its rule for timing, and all of its arms in the interpreter."""

import itertools
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sigma_kernels.autotune import Shape, Tile, default_tile, forced_tile, head_tiles, transport_tile
from sigma_kernels.benchmarks import experts, neurons, offline, timing
from sigma_kernels.benchmarks.__main__ import main
from sigma_kernels.benchmarks.experts import Cell, cells, measure_cell, run_cells
from sigma_kernels.benchmarks.floors import PEAKS, Load, Peak, peak_of
from sigma_kernels.benchmarks.report import draw, markdown
from sigma_kernels.benchmarks.routings import ROUTINGS, route
from sigma_kernels.benchmarks.saved import saved_bytes
from sigma_kernels.benchmarks.timing import Arm, median_interval, time_in_turns, wall_clock
from sigma_kernels.compile_report import HEADS, MODELS, TRANSPORTS, Model
from sigma_kernels.launches import DTYPES
from tests.triton_kernels.fresh_process import uninterpreted


H200 = PEAKS["H200"]
SLOW = Peak(1e12, 1e12)


@pytest.mark.parametrize(
    "tokens, mode, microseconds, bound",
    [(1, "inference", 1.65, "memory"), (4096, "forward", 170, "memory"), (4096, "backward", 342, "memory")]
    + [(32768, "forward", 294, "compute"), (32768, "backward", 587, "compute")],
)
def test_the_floors_of_sigma_moe_tiny_are_those_of_its_weights_and_then_of_its_products(
    tokens, mode, microseconds, bound
):
    work = Load(tokens, 1, 96, min(tokens, 96), 1536, 768).work(mode)

    assert 1e6 * work.seconds(H200) == pytest.approx(microseconds, rel=0.03)
    assert (work.flops / work.bytes > H200.ridge) == (bound == "compute")


def test_both_passes_are_the_sum_of_each():
    load = Load(512, 2, 8, 8, 64, 32)

    assert load.work("both") == load.work("forward") + load.work("backward")
    assert load.work("forward").bytes - load.work("inference").bytes == 2 * 32 * 1024 * 2  # z


def test_the_peak_of_an_unknown_device_has_to_be_given():
    assert peak_of("NVIDIA H200", None, None) == H200
    assert peak_of("NVIDIA H200", 4.8, None) == Peak(4.8e12, 790e12)
    assert peak_of("Some GPU", 1.0, None) is None
    assert peak_of("Some GPU", 1.0, 2.0) == Peak(1e12, 2e12)


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing_gives_a_token_distinct_experts_and_the_same_each_time(name):
    index = route(name, 500, 2, 8)
    counts = index.flatten().bincount(minlength=8)

    assert (index[:, 0] != index[:, 1]).all()
    assert torch.equal(index, route(name, 500, 2, 8))
    if name == "one hot":
        assert counts[0] == 500
    if name == "zipf":
        assert counts[0] > 2 * counts[7]
    assert (counts == 0).sum() == (2 if name == "quarter empty" else 0)


def test_arms_take_turns_and_every_other_block_begins_at_the_other_end():
    order = []
    arms = [Arm(name, lambda: None, lambda _, name=name: order.append(name)) for name in ("a", "b", "c")]

    times = time_in_turns(arms, wall_clock, blocks=10, steps=2)

    assert order[:3] == ["a", "b", "c"]  # the first calls, which compile
    assert order[3:15] == list("abcabc") + list("cbacba")
    assert {name: len(values) for name, values in times.items()} == {"a": 10, "b": 10, "c": 10}


def test_what_is_prepared_is_not_timed_and_reaches_the_step():
    seen = []
    arms = [Arm("a", lambda: len(seen), seen.append)]

    time_in_turns(arms, lambda step: step() or 1.0, blocks=10, steps=1)

    assert seen == list(range(11))


def test_too_few_blocks_or_values_are_refused():
    with pytest.raises(ValueError, match="at least 10 blocks"):
        time_in_turns([], wall_clock, blocks=9, steps=1)
    with pytest.raises(ValueError, match="six is the fewest"):
        median_interval([1.0] * 5)


def test_the_interval_of_ten_values_is_the_second_and_the_ninth():
    interval = median_interval([float(value) for value in range(10)])

    assert (interval.low, interval.median, interval.high) == (1.0, 4.5, 8.0)
    assert interval.confidence == pytest.approx(1 - 22 / 1024)


def test_kept_bytes_are_those_of_storages_that_autograd_holds_without_inputs_and_weights():
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4, requires_grad=True)

    def layer(x, index, weights):
        hidden = x @ weight  # keeps x and the weight
        return hidden.exp().sin()  # keeps exp's result, twice

    assert saved_bytes(layer, x, torch.zeros(1), torch.zeros(1), [weight]) == 3 * 4 * 4


def test_decoding_is_for_few_tokens_and_training_for_many():
    found = cells(["m"], ["bf16", "bf16 of fp32"], ["uniform", "zipf"], [1, 512], ["forward", "decode"])

    assert [cell.key for cell in found] == [
        "m/bf16/uniform/1/decode",
        "m/bf16/uniform/512/forward",
        "m/bf16/zipf/512/forward",
        "m/bf16 of fp32/uniform/512/forward",
        "m/bf16 of fp32/zipf/512/forward",
    ]


@pytest.mark.interpreter
@pytest.mark.parametrize("mode, dtype", [*((mode, "bf16") for mode in experts.MODES), ("both", "bf16 of fp32")])
def test_all_arms_of_a_cell_run_and_agree(mode, dtype):
    tokens = 6 if mode == "decode" else 40
    cell = Cell("toy", dtype, "uniform", tokens, mode)

    with forced_tile(Tile(32, 64, 64)):
        clock = lambda step: step() is None or 1e-3  # noqa: E731 - the time of a step is not the point
        found = measure_cell(cell, device="cpu", clock=clock, blocks=10, steps=1, peak=SLOW, model=Model(2, 1, 32, 32))

    assert found["not_measured"] == {}
    assert list(found["arms"]) == ["sigma_kernels", "grouped_mm", "batched_mm"]
    assert found["rows_per_expert"]["mean"] == pytest.approx(tokens / 2)
    if mode in ("forward", "backward", "both"):
        kept = {name: arm["saved_bytes"] for name, arm in found["arms"].items()}
        assert kept["sigma_kernels"] < kept["grouped_mm"] / 2 < kept["batched_mm"]


def result(microseconds):
    interval = {"median": microseconds, "low": microseconds - 1, "high": microseconds + 1, "confidence": 0.98}
    arm = {"microseconds": interval, "peak_bytes": 2e6, "saved_bytes": None}
    return {
        "rows_per_expert": {"mean": 4.0, "max": 9, "active": 3},
        "floor_microseconds": 10.0,
        "bytes": 1e6,
        "flops": 1e9,
        "arms": {"sigma_kernels": arm, "grouped_mm": arm},
        "speedup_over": {"grouped_mm": {"median": 1.0, "low": 0.9, "high": 1.1, "confidence": 0.98}},
        "not_measured": {"sonicmoe": "RuntimeError: no"},
    }


def test_cells_are_kept_as_they_are_finished_and_not_measured_twice(tmp_path):
    wanted, calls = cells(["m"], ["bf16"], ["uniform"], [512, 1024], ["forward"]), []
    path = tmp_path / "results.json"

    def measure(cell):
        calls.append(cell.tokens)
        if calls == [512, 1024]:
            raise RuntimeError("the machine went away")
        return result(20.0)

    run = partial(run_cells, wanted, path, "GPU", SLOW, measure, say=lambda line: None)
    with pytest.raises(RuntimeError):
        run(seconds=60)
    assert not run(seconds=-1)
    assert run(seconds=60)
    assert calls == [512, 1024, 1024]
    assert len(json.loads(path.read_text())["cells"]) == 2
    with pytest.raises(ValueError, match="move it away"):
        run_cells(wanted, path, "Another GPU", SLOW, measure, seconds=60)


def test_the_table_has_a_line_for_every_arm_and_says_what_was_not_measured_or_is_too_fast(tmp_path):
    path = tmp_path / "results.json"
    run_cells([Cell("m", "bf16", "zipf", 512, "both")], path, "GPU", SLOW, lambda cell: result(5.0), seconds=60)
    results = json.loads(path.read_text())

    table = markdown(results)

    assert table.count("| m | bf16 | zipf | 512 | 4.0 / 9 | both |") == 2
    assert "sonicmoe: RuntimeError: no" in table
    assert "sigma_kernels: below the floor" in table
    draw(results, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 5000


def test_layers_that_give_something_else_have_no_speed():
    x = torch.randn(4, 8)
    layers = [("sigma_kernels", lambda x, *_: x), ("grouped_mm", lambda x, *_: 1.1 * x)]

    with pytest.raises(RuntimeError, match="there is no speed to measure"):
        experts._check_equal(layers, x, None, None)


def test_without_a_gpu_compile_reports_floors_and_kept_numbers_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(offline, "ARCHS", (90,))
    # One cheap compilation; the whole list is the business of the compile report's own tests.
    few = ("--models", "Sigma-MoE-Tiny", "--loads", "16", "--dtypes", "bf16", "--kernels", "dx")
    real = offline._python
    monkeypatch.setattr(
        offline,
        "_python",
        lambda module, *rest, **how: real(module, *rest, *(few if "compile" in module else ()), **how),
    )

    assert main(["experts", "--output", str(tmp_path)]) == 0

    assert "no time, no peak memory and no comparison of speed was measured" in capsys.readouterr().out
    assert "| dx | bf16 |" in (tmp_path / "compile-sm_90.md").read_text()
    results = json.loads((tmp_path / "experts-offline.json").read_text())
    for row in results["saved"]:
        ours, stock = (row["numbers_per_pair"][name] for name in ("sigma_kernels", "grouped_mm"))
        assert ours == pytest.approx(2 * row["inner"], abs=3)
        assert stock == pytest.approx(2 * row["hidden"] + 4 * row["inner"], abs=15)
    tiny = [row for row in results["floors"] if row["model"] == "Sigma-MoE-Tiny" and row["tokens"] == 4096]
    assert tiny[0]["microseconds"]["backward"] == pytest.approx(342, rel=0.02)


def test_neurons_are_timed_beside_dense_layers_with_the_bytes_that_bound_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(neurons.SHAPES, "toy", Model(4, 2, 32, 64))
    monkeypatch.setattr(timing, "process_clock", lambda step: step() is None or 1e-3)

    options = ("--shapes", "toy", "--dtypes", "fp32", "--blocks", "10", "--steps", "1", "--output", str(tmp_path))
    assert main(["neurons", *options]) == 0

    arms = json.loads((tmp_path / "neurons-cpu-1-thread.json").read_text())["cells"]["toy/fp32/1"]["arms"]
    columns = {f"r={share:g}{how}" for share in neurons.SHARES for how in ("", " columns")}
    assert set(arms) == set(neurons.BASELINES) | columns
    assert all(arms[name]["differs_from_dense"] < 1e-5 for name in neurons.BASELINES)
    assert arms["r=0.5"]["differs_from_dense"] == pytest.approx(arms["r=0.5 columns"]["differs_from_dense"], rel=1e-4)
    assert arms["r=0.5"]["differs_from_dense"] > 0.01
    assert arms["r=0.25"]["at_most"] == pytest.approx(2.0)
    assert arms["r=0.25 columns"]["at_most"] == pytest.approx(4 / 3)
    assert arms["r=0.25"]["faster_than"]["dense"]["median"] == pytest.approx(1.0)
    assert "| toy | fp32 | 1 | r=0.25 | 1000 [1000, 1000] |" in capsys.readouterr().out


def test_the_command_line_lists_its_benchmarks():
    done = uninterpreted("-m", "sigma_kernels.benchmarks", "--help")

    assert done.returncode == 0
    assert all(name in done.stdout for name in ("experts", "linear_cross_entropy", "neurons", "saved", "sinkhorn"))


def test_committed_compile_reports_are_of_the_shipped_tiles_and_name_no_machine():
    paths = sorted(experts.RESULTS.glob("compile-sm_*.json"))

    assert [path.stem for path in paths] == ["compile-sm_100", "compile-sm_80", "compile-sm_90"]
    for path in paths:
        text = path.read_text()
        assert str(Path.home()) not in text and str(experts.RESULTS.parents[2]) not in text
        for row in json.loads(text)["compilations"]:
            assert row["problems"] == []
            kind = row["dtype"].split()[0]
            for model, load in itertools.product(row["models"], row["loads"]):
                if model in HEADS:
                    tiles = [head_tiles(width, load, DTYPES[kind])[row["role"]] for width in HEADS[model].widths]
                    assert row["tile"] in [asdict(tile) for tile in tiles]
                elif model in TRANSPORTS:
                    assert row["tile"] in [asdict(transport_tile(n)) for n in TRANSPORTS[model].columns]
                else:
                    of = MODELS[model]
                    shape = Shape(of.experts, of.hidden, of.inner, kind, load)
                    assert asdict(default_tile(row["role"], shape)) == row["tile"]
