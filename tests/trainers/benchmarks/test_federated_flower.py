"""The benchmark against Flower: its report, and, where flwr is there, that both sides end at the same bits."""

import importlib.util
import json

import pytest

from trainers.benchmarks.__main__ import main
from trainers.benchmarks.alternating_blocks import Timing, median_ratio
from trainers.benchmarks.federated_flower import FlowerComparison, FlowerReport, markdown_table


WALL = Timing(ratio=median_ratio([0.04] * 10), ours_seconds=0.4, baseline_seconds=10.0, ratios=[0.04] * 10)


def test_the_table_has_speed_ups_and_the_condition_of_the_machine():
    comparison = FlowerComparison(
        baseline="another",
        actors=2,
        ours_updates_per_second=250.0,
        baseline_updates_per_second=10.0,
        speedup=[25.0, 25.0, 25.0],
        ours_cpu_seconds=0.001,
        baseline_cpu_seconds=0.02,
        ours_start_seconds=1.0,
        baseline_start_seconds=30.0,
        largest_difference=None,
        limit=0.05,
        resolution=0.025,
        verdict="holds",
        wall=WALL,
    )
    shape = {"clients": 1000, "clients_per_round": 100, "samples_per_client": 32, "local_steps": 5, "batch_size": 8}
    report = FlowerReport(
        benchmark="federated_flower",
        shape={},
        blocks=10,
        steps_per_block=1,
        parameters=9,
        target=20,
        load_average=[1.0, 2.0],
        comparisons=[comparison],
        **shape,
    )
    table = markdown_table(report)
    assert (
        "| another | 2 | 250.0 | 10.0 | 25.0 [25.0, 25.0] | 1.00 | 20.00 | 1.0 | 30.0 | other clients | holds |"
        in table
    )
    assert "load average 1.0 to 2.0" in table and "target 20 times" in table


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="flwr is there")
def test_without_flwr_the_remedy_is_told(tmp_path):
    with pytest.raises(ImportError, match=r"hf-sigma\[flower\]"):
        main(["federated_flower", "--output", str(tmp_path)])


@pytest.mark.slow
def test_the_command_writes_json(tmp_path, capsys):
    pytest.importorskip("flwr")
    shape = ["--embedding-dim", "2", "--hidden-sizes", "3", "--clients", "6", "--samples", "7", "--items", "9"]
    main(["federated_flower", *shape, "--clients-per-round", "3", "--local-steps", "3", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("federated_flower-*.json")
    report = json.loads(path.read_text())
    assert {"flwr", "ray", "torch"} <= set(report["versions"])
    plain, ours = report["comparisons"]
    assert ours["largest_difference"] == 0.0 and plain["largest_difference"] is None
    for item in (plain, ours):
        assert item["ours_updates_per_second"] == pytest.approx(3 / item["wall"]["ours_seconds"])
        assert item["speedup"][1] <= item["speedup"][0] <= item["speedup"][2]
        assert len(item["wall"]["ratios"]) == 10 and item["baseline_start_seconds"] > 0
        assert 0 < item["ours_cpu_seconds"] < item["baseline_cpu_seconds"]
    assert "| this engine in Flower |" in capsys.readouterr().out
