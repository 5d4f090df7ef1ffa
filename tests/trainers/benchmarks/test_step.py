"""The benchmark of the training step: what it reports, that its arms are what they claim, that it sees a slow arm."""

import json
import re
import time

import pytest
import torch

from hf_models.moe import SigmaMoeConfig
from trainers.benchmarks import step as step_module
from trainers.benchmarks.__main__ import main
from trainers.benchmarks.alternating_blocks import MIN_BLOCKS, Ratio, judge, median_ratio, time_alternately
from trainers.benchmarks.step import _started_arms, markdown_table, measure


TINY = SigmaMoeConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=1,
    pad_token_id=0,
)
SMALL = {"blocks": MIN_BLOCKS, "steps_per_block": 1, "batch_size": 2, "sequence_length": 8}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_report_has_every_comparison_on_both_clocks():
    report = measure(TINY, **SMALL)
    pairs = [(item.ours, item.baseline, item.limit) for item in report.comparisons]
    assert pairs == [
        ("sigma_moe", "qwen3_moe", 1.0),
        ("sigma_moe", "sigma_moe_without_balance", 1.03),
        ("sigma_moe_with_callback", "sigma_moe_without_balance", 1.03),
    ]
    for item in report.comparisons:
        for timing in (item.process, item.wall):
            assert len(timing.ratios) == MIN_BLOCKS and timing.ours_seconds > 0 and timing.baseline_seconds > 0
            assert timing.ratio.low <= timing.ratio.median <= timing.ratio.high and timing.ratio.confidence >= 0.95
        assert item.verdict == judge(item.process.ratio, limit=item.limit, resolution=item.resolution)
    assert (report.threads, report.clock, report.data) == (1, "process", "random token ids")
    assert set(report.startup_seconds) == {name for pair in pairs for name in pair[:2]}
    assert {"python", "torch", "transformers"} <= set(report.versions)
    rows = [line for line in markdown_table(report).splitlines() if line.startswith("| sigma_moe")]
    assert len(rows) == 3 and all(item.verdict in row for item, row in zip(report.comparisons, rows))


def test_with_several_threads_the_verdicts_rest_on_wall_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # two real ones can be very slow on a busy machine
    report = measure(TINY, **SMALL)
    assert report.clock == "wall" and "wall time" in markdown_table(report)
    for item in report.comparisons:
        assert item.verdict == judge(item.wall.ratio, limit=item.limit, resolution=item.resolution)


def test_arms_differ_in_what_they_are_compared_for(tmp_path, monkeypatch):
    models = {}
    training_step = step_module._training_step
    monkeypatch.setattr(
        step_module,
        "_training_step",
        lambda model, ids: models.setdefault(type(model).__name__, model) and training_step(model, ids),
    )
    arms, _ = _started_arms(TINY, torch.randint(64, (8, 2, 8)), str(tmp_path))
    sigma, qwen3 = models["SigmaMoeForCausalLM"], models["Qwen3MoeForCausalLM"]
    assert sigma.config._experts_implementation == qwen3.config._experts_implementation == "grouped_mm"
    assert sigma.num_parameters() == qwen3.num_parameters()
    assert qwen3.config.output_router_logits and qwen3.config.num_experts_per_tok == 1

    window = sigma.routing_window
    for name, counted in (("sigma_moe", 16), ("sigma_moe_without_balance", None), ("sigma_moe_with_callback", 16)):
        window.reset()
        before = sigma.model.embed_tokens.weight.detach().clone()
        arms[name]()
        summary = window.summary()
        assert (summary and summary["tokens"].tolist()) == (counted and [counted] * 2)
        assert not torch.equal(before, sigma.model.embed_tokens.weight)
        assert sigma.training and sigma.model.training and not window.managed
    for _ in range(step_module.RECORD_EVERY):
        arms["sigma_moe_with_callback"]()
    lines = (tmp_path / "logs" / "balance.jsonl").read_text().splitlines()
    assert [json.loads(line)["layer"] for line in lines] == [0, 1]


def spin(seconds: float):
    def step():
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return step


def test_a_slowed_arm_is_detected():
    ours, baseline = spin(0.002), spin(0.001)
    timings = time_alternately(ours, baseline, blocks=MIN_BLOCKS, steps_per_block=2)
    ratio = timings["process"].ratio
    assert 1.5 < ratio.low <= 2 <= ratio.high + 0.1
    assert judge(ratio, limit=1.03, resolution=0.03) == "fails"
    assert timings["process"].ours_seconds == pytest.approx(0.002, rel=0.2)
    reverse = time_alternately(baseline, ours, blocks=MIN_BLOCKS, steps_per_block=2)["process"].ratio
    assert reverse.high < 1


def test_a_slowed_training_step_is_detected(monkeypatch):
    training_step = step_module._training_step

    def slowed(model, ids):
        step = training_step(model, ids)
        delay = spin(0.02 if type(model).__name__ == "SigmaMoeForCausalLM" else 0.0)
        return lambda: (step(), delay())

    monkeypatch.setattr(step_module, "_training_step", slowed)
    against_qwen3 = measure(TINY, **SMALL).comparisons[0]
    assert against_qwen3.verdict == "fails" and against_qwen3.process.ratio.low > 1


def test_arms_take_turns_and_blocks_begin_with_either():
    order = []
    time_alternately(lambda: order.append("a"), lambda: order.append("b"), blocks=10, steps_per_block=2)
    assert "".join(order) == "ababbaba" * 5


@pytest.mark.parametrize("blocks, steps_per_block", [(9, 1), (10, 0)])
def test_too_few_blocks_or_steps_are_refused(blocks, steps_per_block):
    with pytest.raises(ValueError, match="at least 10 blocks"):
        time_alternately(spin(0), spin(0), blocks=blocks, steps_per_block=steps_per_block)


def test_the_interval_of_the_median_is_that_of_order_statistics():
    ratio = median_ratio([10, 1, 9, 2, 8, 3, 7, 4, 6, 5])
    assert (ratio.median, ratio.low, ratio.high) == (5.5, 2, 9)
    assert ratio.confidence == pytest.approx(1 - 22 / 1024)
    assert median_ratio(list(range(6))).confidence == pytest.approx(1 - 2 / 64)
    with pytest.raises(ValueError, match="5 ratios"):
        median_ratio([1.0] * 5)


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.98, 1.0, "holds"),
        (0.99, 1.01, "at the limit"),
        (1.001, 1.02, "fails"),
        (0.5, 0.9, "not resolved"),
        (0.9, 1.1, "not resolved"),
        (1.5, 2.5, "fails"),
    ],
)
def test_verdicts(low, high, verdict):
    ratio = Ratio(median=(low + high) / 2, low=low, high=high, confidence=0.95)
    assert judge(ratio, limit=1.0, resolution=0.03) == verdict


def test_the_command_writes_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SigmaMoeConfig, "from_preset", classmethod(lambda cls, name: TINY))
    output = tmp_path / "new" / "folder"
    main(["step", "--steps-per-block", "1", "--output", str(output)])
    (path,) = output.iterdir()
    assert re.fullmatch(r"step-[a-z0-9-]+\.json", path.name)
    report = json.loads(path.read_text())
    assert report["benchmark"] == "step" and len(report["comparisons"]) == 3 and report["shape"]["num_experts"] == 4
    assert str(tmp_path) not in path.read_text()
    assert path.name in capsys.readouterr().out


def test_the_command_needs_a_known_name(capsys):
    with pytest.raises(SystemExit):
        main(["leap"])
    assert "step" in capsys.readouterr().err
