import dataclasses
import json

import pytest

from hf_models.moe import MoneConfig
from trainers.benchmarks.decode import markdown_table, measure


def test_every_arm_is_timed_at_every_ratio_and_the_table_says_how_many_times_as_fast():
    config = MoneConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    report = measure(config, [0.5, 0.25], blocks=10, steps_per_block=1)
    baselines = ("dense_grouped_mm", "dense_batched_mm", "masked_grouped_mm")
    timed = [(row.ratio, row.baseline) for row in report.comparisons]
    assert timed == [(ratio, name) for ratio in (0.5, 0.25) for name in baselines]
    json.dumps(dataclasses.asdict(report))
    first = report.comparisons[0]
    clock = first.process if report.threads == 1 else first.wall
    assert clock.ratio.median == pytest.approx(sorted(clock.ratios)[4] / 2 + sorted(clock.ratios)[5] / 2)
    assert f"| 0.5 | dense_grouped_mm | {1 / clock.ratio.median:.2f} |" in markdown_table(report)
