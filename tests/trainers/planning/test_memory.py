"""The memory model against the allocator of one process, and its rules."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hf_models.m3bert import M3BertConfig
from hf_models.moe import MoneConfig, SigmaMoeConfig
from tests.trainers.planning.allocations import allocation_peak, train
from trainers.planning import PlanError, PlannedModel, Sharding, memory_of, step_trace, trace_step
from trainers.planning.memory import trace_options
from trainers.planning.shapes import Training
from trainers.planning.step_trace import checkpoint_layers


MOE = {"vocab_size": 500, "hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 8}
CONFIGS = {
    "sigma_moe": lambda: SigmaMoeConfig.from_preset(
        "demo", **MOE, num_hidden_layers=3, num_experts_per_tok_per_layer=[2, 1, 1]
    ),
    # Most of its memory is logits.
    "sigma_moe, large vocabulary": lambda: SigmaMoeConfig.from_preset(
        "demo", **MOE | {"vocab_size": 8000}, num_hidden_layers=2
    ),
    "mone": lambda: MoneConfig(
        **SigmaMoeConfig.from_preset("demo", **MOE, num_hidden_layers=2).own_fields() | {"neuron_ratio": 0.5}
    ),
    # On a CPU, dropout of attention would store the scores, which no GPU kernel does.
    "m3bert": lambda: M3BertConfig(
        vocab_size=1000, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192,
        attention_dropout=0.0,
    ),
}  # fmt: skip
BATCH, SEQUENCE = 4, 96
RUNS = {
    "fp32": {},
    "fp32, checkpointing": {"checkpointing": True},
    "bf16": {"bf16": True},
    "bf16, checkpointing, accumulation": {"bf16": True, "checkpointing": True, "accumulation": 2},
}


def predicted(config, *, bf16=False, checkpointing=False, accumulation=1, batch_size=BATCH):
    model, sharding = PlannedModel("tiny", config, Training()), Sharding(kind="ddp", gpus=1)
    how = trace_options(sharding, bf16=bf16, accumulation=accumulation)
    how.pop("half_parameters")
    trace = trace_step(
        model.build, batch_size=batch_size, sequence_length=SEQUENCE, checkpointing=checkpointing, kept_fraction=1.0,
        **how,
    )  # fmt: skip
    return memory_of(model, trace, sharding, bf16=bf16, accumulation=accumulation)


def measured(config, *, bf16=False, checkpointing=False, accumulation=1, batch_size=BATCH):
    def prepare():
        model = PlannedModel("tiny", config, Training()).build()
        if checkpointing:
            checkpoint_layers(model)
        return model

    options = {"batch_size": batch_size, "sequence_length": SEQUENCE, "bf16": bf16, "accumulation": accumulation}
    return allocation_peak(prepare, lambda model: train(model, **options))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_process_is_within_a_tenth_of_its_allocations(name, run):
    memory, peak = predicted(CONFIGS[name](), **RUNS[run]), measured(CONFIGS[name](), **RUNS[run])
    print(f"{name}, {run}: planned {memory.total / 2**20:.2f} MiB, measured {peak / 2**20:.2f} ({memory.moment})")
    assert memory.total == pytest.approx(peak, rel=0.1)


def test_a_model_of_transformers_is_planned_too():
    config = Qwen3MoeConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[0], intermediate_size=128,
    )  # fmt: skip
    assert isinstance(
        PlannedModel("tiny", config, Training()).build(), AutoModelForCausalLM._model_mapping[type(config)]
    )
    assert predicted(config).total == pytest.approx(measured(config), rel=0.1)


def test_a_few_layers_stand_for_all(monkeypatch):
    """14 layers of three kinds: the trace of six of them against that of all."""
    config = SigmaMoeConfig.from_preset(
        "demo", **MOE, num_hidden_layers=14, num_experts_per_tok_per_layer=[4, 4, 2, 2, *[1] * 10]
    )
    options = {"batch_size": 2, "sequence_length": 64, "autocast": True, "checkpointing": True}
    model = PlannedModel("tiny", config, Training())
    few = trace_step(model.build, **options)
    monkeypatch.setattr(step_trace, "FULL_DEPTH", 14)
    whole = trace_step(model.build, **options)
    assert few.forward_flops == whole.forward_flops and few.step_flops == whole.step_flops
    assert few.head.forward_peak == pytest.approx(whole.head.forward_peak, rel=0.02)
    for trace in ("grown", "forward_peak", "kept", "backward_peak"):
        sums = [sum(getattr(layer, trace) for layer in each.layers) for each in (few, whole)]
        assert sums[0] == pytest.approx(sums[1], rel=0.02), trace
    names = [[name for layer in each.layers for name in layer.parameters] for each in (few, whole)]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])


def test_shards_are_those_of_torch():
    """96 experts on 64 ranks are 2 on 48 of them; with 32 ranks that own different experts 3, which 2 ranks share."""
    shape = torch.Size((96, 8, 4))
    for gpus, ep, own, gathered in ((64, 1, 2, 128), (48, 1, 2, 96), (96, 1, 1, 96), (64, 32, 2, 4), (8, 8, 12, 12)):
        sharding = Sharding(gpus=gpus, ep=ep)
        assert sharding.shard(shape, True) == own * 32
        assert sharding.gathered(shape, True) == gathered * 32
        assert sharding.whole(shape, True) == 96 // ep * 32
    assert Sharding(gpus=64, replicas=8).shard(torch.Size((96, 8, 4)), True) == 12 * 32
    assert Sharding(kind="ddp", gpus=64).shard(shape, True) == 96 * 32


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"gpus": 0}, "gpus: 0"),
        ({"kind": "zero3"}, "sharding: 'zero3'"),
        ({"kind": "ddp", "ep": 2}, "sharding: ddp"),
        ({"gpus": 8, "replicas": 3}, "replicas: 3"),
        ({"gpus": 8, "ep": 3}, "ep: 3"),
        ({"gpus": 64, "replicas": 16, "ep": 8}, "ep: 8"),
    ],
)
def test_what_does_not_divide_is_refused(changes, field):
    model = PlannedModel("tiny", CONFIGS["sigma_moe"](), Training())
    with pytest.raises(PlanError, match=field):
        dataclasses.replace(Sharding(), **changes).check(model)


def test_experts_of_a_dense_model_are_refused():
    with pytest.raises(PlanError, match="ep: 2 .* has none"):
        Sharding(ep=2).check(PlannedModel("tiny", CONFIGS["m3bert"](), Training()))
