# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Sigma-MoE against an independent float64 model, and everything that a user of transformers relies on."""

import math
import re
import shutil

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

import hf_models  # noqa: F401  (registers the family)
from hf_models.moe import (
    SIGMA_MOE_TINY_INITIAL_TOP_K,
    SigmaMoeConfig,
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
    routing_losses,
)


AUTO_CLASSES = {
    AutoModel: SigmaMoeModel,
    AutoModelForCausalLM: SigmaMoeForCausalLM,
    AutoModelForSequenceClassification: SigmaMoeForSequenceClassification,
    AutoModelForTokenClassification: SigmaMoeForTokenClassification,
}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler: install g++"
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tiny_config(**overrides):
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok_per_layer": [3, 2, 1],
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # far from 0, so that attention and routing depend visibly on the input
        "router_aux_loss_coef": 0.05,
        "router_z_loss_coef": 0.01,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return SigmaMoeConfig(**{**shape, **overrides})


def tiny_model(seed=0, cls=SigmaMoeForCausalLM, **overrides):
    torch.manual_seed(seed)
    model = cls(tiny_config(**overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that forgets its weight
                parameter.uniform_(0.5, 1.5)
    return model


def batch(rows=2, length=9, *, padding=None, seed=0):
    """Random ids; with `padding` ("left" or "right") the second row has two real tokens fewer than the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
        ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    if padding == "left":
        labels[1, 2] = -100  # it would be predicted from padding
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


# --- an independent model, float64, one token and one expert at a time -----------------------------------------------


def slow_rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def slow_rotary(x, base):
    length, dim = x.shape
    angles = torch.arange(length)[:, None].double() * base ** (-torch.arange(0, dim, 2).double() / dim)
    first, second = x[:, : dim // 2], x[:, dim // 2 :]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def slow_attention(x, mask, w, c):
    group = c.num_attention_heads // c.num_key_value_heads
    base = c.rope_parameters["rope_theta"]
    heads = []
    for head in range(c.num_attention_heads):
        rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
        shared = slice(head // group * c.head_dim, (head // group + 1) * c.head_dim)
        q = slow_rotary(slow_rms_norm(x @ w["q_proj.weight"][rows].T, w["q_norm.weight"], c.rms_norm_eps), base)
        k = slow_rotary(slow_rms_norm(x @ w["k_proj.weight"][shared].T, w["k_norm.weight"], c.rms_norm_eps), base)
        v = x @ w["v_proj.weight"][shared].T
        out = []
        for t in range(len(x)):
            seen = [j for j in range(t + 1) if mask[j]] or [t]
            out.append((k[seen] @ q[t] / math.sqrt(c.head_dim)).softmax(0) @ v[seen])
        heads.append(torch.stack(out))
    return torch.cat(heads, dim=-1) @ w["o_proj.weight"].T


def slow_mixture(x, w, c, top_k):
    logits = x @ w["gate.weight"].T
    out, chosen = [], []
    for t in range(len(x)):
        scores = 1 / (1 + (-logits[t]).exp()) if c.scoring_func == "sigmoid" else logits[t].softmax(-1)
        order = sorted(range(c.num_experts), key=lambda e: -(scores[e] + w["gate.e_score_correction_bias"][e]).item())
        picked = order[:top_k]
        total = sum(scores[e] for e in picked) if c.norm_topk_prob and top_k > 1 else 1.0
        y = 0.0
        for e in picked:
            gate, up = (w["experts.gate_up_proj"][e] @ x[t]).chunk(2)
            y = y + c.routed_scaling_factor * scores[e] / total * (
                w["experts.down_proj"][e] @ (gate / (1 + (-gate).exp()) * up)
            )
        out.append(y)
        chosen.append(picked)
    return torch.stack(out), logits, chosen


def slow_forward(state, c, ids, mask):
    """Logits, and per layer the router logits and selected experts of the real tokens."""
    per_layer = [([], []) for _ in range(c.num_hidden_layers)]
    rows = []
    for row, real in zip(ids, mask, strict=True):
        x = state["model.embed_tokens.weight"][row]
        for layer in range(c.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            w = {name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}
            attention = {n.removeprefix("self_attn."): p for n, p in w.items() if n.startswith("self_attn.")}
            mixture = {n.removeprefix("mlp."): p for n, p in w.items() if n.startswith("mlp.")}
            x = x + slow_attention(slow_rms_norm(x, w["input_layernorm.weight"], c.rms_norm_eps), real, attention, c)
            y, logits, chosen = slow_mixture(
                slow_rms_norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps),
                mixture,
                c,
                c.top_k_per_layer[layer],
            )
            x = x + y
            per_layer[layer][0].extend(logits[real.bool()])
            per_layer[layer][1].extend(picked for picked, r in zip(chosen, real, strict=True) if r)
        rows.append(slow_rms_norm(x, state["model.norm.weight"], c.rms_norm_eps) @ state["lm_head.weight"].T)
    return torch.stack(rows), per_layer


def slow_losses(logits, labels, per_layer, num_experts):
    """Cross-entropy, sum over layers of the global-batch loss, sum over layers of the z-loss."""
    terms = [
        -logits[b, t].log_softmax(-1)[labels[b, t + 1]]
        for b in range(logits.shape[0])
        for t in range(logits.shape[1] - 1)
        if labels[b, t + 1] != -100
    ]
    balance = z_loss = 0.0
    for router_logits, chosen in per_layer:
        z = torch.stack(router_logits)
        counts = torch.tensor([float(sum(e in picked for picked in chosen)) for e in range(num_experts)])
        balance = balance + num_experts * (counts.double() / counts.sum() * z.softmax(-1).mean(0)).sum()
        z_loss = z_loss + z.logsumexp(-1).pow(2).mean()
    return torch.stack(terms).mean(), balance, z_loss


VARIANTS = {
    "sigmoid": {},
    "softmax": {"scoring_func": "softmax"},
    "top-1": {"num_experts_per_tok_per_layer": None, "num_experts_per_tok": 1},
    "top-1 softmax": {
        "num_experts_per_tok_per_layer": None,
        "num_experts_per_tok": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    },
    "raw weights": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "all experts": {"num_experts_per_tok_per_layer": [8, 1, 8], "scoring_func": "softmax"},
    "bias": {"routed_scaling_factor": 0.5},
    "rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}


@pytest.mark.parametrize(
    ("variant", "padding"),
    [(variant, None) for variant in VARIANTS]
    + [(variant, side) for variant in ("sigmoid", "top-1", "bias") for side in ("left", "right")],
)
def test_logits_loss_and_all_gradients_equal_the_slow_float64_model(variant, padding):
    model = tiny_model(**VARIANTS[variant]).train()
    if variant == "bias":
        for layer, router in enumerate(model.routers):
            router.e_score_correction_bias.copy_(torch.linspace(-0.6, 0.6, 8).roll(layer))
    inputs = batch(padding=padding)
    out = model(**inputs, output_router_logits=True)
    out.loss.backward()

    state = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}
    logits, per_layer = slow_forward(state, model.config, inputs["input_ids"], inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[real].double(), logits[real], rtol=1e-4, atol=3e-5)
    for router_logits, (z, _) in zip(out.router_logits, per_layer, strict=True):
        torch.testing.assert_close(router_logits[real.flatten()].double(), torch.stack(z), rtol=1e-4, atol=3e-5)

    cross_entropy, balance, z_loss = slow_losses(logits, inputs["labels"], per_layer, 8)
    torch.testing.assert_close(out.aux_loss.double(), balance, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.z_loss.double(), z_loss, rtol=1e-5, atol=0)
    loss = cross_entropy + 0.05 * balance + 0.01 * z_loss
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=0)
    loss.backward()
    expected = {n: state[n].grad for n, _ in model.named_parameters()}
    assert_same(gradients(model), expected, rtol=1e-3, atol=2e-5)


# --- what the router learns from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_with_one_expert_the_language_model_loss_reaches_the_router(norm_topk_prob, scoring_func):
    model = tiny_model(
        seed=1,
        num_experts_per_tok_per_layer=[1, 1, 1],
        norm_topk_prob=norm_topk_prob,
        scoring_func=scoring_func,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
    )
    model.double().set_experts_implementation("eager")
    inputs = batch()

    def cross_entropy():
        # The loss of the model is fp32 by design: too coarse for differences.
        out = model(inputs["input_ids"], output_router_logits=True)
        chosen = torch.stack([z.argmax(-1) for z in out.router_logits])
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()), chosen

    loss, chosen = cross_entropy()
    loss.backward()
    step = 1e-3
    for layer, router in enumerate(model.routers):
        assert router.weight.grad.abs().max() > 1e-5
        direction = router.weight.grad / router.weight.grad.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                router.weight += sign * step * direction
                value, routing = cross_entropy()
                assert torch.equal(routing, chosen), "choose another seed: the step crosses a tie"
                values.append(value)
                router.weight -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(
            slope, router.weight.grad.norm(), rtol=2e-3, atol=0, msg=lambda m, i=layer: f"layer {i}: {m}"
        )


def test_with_one_expert_the_weight_is_the_raw_score():
    for scoring_func in ("sigmoid", "softmax"):
        router = tiny_model(scoring_func=scoring_func, norm_topk_prob=True).routers[2]
        logits, weights, indices = router(torch.randn(11, 32))
        scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
        assert router.top_k == 1 and torch.equal(weights, scores.gather(-1, indices))
        assert weights.requires_grad and not torch.allclose(weights, torch.ones_like(weights))


def test_bias_selects_but_never_weighs():
    router = tiny_model().routers[0]
    router.e_score_correction_bias[5] = 10.0
    logits, weights, indices = router(torch.randn(11, 32))
    assert (indices == 5).any(-1).all()
    selected = logits.sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, selected / selected.sum(-1, keepdim=True))


def test_update_expert_bias_uses_the_counts_of_the_window():
    model = tiny_model(expert_bias_update_rate=0.25, expert_bias_cap=0.5).train()
    model.update_expert_bias()
    assert all(router.e_score_correction_bias.abs().max() == 0 for router in model.routers)
    inputs = batch(padding="right")
    for _ in range(4):
        before = [router.e_score_correction_bias.clone() for router in model.routers]
        model(**inputs)
        counts = model.routing_window.summary()["counts"]
        assert counts.sum(-1).tolist() == [16 * 3, 16 * 2, 16 * 1]
        model.update_expert_bias()
        for router, old, c in zip(model.routers, before, counts, strict=True):
            expected = (old + 0.25 * (c.mean() - c).sign().float()).clamp(-0.5, 0.5)
            assert torch.equal(router.e_score_correction_bias, expected)


# --- the loss that is returned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "switch", "sequence", "global_batch", "top1"])
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_cross_entropy_plus_weighted_auxiliary_losses(kind, training):
    model = tiny_model(router_aux_loss_type=kind).train(training)
    inputs = batch(padding="right")
    out = model(**inputs, output_router_logits=None if training else True)
    cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert out.load_balancing_losses.shape == (3,) and not out.load_balancing_losses.requires_grad
    torch.testing.assert_close(out.aux_loss, out.load_balancing_losses.sum())
    assert (out.aux_loss == 0) == (kind == "none")
    torch.testing.assert_close(out.loss, cross_entropy + 0.05 * out.aux_loss + 0.01 * out.z_loss)
    as_tuple = model(**inputs, output_router_logits=None if training else True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)


def test_evaluation_loss_is_the_plain_cross_entropy():
    model, inputs = tiny_model().eval(), batch(padding="right")
    out = model(**inputs)
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    )
    assert out.aux_loss is None and out.z_loss is None and out.router_logits is None
    assert model.routing_window.summary() is None
    no_labels = model(inputs["input_ids"], output_router_logits=True)
    assert no_labels.loss is None and no_labels.aux_loss > 0 and len(no_labels.router_logits) == 3


def test_shares_of_micro_batches_add_up_to_the_whole_under_num_items_in_batch():
    model = tiny_model().train()
    parts = [batch(padding=None, seed=1), batch(padding="right", seed=2)]
    items = [int((p["labels"][:, 1:] != -100).sum()) for p in parts]
    total = sum(items)
    expected = 0.0
    for part, n in zip(parts, items, strict=True):
        out = model(**part)
        cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten())
        expected += n / total * (cross_entropy + 0.05 * out.aux_loss + 0.01 * out.z_loss)
    for as_given in (total, torch.tensor(total)):
        torch.testing.assert_close(sum(model(**p, num_items_in_batch=as_given).loss for p in parts), expected)
    shifted = [{**p, "shift_labels": F.pad(p["labels"], (0, 1), value=-100)[:, 1:].contiguous()} for p in parts]
    torch.testing.assert_close(sum(model(**p, num_items_in_batch=total).loss for p in shifted), expected)


def test_an_unmanaged_window_starts_afresh_and_a_managed_one_accumulates():
    model, inputs = tiny_model().train(), batch(padding="right")
    first = [model(**inputs).aux_loss.item() for _ in range(2)]
    assert first[0] == first[1]
    assert model.routing_window.summary()["tokens"].tolist() == [16.0] * 3
    model.routing_window.managed = True
    model.routing_window.reset()
    for _ in range(2):
        model(**inputs)
    assert model.routing_window.summary()["tokens"].tolist() == [32.0] * 3
    assert model.routing_window.counts_of_all_ranks.sum(-1).tolist() == [32 * 3, 32 * 2, 32 * 1]


def test_gradient_checkpointing_counts_once_and_changes_no_gradient():
    inputs, results = batch(padding="right"), []
    for checkpointing in (False, True):
        model = tiny_model(router_aux_loss_coef=1.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = model(**inputs)
        out.loss.backward()
        results.append((out, gradients(model), model.routing_window.summary()))
    (plain, plain_gradients, plain_window), (saved, saved_gradients, saved_window) = results
    torch.testing.assert_close(saved.loss, plain.loss, rtol=0, atol=0)
    torch.testing.assert_close(saved.aux_loss, plain.aux_loss, rtol=0, atol=0)
    assert_same(saved_window, plain_window, rtol=0, atol=0)
    assert plain_window["tokens"].tolist() == [16.0] * 3
    assert_same(saved_gradients, plain_gradients, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_never_drops_the_auxiliary_gradient_silently(monkeypatch):
    """It runs the layers without a graph first, where the recorded router logits have no gradient."""
    warnings = []
    monkeypatch.setattr(routing_losses.logger, "warning_once", warnings.append)
    model = tiny_model().train()
    model(**batch())
    assert not warnings
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model(**batch())
    assert len(warnings) == 1 and "'use_reentrant': False" in warnings[0]


# --- backends --------------------------------------------------------------------------------------------------------


def test_expert_backends_agree_in_logits_and_gradients():
    inputs, results = batch(3, 11, padding="right"), {}
    for backend in ("eager", "batched_mm", "grouped_mm"):
        model = tiny_model().train()
        model.set_experts_implementation(backend)
        assert model.config._experts_implementation == backend
        out = model(**inputs)
        out.loss.backward()
        results[backend] = out.logits.detach(), gradients(model)
    for backend in ("batched_mm", "grouped_mm"):
        torch.testing.assert_close(results[backend][0], results["eager"][0], rtol=1e-5, atol=1e-5)
        assert_same(results[backend][1], results["eager"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("flex_attention", marks=[pytest.mark.slow, needs_compiler])])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.compatibility(
    "Attention: FlexAttention", method="sigma_moe", only={"backend": "flex_attention"}, note="on a CPU forward only"
)
def test_attention_backends_agree(backend, padding):
    model, inputs = tiny_model(head_dim=16).eval(), batch(2, 16, padding=padding)
    real = inputs["attention_mask"].bool()
    outputs = {}
    for name in ("eager", backend):
        model.set_attn_implementation(name)
        # flex attention has no backward on the CPU and asks for it whenever a gradient might be needed
        with torch.set_grad_enabled(name != "flex_attention"):
            outputs[name] = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[real].detach()
    torch.testing.assert_close(outputs[backend], outputs["eager"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_does_not_change_real_tokens(padding, backend):
    model, inputs = tiny_model().eval(), batch(padding=padding)
    model.set_attn_implementation(backend)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    together = model(ids, attention_mask=mask, output_router_logits=True)
    real = mask[1].bool()
    alone = model(ids[1:, real], output_router_logits=True)
    torch.testing.assert_close(together.logits[1, real], alone.logits[0], rtol=1e-5, atol=1e-5)
    junk = model(ids.masked_fill(mask == 0, 7), attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(junk.aux_loss, together.aux_loss)
    torch.testing.assert_close(junk.z_loss, together.z_loss)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_sliding_window_sees_its_width_and_no_more(backend):
    model = tiny_model(
        num_hidden_layers=1, num_experts_per_tok_per_layer=None, use_sliding_window=True, sliding_window=3
    ).eval()
    model.set_attn_implementation(backend)
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits
    # what is masked has a gradient of exactly 0; its value may still decide in which order others are added up
    for position in range(logits.shape[1]):
        (gradient,) = torch.autograd.grad(logits[:, position].square().sum(), embeds, retain_graph=True)
        assert gradient[:, 0].any() == (position < 3), position


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_with_a_cache_equals_generation_without(cache, window):
    options = {"cache_implementation": cache}
    model = tiny_model(eos_token_id=None, use_sliding_window=window is not None, sliding_window=window).eval()
    inputs = {k: v for k, v in batch(padding="left").items() if k != "labels"}
    options.update(max_new_tokens=12, do_sample=False)
    with_cache = model.generate(**inputs, disable_compile=True, **options)
    without = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=False)
    assert with_cache.shape == (2, 21) and torch.equal(with_cache, without)


def test_cached_steps_give_the_logits_of_one_forward():
    model, ids = tiny_model().eval(), batch()["input_ids"]
    whole = model(ids).logits
    out = model(ids[:, :4], use_cache=True)
    steps = [out.logits]
    for t in range(4, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], rtol=1e-5, atol=1e-6)


def test_beams_and_sampling_run_also_with_router_logits_asked_for():
    inputs = {k: v for k, v in batch(padding="left").items() if k != "labels"}
    for output_router_logits in (False, True):
        model = tiny_model(output_router_logits=output_router_logits).eval()
        beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5)
        assert beams.shape == (4, 14)
        torch.manual_seed(0)
        sampled = model.generate(**inputs, do_sample=True, top_p=0.9, max_new_tokens=5, min_new_tokens=5)
        assert sampled.shape == (2, 14)


# --- precision and compilation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_router_in_fp32(tmp_path, dtype):
    tiny_model().save_pretrained(tmp_path)
    model = SigmaMoeForCausalLM.from_pretrained(tmp_path, dtype=dtype).train()
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == dtype
    for router in model.routers:
        assert router.weight.dtype == router.e_score_correction_bias.dtype == torch.float32
    for cast in (model, tiny_model().to(dtype).train()):
        out = cast(**batch(padding="right"), output_router_logits=True)
        out.loss.backward()
        assert all(z.dtype == torch.float32 for z in out.router_logits) and out.logits.dtype == dtype
        assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in cast.parameters())


def test_under_autocast_router_logits_are_those_of_fp32():
    model = tiny_model().eval()
    seen = []
    for router in model.routers:
        router.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch(), output_router_logits=True)
    assert len(seen) == 3 and out.logits.dtype == torch.bfloat16
    for (router, hidden, result), z in zip(seen, out.router_logits, strict=True):
        expected = F.linear(hidden.float(), router.weight)
        assert z.dtype == result[1].dtype == torch.float32
        assert torch.equal(z, expected)
        assert torch.equal(result[2], expected.sigmoid().topk(router.top_k).indices)


def test_training_under_autocast_gives_finite_fp32_gradients():
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(padding="right")).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("training", [False, True])
def test_compiled_forward_has_no_graph_break_and_equals_eager(training):
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=2, num_experts_per_tok_per_layer=[2, 1]).train(training)
    inputs = batch(padding="right")
    with torch.set_grad_enabled(training):
        expected = model(**inputs)
        out = torch.compile(model, fullgraph=True)(**inputs)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-5)
    if training:
        expected.loss.backward()
        eager = gradients(model)
        model.zero_grad()
        out.loss.backward()
        assert_same(gradients(model), eager, rtol=1e-3, atol=1e-5)
        assert model.routing_window.summary()["tokens"].tolist() == [16.0] * 2


# --- the library's surface -------------------------------------------------------------------------------------------


def test_inputs_embeds_equal_input_ids():
    model, inputs = tiny_model().train(), batch(padding="right")
    ids = inputs.pop("input_ids")
    by_ids = model(input_ids=ids, **inputs)
    by_embeds = model(inputs_embeds=model.get_input_embeddings()(ids), **inputs)
    torch.testing.assert_close(by_embeds.logits, by_ids.logits, rtol=0, atol=0)
    torch.testing.assert_close(by_embeds.loss, by_ids.loss, rtol=0, atol=0)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**wrong)


def test_recorded_outputs_have_the_documented_shapes():
    model, inputs = tiny_model().eval(), batch(padding="right")
    model.set_attn_implementation("eager")
    out = model(**inputs, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 32)] * 4
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 9, 9)] * 3
    assert [tuple(z.shape) for z in out.router_logits] == [(18, 8)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    base = model.model(inputs["input_ids"], output_router_logits=True, output_hidden_states=True)
    assert len(base.router_logits) == 3 and torch.equal(base.hidden_states[-1], base.last_hidden_state)
    silent = model(inputs["input_ids"])
    assert silent.hidden_states is None and silent.attentions is None and silent.router_logits is None


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_train(tied):
    model = tiny_model(tie_word_embeddings=tied).train()
    model.resize_token_embeddings(48)
    assert model.config.vocab_size == 48 and model.lm_head.weight.shape == (48, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    inputs = batch()
    inputs["input_ids"][0, 0] = inputs["labels"][0, 4] = 47
    out = model(**inputs)
    out.loss.backward()
    assert out.logits.shape == (2, 9, 48)
    torch.testing.assert_close(
        out.loss,
        F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        + 0.05 * out.aux_loss
        + 0.01 * out.z_loss,
    )
    assert model.get_input_embeddings().weight.grad[47].abs().max() > 0


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "experts"],
)
def test_lora_trains_and_comes_back(tmp_path, targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, task_type="CAUSAL_LM", **targets)
    model = peft.get_peft_model(tiny_model(), config).train()
    inputs = batch(padding="right")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    with torch.no_grad():
        kept, loaded = model.eval()(inputs["input_ids"]).logits, again(inputs["input_ids"]).logits
        base = tiny_model().eval()(inputs["input_ids"]).logits
    torch.testing.assert_close(loaded, kept)
    assert (loaded - base).abs().max() > 1e-3


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.compatibility("Auto classes", method="sigma_moe")
def test_every_registered_class_is_found_and_uses_grouped_experts(auto_class):
    model = auto_class.from_config(tiny_config())
    assert type(model) is AUTO_CLASSES[auto_class]
    assert model.config._experts_implementation == "grouped_mm"
    for backend in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(backend)
    assert model.eval()(batch()["input_ids"])[0].isfinite().all()
    assert set(type(model).config_class._family_auto_map) == {"AutoConfig"} | {c.__name__ for c in AUTO_CLASSES}


def test_classification_heads_train():
    inputs = {k: v for k, v in batch(padding="right").items() if k != "labels"}
    sequence = tiny_model(cls=SigmaMoeForSequenceClassification, num_labels=3).train()
    token = tiny_model(cls=SigmaMoeForTokenClassification, num_labels=3).train()
    for model, labels in ((sequence, torch.tensor([0, 2])), (token, inputs["input_ids"] % 3)):
        out = model(**inputs, labels=labels)
        out.loss.backward()
        assert out.loss.isfinite() and model.score.weight.grad.abs().max() > 0
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    sequence.eval()
    alone = sequence(ids[1:, mask[1].bool()]).logits[0]
    torch.testing.assert_close(sequence(ids, attention_mask=mask).logits[1], alone, rtol=1e-5, atol=1e-5)


def test_label_smoothing_of_trainer_shifts_the_labels(tmp_path):
    model, inputs = tiny_model().eval(), batch(padding="right")
    args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = Trainer(model, args)
    loss = trainer.compute_loss(model, dict(inputs))
    log_probs = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    real = labels != -100
    nll = -log_probs.gather(-1, labels.clamp_min(0)[..., None])[..., 0][real].mean()
    torch.testing.assert_close(loss, 0.9 * nll + 0.1 * -log_probs[real].mean())


def test_a_trainer_that_computes_the_loss_itself_does_not_silently_lose_the_balance(tmp_path, caplog):
    """With label smoothing (or a `compute_loss_func`) the Trainer keeps the labels: no auxiliary loss, no counts."""
    model = tiny_model().train()
    args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    Trainer(model, args).compute_loss(model, batch(), num_items_in_batch=torch.tensor(16)).backward()
    told = [record for record in caplog.records if record.name.startswith("hf_models")]
    assert model.routing_window.summary() is not None or any("labels" in record.getMessage() for record in told)


# --- experts per token -----------------------------------------------------------------------------------------------


def test_experts_per_token_take_effect_are_written_and_come_back(tmp_path):
    model, inputs = tiny_model(), batch()
    for top_k, per_layer in ((1, [1, 1, 1]), ([4, 1, 2], [4, 1, 2]), ((2, 2, 1), [2, 2, 1]), (3, [3, 3, 3])):
        model.set_experts_per_token(top_k)
        assert [router.top_k for router in model.routers] == per_layer == model.config.top_k_per_layer
        assert model.config.num_experts_per_tok == max(per_layer)
        assert model.config.num_experts_per_tok_per_layer == (None if isinstance(top_k, int) else per_layer)
        model.train()(**inputs)
        assert model.routing_window.summary()["counts"].sum(-1).tolist() == [18.0 * k for k in per_layer]
        fresh = SigmaMoeForCausalLM(model.config)
        fresh.load_state_dict(model.state_dict())
        model.eval(), fresh.eval()
        torch.testing.assert_close(fresh(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert [router.top_k for router in again.routers] == per_layer
        torch.testing.assert_close(again(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)


@pytest.mark.parametrize(
    ("top_k", "message"),
    [
        ([1, 2], "top_k has 2 entries for 3 layers"),
        ([], "top_k has 0 entries for 3 layers"),
        ([1, 9, 1], "top_k=9 of layer 1 .*1..num_experts=8"),
        ([1, 1, 0], "top_k=0 of layer 2"),
        (-1, "top_k=-1 of layer 0"),
        (True, "top_k=True of layer 0"),
        (2.0, "top_k=2.0 of layer 0"),
        ("2", "top_k='2' of layer 0"),
    ],
)
def test_impossible_experts_per_token_are_refused_and_change_nothing(top_k, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.set_experts_per_token(top_k)
    assert [router.top_k for router in model.routers] == [3, 2, 1] == model.config.num_experts_per_tok_per_layer


# --- parameter counts ------------------------------------------------------------------------------------------------


def counted(config):
    """Total, and active without embeddings: from the shape alone."""
    h, d, per_expert = config.hidden_size, config.head_dim, 3 * config.hidden_size * config.moe_intermediate_size
    attention = 2 * h * config.num_attention_heads * d + 2 * h * config.num_key_value_heads * d
    around = attention + config.num_experts * h + 2 * h + 2 * d
    layers = config.num_hidden_layers
    total = 2 * config.vocab_size * h + layers * (around + config.num_experts * per_expert) + h
    return total, layers * around + sum(config.top_k_per_layer) * per_expert + h


@pytest.mark.parametrize(
    ("head_dim", "total", "active", "initially_active"),
    [(96, 19_978_702_848, 536_924_160, 650_170_368), (64, None, 0.427e9, 0.540e9), (128, None, 0.647e9, 0.760e9)],
)
def test_parameter_counts_of_sigma_moe_tiny(head_dim, total, active, initially_active):
    config = SigmaMoeConfig.from_preset("sigma-moe-tiny", head_dim=head_dim)
    with torch.device("meta"):
        model = SigmaMoeForCausalLM(config)
    assert (model.num_parameters(), model.num_active_parameters()) == counted(config)
    if total is not None:
        assert (model.num_parameters(), model.num_active_parameters()) == (total, active)
    assert model.num_active_parameters() == pytest.approx(active, abs=0.5e6)
    assert model.num_active_parameters(include_embeddings=True) == model.num_active_parameters() + 2 * 200064 * 1536
    assert sum(SIGMA_MOE_TINY_INITIAL_TOP_K) - 56 == 32
    model.set_experts_per_token(SIGMA_MOE_TINY_INITIAL_TOP_K)
    assert model.num_active_parameters() == pytest.approx(initially_active, abs=0.5e6)
    assert model.num_active_parameters() == counted(config)[1] and model.num_parameters() == counted(config)[0]


def test_published_figures_of_sigma_moe_tiny():
    config = SigmaMoeConfig.from_preset("sigma-moe-tiny")
    staged = SigmaMoeConfig.from_preset(
        "sigma-moe-tiny", num_experts_per_tok_per_layer=list(SIGMA_MOE_TINY_INITIAL_TOP_K)
    )
    assert config.num_experts_per_tok == 1 and staged.num_experts_per_tok == 8
    assert (round(counted(config)[0] / 1e9, 2), round(counted(config)[1] / 1e9, 3)) == (19.98, 0.537)
    assert round(counted(staged)[1] / 1e9, 3) == 0.650


def test_parameters_per_rank_of_the_logged_17b_run():
    config = SigmaMoeConfig(
        num_hidden_layers=28,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=96,
        moe_intermediate_size=1024,
        num_experts_per_tok=6,
    )
    with torch.device("meta"):
        model = SigmaMoeForCausalLM(config)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    assert model.num_parameters() - experts + experts // 8 == 3_232_621_568
    assert model.num_parameters() == counted(config)[0] and round(model.num_parameters() / 1e9, 2) == 18.03
    assert round(model.num_active_parameters() / 1e9, 2) == 1.36
    assert round(model.num_active_parameters(include_embeddings=True) / 1e9, 2) == 2.18


@pytest.mark.parametrize("preset", ["sigma-v2-200b", "demo"])
def test_other_presets_have_the_parameters_of_their_shape(preset):
    config = SigmaMoeConfig.from_preset(preset)
    with torch.device("meta"):
        model = SigmaMoeForCausalLM(config)
    assert (model.num_parameters(), model.num_active_parameters()) == counted(config)
    if preset == "sigma-v2-200b":
        assert 195e9 < model.num_parameters() < 210e9


def test_tied_embeddings_are_counted_once():
    model = tiny_model(tie_word_embeddings=True)
    total, active = counted(model.config)
    assert model.num_parameters() == total - 40 * 32
    assert model.num_active_parameters() == active
    assert model.num_active_parameters(include_embeddings=True) == active + 40 * 32


# --- configuration ---------------------------------------------------------------------------------------------------


REFUSALS = [
    ({"num_experts_per_tok_per_layer": [1, 1]}, "num_experts_per_tok_per_layer has 2 entries but num_hidden_layers=3"),
    ({"num_experts_per_tok_per_layer": []}, "num_experts_per_tok_per_layer has 0 entries"),
    ({"num_experts_per_tok_per_layer": [1, 9, 1]}, r"num_experts_per_tok_per_layer.*num_experts=8.*\{1: 9\}"),
    ({"num_experts_per_tok_per_layer": [1, 2, 0]}, r"num_experts_per_tok_per_layer.*num_experts=8.*\{2: 0\}"),
    ({"num_experts_per_tok_per_layer": [1, "2", 1]}, r"num_experts_per_tok_per_layer.*'2'"),
    ({"num_experts_per_tok_per_layer": 2}, "num_experts_per_tok_per_layer.* 2"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 .*num_experts=8"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0"),
    ({"num_experts_per_tok": [1, 2, 1]}, r"num_experts_per_tok.*\[1, 2, 1\]"),
    ({"num_experts_per_tok": 1.5}, "num_experts_per_tok.*1.5"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 .*num_key_value_heads=2"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ({"hidden_size": 30, "head_dim": None}, "hidden_size=30 .*num_attention_heads=4.*Set head_dim"),
    ({"head_dim": 7}, "head_dim=7 is odd"),
    ({"hidden_size": "a"}, "hidden_size.*'a'"),
    ({"hidden_size": "a", "head_dim": None}, "hidden_size.*'a'"),
    ({"num_experts": None}, "num_experts.*None"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob.*'yes'"),
    ({"router_aux_loss_coef": "much"}, "router_aux_loss_coef.*'much'"),
    ({"scoring_func": "relu"}, "scoring_func='relu'.*sigmoid.*softmax"),
    ({"scoring_func": None}, "scoring_func.*None"),
    ({"aux_scoring_func": "tanh"}, "aux_scoring_func='tanh'.*sigmoid.*softmax"),
    ({"router_aux_loss_type": "batch"}, "router_aux_loss_type='batch'.*global_batch.*top1"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
    ({"router_z_loss_coef": -0.1}, "router_z_loss_coef=-0.1"),
    ({"expert_bias_update_rate": -0.1}, "expert_bias_update_rate=-0.1"),
    ({"top1_lbl_temperature": 0.0}, "top1_lbl_temperature=0.0"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
    ({"use_sliding_window": True, "sliding_window": None}, "use_sliding_window=True with sliding_window=None"),
    ({"head_dim": 0}, "head_dim=0"),
    ({"head_dim": -2}, "head_dim=-2"),
    ({"expert_bias_cap": -1.0}, "expert_bias_cap=-1.0"),
]


@pytest.mark.parametrize(
    ("fields", "message"), [pytest.param(*case, id=str(case[0]).replace(" ", "")) for case in REFUSALS]
)
def test_impossible_configurations_are_refused_by_field_and_value(fields, message):
    overrides = {"num_experts_per_tok_per_layer": None, "num_experts_per_tok": 1, **fields}
    with pytest.raises((StrictDataclassError, ValueError)) as refusal:
        tiny_config(**overrides)
    assert re.search(message, str(refusal.value).replace("\n", " "))


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="'tiny' is not known.*demo.*sigma-moe-tiny.*sigma-v2-200b"):
        SigmaMoeConfig.from_preset("tiny")


def test_every_field_survives_the_round_trip(tmp_path):
    changed = {
        "num_experts_per_tok_per_layer": [2, 4, 1],
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "router_aux_loss_type": "top1",
        "aux_scoring_func": "sigmoid",
        "top1_lbl_temperature": 0.3,
        "expert_bias_update_rate": 0.002,
        "expert_bias_cap": 0.5,
        "output_router_logits": True,
        "attention_dropout": 0.1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    config = tiny_config(**changed)
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SigmaMoeConfig
    assert {**again.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert all(getattr(again, name) == value for name, value in changed.items())
    assert again.num_experts_per_tok == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"scoring_func": "relu"}, "scoring_func='relu'"),
        ({"num_experts_per_tok_per_layer": [9, 9, 9]}, "num_experts_per_tok.*num_experts=8.*9"),
        ({"num_experts_per_tok_per_layer": [1]}, "num_experts_per_tok_per_layer has 1 entries"),
    ],
)
def test_impossible_overrides_at_load_time_are_refused(tmp_path, override, message):
    """`from_pretrained` assigns overrides one by one, after the validators ran."""
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        SigmaMoeForCausalLM.from_pretrained(tmp_path, **override)


def test_overriding_experts_per_token_at_load_time_never_does_something_else(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    try:
        model = SigmaMoeForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=1)
    except ValueError as refusal:
        assert "num_experts_per_tok" in str(refusal)
    else:
        assert [router.top_k for router in model.routers] == [1, 1, 1]
    model = SigmaMoeForCausalLM.from_pretrained(tmp_path, num_experts_per_tok_per_layer=[1, 2, 1])
    assert [router.top_k for router in model.routers] == [1, 2, 1]
    assert model.config.num_experts_per_tok == 2


def test_field_names_of_the_sibling_are_understood():
    config = SigmaMoeConfig(n_routed_experts=12, num_experts_per_tok=2)
    assert config.num_experts == config.n_routed_experts == 12
