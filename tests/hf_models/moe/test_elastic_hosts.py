# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Other people's models made elastic: what wrapping changes and leaves, and the loss they train with."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from hf_models.moe.elastic import (
    active_experts,
    captured_routing,
    experts_in_force,
    experts_of_config,
    parameters_per_expert,
    routers_of,
    set_active_experts,
)
from hf_models.moe.elastic_hosts import wrap_moe
from tests.hf_models.moe.elastic_models import (
    EXPERTS,
    HOSTS,
    LAYERS,
    TRAINED_K,
    batch,
    build,
    greedy_without_cache,
    logits_of,
)


every_host = pytest.mark.parametrize("name", HOSTS)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- wrapping --------------------------------------------------------------------------------------------------------


@every_host
def test_wrapping_changes_one_instance_and_keeps_its_names(name):
    other, host = build(name), build(name)
    before = type(host)
    model = wrap_moe(host)
    assert model is host and isinstance(model, before) and type(other) is before and type(model) is not before
    assert type(model).__name__ == before.__name__ and type(model).__module__ == before.__module__
    assert type(wrap_moe(build(name))) is type(model) and type(wrap_moe(model)) is type(model)
    assert not hasattr(other, "set_active_experts")
    assert model.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_elastic_and_apart(copied):
    model = wrap_moe(build("qwen3_moe"), aux_loss_coef=0.5)
    model.set_active_experts([1, 2, 4])
    again = copied(model)
    assert type(again) is type(model) and experts_in_force(again) == [1, 2, 4]
    assert torch.equal(logits_of(again), logits_of(model)) and again.host_routing == model.host_routing
    again.set_active_experts(1)
    assert experts_in_force(model) == [1, 2, 4] == experts_of_config(model)


def test_ours_come_back_as_they_are():
    model = build("m_moe")
    assert type(wrap_moe(model)).__name__ == "MMoeForCausalLM" and wrap_moe(model) is model


@pytest.mark.parametrize("name", ["qwen3_moe", "m_moe"])
def test_a_peft_model_is_wrapped_inside(name, tmp_path):
    peft = get_peft_model(build(name), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert wrap_moe(peft) is peft
    peft.set_active_experts(1)
    assert experts_in_force(peft) == [1] * LAYERS and peft.config.num_experts_per_tok == 1
    with peft.active_experts([2, 1, 4]):
        assert experts_in_force(peft) == [2, 1, 4]
    ids = batch(length=4)["input_ids"]
    few = peft.generate(input_ids=ids, num_active_experts=1, max_new_tokens=4, do_sample=False)
    with active_experts(peft, 1):
        assert torch.equal(peft.generate(input_ids=ids, max_new_tokens=4, do_sample=False), few)
    peft.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", "m_moe"])
def test_adapters_on_routers_and_experts_train_with_the_balance_loss(name):
    lora = LoraConfig(
        target_modules=["q_proj"], target_parameters=["gate.weight", "experts.down_proj"], task_type="CAUSAL_LM"
    )
    peft = wrap_moe(get_peft_model(build(name), lora), aux_loss_coef=0.5).train()
    peft.set_active_experts([4, 1, 2])
    assert experts_in_force(peft) == [4, 1, 2] and len(parameters_per_expert(peft)) == LAYERS
    out = peft(**batch())
    with_balance = out.loss.item()
    out.loss.backward()
    learned = [n for n, p in peft.named_parameters() if p.grad is not None and "gate" in n and p.grad.abs().sum() > 0]
    assert len(learned) == LAYERS  # B starts at zero, so that only it has a gradient
    peft.eval()
    assert with_balance > peft(**batch()).loss.item()


def test_routers_kept_twice_by_an_adapter_are_refused_by_name():
    peft = get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    with pytest.raises(TypeError, match=r"layers.0.mlp.gate.original_module is kept twice by PEFT's modules_to_save"):
        routers_of(peft)


def test_a_dispatched_model_keeps_its_hooks_and_is_elastic(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    model = wrap_moe(dispatch_model(model, {"": "cpu"}, force_hooks=True), aux_loss_coef=0.1)
    plain = wrap_moe(MixtralForCausalLM.from_pretrained(tmp_path), aux_loss_coef=0.1)
    inputs = batch()
    for each in (model, plain):
        each.set_active_experts([1, 2, 4])
    assert "_old_forward" in vars(model)
    torch.testing.assert_close(model.train()(**inputs).loss, plain.train()(**inputs).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aux_loss_type": "top1"}, "aux_loss_type='top1' is not known"),
        ({"aux_scoring_func": "relu"}, "aux_scoring_func='relu' is not known"),
        ({"aux_k": "min"}, "aux_k='min' is not known"),
        ({"renorm_k1": "raw"}, "renorm_k1='raw' is not known"),
        ({"aux_loss_coef": -1.0}, "aux_loss_coef makes -1.0 for each layer, but must not be negative"),
    ],
)
def test_impossible_options_of_a_wrap_are_refused(options, message):
    model = build("mixtral")
    with pytest.raises(ValueError, match=message):
        wrap_moe(model, **options)
    assert type(model) is MixtralForCausalLM


def test_a_list_that_does_not_fit_is_refused_when_wrapping():
    model = build("mixtral")
    model.config.num_experts_per_tok_per_layer = [1, 2]
    with pytest.raises(ValueError, match="top_k has 2 entries for 3 layers"):
        wrap_moe(model)


# --- training a wrapped host -----------------------------------------------------------------------------------------


def balance_from_the_definition(logits, top_k, mask):
    """One layer: E sum_e f_e p_e over real tokens, f being shares of the choices."""
    real = logits[mask.flatten().bool()].double()
    f = F.one_hot(real.topk(top_k).indices, EXPERTS).sum((0, 1)) / (len(real) * top_k)
    return EXPERTS * (f * real.softmax(-1).mean(0)).sum()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
@pytest.mark.parametrize("ks", [[3, 3, 3], [4, 1, 2], [1, 1, 1]])
def test_the_loss_is_cross_entropy_plus_a_balance_of_each_layer_at_its_k(name, ks):
    coef, inputs = 0.3, batch(padding=True)
    model = wrap_moe(build(name, output_router_logits=True, router_aux_loss_coef=coef)).train()
    model.set_active_experts(ks)
    out = model(**inputs)
    cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    balances = [balance_from_the_definition(z, k, inputs["attention_mask"]) for z, k in zip(out.router_logits, ks)]
    torch.testing.assert_close(out.aux_loss.double(), sum(balances) / LAYERS, rtol=1e-5, atol=1e-6)
    # K is the number at the time of wrapping, whatever is in force now
    expected = cross_entropy + coef * TRAINED_K * sum(balances) / LAYERS
    torch.testing.assert_close(out.loss.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_host_that_is_not_wrapped_counts_its_own_loss_by_the_number_in_force(name):
    inputs, options = batch(), {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    model = build(name, **options)
    with active_experts(model, 2):
        within = model(**inputs).loss
    assert torch.equal(model(**inputs).loss, build(name, **options)(**inputs).loss)
    set_active_experts(model, 2)
    expected = build(name, **options, num_experts_per_tok=2)(**inputs).loss
    assert torch.equal(model(**inputs).loss, expected) and torch.equal(within, expected)


def test_at_balance_and_the_trained_k_the_weight_is_the_host_s_own():
    """Router weights of zero: p is uniform, and both losses are at their value of balance."""
    inputs, losses = batch(), {}
    for wrapped in (False, True):
        model = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.3).train()
        with torch.no_grad():
            for router in routers_of(model):
                router.weight.zero_()
        model = wrap_moe(model) if wrapped else model
        losses[wrapped] = model(**inputs).loss
    torch.testing.assert_close(losses[True], losses[False])


@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_the_balance_of_a_host_is_one_at_balance_for_every_k(k):
    model = wrap_moe(build("olmoe", output_router_logits=True)).train()
    with torch.no_grad():
        for router in routers_of(model):
            router.weight.zero_()
    model.set_active_experts(k)
    torch.testing.assert_close(model(**batch()).aux_loss, torch.tensor(1.0))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_hosts_without_a_balance_loss_get_one_on_request(name):
    inputs = batch()
    plain, model = build(name).train(), wrap_moe(build(name), aux_loss_coef=0.3).train()
    difference = model(**inputs).loss - plain(**inputs).loss
    with captured_routing(plain) as calls:
        plain(**inputs)
    balance = 0
    for (call,) in calls:
        f = F.one_hot(call.indices, EXPERTS).sum((0, 1)) / call.indices.numel()
        balance = balance + EXPERTS * (f * call.router_logits.softmax(-1).mean(0)).sum() / LAYERS
    torch.testing.assert_close(difference, 0.3 * TRAINED_K * balance, rtol=1e-4, atol=1e-5)


def test_balancing_at_the_largest_k_counts_what_would_be_chosen_there():
    inputs = batch()
    model = wrap_moe(build("qwen3_moe", output_router_logits=True), aux_k="max", aux_loss_coef=1.0).train()
    with pytest.raises(ValueError, match="aux_k='max' balances the choice at config.k_max, which is not set"):
        model(**inputs)
    model.config.k_max = 5
    model.set_active_experts(1)
    out = model(**inputs)
    balances = [balance_from_the_definition(z, 5, inputs["attention_mask"]) for z in out.router_logits]
    torch.testing.assert_close(out.aux_loss.double(), sum(balances) / LAYERS, rtol=1e-5, atol=1e-6)
    out.loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_wrapped_host_do_not_depend_on_accumulation(checkpointing):
    """One batch of two rows against two micro-batches that share `num_items_in_batch`, with the per-sequence loss,
    which does not depend on the cut."""
    inputs = batch(length=10)
    results = []
    for cut in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        model = wrap_moe(build("qwen3_moe"), aux_loss_coef=0.5, aux_loss_type="sequence").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for rows in cut:
            part = {key: value[rows] for key, value in inputs.items()}
            model(**part, num_items_in_batch=torch.tensor(18)).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_outputs_as_a_tuple_and_in_evaluation():
    model = wrap_moe(build("mixtral", output_router_logits=True, router_aux_loss_coef=0.3))
    inputs = batch()
    model.set_active_experts([1, 2, 4])
    out, as_tuple = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.loss) and len(as_tuple) == len(out.to_tuple())
    positional = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    assert torch.equal(positional.loss, out.loss)
    assert len(out.router_logits) == LAYERS
    tokens = model.generate(inputs["input_ids"], num_active_experts=[2, 1, 4], max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, greedy_without_cache(model, inputs["input_ids"], 3, [2, 1, 4]))
    quiet = model(**inputs, output_router_logits=False)
    assert quiet.router_logits is None and quiet.loss < out.loss


# --- one active expert -----------------------------------------------------------------------------------------------


def router_gradients(model):
    model.train()(**batch()).loss.backward()
    return [router.weight.grad for router in routers_of(model)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_with_one_expert_a_renormalising_host_gives_its_routers_no_gradient_unless_asked(name):
    model = wrap_moe(build(name))
    model.set_active_experts(1)
    without = router_gradients(model)  # p / p has the derivative zero up to rounding

    model = wrap_moe(build(name), renorm_k1="softmax_weight")
    model.set_active_experts(1)
    for none, some in zip(without, router_gradients(model)):
        assert some.abs().max() > 1e-4 and (none is None or none.abs().max() < 1e-5 * some.abs().max())
    with captured_routing(model) as calls:
        logits_of(model)
    for (call,) in calls:
        torch.testing.assert_close(call.weights, call.router_logits.softmax(-1).amax(-1, keepdim=True))
    model.set_active_experts(2)
    assert torch.equal(logits_of(model), logits_of(build(name, num_experts_per_tok=2)))


def test_the_weight_of_a_single_expert_is_remembered_and_can_be_taken_back(tmp_path):
    model = wrap_moe(build("mixtral"), renorm_k1="softmax_weight")
    model.set_active_experts(1)
    model.save_pretrained(tmp_path)
    again = wrap_moe(MixtralForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-5, atol=1e-5)
    wrap_moe(again, renorm_k1="host")
    torch.testing.assert_close(logits_of(again), logits_of(build("mixtral", num_experts_per_tok=1)))
    with pytest.raises(ValueError, match="DeepseekV3TopkRouter scores or scales in another way"):
        wrap_moe(build("deepseek_v3"), renorm_k1="softmax_weight")


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_with_one_expert_ours_weighs_by_one_or_by_the_raw_score_and_learns(scoring_func):
    unit = build("m_moe", scoring_func=scoring_func, router_aux_loss_type="none")
    unit.set_active_experts(1)
    assert all(gradient.abs().max() < 1e-6 for gradient in router_gradients(unit))  # rounding of p / p
    with captured_routing(unit) as calls:
        logits_of(unit)
    assert all((call.weights == 1).all() for (call,) in calls)
    model = build("m_moe", scoring_func=scoring_func, router_aux_loss_type="none", norm_top1_prob=False)
    model.set_active_experts(1)
    assert all(gradient.abs().sum() > 0 for gradient in router_gradients(model))
    with captured_routing(model) as calls:
        logits_of(model)
    for router, (call,) in zip(routers_of(model), calls):
        torch.testing.assert_close(call.weights, router.scores(call.router_logits).amax(-1, keepdim=True))
