"""Which weights are chosen in the models that people train, and how fused ones are cut."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.optimizers import msign_, select_targets
from trainers.optimizers.restoration import RestorationOptions, restore_views


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GQA = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**GQA, "moe_intermediate_size": 8}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4, "qk_nope_head_dim": 4}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


def modernbert():
    ends = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return ModernBertForMaskedLM(ModernBertConfig(**SMALL, **ends, intermediate_size=24))


def deepseek():
    routing = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    options = MOE | MLA | routing | {"first_k_dense_replace": 1, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**options))


def sigma_moe():
    config = SigmaMoeConfig(**{key: value for key, value in MOE.items()}, head_dim=4, num_experts=4)
    return SigmaMoeForCausalLM(config)


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GQA)),
    "gpt2": gpt2,
    "modernbert": modernbert,
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GQA)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**GQA, num_local_experts=4, head_dim=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=8)),
    "deepseek": deepseek,
    "sigma_moe": sigma_moe,
}
# In the second layer: the target, and the shapes of its matrices.
ATTENTION = {
    "llama": {"q_proj": [(16, 16)], "k_proj": [(8, 16)], "v_proj": [(8, 16)], "o_proj": [(16, 16)]},
    "gpt2": {"c_attn": [(16, 16)] * 3, "c_proj": [(16, 16)]},
    "modernbert": {"Wqkv": [(16, 16)] * 3, "Wo": [(16, 16)]},
    "phi3": {"qkv_proj": [(16, 16), (8, 16), (8, 16)], "o_proj": [(16, 16)]},
    "deepseek": {
        "q_a_proj": [(8, 16)],
        "q_b_proj": [(32, 8)],
        "kv_a_proj_with_mqa": [(12, 16)],
        "kv_b_proj": [(32, 8)],
        "o_proj": [(16, 16)],
    },
}
for moe in ("gpt_oss", "qwen2_moe", "sigma_moe"):
    ATTENTION[moe] = ATTENTION["llama"]
SHARED_EXPERT = {"gate_proj": [(8, 16)], "up_proj": [(8, 16)], "down_proj": [(16, 8)]}
EXPERTS = {"gate_up_proj": [(4, 8, 16)] * 2, "down_proj": [(4, 16, 8)]}
FEED_FORWARD = {
    "llama": {"gate_proj": [(32, 16)], "up_proj": [(32, 16)], "down_proj": [(16, 32)]},
    "gpt2": {"c_fc": [(16, 64)], "c_proj": [(64, 16)]},
    "modernbert": {"Wi": [(24, 16)] * 2, "Wo": [(16, 24)]},
    "phi3": {"gate_up_proj": [(32, 16)] * 2, "down_proj": [(16, 32)]},
    "gpt_oss": {"gate_up_proj": [(4, 16, 32)] * 2, "down_proj": [(4, 32, 16)]},
    "qwen2_moe": {"experts": EXPERTS, "shared_expert": SHARED_EXPERT},
    "deepseek": {"experts": EXPERTS, "shared_experts": SHARED_EXPERT},
    "sigma_moe": EXPERTS,
}


def shapes_in_second_layer(targets, inside):
    found = {}
    for target in targets:
        path = target.name.removesuffix(".weight").split(".")
        if "1" in path and any(inside in segment.lower() for segment in path):
            kind = next((segment for segment in path if "shared_expert" in segment), "experts")
            matrices = [tuple(view.shape) for _, view in target.matrices(target.parameter)]
            found.setdefault(kind, {})[path[-1]] = matrices
    return found


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_feed_forward_matrices_are_the_targets_and_nothing_else(name):
    model = MODELS[name]()
    attention = select_targets(model)
    assert shapes_in_second_layer(attention, "attn") == {"experts": ATTENTION[name]}
    assert len(attention) == 2 * len(ATTENTION[name])
    everything = select_targets(model, "all_2d")
    expected = FEED_FORWARD[name] if "experts" in FEED_FORWARD[name] else {"experts": FEED_FORWARD[name]}
    assert shapes_in_second_layer(everything, "mlp") == expected
    assert all("attn" in target.name or "mlp" in target.name for target in everything)
    assert {target.name for target in attention} < {target.name for target in everything}
    named = dict(model.named_parameters())
    assert all(target.parameter is named[target.name] for target in everything)
    assert [target.name for target in everything] == [n for n in named if n in {target.name for target in everything}]


def test_cutting_gives_views_of_the_weight_that_the_model_uses():
    model = MODELS["gpt_oss"]()
    target = next(target for target in select_targets(model, "all_2d") if "gate_up" in target.name)
    weight = target.parameter.detach()
    (_, gate), (_, up) = target.matrices(weight)
    assert torch.equal(gate, weight[..., ::2]) and torch.equal(up, weight[..., 1::2])
    gate.zero_()
    assert not weight[..., ::2].any() and weight[..., 1::2].any()


@pytest.mark.parametrize(("name", "layer"), [("gpt2", "c_attn"), ("modernbert", "Wqkv"), ("phi3", "qkv_proj")])
def test_a_fused_weight_becomes_the_signs_of_its_matrices(name, layer):
    model = MODELS[name]()
    target = next(target for target in select_targets(model) if layer in target.name)
    before = target.parameter.detach().clone()
    restore_views([view for _, view in target.matrices(target.parameter.detach())], RestorationOptions())
    # Outputs of a layer of GPT-2 are columns; the sign of a transpose is the transpose of the sign.
    old, new = (before.mT, target.parameter.detach().mT) if name == "gpt2" else (before, target.parameter.detach())
    sizes = (16, 8, 8) if name == "phi3" else (16, 16, 16)
    separate = torch.cat([msign_(part.clone()) for part in old.split(sizes)])
    torch.testing.assert_close(new, separate, rtol=1e-4, atol=1e-6)
    whole = msign_(old.clone())
    assert (whole - separate).norm() / separate.norm() > 0.2
    # What the layer computes: its queries come from the sign of W_Q alone.
    hidden = torch.randn(5, 16)
    out = dict(model.named_modules())[target.name.removesuffix(".weight")](hidden)
    bias = model.transformer.h[0].attn.c_attn.bias if name == "gpt2" else 0.0
    torch.testing.assert_close((out - bias)[:, :16], hidden @ msign_(old[:16].clone()).mT, rtol=1e-4, atol=1e-5)


def test_of_other_modules():
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4), 2, enable_nested_tensor=False)
    targets = select_targets(layer)
    assert [len(target.parts or ()) for target in targets] == [3, 0, 3, 0]  # in_proj_weight and out_proj
    convolution = nn.ModuleList([nn.Conv1d(4, 4, 3), nn.Linear(4, 4), nn.LayerNorm(4)])
    assert [target.name for target in select_targets(convolution, "all_2d")] == ["1.weight"]


def test_other_choices_regular_expressions_and_functions():
    model = MODELS["llama"]()
    assert [t.name for t in select_targets(model, r"layers\.1\.mlp\.(up|down)")] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    square = select_targets(model, lambda name, p: p.shape == (16, 16))
    assert {t.name.split(".")[-2] for t in square} == {"q_proj", "o_proj"}
    with pytest.raises(ValueError, match="selects no trainable matrix"):
        select_targets(model, "embed|lm_head")
    assert [t.name for t in select_targets(model, "embed|lm_head", exclude=["router"])] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    routers = select_targets(MODELS["sigma_moe"](), r"mlp\.gate", exclude=["head"])
    assert [t.name for t in routers] == [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]


def test_a_tied_head_is_no_target_either():
    model = LlamaForCausalLM(LlamaConfig(**GQA, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="selects no trainable matrix"):
        select_targets(model, "embed|lm_head", exclude=["router", "adapter", "embedding"])


def test_adapters_and_frozen_weights_stay_out():
    model = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for targets in ("attention", "all_2d", "q_proj"):
        with pytest.raises(ValueError, match="what is frozen"):
            select_targets(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    names = [target.name for target in select_targets(model)]
    assert len(names) == 8 and not any("lora" in name for name in names)
    assert any("lora" in t.name for t in select_targets(model, "q_proj", exclude=["head"]))


def test_splits_that_the_user_knows():
    model = MODELS["deepseek"]()
    targets = select_targets(model, split={"kv_a_proj": (8, 4), "q_b_proj": 4, r"0\.self_attn\.o_proj": None})
    cut = {t.name.split(".", 2)[-1]: [tuple(v.shape) for _, v in t.matrices(t.parameter)] for t in targets}
    assert cut["1.self_attn.kv_a_proj_with_mqa.weight"] == [(8, 16), (4, 16)]
    assert cut["1.self_attn.q_b_proj.weight"] == [(8, 8)] * 4
    assert cut["0.self_attn.o_proj.weight"] == [(16, 16)]
    whole = select_targets(MODELS["phi3"](), split={"qkv": None})
    assert all(target.parts is None for target in whole)
    for wrong in ((8, 5), 5, (0, 12)):
        with pytest.raises(ValueError, match="does not add up"):
            select_targets(model, split={"kv_a_proj": wrong})


def test_a_weight_that_is_fused_in_the_model_s_own_way_is_refused():
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=32, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ValueError, match=r"query_key_value.weight is several matrices.*split="):
        select_targets(model)
    assert len(select_targets(model, split={"query_key_value": None})) == 4


def test_flattened_shards_are_refused_with_the_remedy():
    flat = MODELS["llama"]()
    layer = flat.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[:100])  # as FSDP1 and ZeRO-3 leave it
    with pytest.raises(ValueError, match=r"flattened into shards.*FSDP2"):
        select_targets(flat)
    whole = nn.Module()
    whole._flat_param = nn.Parameter(torch.randn(100))
    with pytest.raises(ValueError, match=r"flattened into shards.*FSDP2"):
        select_targets(whole)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="norm"):
        select_targets(MODELS["llama"](), exclude=["norm"])
