"""The benchmark of MSign: one application a block, on the arm that has it."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.benchmarks import msign as module
from trainers.benchmarks.__main__ import main
from trainers.benchmarks.alternating_blocks import MIN_BLOCKS, judge
from trainers.benchmarks.msign import measure, summary


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def test_every_block_has_one_application_and_only_one_arm_applies():
    model = tiny_model()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    report = measure(
        model, name="tiny", targets="all_2d", period=4, blocks=MIN_BLOCKS, batch_size=1, sequence_length=8
    )
    assert len(report.application_seconds) == MIN_BLOCKS == len(report.process.ratios)
    assert report.matrices == 2 * 7 and report.parameters == model.num_parameters()
    assert report.share == pytest.approx(
        sorted(report.application_seconds)[MIN_BLOCKS // 2] / (4 * report.wall.baseline_seconds)
    )
    assert report.verdict == judge(report.process.ratio, limit=report.limit, resolution=report.resolution)
    # AdamW at 1e-6 for 43 steps; a restored matrix would be another one.
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, before, rtol=0, atol=1e-4)
    assert "P = 4" in summary(report) and str(report.verdict) in summary(report)


def test_the_command_writes_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(module.SHAPES, "demo", tiny_model)
    options = ["--steps-per-block", "2", "--batch-size", "1", "--sequence-length", "8", "--output", str(tmp_path)]
    main(["msign", "--targets", "attention", *options])
    [path] = tmp_path.glob("msign-demo-*.json")
    report = json.loads(path.read_text())
    assert (report["period"], report["targets"], report["matrices"]) == (2, "attention", 8)
    assert "P = 2" in capsys.readouterr().out


def test_the_larger_shape_is_the_papers():
    with torch.device("meta"):
        model = module.SHAPES["llama-1b"]()
    layer = 4 * 2048**2 + 3 * 2048 * 5440 + 2 * 2048
    assert model.num_parameters() == 16 * layer + 2048 + 2 * 32_000 * 2048
