# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""The dial for active experts: on ours and on every kind of host, bit for bit, saved, restored and refused."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_models.moe.elastic import (
    active_experts,
    captured_routing,
    expert_schedule,
    experts_in_force,
    experts_of_config,
    num_active_parameters,
    routers_of,
    set_active_experts,
)
from hf_models.moe.elastic_hosts import wrap_moe
from tests.hf_models.moe.elastic_models import (
    EXPERTS,
    FACTORIES,
    GROUPED,
    HOSTS,
    LAYERS,
    OURS,
    TRAINED_K,
    VOCABULARY,
    batch,
    build,
    greedy_without_cache,
    logits_of,
)


every_model = pytest.mark.parametrize("name", FACTORIES)
every_host = pytest.mark.parametrize("name", HOSTS)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- k in force ------------------------------------------------------------------------------------------------------


@every_model
def test_every_layer_with_experts_has_its_router(name):
    model = build(name)
    assert experts_in_force(model) == [TRAINED_K] * LAYERS == experts_of_config(model)
    layers = [int(re.search(r"layers\.(\d+)", n).group(1)) for n, m in model.named_modules() if m in routers_of(model)]
    assert layers == sorted(layers) and len(layers) == LAYERS


@every_model
@pytest.mark.parametrize("k", [1, 2, 4])
def test_k_set_on_a_model_equals_the_model_built_with_k(name, k):
    model, host = wrap_moe(build(name)), build(name, num_experts_per_tok=k)
    model.set_active_experts(k)
    assert torch.equal(logits_of(model), logits_of(host))
    assert not torch.equal(logits_of(model), logits_of(build(name)))


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_at_the_trained_k_a_wrapped_model_is_the_host_bit_for_bit(name, training):
    inputs, host, model = batch(padding=True), build(name).train(training), wrap_moe(build(name)).train(training)
    set_active_experts(model, TRAINED_K)
    expected, actual = host(**inputs), model(**inputs)
    assert type(expected) is type(actual) and expected.keys() == actual.keys()
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)
    expected.loss.backward(), actual.loss.backward()
    gradients = dict(model.named_parameters())
    for key, parameter in host.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[key].grad, parameter.grad), key


@every_model
def test_choices_at_a_smaller_k_are_a_prefix_of_those_at_a_larger(name):
    model, ids = wrap_moe(build(name)), batch()["input_ids"]
    largest = 4
    with active_experts(model, largest), captured_routing(model) as calls:
        logits_of(model, ids)
    at_largest = calls[0][0].indices
    for k in range(1, largest):
        with active_experts(model, k), captured_routing(model) as calls:
            logits_of(model, ids)
        at_k = calls[0][0].indices
        assert at_k.shape == (ids.numel(), k)
        if name in (*GROUPED, "glm4_moe"):  # they return the set in no order
            assert all(set(small.tolist()) < set(large.tolist()) for small, large in zip(at_k, at_largest))
        else:
            assert torch.equal(at_k, at_largest[:, :k])
        assert torch.equal(calls[0][0].router_logits, at_logits(model, ids))


def at_logits(model, ids):
    with captured_routing(model) as calls:
        logits_of(model, ids)
    return calls[0][0].router_logits


@every_model
def test_numbers_of_layers_are_saved_and_come_back(name, tmp_path):
    model = wrap_moe(build(name))
    model.set_active_experts([4, 1, 2])
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    plain = type(build(name)).from_pretrained(tmp_path).eval()
    assert plain.config.architectures == [type(plain).__name__] and plain.config.num_experts_per_tok == 4
    again = wrap_moe(plain)
    assert experts_in_force(again) == [4, 1, 2] == again.config.num_experts_per_tok_per_layer
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-5, atol=1e-5)

    again.set_active_experts(2)
    again.save_pretrained(tmp_path)
    plain = type(build(name)).from_pretrained(tmp_path)
    assert experts_in_force(plain) == [2, 2, 2]
    assert getattr(plain.config, "num_experts_per_tok_per_layer", None) is None


def test_a_host_that_went_back_to_one_number_saves_its_own_config_and_nothing_else():
    model, host = wrap_moe(build("mixtral")), build("mixtral")
    model.set_active_experts([1, 2, 3])
    model.set_active_experts(TRAINED_K)
    assert model.config.to_dict() == host.config.to_dict()


def test_some_layers_by_number():
    model = build("qwen3_moe")
    set_active_experts(model, {0: 5, 2: 1})
    assert experts_in_force(model) == [5, TRAINED_K, 1] == experts_of_config(model)
    set_active_experts(model, {1: 2})
    assert experts_in_force(model) == [5, 2, 1]


def test_a_schedule_by_name():
    model = build("m_moe")
    model.set_active_experts({"schedule": "front", "mean": 3})
    assert experts_in_force(model) == [5, 3, 1] == model.config.num_experts_per_tok_per_layer
    model.set_active_experts({"schedule": "back", "mean": 3, "smallest": 2})
    assert experts_in_force(model) == [2, 3, 4]


@pytest.mark.parametrize("schedule", ["front", "back", "uniform"])
@pytest.mark.parametrize("layers", [1, 2, 5, 56])
@pytest.mark.parametrize(("smallest", "largest"), [(1, 6), (2, 96)])
def test_schedules_have_exactly_their_mean_and_stay_in_range(schedule, layers, smallest, largest):
    for total in range(smallest * layers, min(largest, 12) * layers + 1):
        ks = expert_schedule(schedule, layers, mean=total / layers, smallest=smallest, largest=largest)
        assert sum(ks) == total and len(ks) == layers and smallest <= min(ks) <= max(ks) <= largest
        assert ks == sorted(ks, reverse=schedule != "back")
        if schedule == "uniform":
            assert max(ks) - min(ks) <= 1
    assert expert_schedule("front", layers, mean=largest, largest=largest) == [largest] * layers


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match=r"schedule='middle' is not known"):
        expert_schedule("middle", 4, mean=2, largest=8)
    with pytest.raises(ValueError, match=r"nearest means are 2.25 and 2.5"):
        expert_schedule("front", 4, mean=2.3, largest=8)
    with pytest.raises(ValueError, match=r"mean=9 lies outside 1..8"):
        expert_schedule("front", 4, mean=9, largest=8)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "top_k=0 of layer 0"),
        (9, r"top_k=9 of layer 0 is not an integer in 1..num_experts=8"),
        (True, "top_k=True of layer 0"),
        (2.0, "top_k=2.0"),
        ("2", "top_k='2'"),
        (None, "top_k=None"),
        ([1, 2], "top_k has 2 entries for 3 layers"),
        ([1, 9, 2], "top_k=9 of layer 1"),
        ({5: 2}, r"layers \[5\] are not among the 3"),
        ({0: 0}, "top_k=0 of layer 0"),
        ({"schedule": "front", "mean": 20}, "mean=20 lies outside 1..8"),
    ],
)
@pytest.mark.parametrize("name", ["mixtral", "m_moe"])
def test_impossible_numbers_are_refused_and_change_nothing(name, k, message):
    model = wrap_moe(build(name))
    model.set_active_experts([3, 2, 1])
    before = model.config.to_dict()
    for attempt in (model.set_active_experts, lambda k: model.active_experts(k).__enter__()):
        with pytest.raises(ValueError, match=message):
            attempt(k)
    assert experts_in_force(model) == [3, 2, 1] and model.config.to_dict() == before


@pytest.mark.parametrize("name", GROUPED)
def test_no_more_experts_than_the_groups_of_a_token_hold(name):
    model = build(name)
    set_active_experts(model, 4)
    with pytest.raises(ValueError, match=r"top_k=5 of layer 0 is more than the 4 experts of the topk_group=1 groups"):
        set_active_experts(model, 5)
    free = build("deepseek_v2", topk_method="greedy")
    set_active_experts(free, EXPERTS)


def test_a_model_without_experts_is_refused_by_name():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    for attempt in (routers_of, wrap_moe, lambda m: set_active_experts(m, 1)):
        with pytest.raises(TypeError, match="LlamaForCausalLM has no routers"):
            attempt(dense)


# --- for a moment ----------------------------------------------------------------------------------------------------


@every_model
def test_the_context_restores_nests_and_survives_exceptions(name):
    model = wrap_moe(build(name))
    model.set_active_experts({0: 4})
    before, expected = model.config.to_dict(), logits_of(model)
    with model.active_experts(2):
        assert experts_in_force(model) == [2, 2, 2] and model.config.num_experts_per_tok == 2
        with pytest.raises(KeyError), model.active_experts([1, 2, 4]):
            assert experts_in_force(model) == [1, 2, 4]
            raise KeyError
        assert experts_in_force(model) == [2, 2, 2]
    assert experts_in_force(model) == [4, 3, 3] and model.config.to_dict() == before
    assert torch.equal(logits_of(model), expected)


def test_routers_that_momentarily_differ_from_the_config_come_back_too():
    model = build("m_moe")
    routers_of(model)[1].top_k = 6  # as a draw of training
    with model.active_experts(1):
        pass
    assert experts_in_force(model) == [3, 6, 3] and experts_of_config(model) == [3, 3, 3]


@every_model
def test_generation_with_a_cache_follows_the_number_of_each_call(name):
    model, ids = wrap_moe(build(name)), batch(length=5)["input_ids"]
    outputs = []
    for k in (1, 4, 1, [4, 1, 2], None):
        tokens = model.generate(ids, num_active_experts=k, max_new_tokens=6, do_sample=False, use_cache=True)
        without = greedy_without_cache(model, ids, 6, k)
        assert torch.equal(tokens, without), k
        outputs.append(tokens)
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    assert experts_in_force(model) == [TRAINED_K] * LAYERS


def test_one_conversation_may_change_its_experts_between_calls_on_the_same_cache():
    model, ids = wrap_moe(build("qwen3_moe")), batch(rows=1, length=8)["input_ids"]
    with torch.no_grad():
        with model.active_experts(4):
            past = model(ids[:, :5], use_cache=True).past_key_values
        with model.active_experts(1):
            mixed = model(ids[:, 5:], past_key_values=past, use_cache=True).logits
        with model.active_experts(1):
            one = model(ids, use_cache=False).logits[:, 5:]
    assert past.get_seq_length() == 8 and not torch.allclose(mixed, one)


# --- capturing what routers do ---------------------------------------------------------------------------------------


@every_model
def test_captured_logits_carry_the_gradient_to_the_routers(name):
    model, ids = build(name).train(), batch()["input_ids"]
    with captured_routing(model) as calls:
        model(ids)
    assert [len(layer) for layer in calls] == [1] * LAYERS
    assert not any(router._forward_hooks for router in routers_of(model) if name not in OURS)
    for router, (call,) in zip(routers_of(model), calls):
        assert call.router_logits.shape == (ids.numel(), EXPERTS)
        assert call.indices.shape == call.weights.shape == (ids.numel(), TRAINED_K)
        (gradient,) = torch.autograd.grad(call.router_logits.square().sum(), router.weight, retain_graph=True)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "m_moe"])
def test_checkpointing_neither_counts_twice_nor_changes_a_gradient(name):
    results = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with captured_routing(model) as calls:
            logits = model(**batch()).logits
            loss = logits.square().mean() + sum(c.router_logits.logsumexp(-1).square().mean() for (c,) in calls)
            loss.backward()  # inside: the layers run again here
        assert [len(layer) for layer in calls] == [1] * LAYERS
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@every_model
def test_captured_choices_at_another_number(name):
    model, ids = build(name), batch()["input_ids"]
    with captured_routing(model, top_k=4) as calls:
        expected = logits_of(model, ids)
    with captured_routing(model) as plain:
        assert torch.equal(logits_of(model, ids), expected)
    assert experts_in_force(model) == [TRAINED_K] * LAYERS
    for (call,), (as_usual,) in zip(calls, plain):
        assert call.indices.shape[-1] == 4 and as_usual.indices.shape[-1] == TRAINED_K
        assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(as_usual.indices, call.indices))


# --- what it costs ---------------------------------------------------------------------------------------------------


@every_model
def test_each_further_active_expert_costs_its_parameters(name):
    model = build(name)
    tables = 2 * VOCABULARY * 32
    everything = sum(p.numel() for p in model.parameters())
    per_expert = 3 * 32 * 16 + (2 * 16 + 32 if name == "gpt_oss" else 0)  # gpt-oss has biases
    set_active_experts(model, [4, 1, 2])
    idle = per_expert * sum(EXPERTS - k for k in (4, 1, 2))
    assert num_active_parameters(model) == everything - idle - tables
    assert num_active_parameters(model, include_embeddings=True) == everything - idle
