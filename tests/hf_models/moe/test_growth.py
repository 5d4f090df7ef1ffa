# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Growth in memory: what keeps the function keeps it, noise is what it says, the grown model is a model."""

import dataclasses

import peft
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import AutoModelForCausalLM

from hf_models.moe import growth as growth_module
from hf_models.moe.elastic import routers_of, set_active_experts
from hf_models.moe.elastic_hosts import wrap_moe
from hf_models.moe.growth import GrowthPlan, grow_model, grow_optimizer_state
from hf_models.moe.growth_config import what_changes_the_function
from hf_models.moe.growth_tensors import TensorGrowth, grow_state_dict, layer_tensor
from tests.hf_models.moe.growth_hosts import EXPERTS, HOSTS, TOKENS, host, host_config, logits_of


EXACT_WIDTH = GrowthPlan(width_factor=2, noise_alpha=0.0)
IDENTITY_DEPTH = GrowthPlan(depth_factor=2, depth_copy_init="zero_output")


def plan(**fields) -> GrowthPlan:
    return GrowthPlan(**fields)


def assert_same_function(grown, model):
    torch.testing.assert_close(logits_of(grown), logits_of(model), rtol=0, atol=1e-5)


# --- the function


@pytest.mark.parametrize("order", ["append", "interleave"])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", HOSTS)
def test_width_without_noise_keeps_the_logits(name, factor, order):
    if name == "deepseek_v2-groups":
        order = "interleave"
    model = host(name)
    assert_same_function(grow_model(model, plan(width_factor=factor, noise_alpha=0.0, expert_order=order)), model)


def test_a_bias_on_softmax_scores_shrinks_with_them():
    model = host("sigma_moe-softmax", expert_bias_update_rate=0.01, expert_bias_cap=0.5)
    grown = grow_model(model, plan(width_factor=2, noise_alpha=0.0))
    biases = [m.model.layers[0].mlp.gate.e_score_correction_bias for m in (model, grown)]
    assert torch.equal(biases[1], torch.cat([biases[0] / 2] * 2))
    assert (grown.config.expert_bias_update_rate, grown.config.expert_bias_cap) == (0.005, 0.25)


@pytest.mark.parametrize("method", ["interposition", "stack"])
@pytest.mark.parametrize("name", HOSTS)
def test_depth_with_zeroed_output_is_an_identity(name, method):
    model = host(name)
    keep_first = 1 if method == "stack" and name.startswith("deepseek") else 0
    grown = grow_model(model, dataclasses.replace(IDENTITY_DEPTH, depth_method=method, keep_first=keep_first))
    assert grown.config.num_hidden_layers == 6 - keep_first
    assert_same_function(grown, model)


def test_a_zeroed_output_includes_biases_and_noisy_experts():
    model = host("sigma_moe", attention_bias=True)
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.bias)
    grown = grow_model(model, dataclasses.replace(IDENTITY_DEPTH, width_factor=2, noise_alpha=0.0))
    assert_same_function(grown, model)
    noisy = grow_model(model, dataclasses.replace(IDENTITY_DEPTH, width_factor=2))
    assert not noisy.model.layers[1].mlp.experts.down_proj.any()
    assert noisy.model.layers[0].mlp.experts.down_proj.all()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("olmoe", {"topk_policy": "keep"}),
        ("olmoe", {"router_init": "random"}),
        ("sigma_moe-plain", {"router_scale_fix": "none"}),
        ("sigma_moe-top1", {"router_scale_fix": "none"}),
    ],
)
def test_what_does_not_keep_the_logits_warns(name, changed, monkeypatch):
    warnings = []
    monkeypatch.setattr(growth_module.logger, "warning", warnings.append)
    model = host(name)
    grown = grow_model(model, dataclasses.replace(EXACT_WIDTH, **changed))
    assert (logits_of(grown) - logits_of(model)).abs().max() > 1e-2
    assert len(warnings) == 1 and f"{[*changed][0]}=" in warnings[0]


def test_the_recipe_itself_does_not_warn(monkeypatch):
    warnings = []
    monkeypatch.setattr(growth_module.logger, "warning", warnings.append)
    model = host("olmoe")
    grown = grow_model(model, plan(depth_factor=2, width_factor=2))
    assert not warnings
    assert (logits_of(grown) - logits_of(model)).abs().max() > 1e-2  # layers act twice


def test_groups_chosen_by_their_two_best_experts_drift_and_warn(monkeypatch):
    warnings = []
    monkeypatch.setattr(growth_module.logger, "warning", warnings.append)
    model = host("deepseek_v3", topk_group=1)
    grown = grow_model(model, dataclasses.replace(EXACT_WIDTH, expert_order="interleave"))
    assert (logits_of(grown) - logits_of(model)).abs().max() > 1e-2
    assert len(warnings) == 1 and "topk_group=1 of n_group=3" in warnings[0]


def test_small_noise_is_a_small_change():
    model = host("qwen3_moe", decoder_sparse_step=1)
    drift = [
        ((logits_of(grow_model(model, plan(width_factor=2, noise_alpha=alpha))) - logits_of(model)).norm()).item()
        for alpha in (0.0, 0.01, 0.1)
    ]
    assert drift[0] < 1e-4 < drift[1] < drift[2]


# --- the model


@pytest.mark.parametrize("name", HOSTS)
def test_grown_models_generate_with_a_cache_as_without(name):
    grown = grow_model(host(name), plan(depth_factor=2, width_factor=2, expert_order="interleave"))
    indices = [layer.self_attn.layer_idx for layer in grown.model.layers]
    assert indices == list(range(6))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache = grown.generate(TOKENS, **options)
    assert with_cache.shape == (2, 16)
    assert torch.equal(with_cache, grown.generate(TOKENS, use_cache=False, **options))
    whole = logits_of(grown)
    with torch.no_grad():
        first = grown(TOKENS[:, :5], use_cache=True)
        rest = grown(TOKENS[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 5:], rtol=0, atol=1e-5)


def test_sliding_layers_slide_in_the_grown_model():
    model = host("qwen2_moe", use_sliding_window=True, sliding_window=3, max_window_layers=2, num_hidden_layers=4)
    grown = grow_model(model, IDENTITY_DEPTH)
    assert_same_function(grown, model)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in grown.model.layers]
    assert windows == [3, 3, None, None, None, None, None, None]


def test_the_source_is_left_alone_and_nothing_is_shared():
    model = host("mixtral").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    grown = grow_model(model, plan(depth_factor=2, width_factor=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert grown.training and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pointers = [tensor.untyped_storage().data_ptr() for m in (model, grown) for tensor in m.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert all(parameter.requires_grad for parameter in grown.parameters())


def test_tied_embeddings_stay_tied():
    grown = grow_model(host("sigma_moe", tie_word_embeddings=True), plan(depth_factor=2, width_factor=2))
    assert grown.lm_head.weight is grown.model.embed_tokens.weight


def test_low_precision_and_options_of_the_model_are_kept():
    model = AutoModelForCausalLM.from_config(
        host_config("sigma_moe"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    model.generation_config.max_new_tokens = 7
    grown = grow_model(model, plan(width_factor=2))
    assert grown.dtype == torch.bfloat16 and grown.config._attn_implementation == "eager"
    assert grown.model.layers[0].mlp.gate.weight.dtype == model.model.layers[0].mlp.gate.weight.dtype
    assert grown.generation_config.max_new_tokens == 7
    copied = grown.model.layers[0].mlp.experts.down_proj[EXPERTS:]
    original = model.model.layers[0].mlp.experts.down_proj
    assert (copied != original).float().mean() > 0.5  # a percent survives rounding to 8 bits


def test_adapters_are_refused():
    model = host("sigma_moe")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for active in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="has adapters.*merge_and_unload"):
            grow_model(active, EXACT_WIDTH)
    assert grow_model(adapted.merge_and_unload(), EXACT_WIDTH).config.num_experts == 12


def test_a_dial_that_growth_would_lose_is_refused():
    model = host("qwen3_moe")
    set_active_experts(model, [1] + [2] * (len(routers_of(model)) - 1))
    with pytest.raises(ValueError, match="which its own config cannot"):
        grow_model(model, EXACT_WIDTH)
    set_active_experts(model, 2)
    assert grow_model(model, EXACT_WIDTH).config.num_experts_per_tok == 4
    with pytest.raises(ValueError, match="wrapped by wrap_moe"):
        grow_model(wrap_moe(model), EXACT_WIDTH)


def test_drawn_numbers_that_cross_one_expert_are_reported():
    model = host("m_moe")
    model.config.k_min, model.config.k_max, model.config.k_sampling = 1, 3, "layer"
    assert model.config.norm_topk_prob and model.config.norm_top1_prob
    assert not any("k_min" in reason for reason in what_changes_the_function(model.config, EXACT_WIDTH))
    model.config.norm_top1_prob = False
    assert any("k_min=1" in reason for reason in what_changes_the_function(model.config, EXACT_WIDTH))
    model.config.k_min = 2
    assert not any("k_min" in reason for reason in what_changes_the_function(model.config, EXACT_WIDTH))


def test_models_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(host_config("olmoe"))
    with pytest.raises(ValueError, match=r"on \['meta'\].*Load it on one device"):
        grow_model(model, EXACT_WIDTH)


# --- tensors


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "sigma_moe"])
def test_depth_and_width_commute(name):
    model = host(name)
    depth, both = plan(depth_factor=2), plan(depth_factor=2, width_factor=2, noise_alpha=0.0)
    results = [
        grow_model(grow_model(model, depth), EXACT_WIDTH),
        grow_model(grow_model(model, EXACT_WIDTH), depth),
        grow_model(model, both),
    ]
    for other in results[1:]:
        assert other.config.to_dict() == results[0].config.to_dict()
        for key, tensor in results[0].state_dict().items():
            assert torch.equal(tensor, other.state_dict()[key]), key


@pytest.mark.parametrize("order", ["append", "interleave"])
def test_noise_is_what_the_plan_says_and_originals_are_untouched(order):
    model = host("deepseek_v3", hidden_size=64, moe_intermediate_size=48, num_attention_heads=4)
    growth = TensorGrowth(model.config, plan(width_factor=3, noise_alpha=0.05, expert_order=order))
    source = model.state_dict()
    # Gate and up of different size: one sigma for both would show.
    source["model.layers.1.mlp.experts.gate_up_proj"][:, 48:] *= 20
    grown = grow_state_dict(source, growth)
    index = {member: i for i, member in enumerate(growth.members)}
    assert set(index) == {(e, c) for e in range(EXPERTS) for c in range(3)}
    for leaf, rows in (("gate_up_proj", slice(0, 48)), ("gate_up_proj", slice(48, 96)), ("down_proj", slice(None))):
        name = f"model.layers.1.mlp.experts.{leaf}"
        for expert in range(EXPERTS):
            original = source[name][expert, rows]
            assert torch.equal(grown[name][index[expert, 0], rows], original)
            noises = [grown[name][index[expert, c], rows] - original for c in (1, 2)]
            for noise in noises:
                assert noise.std() == pytest.approx(0.05 * original.std().item(), rel=0.05)
                assert abs(noise.mean()) < 0.05 * noise.std() * 4
            assert abs(torch.corrcoef(torch.stack([noises[0].flatten(), noises[1].flatten()]))[0, 1]) < 0.1
    router = "model.layers.1.mlp.gate.weight"
    rows = torch.stack([grown[router][index[e, c]] - source[router][e] for e in range(EXPERTS) for c in (1, 2)])
    assert rows.std() == pytest.approx(0.05 * source[router].std().item(), rel=0.1)  # 768 draws
    assert all(torch.equal(grown[router][index[e, 0]], source[router][e]) for e in range(EXPERTS))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert all(grown[bias][i] == source[bias][expert] for (expert, _), i in index.items())
    others = [name for name in source if layer_tensor(name) is None or layer_tensor(name).kind in ("dense", "other")]
    assert others and all(torch.equal(grown[name], source[name]) for name in others)


def test_orders_of_experts_are_permutations_of_each_other():
    model = host("mixtral")
    growths = [TensorGrowth(model.config, plan(width_factor=2, expert_order=o)) for o in ("append", "interleave")]
    permutation = [growths[1].members.index(member) for member in growths[0].members]
    append, interleave = (grow_state_dict(model.state_dict(), growth) for growth in growths)
    for name, tensor in append.items():
        kind = getattr(layer_tensor(name), "kind", None)
        other = interleave[name][permutation] if kind in ("fused", "router") else interleave[name]
        assert torch.equal(tensor, other), name


def test_noise_is_a_function_of_the_seed_and_targets_are_chosen():
    model = host("olmoe")

    def grown(**fields):
        return grow_model(model, plan(depth_factor=2, width_factor=2, **fields)).model.layers

    first, again, other = grown(seed=1), grown(seed=1), grown(seed=2)
    for block in ("experts.down_proj", "gate.weight"):
        values = [layers[0].mlp.get_parameter(block) for layers in (first, again, other)]
        assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
        assert not torch.equal(values[0], first[1].mlp.get_parameter(block))  # the next layer, another draw
    only_router = grown(noise_targets=("router",))[0].mlp
    assert torch.equal(only_router.experts.down_proj[:EXPERTS], only_router.experts.down_proj[EXPERTS:])
    assert not torch.equal(only_router.gate.weight[:EXPERTS], only_router.gate.weight[EXPERTS:])
    only_experts = grown(noise_targets=("experts",))[0].mlp
    assert torch.equal(only_experts.gate.weight[:EXPERTS], only_experts.gate.weight[EXPERTS:])


def test_a_random_router_has_the_published_spread_and_no_bias_for_copies():
    model = host("deepseek_v3", hidden_size=256)
    gate = grow_model(model, plan(width_factor=4, router_init="random")).model.layers[1].mlp.gate
    source = model.model.layers[1].mlp.gate
    assert torch.equal(gate.weight[:EXPERTS], source.weight)
    assert gate.weight.detach()[EXPERTS:].std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(gate.e_score_correction_bias[:EXPERTS], source.e_score_correction_bias)
    assert not gate.e_score_correction_bias[EXPERTS:].any()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lm_head.weight", None),
        ("model.layers.3.mlp.experts.12.up_proj.weight", (3, "expert", ("up",), 12)),
        ("layers.0.block_sparse_moe.experts.0.w2.weight", (0, "expert", ("down",), 0)),
        ("model.layers.3.mlp.experts.gate_up_proj", (3, "fused", ("gate", "up"), None)),
        ("model.layers.3.mlp.gate.weight", (3, "router", (), None)),
        ("model.layers.3.block_sparse_moe.gate.weight", (3, "router", (), None)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (3, "router_bias", (), None)),
        ("model.layers.3.mlp.gate_proj.weight", (3, "dense", ("gate",), None)),
        ("model.layers.3.mlp.shared_expert_gate.weight", (3, "other", (), None)),
        ("model.layers.3.mlp.shared_experts.down_proj.weight", (3, "other", (), None)),
    ],
)
def test_names_of_tensors(name, parts):
    found = layer_tensor(name)
    assert parts is None and found is None or (found.layer, found.kind, found.projections, found.expert) == parts
    assert found is None or found.name(found.layer, found.expert) == name


@pytest.mark.parametrize("leaf", ["gate_up_proj_bias", "3.linear_fc1.weight", "3.up_proj.weight_scale_inv"])
def test_unknown_layouts_of_experts_are_refused_with_the_known_ones(leaf):
    with pytest.raises(ValueError, match=r"no layout that growth knows.*gate_up_proj.*w1\|w2\|w3"):
        layer_tensor(f"model.layers.0.mlp.experts.{leaf}")


# --- gradients and optimizer state


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_copies_learn_apart_only_with_noise(alpha):
    model = grow_model(host("qwen3_moe", decoder_sparse_step=1), plan(width_factor=2, noise_alpha=alpha)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        gradients_of(model)
        optimizer.step()
    grad = gradients_of(model)["model.layers.0.mlp.experts.gate_up_proj"]
    original, copied = grad[:EXPERTS], grad[EXPERTS:]
    difference = ((original - copied).norm() / original.norm()).item()
    assert difference < 1e-3 if alpha == 0 else difference > 1e-2


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "deepseek_v3", "sigma_moe-plain"])
@pytest.mark.parametrize("factor", [2, 3])
def test_scaled_optimizer_state_is_that_of_the_grown_model(name, factor):
    # AdamW's statistics of the first step are multiples of the gradient and of its square.
    model = host(name, **({"router_aux_loss_coef": 0.0} if name.startswith("sigma") else {})).eval()
    growth_plan = plan(width_factor=factor, noise_alpha=0.0)
    grown = grow_model(model, growth_plan)
    state = {
        key: {"step": torch.tensor(5.0), "exp_avg": 0.1 * grad, "exp_avg_sq": 0.001 * grad**2}
        for key, grad in gradients_of(model).items()
    }
    scaled = grow_optimizer_state(state, growth_plan, config=model.config, policy="scale")
    gradients = gradients_of(grown)
    assert scaled.keys() == gradients.keys()
    for key, grad in gradients.items():
        assert scaled[key]["step"] == 5
        torch.testing.assert_close(scaled[key]["exp_avg"], 0.1 * grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(scaled[key]["exp_avg_sq"], 0.001 * grad**2, rtol=1e-3, atol=1e-9)


def test_optimizer_state_policies():
    model = host("qwen3_moe")
    both = plan(depth_factor=2, width_factor=2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    gradients_of(model)
    optimizer.step()
    whole = get_optimizer_state_dict(model, optimizer)
    state = whole["state"]
    grown = grow_model(model, both)
    assert grow_optimizer_state(state, both, config=model.config) == {}
    copied = grow_optimizer_state(state, both, config=model.config, policy="copy")
    assert copied.keys() == dict(grown.named_parameters()).keys()
    name = "model.layers.2.mlp.experts.down_proj"
    source = state["model.layers.1.mlp.experts.down_proj"]
    for statistic in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(copied[name][statistic], torch.cat([source[statistic]] * 2))
    # A new optimizer goes on from it.
    continued = torch.optim.AdamW(grown.parameters(), amsgrad=True)
    groups = [whole["param_groups"][0] | {"params": list(copied)}]
    set_optimizer_state_dict(grown, continued, {"state": copied, "param_groups": groups})
    gradients_of(grown)
    continued.step()
    assert continued.state[grown.lm_head.weight]["step"] == 2
    assert optimizer.state[model.lm_head.weight]["step"] == 1


def test_copies_of_layers_without_output_start_afresh():
    model = host("olmoe")
    zeroed = dataclasses.replace(IDENTITY_DEPTH, width_factor=2)
    state = {n: {"step": 1, "exp_avg": p.detach(), "exp_avg_sq": p.detach() ** 2} for n, p in model.named_parameters()}
    grown = grow_optimizer_state(state, zeroed, config=model.config, policy="scale")
    assert {found.layer for name in grown if (found := layer_tensor(name))} == {0, 2, 4}


@pytest.mark.parametrize(
    ("fields", "policy", "message"),
    [
        ({}, "halve", "policy='halve' is not known"),
        ({"topk_policy": "keep"}, "scale", "policy='scale' with topk_policy='keep'"),
        ({"router_init": "random"}, "scale", "router_init='random'"),
        ({}, "copy", r"lm_head.weight has \['momentum_buffer'\]"),
    ],
)
def test_optimizer_states_that_cannot_grow_are_refused(fields, policy, message):
    state = {"lm_head.weight": {"step": 1, "momentum_buffer": torch.zeros(1)}}
    with pytest.raises(ValueError, match=message):
        grow_optimizer_state(state, plan(width_factor=2, **fields), config=host_config("olmoe"), policy=policy)


def test_statistics_of_another_shape_are_refused():
    name = "model.layers.0.mlp.experts.down_proj"
    state = {name: {"step": 1, "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)}}
    with pytest.raises(ValueError, match=r"has shape \(5,\); the first dimension must be the 6 experts"):
        grow_optimizer_state(state, EXACT_WIDTH, config=host_config("olmoe"), policy="copy")
