"""The benchmark of the reliability set: its arms are Trainers that take turns, and it sees a slow callback."""

import json
import time

import pytest
import torch
from transformers import TrainerCallback

from hf_models.moe import SigmaMoeConfig
from trainers.benchmarks import reliability as module
from trainers.benchmarks.__main__ import main
from trainers.benchmarks.alternating_blocks import MIN_BLOCKS
from trainers.benchmarks.reliability import SteppedTrainer, _trainer, markdown_table, measure


TINY = SigmaMoeConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    moe_intermediate_size=8,
    num_experts=4,
)
SMALL = {"blocks": MIN_BLOCKS, "steps_per_block": 1, "batch_size": 2, "sequence_length": 8}


def test_a_stepped_trainer_makes_the_steps_that_it_is_asked_for(tmp_path):
    stepped = SteppedTrainer(_trainer(TINY, tmp_path, 50, 2, 8))
    for done in (1, 2, 3):
        stepped.step()
        assert stepped.trainer.state.global_step == done
    stepped.finish()
    assert stepped.trainer.state.global_step == 4 and not stepped._thread.is_alive()


def test_an_error_in_the_training_reaches_the_one_who_waits(tmp_path):
    class Broken(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            raise ZeroDivisionError("broken")

    trainer = _trainer(TINY, tmp_path, 50, 2, 8)
    trainer.add_callback(Broken())
    stepped = SteppedTrainer(trainer)
    with pytest.raises(ZeroDivisionError, match="broken"):
        stepped.step()


def test_the_report_has_the_ratio_and_every_callback():
    report = measure(TINY, **SMALL)
    assert len(report.process.ratios) == len(report.wall.ratios) == MIN_BLOCKS
    assert {"LocalLossGuardCallback", "HangWatchdogCallback", "GoodputCallback"} <= set(report.callbacks)
    assert set(report.shares) <= set(report.callbacks) and report.share_of_all > 0
    table = markdown_table(report)
    assert str(report.verdict) in table and all(f"| {name} |" in table for name in report.shares)


def test_a_slow_callback_fails_and_is_named(monkeypatch):
    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass

    def install(trainer):
        trainer.add_callback(slow := Slow())
        return [slow]

    monkeypatch.setattr(module, "reliability", install)
    report = measure(TINY, **SMALL)
    assert report.verdict == "fails" and list(report.shares) == ["Slow"] and report.share_of_all > 0.1


def test_the_command_writes_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.SigmaMoeConfig, "from_preset", lambda name: TINY)
    threads = torch.get_num_threads()
    try:
        main(["reliability", "--blocks", "10", "--steps-per-block", "1", "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    [file] = tmp_path.glob("reliability-*.json")
    assert json.loads(file.read_text())["limit"] == 1.02 and "| all |" in capsys.readouterr().out
