import json

import pytest

from trainers.recipes.sigma_moe_results import balance_before_switch, balance_metrics


def write_run(folder, shares_by_step, switch=None):
    """Layer 0 as `shares_by_step[step]` says; layer 1 is there to be ignored."""
    (folder / "logs").mkdir(parents=True)
    rows = [
        {
            "step": step,
            "layer": layer,
            "f": f if layer == 0 else [1.0, 0.0, 0.0, 0.0],
            "load_balancing_loss": step / 10,
        }
        for step, f in shares_by_step.items()
        for layer in (0, 1)
    ]
    (folder / "logs" / "balance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if switch is not None:
        (folder / "logs" / "switch.json").write_text(json.dumps({"step": switch, "before": 1.0, "after": 2.0}))
    return folder


EVEN, EARLY = [0.25] * 4, [0.4, 0.3, 0.2, 0.1]


def test_the_extremes_are_those_of_the_summed_counts_of_the_last_tenth(tmp_path):
    steps = dict.fromkeys(range(1, 19), EARLY)
    ours = write_run(tmp_path / "ours", steps | {19: [0.5, 0.5, 0.0, 0.0], 20: [0.1, 0.5, 0.4, 0.0]})
    base = write_run(tmp_path / "base", dict.fromkeys(range(1, 21), EVEN))
    metrics = balance_metrics({"ours": ours, "base": base, "without a log": tmp_path})
    # the last two of twenty steps: mean shares 0.3, 0.5, 0.2, 0
    expected = {"max_deviation": 1.0, "min_deviation": -1.0, "dead_experts": 1.0, "load_balancing_loss": 1.95}
    assert {name: metrics[f"layer0_{name}"].value for name in expected} == pytest.approx(expected)
    assert set(metrics["layer0_max_deviation"].baseline) == {"base"}
    assert metrics["layer0_max_deviation"].baseline["base"].value == pytest.approx(0)
    assert metrics["layer0_min_deviation"].higher_is_better and not metrics["layer0_max_deviation"].higher_is_better


def test_before_the_switch_is_before_the_switch(tmp_path):
    run = write_run(tmp_path / "run", dict.fromkeys(range(1, 91), EARLY) | dict.fromkeys(range(91, 101), EVEN), 90)
    metrics = balance_before_switch([run])
    assert metrics["layer0_max_deviation_before_switch"].value == pytest.approx(0.6)
    assert metrics["layer0_min_deviation_before_switch"].value == pytest.approx(-0.6)
    assert balance_before_switch([write_run(tmp_path / "other", {1: EVEN})]) == {}
