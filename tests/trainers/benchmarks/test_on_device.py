"""The benchmark of fine-tuning on devices: all arms end at the same parameters, and users a second fit the seconds."""

import json

import pytest
import torch

from hf_models.ctr import CtrForCtrPrediction
from trainers.benchmarks.__main__ import main
from trainers.benchmarks.alternating_blocks import MIN_BLOCKS, Timing, median_ratio
from trainers.benchmarks.on_device import _per_user, last_rows, markdown_table, measure
from trainers.data.drifted_clicks import draw_drifted_clicks


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_all_arms_do_the_same():
    data = draw_drifted_clicks(num_users=2, num_local=6, num_items=12, num_test=1).data()
    model = CtrForCtrPrediction(data.config("deepfm", embedding_dim=4, hidden_sizes=[4]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    report = measure(model, data.rows("train"), steps=2, blocks=MIN_BLOCKS, steps_per_block=1)
    assert [item.baseline for item in report.comparisons] == ["a Trainer for each user", "a plain loop for each user"]
    assert (report.users, report.samples_per_user, report.clock) == (2, 6, "process")
    for item in report.comparisons:
        assert item.largest_difference < 1e-5
        assert item.ours_users_per_second == pytest.approx(2 / item.process.ours_seconds)
        assert len(item.process.ratios) == MIN_BLOCKS
    rows = [line for line in markdown_table(report).splitlines() if line.startswith("| a ")]
    assert len(rows) == 2 and all(item.verdict in row for item, row in zip(report.comparisons, rows))


def test_the_command_writes_json(tmp_path, capsys):
    shape = ["--embedding-dim", "2", "--hidden-sizes", "3", "--users", "1", "--samples", "4", "--items", "8"]
    main(["on_device", *shape, "--device-steps", "1", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("on_device-*.json")
    assert len(json.loads(path.read_text())["comparisons"]) == 2 and str(path) in capsys.readouterr().out


def test_a_loop_over_some_users_counts_for_all():
    data = draw_drifted_clicks(num_users=6, num_local=6, num_items=12, num_test=1).data()
    model = CtrForCtrPrediction(data.config("lr", embedding_dim=4, hidden_sizes=[4]))
    rows = last_rows(data.rows("train"), 4)
    assert len(rows) == 24 and rows.by_user()[3].tensors["labels"].tolist() == (
        data.rows("train").by_user()[3].tensors["labels"][-4:].tolist()
    )
    report = measure(model, rows, steps=1, blocks=MIN_BLOCKS, steps_per_block=1, baseline_users=2)
    assert (report.users, report.samples_per_user) == (6, 4)
    for item in report.comparisons:
        assert item.baseline_users == 2 and item.largest_difference < 1e-5
        assert item.baseline_users_per_second == pytest.approx(6 / item.process.baseline_seconds)
    whole = Timing(ratio=median_ratio([3.0] * 10), ours_seconds=6.0, baseline_seconds=2.0, ratios=[3.0] * 10)
    scaled = _per_user(whole, 1 / 3)
    assert (scaled.baseline_seconds, scaled.ours_seconds, scaled.ratio.median) == (6.0, 6.0, 1.0)
