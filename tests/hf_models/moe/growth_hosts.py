# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models of every family that grows, for the tests of growth."""

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from hf_models.moe import MoneConfig, SigmaMoeConfig
from hf_models.moe.configuration_m_moe import MMoeConfig


VOCAB, EXPERTS = 37, 6
TOKENS = torch.tensor([[3, 7, 30, 2, 2, 19, 11, 5], [4, 4, 9, 8, 28, 3, 17, 6]])

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_DENSE = _SHAPE | {"intermediate_size": 12, "moe_intermediate_size": 8}
_LATENT = _DENSE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_OURS = _SHAPE | {"moe_intermediate_size": 8, "num_experts": EXPERTS}

# name: (class of the configuration, its fields)
HOSTS = {
    "qwen2_moe": (
        Qwen2MoeConfig,
        _DENSE | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        _DENSE | {"num_experts": EXPERTS, "head_dim": 4, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "olmoe": (OlmoeConfig, _SHAPE | {"intermediate_size": 8, "num_experts": EXPERTS}),
    "mixtral": (MixtralConfig, _SHAPE | {"intermediate_size": 8, "num_local_experts": EXPERTS}),
    "deepseek_v2": (DeepseekV2Config, _LATENT),
    "deepseek_v2-groups": (
        DeepseekV2Config,
        _LATENT | {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    ),
    "deepseek_v3": (DeepseekV3Config, _LATENT | {"n_group": 3, "topk_group": 3}),
    "deepseek_v3-plain": (DeepseekV3Config, _LATENT | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "sigma_moe": (SigmaMoeConfig, _OURS),
    "sigma_moe-plain": (SigmaMoeConfig, _OURS | {"norm_topk_prob": False}),
    "sigma_moe-softmax": (SigmaMoeConfig, _OURS | {"norm_topk_prob": False, "scoring_func": "softmax"}),
    "sigma_moe-top1": (SigmaMoeConfig, _OURS | {"num_experts_per_tok": 1}),
    "mone": (MoneConfig, _OURS | {"neuron_top_k": [6, 4, 3]}),
    "m_moe": (MMoeConfig, _OURS | {"k_min": 1, "k_max": 4}),
}


def host_config(name: str, **overrides) -> PreTrainedConfig:
    config_class, fields = HOSTS[name]
    return config_class(**{**fields, **overrides})


def host(name: str, **overrides) -> PreTrainedModel:
    """A random model whose balancing biases, if it has any, take part."""
    model = AutoModelForCausalLM.from_config(host_config(name, **overrides)).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model.eval()(tokens).logits
