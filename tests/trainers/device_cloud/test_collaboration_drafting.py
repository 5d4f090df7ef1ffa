"""Assisted generation: the target's own greedy words, and every token that crosses counted."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ecosystem.families import m_moe_config
from trainers.device_cloud.collaboration_drafting import (
    draft_and_verify,
    drafter_of_fewer_experts,
    drafter_of_fewer_layers,
)
from trainers.federated.core import WireMeter, pack


PROMPT = torch.tensor([[3, 17, 5, 29, 8]])
TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.2,
}


def causal_lm(kind):
    torch.manual_seed(0)
    config = m_moe_config(num_hidden_layers=3, num_experts_per_tok_per_layer=[4, 4, 3])
    if kind != "m_moe":
        config = AutoConfig.for_model(kind, **TINY, head_dim=8, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


DRAFTERS = {
    "one expert": ("m_moe", lambda model: drafter_of_fewer_experts(model, 1)),
    "one layer": ("m_moe", lambda model: drafter_of_fewer_layers(model, 1)),
    "one layer of another family": ("qwen3", lambda model: drafter_of_fewer_layers(model, 1)),
    "itself": ("qwen3", lambda model: drafter_of_fewer_layers(model, 3)),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_tokens_are_the_target_s_whoever_drafts(name):
    kind, drafter_of = DRAFTERS[name]
    target, meter = causal_lm(kind), WireMeter()
    greedy = target.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=None)
    drafter = drafter_of(target)
    found = draft_and_verify(
        target, drafter, PROMPT, meter, max_new_tokens=24, num_assistant_tokens=3, eos_token_id=None
    )
    assert torch.equal(found.sequences, greedy)
    assert found.new_tokens == 24 == found.accepted + found.cloud_calls, "each call adds one token of the cloud's own"
    assert found.cloud_calls <= 24 and 0 <= found.accepted <= found.drafted
    assert found.cloud_tokens == PROMPT.shape[1] + found.drafted + found.cloud_calls - 1
    if name == "itself":
        assert found.cloud_calls == 24 // 4 and found.accepted == found.drafted == 18


def test_bytes_are_those_of_the_tokens():
    target, meter = causal_lm("qwen3"), WireMeter()
    drafter = drafter_of_fewer_layers(target, 3)
    found = draft_and_verify(
        target, drafter, PROMPT, meter, max_new_tokens=8, num_assistant_tokens=3, round=7, eos_token_id=None
    )
    sizes = {n: len(pack({"tokens": torch.zeros(n, dtype=torch.int32)})) for n in (3, 5)}
    answer = {"right": torch.zeros(1, dtype=torch.int32), "next": torch.zeros(1, dtype=torch.int32)}
    assert (found.cloud_calls, found.drafted) == (2, 6)
    assert meter.by_round() == {7: {"up": sizes[5] + 2 * sizes[3], "down": 2 * len(pack(answer))}}
    assert set(meter.by_purpose()) == {"serving"}


def test_drafters_share_weights_and_leave_the_target_as_it_was():
    target = causal_lm("m_moe")
    state = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    fewer, shorter = drafter_of_fewer_experts(target, 1), drafter_of_fewer_layers(target, 2)
    assert {id(p) for p in fewer.parameters()} == {id(p) for p in target.parameters()}
    assert {id(p) for p in shorter.parameters()} < {id(p) for p in target.parameters()}
    assert fewer.num_active_parameters() < target.num_active_parameters()
    assert target.config.num_experts_per_tok_per_layer == [4, 4, 3] and target.config.num_hidden_layers == 3
    assert shorter.config.num_experts_per_tok_per_layer == [4, 4] and shorter.config.num_hidden_layers == 2
    draft_and_verify(target, fewer, PROMPT, WireMeter(), max_new_tokens=6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())
    with pytest.raises(ValueError, match="layers=4 must be between 1 and 3"):
        drafter_of_fewer_layers(target, 4)
    with pytest.raises(ValueError, match="one at a time"):
        draft_and_verify(target, fewer, PROMPT.repeat(2, 1), WireMeter(), max_new_tokens=2)


def test_a_truncated_drafter_is_what_its_first_layers_compute():
    target = causal_lm("qwen3")
    shorter = drafter_of_fewer_layers(target, 2)
    with torch.no_grad():
        hidden = target(PROMPT, output_hidden_states=True).hidden_states[2]
        expected = target.lm_head(target.model.norm(hidden))
        assert torch.allclose(shorter(PROMPT).logits, expected, atol=1e-5)
