"""The runs that Sigma-MoE is compared with: same data, tokens, order and learning-rate grid, equal
active parameters at the target sparsity (the initial stage of `progressive` activates more).

An arm is a name, a model and its callbacks. The first is the method; the others are its baselines:

| arm | model | what differs |
|---|---|---|
| `progressive` | Sigma-MoE | more experts in the low layers at first, then top-1; global-batch LBL |
| `lbl_top1` | Sigma-MoE | top-1 from the start, global-batch LBL |
| `top1_lbl` | Sigma-MoE | top-1 from the start, Top-1 LBL |
| `loss_free` | Sigma-MoE | top-1 from the start, DeepSeek-V3's bias instead of a loss |
| `qwen3_moe` | transformers' Qwen3-MoE | 4 times as many experts of a quarter of the size, top-4, renormalised softmax
|
| `dense` | transformers' Qwen3 | one feed-forward network of the size of an expert |
"""

import dataclasses
from collections.abc import Callable

from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    set_seed,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

from ..callbacks import ExpertBalanceCallback, ProgressiveSparsificationCallback


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Experts per token of each layer in the initial stage, and the fraction of the run after which top-1 takes
    over."""

    initial_top_k: list[int]
    switch_at: float


def build_arm(
    name: str, config: SigmaMoeConfig, schedule: Schedule, seed: int
) -> tuple[PreTrainedModel, list[TrainerCallback]]:
    """Model (freshly initialised from `seed`) and callbacks of an arm. `ValueError` for an unknown name."""
    if name not in ARMS:
        raise ValueError(f"arm {name!r} is not known. Choose from {sorted(ARMS)}.")
    set_seed(seed)
    return ARMS[name](config, schedule)


def _changed(config: SigmaMoeConfig, **changes) -> SigmaMoeConfig:
    # Always a copy: the schedule and Trainer write into a model's config, and arms must not see each other's.
    return SigmaMoeConfig(**{**config.to_dict(), **changes})


def _balance_callback() -> ExpertBalanceCallback:
    return ExpertBalanceCallback(record_vectors=True)


def _progressive(config: SigmaMoeConfig, schedule: Schedule):
    stages = [(0, schedule.initial_top_k), (schedule.switch_at, 1)]
    return SigmaMoeForCausalLM(_changed(config)), [
        ProgressiveSparsificationCallback(stages, unit="fraction"),
        _balance_callback(),
    ]


def _lbl_top1(config: SigmaMoeConfig, schedule: Schedule):
    return SigmaMoeForCausalLM(_changed(config)), [_balance_callback()]


def _top1_lbl(config: SigmaMoeConfig, schedule: Schedule):
    return SigmaMoeForCausalLM(_changed(config, router_aux_loss_type="top1")), [_balance_callback()]


def _loss_free(config: SigmaMoeConfig, schedule: Schedule):
    changes = {"router_aux_loss_type": "none", "expert_bias_update_rate": 1e-3}
    return SigmaMoeForCausalLM(_changed(config, **changes)), [_balance_callback()]


_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _shape_of(config: SigmaMoeConfig) -> dict:
    return {field: getattr(config, field) for field in _SHARED_FIELDS}


def _dense(config: SigmaMoeConfig, schedule: Schedule):
    return Qwen3ForCausalLM(Qwen3Config(**_shape_of(config), intermediate_size=config.moe_intermediate_size)), []


def _qwen3_moe(config: SigmaMoeConfig, schedule: Schedule):
    fine_grained = Qwen3MoeConfig(
        **_shape_of(config),
        num_experts=4 * config.num_experts,
        num_experts_per_tok=4,
        moe_intermediate_size=config.moe_intermediate_size // 4,
        norm_topk_prob=True,
        # transformers averages over layers and counts k per token: this is the same pressure per layer as ours.
        router_aux_loss_coef=config.router_aux_loss_coef * config.num_hidden_layers / 4,
        output_router_logits=True,
    )
    return Qwen3MoeForCausalLM(fine_grained), []


ARMS: dict[str, Callable] = {
    "progressive": _progressive,
    "lbl_top1": _lbl_top1,
    "top1_lbl": _top1_lbl,
    "loss_free": _loss_free,
    "qwen3_moe": _qwen3_moe,
    "dense": _dense,
}
