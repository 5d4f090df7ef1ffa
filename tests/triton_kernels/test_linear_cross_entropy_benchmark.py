"""The benchmark of the linear cross-entropy: what it counts as memory, and the committed figures."""

import importlib
import json
import mmap
from pathlib import Path

import pytest
import torch

from sigma_kernels.benchmarks import timing
from sigma_kernels.benchmarks.__main__ import main
from sigma_kernels.benchmarks.allocations import Allocations, allocations, kept_bytes, resident_bytes
from tests.triton_kernels.fresh_process import python


benchmark = importlib.import_module("sigma_kernels.benchmarks.linear_cross_entropy")
CPU = torch.device("cpu")
TOY = (benchmark.Cell(16, 4096, 8, (8,)), True), (benchmark.Cell(16, 4096, 8, (2, 4, 8)), False)


def test_allocations_are_counted_inside_operators_and_what_is_freed_is_not_left():
    kept = []

    def step():
        kept.append(torch.zeros(1000))
        torch.zeros(3000)
        torch.zeros(2000)

    assert allocations(step, CPU) == Allocations(peak=16000, left=4000, largest=12000)


def test_kept_storages_count_once_and_known_ones_not_at_all():
    x = torch.randn(10, requires_grad=True)

    def step():
        y = x.exp()  # kept, by exp and by sin
        return y.sin().sum() + (x * x).sum()

    assert kept_bytes(step, [x]) == 40


def test_a_process_grows_by_what_it_touches():
    before = resident_bytes()
    if before is None:
        pytest.skip("the system does not tell")
    size = 40 * 2**20
    with mmap.mmap(-1, size) as block:  # fresh pages: an allocator could hand out some that are resident already
        block.write(b"x" * size)
        now, peak = resident_bytes()
    assert now - before[0] >= 0.9 * size and peak >= now


def test_every_arm_is_measured_and_the_table_compares_them_with_plain_logits(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SHOWN, "cpu", TOY)
    monkeypatch.setattr(timing, "process_clock", lambda step: step() is None or 1e-3)
    monkeypatch.setattr(
        benchmark,
        "_memory_of",
        lambda at, arm, options: benchmark.memory(TOY[at][0], arm, torch.float32, CPU),
    )

    assert main(["linear_cross_entropy", "--output", str(tmp_path)]) == 0

    cells = json.loads((tmp_path / "linear-cross-entropy-cpu-1-thread.json").read_text())["cells"]
    one, grid = cells["16x4096x8"]["arms"], cells["16x4096x3 heads"]["arms"]
    assert set(one) == {"plain", "linear_cross_entropy"} and set(grid) == {*one, "linear_cross_entropy_grid"}
    logits, gradients = 4 * 16 * 4096, 4 * (4096 * 8 + 4096)
    assert one["plain"]["kept_bytes"] >= logits and one["linear_cross_entropy"]["kept_bytes"] < 100
    assert grid["plain"]["kept_bytes"] >= 3 * logits
    for arm in one.values():
        assert arm["gradient_bytes"] == gradients + 4 * 16 * 8
    assert one["linear_cross_entropy"]["faster_than_plain"]["median"] == pytest.approx(1.0)
    assert "milliseconds" not in grid["plain"]
    assert "| 16x4096x8 | linear_cross_entropy |" in capsys.readouterr().out


def test_memory_is_taken_in_a_process_of_its_own():
    options = ("linear_cross_entropy", "--memory", "0", "linear_cross_entropy")
    done = python("-m", "sigma_kernels.benchmarks", *options, interpret=False)
    found = json.loads(done.stdout.splitlines()[-1])

    cell = benchmark.SHOWN["cpu"][0][0]
    assert found["activation_bytes"] < 4 * cell.tokens * cell.classes / 4
    assert found["resident_growth"] is None or found["resident_growth"] > found["gradient_bytes"] / 2


def test_the_committed_figures_meet_the_target_of_the_grid():
    path = benchmark.RESULTS / "linear-cross-entropy-cpu-1-thread.json"
    text = path.read_text()
    arms = json.loads(text)["cells"]["256x250002x12 heads"]["arms"]

    assert str(Path.home()) not in text
    assert path.with_suffix(".md").read_text() == benchmark.markdown(json.loads(text))
    bytes_of = {name: arm["activation_bytes"] for name, arm in arms.items()}
    assert bytes_of["plain"] > benchmark.TARGET * bytes_of["linear_cross_entropy_grid"]
