# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""A sister family with a router of its own: what README.md promises to whoever adds one.

The router here is top-p's (Dynamic-MoE, arXiv 2403.07652), as its formula was known to us: a token uses its best
experts until their probabilities reach p.
"""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationMixin
from transformers.distributed import DistributedConfig

from hf_models.moe import MoneForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM, SigmaMoeModel
from hf_models.moe.balance import expert_counts, mean_over_tokens
from hf_models.moe.growth import grow_model
from hf_models.moe.growth_plan import GrowthPlan
from hf_models.moe.modeling_sigma_moe import SigmaMoeTopKRouter
from tests.gloo_ranks import results_of_ranks


EXPERTS, TOP_P = 6, 0.6
FIELDS = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "initializer_range": 0.4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BACKENDS = ["eager", "batched_mm", "grouped_mm", "sigma_triton"]


class TopPRouter(SigmaMoeTopKRouter):
    leaves_out_experts = True
    top_p = TOP_P

    def select(self, scores: torch.Tensor, top_k: int | None = None) -> torch.Tensor:
        chosen, indices = scores.topk(self.top_k if top_k is None else top_k, dim=-1)
        return indices.masked_fill(chosen.cumsum(dim=-1) - chosen >= self.top_p, self.num_experts)


class CosineRouter(SigmaMoeTopKRouter):
    """Overrides another step."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.cosine_similarity(hidden_states.float()[:, None], self.weight.float()[None], dim=-1)


class TopPModel(SigmaMoeModel):
    router_class = TopPRouter


class TopPForCausalLM(SigmaMoeForCausalLM, GenerationMixin):
    body_class = TopPModel


class CosineModel(SigmaMoeModel):
    router_class = CosineRouter


def build(model_class=TopPForCausalLM, **fields):
    torch.manual_seed(0)
    return model_class(SigmaMoeConfig(**FIELDS | fields)).eval()


def reference(block, hidden):
    """Each token by itself, expert by expert, in float64."""
    block, out = block.double(), []
    for x in hidden.double():
        p = (block.gate.weight @ x).softmax(-1)
        order, reached, y = p.argsort(descending=True), 0.0, torch.zeros_like(x)
        for e in order[: block.gate.top_k]:
            if reached >= TOP_P:
                break
            reached += p[e].item()
            gate, up = (block.experts.gate_up_proj[e] @ x).chunk(2)
            y = y + p[e] * (block.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_use_as_many_experts_as_they_need(backend):
    model = build()
    model.set_experts_implementation(backend)
    block, hidden = model.model.layers[0].mlp, torch.randn(50, 32)
    used = (block.gate(hidden)[2] < EXPERTS).sum(-1)
    assert set(used.tolist()) >= {1, 2, 3}, "the case has tokens of several kinds"
    found = block(hidden[None])[0]
    torch.testing.assert_close(found.double(), reference(block, hidden), atol=1e-5, rtol=1e-5)


def test_up_to_one_it_is_top_k(monkeypatch):
    monkeypatch.setattr(TopPRouter, "top_p", 2.0)
    ids = torch.randint(1, 40, (2, 12))
    theirs = build(SigmaMoeForCausalLM)
    assert torch.equal(build()(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_trains_is_counted_and_writes(backend):
    model = build(router_aux_loss_coef=0.01).train()
    model.set_experts_implementation(backend)
    ids = torch.randint(1, 40, (2, 12))
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().sum() > 0 and layer.mlp.experts.down_proj.grad.abs().sum() > 0
    counts = model.routing_window.summary()["counts"]
    assert (counts.sum(-1) < 4 * ids.numel()).all() and (counts.sum(-1) >= ids.numel()).all()
    model.eval()
    with torch.no_grad():
        indices = model.model.layers[0].mlp.gate(torch.randn(9, 32))[2]
        assert expert_counts(indices, EXPERTS).sum() == (indices < EXPERTS).sum()
        written = model.generate(ids, max_new_tokens=4, do_sample=False)
        again = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert written.shape == (2, 16) and torch.equal(written, again)


def test_it_comes_back_from_a_folder(tmp_path):
    model, ids = build(), torch.randint(1, 40, (2, 12))
    model.save_pretrained(tmp_path)
    back = TopPForCausalLM.from_pretrained(tmp_path)
    assert all(type(router) is TopPRouter for router in back.routers)
    assert torch.equal(back(ids).logits, model(ids).logits)


class EntropyForCausalLM(TopPForCausalLM, GenerationMixin):
    """With a loss of its own."""

    def own_router_loss(self, router_logits, mask, learning):
        log_p = [z.log_softmax(-1) for z in router_logits]
        return 0.5 * sum(mean_over_tokens(-(p.exp() * p).sum(-1), mask, across_ranks=learning) for p in log_p)


def test_a_loss_of_the_routers_own():
    model, plain, ids = build(EntropyForCausalLM), build(), torch.randint(1, 40, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found, without = (
        each.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss for each in (model, plain)
    )
    logits = plain(ids, attention_mask=mask, output_router_logits=True).router_logits
    p = torch.stack([z[mask.flatten() == 1].double().softmax(-1) for z in logits])
    entropy = -(p * p.log()).sum(-1).mean(-1)  # of each layer
    torch.testing.assert_close((found - without).double(), 0.5 * entropy.sum(), rtol=1e-4, atol=0)
    found.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in model.routers)
    copy.deepcopy(model)
    assert torch.equal(model.eval()(ids, labels=ids).loss, plain.eval()(ids, labels=ids).loss)


def test_other_methods_refuse_a_router_that_they_have_not(monkeypatch):
    with pytest.raises(ValueError, match="TopPForCausalLM routes by TopPRouter, which MoneForCausalLM has not"):
        MoneForCausalLM.from_moe(build(), neuron_ratio=1.0)
    model = build()
    monkeypatch.setattr(model.config, "model_type", "top_p")
    with pytest.raises(ValueError, match="model_type='top_p' is not known to growth"):
        grow_model(model, GrowthPlan(depth_factor=2))


def test_adapters_on_router_and_experts_learn():
    lora = LoraConfig(target_parameters=["gate.weight", "experts.down_proj"], task_type="CAUSAL_LM")
    model, ids = get_peft_model(build(), lora).train(), torch.randint(1, 40, (2, 12))
    torch.testing.assert_close(model(ids).logits, build()(ids).logits)
    model(ids, labels=ids).loss.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(learned) == 2 * 2  # B starts at zero, so that only it has a gradient


def test_another_step_of_the_router():
    model = build(CosineModel)
    routers, hidden = model.routers, torch.randn(7, 32)
    assert len(routers) == 2 and all(type(router) is CosineRouter for router in routers)
    logits, weights, indices = routers[0](hidden)
    assert logits.abs().max() <= 1
    expected = logits.softmax(-1).topk(4)
    torch.testing.assert_close(weights, expected.values)
    assert torch.equal(indices, expected.indices)
    assert not getattr(model.layers[0].mlp.experts, "_is_expert_parallel", False)


# --- experts that are divided among ranks ----------------------------------------------------------------------------


ROWS = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(3))


def learned(model, ids):
    out = model.train()(ids, labels=ids)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return out.logits.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


def job_divided():
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    if dist.get_rank() == 0:
        build(router_aux_loss_coef=0.0).save_pretrained(shared[0])
    dist.barrier()
    sharding, results = DistributedConfig(fsdp_size=2, ep_size=2), {}
    for backend in ("grouped_mm", "sigma_triton"):
        model = TopPForCausalLM.from_pretrained(
            shared[0], distributed_config=sharding, experts_implementation=backend, dtype=torch.float32
        )
        own = model.model.layers[0].mlp.experts.down_proj.to_local().shape[0]
        results[backend] = own, *learned(model, ROWS[dist.get_rank()][None])
    return results


JOBS = {"divided": job_divided}


@pytest.mark.slow
@pytest.mark.skipif(
    "ep_size" not in DistributedConfig.__dataclass_fields__, reason="this transformers exchanges no tokens"
)
def test_two_ranks_with_half_of_the_experts_each_learn_as_one(tmp_path):
    of_ranks = results_of_ranks(__name__, tmp_path)("divided")
    expected = [learned(build(router_aux_loss_coef=0.0), row[None]) for row in ROWS]
    for (logits, _), results in zip(expected, of_ranks, strict=True):
        for own, found, gradients in results.values():
            assert own == EXPERTS // 2
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
            for name, gradient in gradients.items():
                mean = (expected[0][1][name] + expected[1][1][name]) / 2
                torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
