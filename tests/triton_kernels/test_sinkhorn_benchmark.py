"""The benchmark of transport plans: all arms on toys, and the committed figures."""

import importlib
import json
from pathlib import Path

import pytest

from sigma_kernels.benchmarks import timing
from sigma_kernels.benchmarks.__main__ import main


benchmark = importlib.import_module("sigma_kernels.benchmarks.sinkhorn")
TOY = (benchmark.Cell(3, 9, 7, iterations=20),)


def test_every_arm_is_measured_and_makes_the_same_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SHOWN, "cpu", TOY)
    monkeypatch.setattr(timing, "process_clock", lambda step: step() is None or 1e-3)
    monkeypatch.setitem(benchmark.PACKAGES, "nobody's", ("no_such_module", "no-such-package"))

    assert main(["sinkhorn", "--output", str(tmp_path)]) == 0

    results = json.loads((tmp_path / "sinkhorn-cpu-1-thread.json").read_text())
    assert list(results["cells"]) == [f"3x9x7, eps 0.1, {mode}" for mode in benchmark.MODES]
    for cell in results["cells"].values():
        arms = cell["arms"]
        assert {"loop", "sinkhorn"} <= set(arms) and "nobody's" not in arms
        for name, arm in arms.items():
            assert arm["differs_from_exact"] < (1e-2 if name == "GeomLoss" else 1e-5)
            assert arm["milliseconds"]["median"] == pytest.approx(1.0) and arm["peak_bytes"] >= 4 * 3 * 9 * 7
        assert arms["sinkhorn"]["missing_in_columns"] < 1e-6
    assert "no-such-package" in results["missing"]
    assert "| 3x9x7, eps 0.1, plan | loop | 1 [1, 1] | 1 [1, 1] |" in capsys.readouterr().out


def test_the_committed_figures_are_those_of_the_table():
    path = benchmark.RESULTS / "sinkhorn-cpu-1-thread.json"
    text = path.read_text()
    results = json.loads(text)

    assert str(Path.home()) not in text
    assert path.with_suffix(".md").read_text() == benchmark.markdown(results)
    for cell in results["cells"].values():
        ours, loop = cell["arms"]["sinkhorn"], cell["arms"]["loop"]
        assert loop["times_sinkhorn"]["low"] > 1 and ours["peak_bytes"] < loop["peak_bytes"]
