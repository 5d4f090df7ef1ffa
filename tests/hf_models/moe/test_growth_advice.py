# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""The norm profile, and the rules of thumb with the numbers that were published for them."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from hf_models.moe.growth import GrowthPlan, grow_model
from hf_models.moe.growth_advice import LayerNorm, advise, chinchilla_flops, g_stack_tokens, norm_profile, recommend
from tests.hf_models.moe.growth_hosts import host


def profile_of(norms: list[float]) -> list[LayerNorm]:
    return [LayerNorm(layer, "experts", norm, norm, norm) for layer, norm in enumerate(norms)]


def test_the_norm_is_the_mean_over_projections_then_experts():
    model = host("deepseek_v3")
    experts = model.model.layers[1].mlp.experts
    norms = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj):
        matrices = [*gate_up.chunk(2), down]
        norms.append(sum(m.norm().item() / m.numel() ** 0.5 for m in matrices) / 3)
    dense, *with_experts = norm_profile(model)
    assert (dense.layer, dense.kind) == (0, "dense")
    mlp = model.model.layers[0].mlp
    by_hand = [m.weight.norm().item() / m.weight.numel() ** 0.5 for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    assert [dense.gate, dense.up, dense.down] == pytest.approx(by_hand)
    assert [(row.layer, row.kind) for row in with_experts] == [(1, "experts"), (2, "experts")]
    assert with_experts[0].norm == pytest.approx(sum(norms) / len(norms))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_profile_of_files_is_that_of_the_model(tmp_path, name, fused):
    model = host(name)
    model.save_pretrained(tmp_path, save_original_format=not fused)
    assert norm_profile(tmp_path) == norm_profile(model)


def test_interposition_keeps_neighbours_alike():
    model = host("olmoe", num_hidden_layers=8)
    for layer, block in enumerate(model.model.layers):
        with torch.no_grad():
            block.mlp.experts.gate_up_proj.mul_(1 + 0.1 * layer)
            block.mlp.experts.down_proj.mul_(1 + 0.1 * layer)
    largest = {}
    for method in ("interposition", "stack"):
        norms = [row.norm for row in norm_profile(grow_model(model, GrowthPlan(depth_factor=2, depth_method=method)))]
        largest[method] = max(abs(b - a) for a, b in zip(norms, norms[1:]))
    assert largest["stack"] > 4 * largest["interposition"]
    assert recommend(norm_profile(model)).depth_method == "interposition"


def test_profiles_need_weights_that_are_known():
    with pytest.raises(ValueError, match="no feed-forward weight"):
        norm_profile(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)))


def test_recommendations():
    # The published profile of the 3B base model, layers 0, 10 and 19, interpolated: "about 10 times".
    rising = profile_of([0.0323 + 0.0033 * layer / 19 for layer in range(20)])
    told = recommend(rising)
    assert told.depth_method == "interposition" and told.seam_ratio == pytest.approx(19)
    flat = profile_of([0.02, 0.0201, 0.02, 0.0201, 0.02])
    assert recommend(flat).depth_method == "either"
    assert recommend(profile_of([1.0, 1.0])).seam_ratio == 0
    early = recommend(rising, sunk_flops=1e19, active_parameters=0.7e9)
    assert early.depth_method == "either" and "below 1" in early.reasons[1]
    late = recommend(flat, sunk_flops=1.6e21, active_parameters=0.7e9)
    assert late.depth_method == "interposition" and "beyond 1" in late.reasons[1]
    with pytest.raises(ValueError, match="1 layers with experts"):
        recommend(profile_of([1.0]))


def test_published_budgets():
    assert chinchilla_flops(0.7e9) == pytest.approx(5.9e19, rel=0.01)
    assert chinchilla_flops(2.1e9) == pytest.approx(5.3e20, rel=0.01)
    with pytest.raises(ValueError, match="active_parameters=0 must be positive"):
        chinchilla_flops(0)


def test_the_formula_of_g_stack():
    # log10 d = 0.88 * 9 + 163.27 / 22 - 5.74
    assert g_stack_tokens(1e9, 1e22) == pytest.approx(10 ** (7.92 + 163.27 / 22 - 5.74))
    with pytest.raises(ValueError, match="flops=1"):
        g_stack_tokens(1e9, 1)


def test_advice():
    good = advise(1.6e21, 1.6e21, 0.7e9)
    assert all(rule.follows for rule in good) and all("authors" in rule.source for rule in good)
    bad = advise(1e19, 1e18, 0.7e9, annealed=True, noise_alpha=0.5)
    assert [rule.follows for rule in bad] == [False, False, False, False, True]
    assert "0.1 of it" in bad[0].text
    assert advise(0, 1.0, 1.0)[0].follows
    with pytest.raises(ValueError, match="extra_flops=0 positive"):
        advise(1.0, 0, 1.0)
