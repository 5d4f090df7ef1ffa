"""What is measured, of which matrices and when; closed forms of a model whose weights are known."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.callbacks import StableRankCallback, install_callbacks
from trainers.callbacks.stable_rank import first_quarter_means, kind_of
from trainers.optimizers import select_targets
from trainers.reliability.events import read_events


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=24)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2, n_positions=8)),
    "sigma_moe": lambda: SigmaMoeForCausalLM(
        SigmaMoeConfig(**SMALL, num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, num_experts=4)
    ),
}
KINDS = {"llama": "q k v o gate up down", "gpt2": "q k v o up down", "sigma_moe": "q k v o gate up down"}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_a_block_has_a_kind(name):
    model = MODELS[name]()
    weights = dict(model.named_parameters())
    names = [n for t in select_targets(model, "all_2d") for n, _ in t.matrices(weights[t.name])]
    assert None not in {kind_of(n) for n in names}
    assert {kind_of(n) for n in names} == set(KINDS[name].split())
    assert len(names) == 4 * len(KINDS[name].split())


def test_the_mean_is_geometric_over_the_first_quarter_of_the_layers():
    ranks = {f"model.layers.{layer}.self_attn.v_proj.weight": 2.0**layer for layer in range(8)}
    means = first_quarter_means(ranks | {"model.layers.0.self_attn.other": 9.0, "lm_head.weight": 9.0})
    assert means == {"v": pytest.approx(math.sqrt(1.0 * 2.0))}
    assert first_quarter_means({"h.0.attn.c_proj.weight": 3.0}) == {"o": pytest.approx(3.0)}
    assert first_quarter_means({"h.0.attn.c_proj.weight": 0.0}) == {"o": 0.0}  # a matrix of zeros


def train(tmp_path, model, callback, steps=4, **options):
    rows = [{"input_ids": torch.arange(8) % 32, "labels": torch.arange(8) % 32}] * 32
    arguments = {"max_steps": steps, "logging_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, save_strategy="no", **arguments | options)
    trainer = Trainer(model, args, train_dataset=rows)
    install_callbacks(trainer, callback)
    trainer.train()
    return trainer


def test_it_reads_the_weights_that_the_logged_step_starts_from(tmp_path):
    model = MODELS["llama"]()
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.orthogonal_(layer.self_attn.o_proj.weight)  # stable rank 16
            layer.self_attn.v_proj.weight.copy_(torch.outer(torch.ones(8), torch.ones(16)))  # stable rank 1
    trainer = train(tmp_path, model, StableRankCallback(), learning_rate=0.0, weight_decay=0.0)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["stable_rank/o"] == pytest.approx(16.0, abs=1e-3)
        assert row["stable_rank/v"] == pytest.approx(1.0, abs=1e-3)
    events = read_events(tmp_path, component="stable_rank")
    assert [event.step for event in events] == [1, 3] and {event.severity for event in events} == {"info"}
    assert events[0].evidence["model.layers.3.self_attn.o_proj.weight"] == pytest.approx(16.0, abs=1e-3)


def test_attention_alone_can_be_chosen(tmp_path):
    trainer = train(tmp_path, MODELS["gpt2"](), StableRankCallback("attention"), steps=2)
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert {key for key in row if key.startswith("stable_rank/")} == {f"stable_rank/{kind}" for kind in "qkvo"}
