"""FLOPs of the plan against torch's counter on real steps, and against the closed formula."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_models.m3bert import M3BertConfig
from hf_models.moe import SIGMA_MOE_TINY_INITIAL_TOP_K, SigmaMoeConfig
from trainers.callbacks.throughput import gemm_flops_per_token
from trainers.planning import PlanError, PlannedModel, Utilisation, throughput_of, trace_step
from trainers.planning.shapes import Training
from trainers.planning.step_trace import checkpoint_layers
from trainers.planning.throughput import flops_per_token


BATCH, SEQUENCE = 2, 64


def tiny():
    return SigmaMoeConfig.from_preset(
        "demo", vocab_size=500, num_hidden_layers=3, num_experts=8, num_experts_per_tok_per_layer=[4, 2, 1]
    )


def trace_of(config, **options):
    model = PlannedModel("tiny", config, Training())
    return trace_step(model.build, batch_size=BATCH, sequence_length=SEQUENCE, kept_fraction=1.0, **options)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_a_step_are_those_that_torch_counts(checkpointing):
    """Eager attention and experts, whose products torch's counter knows, and which compute the whole square."""
    model = PlannedModel("tiny", tiny(), Training()).build().train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    if checkpointing:
        checkpoint_layers(model)
    ids = torch.randint(0, 500, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trace = trace_of(tiny(), checkpointing=checkpointing)
    forward, step = trace.forward_flops, trace.step_flops
    # Causal kernels do half of the square; their backward has a fifth product, the scores again.
    square = 2 * forward["attention_scores"]
    scores = square * (4 if checkpointing else 3)
    planned = step["experts"] + step["projections"] + scores
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_of_m3bert_are_those_that_torch_counts(monkeypatch):
    """Without the fused loss, which torch's counter does not look into; chunks in torch compute the same, and compute
    it once more in the backward too."""
    monkeypatch.setitem(sys.modules, "sigma_kernels", None)
    config = M3BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128,
        attention_dropout=0.0, mrl_dims=[32, 64],
    )  # fmt: skip
    model = PlannedModel("tiny", config, Training()).build().train()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 300, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    monkeypatch.undo()
    trace = trace_of(config)
    scores = 3 * trace.forward_flops["attention_scores"]
    planned = trace.step_flops["head"] + trace.step_flops["projections"] + scores
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_of_the_family_are_those_of_its_formula():
    flops, _ = flops_per_token(trace_of(tiny()), BATCH * SEQUENCE)
    assert sum(flops.values()) == pytest.approx(gemm_flops_per_token(tiny(), SEQUENCE), rel=0.01)


@pytest.mark.parametrize(("top_k", "gigaflops"), [(SIGMA_MOE_TINY_INITIAL_TOP_K, 7.8577), ([1] * 56, 7.1781)])
def test_of_sigma_moe_tiny(top_k, gigaflops):
    model = PlannedModel("sigma-moe-tiny", SigmaMoeConfig.from_preset("sigma-moe-tiny"), Training())
    trace = trace_step(lambda: model.build(top_k), batch_size=1, sequence_length=4096)
    flops, _ = flops_per_token(trace, 4096)
    assert sum(flops.values()) / 1e9 == pytest.approx(gigaflops, rel=1e-4)
    assert flops["head"] == 6 * 1536 * 200064
    assert flops["experts"] == 6 * sum(top_k) * 3 * 1536 * 768


def test_days_hours_and_cost():
    """1e9 tokens of 1e9 FLOPs on 2 devices that do 1e12 FLOP/s: 5e5 s at full speed."""
    stages = [(0.5, {"other": 5e8}, 1e8), (0.5, {"other": 5e8, "experts": 1e9}, 3e8)]
    run = throughput_of(
        stages, tokens=1e9, tokens_per_step=1000, gpus=2, peak_flops=1e12, utilisation=Utilisation(0.1, 0.5, "given"),
        price=2.0,
    )  # fmt: skip
    assert run.flops_per_token == {"experts": 5e8, "other": 5e8} and run.step_flops == 1e12 and run.recomputed == 2e8
    assert run.days == pytest.approx((5e6 / 86400, 1e6 / 86400))
    assert run.gpu_hours == pytest.approx((2 * 5e6 / 3600, 2 * 1e6 / 3600))
    assert run.cost == pytest.approx(tuple(2 * hours for hours in run.gpu_hours))
    assert run.tokens_per_day == pytest.approx((200 * 86400, 1000 * 86400))


@pytest.mark.parametrize("pair", [(0.0, 0.5), (0.5, 0.4), (0.5, 1.5)])
def test_a_range_that_is_none(pair):
    with pytest.raises(PlanError, match="mfu: .* is no range"):
        Utilisation(*pair, "given")
