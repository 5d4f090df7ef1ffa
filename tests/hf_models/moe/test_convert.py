# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Conversion against an independent forward of the Sigma-V2 family and transformers' Qwen3-MoE, and all refusals."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM, SigmaMoeForSequenceClassification, checkpoint_files
from hf_models.moe import convert as convert_module
from hf_models.moe.convert import convert_checkpoint, export_checkpoint, from_megatron_state_dict, main


VOCAB, HIDDEN, LAYERS, HEADS, GROUPS, DIM, FFN, EXPERTS = 31, 16, 2, 4, 2, 6, 12, 5
TOKENS = torch.tensor([[1, 7, 30, 2, 2, 19, 11, 5], [4, 4, 9, 0, 28, 3, 17, 6]])

SIGMA_CONFIG = {
    "architectures": ["SigmaV2ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 99,
    "max_position_embeddings": 64,
    "model_type": "sigma",
    "moe_intermediate_size": FFN,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 0,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": GROUPS,
    "pad_token_id": 4,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 5000.0,
    "routed_scaling_factor": 1.25,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "transformers_version": "4.33.1",
    "vocab_size": VOCAB,
}


def sigma_tensors(bias: bool = True) -> dict[str, torch.Tensor]:
    """Tensors under the names of the family, large enough that every part of the forward matters."""
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape, mean=0.0, std=0.3):
        return mean + std * torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": tensor(VOCAB, HIDDEN, std=1.0)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}"
        for proj, rows in (("q", HEADS * DIM), ("k", GROUPS * DIM), ("v", GROUPS * DIM)):
            tensors[f"{p}.self_attn.{proj}_proj.weight"] = tensor(rows, HIDDEN)
        tensors[f"{p}.self_attn.o_proj.weight"] = tensor(HIDDEN, HEADS * DIM)
        tensors[f"{p}.self_attn.q_layernorm.weight"] = tensor(DIM, mean=1.0)
        tensors[f"{p}.self_attn.k_layernorm.weight"] = tensor(DIM, mean=1.0)
        tensors[f"{p}.input_layernorm.weight"] = tensor(HIDDEN, mean=1.0)
        tensors[f"{p}.post_attention_layernorm.weight"] = tensor(HIDDEN, mean=1.0)
        tensors[f"{p}.mlp.gate.weight"] = tensor(EXPERTS, HIDDEN)
        if bias:
            tensors[f"{p}.mlp.gate.e_score_correction_bias"] = tensor(EXPERTS, std=0.5)
        for e in range(EXPERTS):
            tensors[f"{p}.mlp.experts.{e}.gate_proj.weight"] = tensor(FFN, HIDDEN)
            tensors[f"{p}.mlp.experts.{e}.up_proj.weight"] = tensor(FFN, HIDDEN)
            tensors[f"{p}.mlp.experts.{e}.down_proj.weight"] = tensor(HIDDEN, FFN)
    tensors["model.norm.weight"] = tensor(HIDDEN, mean=1.0)
    tensors["lm_head.weight"] = tensor(VOCAB, HIDDEN)
    return tensors


def sigma_forward(tensors: dict[str, torch.Tensor], config: dict, tokens: torch.Tensor) -> torch.Tensor:
    """The family's forward as papers and serving code describe it: float64, token by token, no library."""
    w = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    def rotate(x):  # (heads, tokens, dim)
        position = torch.arange(x.shape[1], dtype=torch.float64)
        frequency = config["rope_theta"] ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        angle = position[:, None] * frequency
        first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1
        )

    def attention(x, p):
        def heads(name):
            return (x @ w[f"{p}.{name}_proj.weight"].T).view(len(x), -1, DIM).transpose(0, 1)

        q = rotate(norm(heads("q"), w[f"{p}.q_layernorm.weight"]))
        k = rotate(norm(heads("k"), w[f"{p}.k_layernorm.weight"]))
        v = heads("v")
        out = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = q[head] @ k[group].T / DIM**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v[group])
        return torch.cat(out, dim=-1) @ w[f"{p}.o_proj.weight"].T

    def mixture(u, p):
        logits = u @ w[f"{p}.gate.weight"].T
        scores = logits.sigmoid() if config["scoring_func"] == "sigmoid" else logits.softmax(-1)
        bias = w.get(f"{p}.gate.e_score_correction_bias", torch.zeros(EXPERTS).double())
        out = torch.zeros_like(u)
        for t in range(len(u)):
            chosen = sorted(range(EXPERTS), key=lambda e: -(scores[t, e] + bias[e]).item())
            chosen = chosen[: config["num_experts_per_tok"]]
            total = sum(scores[t, e] for e in chosen)
            for e in chosen:
                g = scores[t, e]
                if config["norm_topk_prob"] and len(chosen) > 1:
                    g = g / total
                expert = f"{p}.experts.{e}"
                gate, up = w[f"{expert}.gate_proj.weight"] @ u[t], w[f"{expert}.up_proj.weight"] @ u[t]
                y = w[f"{expert}.down_proj.weight"] @ (F.silu(gate) * up)
                out[t] += config["routed_scaling_factor"] * g * y
        return out

    logits = []
    for sequence in tokens:
        x = w["model.embed_tokens.weight"][sequence]
        for layer in range(LAYERS):
            p = f"model.layers.{layer}"
            x = x + attention(norm(x, w[f"{p}.input_layernorm.weight"]), f"{p}.self_attn")
            x = x + mixture(norm(x, w[f"{p}.post_attention_layernorm.weight"]), f"{p}.mlp")
        logits.append(norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T)
    return torch.stack(logits)


def write_sigma(folder, tensors=None, shards=1, **overrides):
    folder.mkdir(exist_ok=True)
    config = {**SIGMA_CONFIG, **overrides}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    tensors = sigma_tensors() if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = sorted(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def qwen3_moe(**overrides) -> Qwen3MoeForCausalLM:
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "moe_intermediate_size": FFN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": 3,
        "eos_token_id": [4, 5],
        **overrides,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).eval()


def ours(**overrides) -> SigmaMoeForCausalLM:
    """A model of ours that Qwen3-MoE can express, unless `overrides` say otherwise."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "moe_intermediate_size": FFN,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "initializer_range": 0.3,
        "max_position_embeddings": 64,
        **overrides,
    }
    return SigmaMoeForCausalLM(SigmaMoeConfig(**fields)).eval()


@torch.no_grad()
def logits_of(model, tokens=TOKENS):
    return model.eval()(tokens).logits


def all_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def left_behind(folder):
    """What lies in `folder`, hidden entries too: a conversion that fails leaves nothing beside its destination."""
    return sorted(os.listdir(folder))


# --- Sigma-V2


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_sigma_v2_computes_what_the_family_computes(tmp_path, bias, k, scoring_func):
    tensors = sigma_tensors(bias)
    overrides = {"num_experts_per_tok": k, "scoring_func": scoring_func}
    source = write_sigma(tmp_path / "source", tensors, **overrides)
    convert_checkpoint(source, tmp_path / "ours")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(model, SigmaMoeForCausalLM)
    # Without a bias in the source the model has zeros, and nothing that reads like a damaged file.
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    # fp32 against float64: norms, rotary frequencies and router are fp32 in the model whatever its dtype.
    reference = sigma_forward(tensors, {**SIGMA_CONFIG, **overrides}, TOKENS)
    torch.testing.assert_close(logits_of(model).double(), reference, rtol=1e-5, atol=1e-5)


def test_the_bias_of_the_synthetic_checkpoint_matters():
    with_bias, without = (sigma_forward(sigma_tensors(bias), SIGMA_CONFIG, TOKENS) for bias in (True, False))
    assert (with_bias - without).abs().max() > 0.1


def test_sigma_v2_round_trip_keeps_every_tensor_and_field(tmp_path):
    source = write_sigma(tmp_path / "source", shards=3)
    convert_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "sigma")

    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    unused = {"seq_aux", "sliding_window", "intermediate_size", "transformers_version"}
    assert {k: v for k, v in config.items() if k in SIGMA_CONFIG} == {
        k: v for k, v in SIGMA_CONFIG.items() if k not in unused
    }
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    again, first = (SigmaMoeConfig.from_pretrained(tmp_path / name) for name in ("again", "ours"))
    assert again.to_dict() == first.to_dict()


def test_sharded_index_names_every_tensor_once(tmp_path):
    convert_checkpoint(write_sigma(tmp_path / "source", shards=3), tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    held = {}
    for path in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            held |= dict.fromkeys(shard.keys(), path.name)
    assert index["weight_map"] == held
    assert not any("layernorm" in name for name in held if ".self_attn." in name)
    tensors = sigma_tensors()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_stored_dtype_is_kept_and_the_router_computes_in_fp32(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in sigma_tensors().items()}
    source = write_sigma(tmp_path / "source", tensors, torch_dtype="bfloat16")
    convert_checkpoint(source, tmp_path / "ours")
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "ours").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.routers[0].weight.dtype == model.routers[0].e_score_correction_bias.dtype == torch.float32


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_shared_experts", 1),
        ("first_k_dense_replace", 3),
        ("moe_layer_freq", 2),
        ("n_group", 8),
        ("topk_group", 4),
        ("qk_layernorm", False),
        ("use_sliding_window", True),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("architectures", ["SigmaV2ForImageClassification"]),
        ("norm_topk_prob", "absent"),
        ("scoring_func", "absent"),
        ("rope_theta", "absent"),
        ("num_experts_per_tok", None),
    ],
)
def test_sigma_v2_fields_without_a_counterpart_are_refused_by_name(tmp_path, field, value):
    source = write_sigma(tmp_path / "source", **{field: value})
    with pytest.raises(ValueError, match=field):
        convert_checkpoint(source, tmp_path / "ours")
    assert left_behind(tmp_path) == ["source"]


def test_unknown_fields_are_named_in_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(convert_module.logger, "warning", warnings.append)
    convert_checkpoint(write_sigma(tmp_path / "plain"), tmp_path / "ours")
    assert not warnings
    convert_checkpoint(write_sigma(tmp_path / "source", attention_sink=True), tmp_path / "ours_too")
    assert "attention_sink" in warnings.pop()


def test_a_bias_that_the_source_does_not_select_by_is_refused(tmp_path):
    source = write_sigma(tmp_path / "source", topk_method="greedy")
    with pytest.raises(ValueError, match="e_score_correction_bias is unexpected"):
        convert_checkpoint(source, tmp_path / "ours")


def test_a_bias_in_some_layers_only_is_refused(tmp_path):
    tensors = sigma_tensors()
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias is missing"):
        convert_checkpoint(write_sigma(tmp_path / "source", tensors), tmp_path / "ours")


@pytest.mark.parametrize("format", ["sigma", "qwen3_moe"])
def test_a_schedule_of_experts_per_token_is_not_exported(tmp_path, format):
    model = ours(num_experts_per_tok_per_layer=[3, 1])
    with pytest.raises(ValueError, match="num_experts_per_tok_per_layer"):
        export_checkpoint(model, tmp_path / "out", format)
    assert left_behind(tmp_path) == []


def test_scaled_rope_is_not_exported_to_sigma(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_parameters"):
        export_checkpoint(ours(rope_parameters=rope), tmp_path / "out", "sigma")


def test_a_sliding_window_is_not_exported_to_sigma(tmp_path):
    with pytest.raises(ValueError, match="use_sliding_window"):
        export_checkpoint(ours(use_sliding_window=True, sliding_window=4), tmp_path / "out", "sigma")


# --- Qwen3-MoE


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False},
        {"norm_topk_prob": False, "num_experts_per_tok": 1},
        {"norm_topk_prob": True, "num_experts_per_tok": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"use_sliding_window": True, "sliding_window": 4},
    ],
    ids=lambda fields: ",".join(fields) or "default",
)
@pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"])
def test_qwen3_moe_logits_are_equal_bitwise_there_and_back(tmp_path, fields, max_shard_size):
    theirs = qwen3_moe(**fields)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert isinstance(model, SigmaMoeForCausalLM)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits_of(theirs)
    assert torch.equal(logits_of(model), expected)
    assert model.config.eos_token_id == [4, 5]

    export_checkpoint(tmp_path / "ours", tmp_path / "back", "qwen3_moe")
    back, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert isinstance(back, Qwen3MoeForCausalLM)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(back), expected)
    changed = {"transformers_version", "_name_or_path"}
    original, returned = (Qwen3MoeConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "back"))
    assert {k: v for k, v in returned.items() if k not in changed} == {
        k: pytest.approx(v) if isinstance(v, float) else v for k, v in original.items() if k not in changed
    }


def test_qwen3_moe_balance_loss_keeps_its_weight(tmp_path):
    """For one layer the two definitions of the balance loss agree, once the coefficient is translated."""
    theirs = qwen3_moe(num_hidden_layers=1, num_experts_per_tok=3, router_aux_loss_coef=0.5, output_router_logits=True)
    theirs.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model = SigmaMoeForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.router_aux_loss_coef == pytest.approx(0.5 * 3)
    losses, gradients = [], []
    for each in (theirs, model):
        loss = each.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(each.model.layers[0].mlp.gate.weight.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_qwen3_moe_saved_with_fused_experts_converts_too(tmp_path):
    theirs = qwen3_moe()
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in all_tensors(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert "model.layers.0.mlp.experts.4.up_proj.weight" in all_tensors(tmp_path / "ours")
    assert torch.equal(logits_of(SigmaMoeForCausalLM.from_pretrained(tmp_path / "ours")), logits_of(theirs))


def test_classification_head_converts_with_its_labels(tmp_path):
    labels = {0: "bad", 1: "fair", 2: "good"}
    config = qwen3_moe(pad_token_id=0, id2label=labels, label2id={v: k for k, v in labels.items()}).config
    theirs = Qwen3MoeForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    model = SigmaMoeForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert model.config.id2label == labels
    assert torch.equal(logits_of(model), logits_of(theirs))
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "qwen3_moe")
    assert torch.equal(
        logits_of(Qwen3MoeForSequenceClassification.from_pretrained(tmp_path / "back")), logits_of(theirs)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [1]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_qwen3_moe_fields_without_a_counterpart_are_refused_by_name(tmp_path, fields):
    qwen3_moe(**fields).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=next(iter(fields))):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert left_behind(tmp_path) == ["theirs"]


@pytest.mark.parametrize("field, value", [("scoring_func", "sigmoid"), ("routed_scaling_factor", 2.5)])
def test_what_qwen3_moe_cannot_express_is_not_exported(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        export_checkpoint(ours(**{field: value}), tmp_path / "out", "qwen3_moe")
    assert left_behind(tmp_path) == []


def test_an_expert_bias_in_use_is_not_exported_to_qwen3_moe(tmp_path):
    model = ours()
    model.routers[1].e_score_correction_bias[2] = 0.5
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias"):
        export_checkpoint(model, tmp_path / "out", "qwen3_moe")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("fields", [{"neuron_top_k": 3}, {"neuron_ratio": [0.5, 1.0]}], ids=str)
@pytest.mark.parametrize("format", ["sigma", "qwen3_moe"])
def test_a_choice_of_neurons_is_not_exported(tmp_path, format, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*{format}"):
        export_checkpoint(ours(num_hidden_layers=2, **fields), tmp_path / "out", format)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("format", ["sigma", "qwen3_moe"])
def test_one_expert_per_token_is_exported_without_normalisation(tmp_path, format):
    model = ours(num_experts_per_tok=1, norm_topk_prob=True)
    export_checkpoint(model, tmp_path / "out", format)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_topk_prob"] is False
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert torch.equal(logits_of(SigmaMoeForCausalLM.from_pretrained(tmp_path / "back")), logits_of(model))


def test_losses_that_qwen3_moe_cannot_express_are_named(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(convert_module.logger, "warning", warnings.append)
    export_checkpoint(ours(router_aux_loss_type="top1", router_z_loss_coef=1e-3), tmp_path / "out", "qwen3_moe")
    assert "router_z_loss_coef" in warnings[0] and "router_aux_loss_coef" in warnings[0]
    assert Qwen3MoeConfig.from_pretrained(tmp_path / "out").router_aux_loss_coef == 0


# --- Megatron


def megatron_state_dict(model: SigmaMoeForCausalLM) -> dict[str, torch.Tensor]:
    """What Megatron-LM would hold, built head by head and expert by expert."""
    w, out = model.state_dict(), {}
    for layer in range(LAYERS):
        p, m = f"model.layers.{layer}", f"decoder.layers.{layer}"
        q, k, v = (w[f"{p}.self_attn.{name}_proj.weight"] for name in "qkv")
        rows, per_group = [], HEADS // GROUPS
        for group in range(GROUPS):
            rows += [q[h * DIM : (h + 1) * DIM] for h in range(group * per_group, (group + 1) * per_group)]
            rows += [part[group * DIM : (group + 1) * DIM] for part in (k, v)]
        out[f"{m}.self_attention.linear_qkv.weight"] = torch.cat(rows)
        out[f"{m}.self_attention.linear_qkv.layer_norm_weight"] = w[f"{p}.input_layernorm.weight"]
        out[f"{m}.self_attention.linear_qkv._extra_state"] = None
        out[f"{m}.self_attention.q_layernorm.weight"] = w[f"{p}.self_attn.q_norm.weight"]
        out[f"{m}.self_attention.k_layernorm.weight"] = w[f"{p}.self_attn.k_norm.weight"]
        out[f"{m}.self_attention.linear_proj.weight"] = w[f"{p}.self_attn.o_proj.weight"]
        out[f"{m}.pre_mlp_layernorm.weight"] = w[f"{p}.post_attention_layernorm.weight"]
        out[f"{m}.mlp.router.weight"] = w[f"{p}.mlp.gate.weight"]
        out[f"{m}.mlp.router.expert_bias"] = w[f"{p}.mlp.gate.e_score_correction_bias"]
        up, down = torch.empty(EXPERTS, HIDDEN, 2 * FFN), torch.empty(EXPERTS, FFN, HIDDEN)
        for e in range(EXPERTS):
            up[e] = w[f"{p}.mlp.experts.gate_up_proj"][e].T
            down[e] = w[f"{p}.mlp.experts.down_proj"][e].T
        out[f"{m}.mlp.experts.weight1"] = up.view(HIDDEN, -1)
        out[f"{m}.mlp.experts.weight2"] = down.view(-1, HIDDEN)
    out["embedding.word_embeddings.weight"] = w["model.embed_tokens.weight"]
    out["decoder.final_layernorm.weight"] = w["model.norm.weight"]
    out["output_layer.weight"] = w["lm_head.weight"]
    return out


def randomized(model):
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor)
    return model


def test_megatron_names_are_inverted_exactly():
    model = randomized(ours())
    converted = from_megatron_state_dict(megatron_state_dict(model), model.config)
    other = ours()
    other.load_state_dict(converted, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(logits_of(other), logits_of(model))


def test_megatron_without_bias_and_with_tied_embeddings():
    model = ours(tie_word_embeddings=True)
    state_dict = megatron_state_dict(model)
    del state_dict["output_layer.weight"]
    state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith("expert_bias")}
    other = ours(tie_word_embeddings=True)
    other.load_state_dict(from_megatron_state_dict(state_dict, model.config), strict=True)
    assert torch.equal(logits_of(other), logits_of(model))


def test_megatron_state_dicts_that_do_not_fit_are_refused():
    model = ours()
    good = megatron_state_dict(model)
    qkv, weight1 = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.experts.weight1"
    with pytest.raises(ValueError, match=rf"{qkv} is missing.*\(48, 16\)"):
        from_megatron_state_dict({name: tensor for name, tensor in good.items() if name != qkv}, model.config)
    with pytest.raises(ValueError, match=rf"{weight1} has shape \(16, 40\).*\(16, 120\)"):
        from_megatron_state_dict({**good, weight1: good[weight1][:, :40]}, model.config)  # one expert-parallel rank
    with pytest.raises(ValueError, match="no place in sigma_moe.*shared_experts"):
        from_megatron_state_dict({**good, "decoder.layers.0.mlp.shared_experts.weight": torch.ones(1)}, model.config)
    with pytest.raises(ValueError, match="attention_bias"):
        from_megatron_state_dict(good, ours(attention_bias=True).config)


# --- files


def test_converted_folder_carries_code_and_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models

    source = write_sigma(tmp_path / "source")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))).save_pretrained(
        source
    )
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (source / "training_args.bin").write_bytes(b"a token in clear")
    (source / "modeling_sigma.py").write_text("code of another model")
    convert_checkpoint(source, tmp_path / "converted")
    SigmaMoeForCausalLM.from_pretrained(tmp_path / "converted").save_pretrained(tmp_path / "saved")
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(tmp_path / "converted")) == set(os.listdir(tmp_path / "saved")) | tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").convert_tokens_to_ids(["b"]) == [1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("converted", "saved")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "model_type, message", [("sigma_moe", "sigma_moe checkpoint already"), ("olmoe", "not known")]
)
def test_other_model_types_are_refused(tmp_path, model_type, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(write_sigma(tmp_path / "source", model_type=model_type), tmp_path / "ours")
    if model_type == "olmoe":
        with pytest.raises(ValueError, match="olmoe"):
            export_checkpoint(tmp_path / "source", tmp_path / "ours", "sigma")


def test_unknown_export_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mixtral.*Choose"):
        export_checkpoint(ours(), tmp_path / "out", "mixtral")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_that_do_not_fit_are_named_before_anything_is_written(tmp_path, damage, shards):
    name = "model.layers.1.self_attn.q_layernorm.weight"
    tensors = sigma_tensors()
    if damage == "missing":
        del tensors[name]
        message = rf"{name} is missing, expected shape \(6,\)"
    elif damage == "unexpected":
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(HEADS * DIM)
        message = "q_proj.bias is unexpected"
    else:
        tensors[name] = torch.ones(DIM + 1)
        message = rf"{name} has shape \(7,\), expected \(6,\)"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(write_sigma(tmp_path / "source", tensors, shards), tmp_path / "ours")
    assert left_behind(tmp_path) == ["source"]


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    tensors = sigma_tensors()
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(DIM)
    with pytest.raises(ValueError, match="are the same tensor"):
        convert_checkpoint(write_sigma(tmp_path / "source", tensors), tmp_path / "ours")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Hub id"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "ours")
    source = write_sigma(tmp_path / "source", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors"):
        convert_checkpoint(source, tmp_path / "ours")
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        convert_checkpoint(source, tmp_path / "ours")
    assert left_behind(tmp_path) == ["source"]


def test_a_hub_id_is_read_config_first_and_at_one_commit(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    write_sigma(snapshot, n_shared_experts=2)
    calls = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(checkpoint_files, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="n_shared_experts"):
        convert_checkpoint("a/b", tmp_path / "ours", revision="main")
    assert calls == [("a/b", "main", ["*.json"])]  # refused before any weight was downloaded
    write_sigma(snapshot)
    convert_checkpoint("a/b", tmp_path / "ours", revision="main")
    repo_id, revision, patterns = calls[-1]
    assert (repo_id, revision) == ("a/b", "0123abc") and "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", "*")) and pattern[0] == "*" for pattern in patterns)


def test_truncated_shard_and_broken_json_are_named(tmp_path):
    source = write_sigma(tmp_path / "source")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or incomplete"):
        convert_checkpoint(source, tmp_path / "ours")
    (source / "config.json").write_text('{"model_type": "sig')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        convert_checkpoint(source, tmp_path / "ours")


def test_an_index_that_contradicts_its_shards_is_refused(tmp_path):
    source = write_sigma(tmp_path / "source", shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = first if index["weight_map"]["lm_head.weight"] == second else second
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="disagree.*lm_head.weight"):
        convert_checkpoint(source, tmp_path / "ours")
    path.write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        convert_checkpoint(source, tmp_path / "ours")


def test_pickles_are_refused_by_name(tmp_path):
    source = write_sigma(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*save_pretrained"):
        convert_checkpoint(source, tmp_path / "ours")
    weight_map = {"model.embed_tokens.weight": "pytorch_model.bin"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="pytorch_model.bin.*run code"):
        convert_checkpoint(source, tmp_path / "ours")


@pytest.mark.parametrize("name", ["../stolen.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", "", 3])
def test_file_names_of_an_index_that_leave_the_folder_are_refused(tmp_path, name):
    source = write_sigma(tmp_path / "source", shards=2)
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match="plain file name|not a safetensors"):
        convert_checkpoint(source, tmp_path / "ours")


def test_absolute_paths_and_links_are_refused(tmp_path):
    elsewhere = write_sigma(tmp_path / "elsewhere")
    source = write_sigma(tmp_path / "source")
    weights = source / "model.safetensors"
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": str(elsewhere / "model.safetensors")}}))
    with pytest.raises(ValueError, match="plain file name"):
        convert_checkpoint(source, tmp_path / "ours")
    index.unlink()
    weights.unlink()
    weights.symlink_to(elsewhere / "model.safetensors")
    with pytest.raises(ValueError, match="is a link"):
        convert_checkpoint(source, tmp_path / "ours")
    weights.unlink()
    shutil.copy(elsewhere / "model.safetensors", weights)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (source / "tokenizer.json").symlink_to(secret)
    with pytest.raises(ValueError, match="tokenizer.json is a link"):
        convert_checkpoint(source, tmp_path / "ours")
    assert left_behind(tmp_path) == ["elsewhere", "secret", "source"]


def test_links_of_a_hub_cache_are_followed_into_its_blobs_only(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    write_sigma(snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    convert_checkpoint(snapshot, tmp_path / "ours")
    (blobs / "model.safetensors").rename(tmp_path / "outside")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link"):
        convert_checkpoint(snapshot, tmp_path / "ours_too")


def test_an_occupied_destination_is_kept_unless_told_otherwise(tmp_path):
    source = write_sigma(tmp_path / "source")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="not empty.*overwrite"):
        convert_checkpoint(source, occupied)
    with pytest.raises(FileExistsError, match="is a file"):
        convert_checkpoint(source, occupied / "thesis.txt")
    for inside in (source, tmp_path):
        with pytest.raises(ValueError, match="is or contains the source"):
            convert_checkpoint(source, inside, overwrite=True)
    assert os.listdir(occupied) == ["thesis.txt"]
    convert_checkpoint(source, occupied, overwrite=True)
    assert AutoConfig.from_pretrained(occupied).model_type == "sigma_moe"
    assert not (occupied / "thesis.txt").exists()
    assert left_behind(tmp_path) == ["occupied", "source"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_half_way_leaves_no_half_checkpoint(tmp_path, monkeypatch, existing):
    source = write_sigma(tmp_path / "source", shards=3)
    destination = tmp_path / "ours"
    if existing:
        destination.mkdir()
        (destination / "old").write_text("kept")
    written = []

    def full_disk(tensors, path, metadata=None):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(source, destination, overwrite=True)
    assert left_behind(tmp_path) == (["ours", "source"] if existing else ["source"])
    assert not existing or os.listdir(destination) == ["old"]


def test_only_one_shard_is_held_at_a_time(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(
        checkpoint_files, "save_file", lambda tensors, path, metadata=None: held.append(len(tensors)) or path.touch()
    )
    convert_checkpoint(write_sigma(tmp_path / "source", shards=4), tmp_path / "ours")
    assert len(held) == 4 and max(held) <= len(sigma_tensors()) // 4 + 1


def test_command_line(tmp_path, capsys):
    source = write_sigma(tmp_path / "source", scoring_func="softmax", routed_scaling_factor=1.0, topk_method="greedy")
    save_file(sigma_tensors(bias=False), source / "model.safetensors")
    main([str(source), str(tmp_path / "ours")])
    main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "qwen3_moe"])
    assert "theirs" in capsys.readouterr().err
    theirs = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "theirs")
    config = {**SIGMA_CONFIG, "scoring_func": "softmax", "routed_scaling_factor": 1.0}
    reference = sigma_forward(sigma_tensors(bias=False), config, TOKENS)
    torch.testing.assert_close(logits_of(theirs).double(), reference, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit) as stopped:
        main([str(source), str(tmp_path / "ours")])
    assert stopped.value.code == 1
    assert "error: " in (message := capsys.readouterr().err) and "--overwrite" in message
