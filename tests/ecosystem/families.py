"""What a model family gives to the ecosystem tests: one entry, and every test runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import hf_models  # noqa: F401  (registers the families)
from hf_models.moe import SigmaMoeConfig


@dataclass(frozen=True)
class Family:
    """A family whose compatibility table is `model_cards/<method>/compatibility.json`."""

    method: str


@dataclass(frozen=True)
class CausalLM(Family):
    """A causal language model with experts.

    Args:
        config: a tiny configuration, its fields overridden by keyword; every kind of layer that the family has.
        smaller: fields of a still smaller model with the same vocabulary, the assistant of assisted generation.
        sliding_window: fields that give it a window of a few tokens; None if the family has none.
        attention: names of the attention's linear layers, as LoRA's `target_modules`.
        experts: names of the 3-D expert parameters, as LoRA's `target_parameters`.
        router: part of the names of what stays in fp32.
    """

    config: Callable[..., PreTrainedConfig]
    smaller: dict[str, Any]
    sliding_window: dict[str, Any] | None = None
    attention: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    experts: list[str] = field(default_factory=lambda: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    router: str = ".mlp.gate."

    def model(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """The same weights for the same seed and fields, in evaluation mode."""
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config(**overrides)).eval()


def sigma_moe_config(**overrides: Any) -> SigmaMoeConfig:
    fields = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        # Both kinds of layer: several experts with normalised weights, and one expert with its raw score.
        "num_experts_per_tok_per_layer": [2, 1],
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # far from 0, so that what comes next depends visibly on what came before
        "router_aux_loss_coef": 0.05,
        "router_z_loss_coef": 0.01,
        "pad_token_id": 0,
    }
    return SigmaMoeConfig(**fields | overrides)


CAUSAL_LMS = [
    CausalLM(
        method="sigma_moe",
        config=sigma_moe_config,
        smaller={"num_hidden_layers": 1, "num_experts_per_tok_per_layer": [1], "hidden_size": 16},
        sliding_window={"use_sliding_window": True, "sliding_window": 5},
    )
]
