# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""The plan, the order of layers and the grown configurations: goldens, properties, refusals."""

from itertools import groupby

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import Qwen3MoeConfig

from hf_models.moe import growth_config
from hf_models.moe.growth import GrowthPlan, grow_config, layer_order
from hf_models.moe.growth_config import expert_layers, what_changes_the_function
from tests.hf_models.moe.growth_hosts import HOSTS, host_config


DEPTH = GrowthPlan(depth_factor=2)
WIDTH = GrowthPlan(width_factor=2, expert_order="interleave")
BOTH = GrowthPlan(depth_factor=2, width_factor=3, expert_order="interleave")


# --- the order of layers


@pytest.mark.parametrize(
    ("layers", "fields", "order"),
    [
        (3, {}, [0, 0, 1, 1, 2, 2]),
        (3, {"depth_method": "stack"}, [0, 1, 2, 0, 1, 2]),
        (2, {"depth_factor": 4}, [0, 0, 0, 0, 1, 1, 1, 1]),
        (2, {"depth_factor": 4, "depth_method": "stack"}, [0, 1] * 4),
        (4, {"keep_first": 1, "keep_last": 2}, [0, 1, 1, 2, 3]),
        (4, {"keep_first": 1, "keep_last": 1, "depth_method": "stack"}, [0, 1, 2, 1, 2, 3]),
        (4, {"keep_first": 1, "depth_factor": 3, "depth_method": "stack"}, [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]),
        (3, {"depth_factor": 1, "depth_method": "stack", "keep_last": 2}, [0, 1, 2]),
    ],
)
def test_layer_order_goldens(layers, fields, order):
    assert layer_order(layers, GrowthPlan(**{"depth_factor": 2, **fields})) == order


def test_layer_order_gives_the_depths_that_were_published():
    assert len(layer_order(20, DEPTH)) == 40
    assert len(layer_order(20, GrowthPlan(depth_factor=2, keep_first=2, keep_last=2))) == 36
    assert len(layer_order(28, DEPTH)) == 56
    assert len(layer_order(20, GrowthPlan(depth_factor=4))) == 80


@given(
    n=st.integers(1, 12),
    g=st.integers(1, 5),
    a=st.integers(0, 6),
    b=st.integers(0, 6),
    method=st.sampled_from(["interposition", "stack"]),
)
def test_layer_order_invariants(n, g, a, b, method):
    assume(a + b < n)
    order = layer_order(n, GrowthPlan(depth_factor=g, depth_method=method, keep_first=a, keep_last=b))
    assert set(order) == set(range(n))
    firsts = [order.index(source) for source in range(n)]
    assert firsts == sorted(firsts)  # with copies that add nothing, what is left is the source
    assert order[:a] == list(range(a)) and all(order.count(source) == 1 for source in range(a))
    if g == 1:
        assert order == list(range(n))
    elif method == "interposition":
        assert order == sorted(order)
        assert len(order) == n + (g - 1) * (n - a - b)
        assert all(order.count(s) == (g if a <= s < n - b else 1) for s in range(n))
    else:
        assert len(order) == (n - b) + (g - 1) * (n - a)
        assert order[: n - b] == list(range(n - b)) and order[n - b :] == list(range(a, n)) * (g - 1)


@given(n=st.integers(1, 10))
def test_interposition_by_four_is_by_two_twice(n):
    twice = [layer_order(n, DEPTH)[i] for i in layer_order(2 * n, DEPTH)]
    assert twice == layer_order(n, GrowthPlan(depth_factor=4))


def test_edges_that_leave_nothing_to_repeat_are_refused():
    with pytest.raises(ValueError, match="keep_first=2 and keep_last=2 leave none of 4 layers.*Keep fewer"):
        layer_order(4, GrowthPlan(depth_factor=2, keep_first=2, keep_last=2))
    with pytest.raises(ValueError, match="num_layers=0"):
        layer_order(0, DEPTH)


# --- the plan


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth_factor": 0}, "depth_factor=0 is not an integer >= 1"),
        ({"width_factor": 1.5}, "width_factor=1.5 is not an integer >= 1"),
        ({"depth_factor": True}, "depth_factor=True"),
        ({"keep_last": -1}, "keep_last=-1 is not an integer >= 0"),
        ({"depth_method": "interpose"}, "depth_method='interpose' is not known. Choose one of .*'stack'"),
        ({"depth_copy_init": "zero"}, "depth_copy_init='zero'"),
        ({"topk_policy": "double"}, "topk_policy='double'"),
        ({"expert_order": "random"}, "expert_order='random'"),
        ({"router_init": "zeros"}, "router_init='zeros'"),
        ({"router_scale_fix": "half"}, "router_scale_fix='half'"),
        ({"noise_alpha": -0.1}, "noise_alpha=-0.1 must be a finite number >= 0"),
        ({"noise_alpha": float("nan")}, "noise_alpha=nan"),
        ({"noise_alpha": "much"}, "noise_alpha='much'"),
        ({"noise_targets": "experts"}, "noise_targets='experts' must be a tuple"),
        ({"noise_targets": ("attention",)}, "noise_targets="),
        ({"seed": 0.5}, "seed=0.5 is not an integer"),
    ],
)
def test_plans_refuse_bad_values_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        GrowthPlan(**fields)


# --- configurations


@pytest.mark.parametrize("name", HOSTS)
def test_every_family_grows_in_experts_experts_per_token_and_layers(name):
    config = host_config(name)
    before = config.to_dict()
    grown = grow_config(config, BOTH)
    assert config.to_dict() == before
    assert type(grown) is type(config)
    assert growth_config.number_of_experts(grown) == 18
    assert grown.num_experts_per_tok == 3 * config.num_experts_per_tok
    assert grown.num_hidden_layers == 6
    assert expert_layers(grown) == [has for has in expert_layers(config) for _ in range(2)]
    assert grow_config(config, GrowthPlan()).to_dict() == before


def test_a_dict_gives_a_dict_under_any_spelling():
    raw = {"model_type": "sigma_moe", "n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    grown = grow_config(raw, WIDTH)
    assert isinstance(grown, dict) and grown["num_experts"] == 16 and grown["num_experts_per_tok"] == 4
    both = host_config("olmoe").to_dict() | {"num_local_experts": 6}
    assert {grow_config(both, WIDTH).get(k, 12) for k in ("num_experts", "num_local_experts")} == {12}


def test_lists_that_go_with_layers_are_repeated_with_them():
    config = host_config(
        "sigma_moe", num_experts_per_tok_per_layer=[3, 2, 2], neuron_ratio=[0.5, 0.25, 1.0], k_min=2, k_max=3
    )
    grown = grow_config(config, BOTH)
    assert grown.num_experts_per_tok_per_layer == [9, 9, 6, 6, 6, 6]
    assert grown.num_experts_per_tok == 9
    assert grown.neuron_ratio == [0.5, 0.5, 0.25, 0.25, 1.0, 1.0]
    assert (grown.k_min, grown.k_max) == (6, 9)
    kept = grow_config(config, GrowthPlan(width_factor=2, topk_policy="keep"))
    assert kept.num_experts_per_tok_per_layer == [3, 2, 2] and (kept.k_min, kept.k_max) == (2, 3)
    by_count = grow_config(host_config("sigma_moe", neuron_top_k=[8, 4, 2]), GrowthPlan(depth_factor=2, keep_first=1))
    assert by_count.neuron_top_k == [8, 4, 4, 2, 2]
    assert grow_config(host_config("sigma_moe", neuron_top_k=4), DEPTH).neuron_top_k == 4


def test_a_draw_of_experts_per_token_from_one_becomes_a_draw_from_the_factor():
    assert grow_config(host_config("sigma_moe", k_sampling="layer"), WIDTH).k_min == 2
    assert grow_config(host_config("sigma_moe"), WIDTH).k_min is None
    matryoshka = grow_config(host_config("m_moe", k_budget=1.2), WIDTH)
    assert (matryoshka.k_min, matryoshka.k_max, matryoshka.k_budget) == (2, 8, 1.2)


def test_sliding_layers_stay_sliding():
    config = host_config("qwen2_moe", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    grown = grow_config(config, DEPTH)
    assert [kind for kind, _ in groupby(grown.layer_types)] == ["sliding_attention", "full_attention"]
    assert grown.layer_types.count("sliding_attention") == 2
    assert grown.max_window_layers == 4
    assert grow_config(host_config("qwen2_moe"), DEPTH).max_window_layers == 28 + 3


def test_dense_layers_are_where_their_originals_were():
    qwen = grow_config(host_config("qwen3_moe"), DEPTH)  # step 2: layers 0 and 2 are dense
    assert (qwen.decoder_sparse_step, qwen.mlp_only_layers) == (1, [0, 1, 4, 5])
    kept = grow_config(host_config("qwen3_moe"), WIDTH)
    assert (kept.decoder_sparse_step, kept.mlp_only_layers) == (2, [])
    assert grow_config(host_config("deepseek_v3"), DEPTH).first_k_dense_replace == 2
    edge = GrowthPlan(depth_factor=3, keep_first=1)
    assert grow_config(host_config("deepseek_v3"), edge).first_k_dense_replace == 1
    stack = GrowthPlan(depth_factor=2, depth_method="stack", keep_first=1)
    assert grow_config(host_config("deepseek_v2"), stack).first_k_dense_replace == 1
    with pytest.raises(ValueError, match="first_k_dense_replace=1 dense layers.*keep_first=1"):
        grow_config(host_config("deepseek_v2"), GrowthPlan(depth_factor=2, depth_method="stack"))


def test_moe_layer_freq():
    listed = grow_config(host_config("deepseek_v3", moe_layer_freq=[0, 1, 1]), DEPTH)
    assert listed.moe_layer_freq == [0, 0, 1, 1, 1, 1]
    assert grow_config(host_config("deepseek_v3", moe_layer_freq=1), DEPTH).moe_layer_freq == 1
    with pytest.raises(ValueError, match="moe_layer_freq=2"):
        grow_config(host_config("deepseek_v3", moe_layer_freq=2), DEPTH)
    with pytest.raises(ValueError, match="moe_layer_freq has 2 entries for 3 layers"):
        grow_config(host_config("deepseek_v3", moe_layer_freq=[0, 1]), DEPTH)


def test_lists_of_unknown_meaning_are_kept_with_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(growth_config.logger, "warning", warnings.append)
    config = host_config("qwen3_moe", per_layer_secret=[1, 2, 3], eos_token_id=[1, 2, 3])
    assert grow_config(config, DEPTH).per_layer_secret == [1, 2, 3]
    assert len(warnings) == 1 and warnings[0].startswith("per_layer_secret has as many entries")


def test_the_scale_of_the_router_is_fixed_only_where_it_changes():
    assert grow_config(host_config("deepseek_v3-plain"), BOTH).routed_scaling_factor == pytest.approx(2.5 / 3)
    assert grow_config(host_config("deepseek_v3"), BOTH).routed_scaling_factor == 2.5
    assert grow_config(host_config("deepseek_v2", norm_topk_prob=False), BOTH).routed_scaling_factor == 1.0
    assert grow_config(host_config("sigma_moe-plain"), WIDTH).routed_scaling_factor == 0.5
    assert grow_config(host_config("sigma_moe-softmax"), WIDTH).routed_scaling_factor == 1.0
    top1 = grow_config(host_config("sigma_moe-top1"), WIDTH)
    assert (top1.norm_topk_prob, top1.routed_scaling_factor) == (False, 0.5)
    top1 = grow_config(host_config("sigma_moe-top1", scoring_func="softmax"), WIDTH)
    assert (top1.norm_topk_prob, top1.routed_scaling_factor) == (False, 1.0)
    for changed in ({"topk_policy": "keep"}, {"router_scale_fix": "none"}):
        plan = GrowthPlan(width_factor=2, **changed)
        assert grow_config(host_config("sigma_moe-plain"), plan).routed_scaling_factor == 1.0
        assert grow_config(host_config("sigma_moe-top1"), plan).norm_topk_prob is True


def test_one_expert_of_weight_one_grows_without_a_fix():
    mixed = {"num_experts_per_tok_per_layer": [2, 1, 1], "norm_top1_prob": True}
    for config in (host_config("sigma_moe-top1", norm_top1_prob=True), host_config("sigma_moe", **mixed)):
        grown = grow_config(config, WIDTH)
        assert (grown.norm_topk_prob, grown.norm_top1_prob, grown.routed_scaling_factor) == (True, True, 1.0)
        exact = GrowthPlan(width_factor=2, noise_alpha=0.0)
        assert what_changes_the_function(config, exact) == []


def test_layers_with_one_expert_among_others_that_renormalise_are_refused():
    config = host_config("sigma_moe", num_experts_per_tok_per_layer=[2, 1, 1])
    with pytest.raises(ValueError, match=r"\[2, 1, 1\] with norm_topk_prob=True.*router_scale_fix='none'"):
        grow_config(config, WIDTH)
    anyway = GrowthPlan(width_factor=2, router_scale_fix="none")
    assert grow_config(config, anyway).num_experts_per_tok_per_layer == [4, 2, 2]
    assert any("router_scale_fix" in reason for reason in what_changes_the_function(config, anyway))
    assert grow_config(config, DEPTH).num_experts_per_tok_per_layer == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "overrides", "plan", "message"),
    [
        ("deepseek_v3", {"topk_group": 2}, GrowthPlan(width_factor=2), "breaks n_group=3.*expert_order='interleave'"),
        ("deepseek_v2-groups", {}, GrowthPlan(width_factor=2), "breaks n_group=3"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 4}, WIDTH, "n_group=4 does not divide the 6 experts"),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 3}, WIDTH, "between 1 and the 2 experts"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, WIDTH, "num_experts_per_tok=7 is not between 1 and the 6"),
        ("qwen3_moe", {"num_experts": 0}, DEPTH, "num_experts=0.*no layer with experts"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, DEPTH, "no layer with experts"),
        ("olmoe", {"quantization_config": {"quant_method": "fp8"}}, DEPTH, "quantization_config.*Dequantise"),
        (
            "mone",
            {"host_config": host_config("olmoe").to_dict(), "neuron_top_k": 4},
            DEPTH,
            "host_config of this 'mone' is not null",
        ),
    ],
)
def test_configurations_that_cannot_grow_are_refused(name, overrides, plan, message):
    config = host_config(name, **overrides)
    with pytest.raises(ValueError, match=message):
        grow_config(config, plan)


def test_unknown_families_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="model_type='gpt2' is not known.*'sigma_moe'.*'mixtral'"):
        grow_config({"model_type": "gpt2"}, DEPTH)
    config = Qwen3MoeConfig()
    config.model_type = "other"
    with pytest.raises(ValueError, match="model_type='other'"):
        grow_config(config, DEPTH)


@pytest.mark.parametrize(
    ("name", "overrides", "fields", "reasons"),
    [
        ("olmoe", {}, {"width_factor": 2, "noise_alpha": 0}, []),
        ("olmoe", {}, {"width_factor": 2}, ["noise_alpha=0.01"]),
        ("olmoe", {}, {"width_factor": 2, "noise_targets": ()}, []),
        ("olmoe", {}, {"depth_factor": 2}, ["depth_copy_init='copy'"]),
        ("olmoe", {}, {"depth_factor": 2, "depth_copy_init": "zero_output"}, []),
        ("olmoe", {}, {"width_factor": 2, "noise_alpha": 0, "topk_policy": "keep"}, ["topk_policy='keep'"]),
        ("olmoe", {}, {"width_factor": 2, "noise_alpha": 0, "router_init": "random"}, ["router_init='random'"]),
        ("olmoe", {}, {"width_factor": 2, "noise_alpha": 0, "router_scale_fix": "none"}, []),
        (
            "sigma_moe-plain",
            {},
            {"width_factor": 2, "noise_alpha": 0, "router_scale_fix": "none"},
            ["router_scale_fix='none'"],
        ),
        (
            "sigma_moe-softmax",
            {},
            {"width_factor": 2, "noise_alpha": 0, "router_scale_fix": "none"},
            ["router_scale_fix='none': biases"],
        ),
        ("deepseek_v3", {}, {"width_factor": 2, "noise_alpha": 0}, []),
        ("deepseek_v3", {"topk_group": 2}, {"width_factor": 2, "noise_alpha": 0}, ["topk_group=2 of n_group=3"]),
    ],
)
def test_what_changes_the_function_is_told(name, overrides, fields, reasons):
    told = what_changes_the_function(host_config(name, **overrides), GrowthPlan(**fields))
    assert len(told) == len(reasons)
    assert all(text.startswith(start) for text, start in zip(told, reasons))
