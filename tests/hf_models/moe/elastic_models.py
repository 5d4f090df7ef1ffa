"""Tiny models of every kind whose number of active experts is a dial, with three layers of experts each."""

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.configuration_m_moe import MMoeConfig
from hf_models.moe.elastic import active_experts, experts_in_force
from hf_models.moe.modeling_m_moe import MMoeForCausalLM


VOCABULARY, EXPERTS, LAYERS, TRAINED_K = 64, 8, 3, 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": TRAINED_K,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far from 0, so that routing depends visibly on the input
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Latent attention, a leading dense layer, a shared expert, two groups of experts of which a token uses one.
LATENT = COMMON | {
    "num_hidden_layers": 1 + LAYERS,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
QWEN = {"num_experts": EXPERTS, "num_hidden_layers": 1 + LAYERS, "mlp_only_layers": [1], "decoder_sparse_step": 1}
FACTORIES = {
    "mixtral": lambda **o: MixtralForCausalLM(
        MixtralConfig(**COMMON | {"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS} | o)
    ),
    "qwen2_moe": lambda **o: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**COMMON | QWEN | {"shared_expert_intermediate_size": 16} | o)
    ),
    "qwen3_moe": lambda **o: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON | QWEN | {"norm_topk_prob": True} | o)),
    "olmoe": lambda **o: OlmoeForCausalLM(
        OlmoeConfig(**COMMON | {"num_hidden_layers": LAYERS, "num_experts": EXPERTS} | o)
    ),
    "deepseek_v2": lambda **o: DeepseekV2ForCausalLM(
        DeepseekV2Config(**LATENT | {"topk_method": "group_limited_greedy"} | o)
    ),
    "deepseek_v3": lambda **o: DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT | o)),
    "glm4_moe": lambda **o: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **COMMON
            | {"num_hidden_layers": 1 + LAYERS, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
            | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
            | o
        )
    ),
    "gpt_oss": lambda **o: GptOssForCausalLM(
        GptOssConfig(**COMMON | {"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS, "sliding_window": 16} | o)
    ),
    "sigma_moe": lambda **o: SigmaMoeForCausalLM(
        SigmaMoeConfig(**_ours() | {"num_hidden_layers": LAYERS, "num_experts": EXPERTS} | o)
    ),
    "m_moe": lambda **o: MMoeForCausalLM(
        MMoeConfig(**_ours() | {"num_hidden_layers": LAYERS, "num_experts": EXPERTS} | o)
    ),
}
OURS = ("sigma_moe", "m_moe")
HOSTS = tuple(name for name in FACTORIES if name not in OURS)
GROUPED = ("deepseek_v2", "deepseek_v3")  # a token uses 4 experts at most


def _ours() -> dict:
    return {name: value for name, value in COMMON.items() if name != "intermediate_size"}


def build(name: str, *, seed: int = 0, **options):
    """A model with weights of its own, in eval mode."""
    torch.manual_seed(seed)
    model = FACTORIES[name](**options).eval()
    with torch.no_grad():  # what starts as zero or one would hide a module that forgets it
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in parameter_name or "sinks" in parameter_name:
                parameter.normal_(std=0.2)
    return model


def batch(rows: int = 2, length: int = 9, *, padding: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with labels; with `padding`, the last row is two tokens shorter (right)."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -2:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def logits_of(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits without gradient."""
    with torch.no_grad():
        return model(batch()["input_ids"] if ids is None else ids).logits


def greedy_without_cache(model, ids: torch.Tensor, number: int, k) -> torch.Tensor:
    """`ids` and the `number` most likely tokens after them at `k` active experts (None: as in force)."""
    with active_experts(model, experts_in_force(model) if k is None else k):
        for _ in range(number):
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids
