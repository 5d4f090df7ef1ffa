"""Curves and budgets of models whose answer is known: closed forms, or the model built at that number."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from hf_models.moe.elastic import experts_in_force
from hf_models.moe.elastic_hosts import wrap_moe
from tests.hf_models.moe.elastic_models import EXPERTS, LAYERS, VOCABULARY, build
from trainers.data import train_tokenizer
from trainers.evaluation import evaluate_elastic, held_out_loss, search_layer_budget
from trainers.figures import elastic_figure


TEXT = "def add(left, right):\n    return left + right\n" * 12


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=280, show_progress=False)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    ids = tokenizer(TEXT).input_ids
    return Dataset.from_dict({"input_ids": [ids[i : i + 16] for i in range(0, 16 * 6, 16)]})


CONSTANT = Dataset.from_dict({"input_ids": [[7] * 6, [7] * 6]})


def known_model(gains=(8.0, 0.0, 0.0)):
    """A model of one fact, token 7 follows token 7, in closed form.

    Attention adds nothing. Routers of zeros give every expert the weight 1/E, not renormalised; the experts of layer l
    are all the same and add `gains[l] / E * d` each. What comes out is embedding + sum_l k_l gains[l] / E * d, and the
    head's row of token 7 is d.
    """
    model = build("m_moe", norm_topk_prob=False, router_aux_loss_type="none")
    d = F.normalize(torch.randn(32, generator=torch.Generator().manual_seed(3)), dim=0)
    with torch.no_grad():
        x = model.model.embed_tokens.weight[7]
        x -= (x @ d) * d
        for layer, gain in zip(model.model.layers, gains):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.gate.weight.zero_()
            experts = layer.mlp.experts
            experts.gate_up_proj.copy_(experts.gate_up_proj[:1].expand_as(experts.gate_up_proj).clone())
            if gain == 0:
                experts.down_proj.zero_()
                continue
            # The first layer sees the normalised embedding: choose the output matrix that makes d of it.
            seen = layer.post_attention_layernorm(x)
            gate, up = (experts.gate_up_proj[0] @ seen).chunk(2)
            inner = F.silu(gate) * up
            experts.down_proj.copy_((gain * torch.outer(d, inner) / inner.square().sum()).expand_as(experts.down_proj))
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = d
    return model, x.detach().clone(), d


def loss_in_closed_form(x, d, k, gain=8.0):
    hidden = x + k * gain / EXPERTS * d
    logit = (hidden / hidden.square().mean().add(1e-6).sqrt()) @ d
    return (math.log(VOCABULARY - 1 + math.exp(logit)) - logit).item()


# --- the curve -------------------------------------------------------------------------------------------------------


def test_losses_of_a_model_in_closed_form(tokenizer):
    model, x, d = known_model()
    curve = evaluate_elastic(model, CONSTANT, tokenizer, [1, 2, [5, 1, 1], EXPERTS])
    expected = [loss_in_closed_form(x, d, k) for k in (1, 2, 5, EXPERTS)]
    assert [point.nats_per_token for point in curve.points] == pytest.approx(expected, rel=1e-4)
    assert expected == sorted(expected, reverse=True) and expected[-1] < 0.7 * expected[0]
    assert [point.perplexity for point in curve.points] == pytest.approx([math.exp(e) for e in expected], rel=1e-4)
    assert [point.mean_k for point in curve.points] == pytest.approx([1, 2, 7 / 3, EXPERTS])
    assert [point.experts_per_token for point in curve.points][2] == (5, 1, 1)
    assert [p.expert_flops_share for p in curve.points] == pytest.approx([1 / 8, 2 / 8, 7 / 24, 1])
    assert curve.tokens == 10


@pytest.mark.parametrize("name", ["m_moe", "qwen3_moe", "deepseek_v3"])
def test_each_point_is_the_model_built_with_that_number(name, blocks, tokenizer):
    model = wrap_moe(build(name, vocab_size=280)).train()
    model.set_active_experts([1, 2, 4])
    before = model.config.to_dict()
    curve = evaluate_elastic(model, blocks, tokenizer, [1, 3], batch_size=4)
    for k, point in zip((1, 3), curve.points):
        expected = held_out_loss(build(name, vocab_size=280, num_experts_per_tok=k), blocks, tokenizer, batch_size=4)
        assert (point.nats_per_token, point.bits_per_character) == (
            expected.nats_per_token,
            expected.bits_per_character,
        )
    difference = curve.points[1].active_parameters - curve.points[0].active_parameters
    assert difference == 2 * LAYERS * 3 * 32 * 16
    assert experts_in_force(model) == [1, 2, 4] and model.config.to_dict() == before and model.training


def test_a_curve_as_table_rows_and_figure(tokenizer, tmp_path):
    model, _, _ = known_model()
    curve = evaluate_elastic(model, CONSTANT, tokenizer, [1, {"schedule": "front", "mean": 2}, 4])
    lines = curve.table().splitlines()
    assert len(lines) == 5 and lines[2].startswith("| 1 |") and lines[3].startswith("| 2 (3, 2, 1) |")
    assert lines[0].count("|") == lines[1].count("|") == lines[4].count("|")
    assert [row["experts_per_token"] for row in curve.rows()] == [[1, 1, 1], [3, 2, 1], [4, 4, 4]]
    path = curve.figure(tmp_path / "elastic.png", name="ours", other=curve)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_the_figure_is_the_same_bytes_twice_and_takes_specialists(tmp_path):
    curves = {"ours": [(1, 9.0), (2, 7.0), (4, 6.5)], "fixed at 4": [(1, 90.0), (2, 20.0), (4, 6.3)]}
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        elastic_figure(curves, path, points={"trained at 1": (1, 8.8)})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for bad in ({}, {"ours": []}):
        with pytest.raises(ValueError, match="Every curve needs at least one point"):
            elastic_figure(bad, paths[0])


def test_nothing_to_evaluate_is_refused_and_an_impossible_number_changes_nothing(tokenizer):
    model, _, _ = known_model()
    with pytest.raises(ValueError, match="`ks` is empty"):
        evaluate_elastic(model, CONSTANT, tokenizer, [])
    with pytest.raises(ValueError, match="top_k=9"):
        evaluate_elastic(model, CONSTANT, tokenizer, [1, 9])
    assert experts_in_force(model) == [3] * LAYERS


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(("mean", "k_min", "k_max"), [(2, 1, None), (3, 2, None), (3, 1, 4), (5 / 3, 1, None)])
def test_all_spare_experts_go_to_the_layer_where_they_matter(layer, mean, k_min, k_max):
    gains = [0.0] * LAYERS
    gains[layer] = 8.0
    model, x, d = known_model(gains)
    found = search_layer_budget(model, mean, CONSTANT, k_min=k_min, k_max=k_max)
    total = round(LAYERS * mean)
    most = min(total - k_min * (LAYERS - 1), k_max or EXPERTS)
    assert found.experts_per_token[layer] == most and sum(found.experts_per_token) == total
    assert min(found.experts_per_token) >= k_min and max(found.experts_per_token) <= (k_max or EXPERTS)
    assert found.nats_per_token == pytest.approx(loss_in_closed_form(x, d, most), rel=1e-4)
    assert found.uniform_nats_per_token == pytest.approx(loss_in_closed_form(x, d, found.uniform[layer]), rel=1e-4)
    assert found.nats_per_token < found.uniform_nats_per_token or found.uniform[layer] == most
    assert experts_in_force(model) == [3] * LAYERS


def test_where_nothing_matters_the_uniform_allocation_stays():
    model, _, _ = known_model((0.0, 0.0, 0.0))
    found = search_layer_budget(model, 2, CONSTANT)
    assert found.experts_per_token == found.uniform == [2, 2, 2]
    assert found.nats_per_token == found.uniform_nats_per_token
    assert found.evaluations == 1 + 3 + 3 + 3  # uniform, one more, one fewer, the best three moves


@pytest.mark.parametrize("name", ["m_moe", "mixtral"])
def test_the_search_never_loses_keeps_the_cost_is_deterministic_and_counts_its_evaluations(name, blocks):
    model = wrap_moe(build(name, vocab_size=280))
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(experts_in_force(model)))
    found = search_layer_budget(model, 2, blocks, batch_size=6)
    handle.remove()
    assert len(forwards) == found.evaluations == len({tuple(ks) for ks in forwards})
    assert sum(found.experts_per_token) == 2 * LAYERS
    assert found.nats_per_token <= found.uniform_nats_per_token
    assert search_layer_budget(model, 2, blocks, batch_size=6) == found
    model.set_active_experts(found.experts_per_token)
    again = search_layer_budget(model, 2, blocks, batch_size=6)
    assert again == found  # it starts from the uniform allocation, not from what is in force


def test_impossible_budgets_are_refused():
    model, _, _ = known_model()
    with pytest.raises(ValueError, match="nearest means are 2.33333 and 2.66667"):
        search_layer_budget(model, 2.5, CONSTANT)
    with pytest.raises(ValueError, match="mean=9 lies outside 1..8"):
        search_layer_budget(model, 9, CONSTANT)
    with pytest.raises(ValueError, match="`calibration` is empty"):
        search_layer_budget(model, 2, Dataset.from_dict({"input_ids": []}))
