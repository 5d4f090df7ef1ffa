# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of MoNE (mixture of neuron experts, arXiv 2510.05781)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

from .configuration_sigma_moe import SigmaMoeConfig


# The names that transformers has for the number of routed experts of a layer.
EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
# Read from a host, so that whoever reads the config alone (serving engines, parameter counts) sees its shape.
_MIRRORED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "hidden_act",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
HOST_DECIDES = (*_MIRRORED, "num_experts_per_tok", "num_experts_per_tok_per_layer")


@strict
class MoneConfig(SigmaMoeConfig):
    r"""
    Configuration of a [`MoneForCausalLM`]: Sigma-MoE whose tokens use a part of the neurons of their active experts;
    or, with `host_config`, another transformers model whose experts do.

    Not to be confused with two other methods of this name: Mixture of Nested Experts (arXiv 2407.19985) and Mixture of
    Novice Experts (arXiv 2507.00390).

    Args:
        neuron_ratio (`float` or `list[float]`, *optional*):
            Share r of the neurons of an expert that a token uses; 0.5 if neither this nor `neuron_top_k` is given.
            The share of the expert's *parameters* is (1 + 2 r) / 3, since the gate projection is always computed
            whole: 2/3 at r = 0.5, one half at r = 0.25. The paper's "50 % of the parameters" may mean either.
        neuron_shared_expert (`bool`, defaults to `False`):
            Choose neurons in the shared experts of a host too. Whether the paper does is not known.
        host_config ([`PreTrainedConfig`] or `dict`, *optional*):
            Configuration of the model that hosts the experts, if it is not Sigma-MoE's own trunk:
            [`MoneForCausalLM.from_moe`] sets it. The shape fields of this config are then the host's.

    Every other field means what it means in [`SigmaMoeConfig`].
    """

    model_type = "mone"
    sub_configs = {"host_config": AutoConfig}
    # The top neurons of an expert are chosen among all of them: tensor parallelism leaves experts whole.
    base_model_tp_plan = {
        name: style for name, style in Qwen3MoeConfig.base_model_tp_plan.items() if ".mlp." not in name
    }

    host_config: dict | PreTrainedConfig | None = None
    neuron_shared_expert: bool = False

    def __post_init__(self, **kwargs):
        if self.neuron_top_k is None and self.neuron_ratio is None:
            self.neuron_ratio = 0.5
        if isinstance(self.host_config, dict):
            self.host_config = AutoConfig.for_model(**self.host_config)
        if self.host_config is not None:
            self._mirror(self.host_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What a host decides is overridden there; here it would be mirrored away.
        if host := config_dict.get("host_config"):
            moved = {name: kwargs.pop(name) for name in list(kwargs) if name in HOST_DECIDES}
            if "num_experts_per_tok" in moved:
                moved.setdefault("num_experts_per_tok_per_layer", None)
            config_dict = {**config_dict, "host_config": {**host, **moved}}
        return super().from_dict(config_dict, **kwargs)

    def _mirror(self, host: PreTrainedConfig) -> None:
        for field in _MIRRORED:
            if hasattr(host, field):
                setattr(self, field, getattr(host, field))
        self.num_experts = number_of_experts(host) or 1
        self.num_experts_per_tok = getattr(host, "num_experts_per_tok", None) or 1
        self.num_experts_per_tok_per_layer = None
        self.moe_intermediate_size = getattr(host, "moe_intermediate_size", None) or host.intermediate_size

    def validate_host(self):
        """A host's routers are its own: what acts inside ours cannot act there."""
        if self.host_config is None:
            return
        if self.aux_k != "sampled" or self.expert_bias_update_rate:
            raise ValueError(
                f"aux_k={self.aux_k!r} and expert_bias_update_rate={self.expert_bias_update_rate} act inside "
                "Sigma-MoE's routers; with host_config they must be 'sampled' and 0."
            )

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The host's configuration, by which caches and embeddings are made; without a host, this one."""
        return self if self.host_config is None else self.host_config.get_text_config(*args, **kwargs)


def number_of_experts(config: PreTrainedConfig) -> int:
    """Experts of a layer by any of the names that transformers has for them; 0 for a dense model."""
    numbers = [getattr(config, name, None) for name in EXPERT_COUNT_FIELDS]
    return next((number for number in numbers if number), 0)


__all__ = ["EXPERT_COUNT_FIELDS", "MoneConfig", "number_of_experts"]
