# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Sigma-MoE (Sigma-MoE-Tiny, arXiv 2512.16248, and its sibling Sigma-V2)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig


SCORE_FUNCTIONS = ("sigmoid", "softmax")
AUX_LOSS_TYPES = ("none", "switch", "sequence", "global_batch", "top1")
NEURON_SELECTIONS = ("abs_act", "abs_gate", "act", "abs_product")
NEURON_AUX_MODES = ("normalized", "literal")
K_SAMPLINGS = ("none", "global_batch", "micro_batch", "layer")
K_DISTRIBUTIONS = ("uniform", "capacity")
AUX_KS = ("sampled", "max")

# "sigma-moe-tiny": the shape as summaries of the report give it, vocabulary and initialisation as in the family;
# head_dim 96 is inferred, the one value that gives the published parameter counts. "sigma-v2-200b": the configuration
# file of the 200B sibling. "demo": what two CPU cores train in minutes; "evidence": in one, for comparisons of many
# runs; "evidence-small": to 20 tokens an active parameter in two.
PRESETS = {
    "sigma-moe-tiny": {
        "hidden_size": 1536,
        "num_hidden_layers": 56,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "moe_intermediate_size": 768,
        "num_experts": 96,
        "num_experts_per_tok": 1,
        "initializer_range": 0.0125,
    },
    "sigma-v2-200b": {
        "hidden_size": 5120,
        "num_hidden_layers": 63,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "moe_intermediate_size": 2160,
        "num_experts": 96,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "initializer_range": 0.0125,
    },
    "demo": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": 128,
        "num_experts": 32,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 1e-2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "evidence": {
        "vocab_size": 2048,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "moe_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 1e-2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    "evidence-small": {
        "vocab_size": 1024,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "max_position_embeddings": 1024,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 1e-2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}

# Experts per token of the first layers before the switch to top-1. From memory of the authors' runs, not seen in
# print: it is supported by the published layer-0 value of 8 and by the published 0.65B active parameters, which it
# gives exactly.
SIGMA_MOE_TINY_INITIAL_TOP_K = [8, 8, 6, 6, 4, 4, 2, 2] + [1] * 48


@strict
class SigmaMoeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SigmaMoeModel`]: a decoder whose every feed-forward layer is a mixture of SwiGLU experts, with
    as few as one active expert per token, and its own number of active experts in each layer.

    Args:
        num_experts_per_tok (`int`, defaults to 1):
            Active experts per token; with `num_experts_per_tok_per_layer`, the largest of them.
        num_experts_per_tok_per_layer (`list[int]`, *optional*):
            Active experts per token of each layer, length `num_hidden_layers`. `None`: the same everywhere.
        scoring_func (`str`, defaults to `"sigmoid"`):
            Score that selects experts and weighs their outputs: `"sigmoid"` or `"softmax"` over all experts, in fp32.
        norm_topk_prob (`bool`, defaults to `True`):
            Divide the weights of the selected experts by their sum, in layers with more than one. With one expert the
            weight is the raw score: divided by itself it would be the constant 1 and the router would get no gradient.
        norm_top1_prob (`bool`, defaults to `False`):
            With `norm_topk_prob`, make that weight 1 all the same, in every layer with one expert: what a model needs
            that also runs with several, whose weights add up to 1. Where one expert is active, only the balance loss
            then trains the router.
        routed_scaling_factor (`float`, defaults to 1.0):
            Multiplies the expert weights.
        router_aux_loss_type (`str`, defaults to `"global_batch"`):
            `"none"`, `"switch"`, `"sequence"`, `"global_batch"` or `"top1"`: see `hf_models.moe.balance`.
        router_aux_loss_coef (`float`, defaults to 0.001):
            Weight of the load-balancing loss **of each layer**; layers are summed, as in the authors' code
            (transformers' own models average over layers: divide by `num_hidden_layers` to compare).
        aux_scoring_func (`str`, defaults to `"softmax"`):
            Score function inside the load-balancing loss, apart from `scoring_func`.
        top1_lbl_temperature (`float`, defaults to 0.1):
            Temperature of the `"top1"` loss.
        router_z_loss_coef (`float`, defaults to 0.0):
            Weight of the router z-loss of each layer.
        expert_bias_update_rate (`float`, defaults to 0.0):
            Step of the loss-free bias `e_score_correction_bias`, applied once per optimizer step by
            `ExpertBalanceCallback`.
        expert_bias_cap (`float`, *optional*):
            Bound on the absolute value of that bias.
        output_router_logits (`bool`, defaults to `False`):
            Return the router logits and, with labels, add the auxiliary losses also outside training.
        neuron_top_k (`int` or `list[int]`, *optional*):
            MoNE (arXiv 2510.05781): neurons that each token keeps inside an active expert, one number or one per
            layer; `moe_intermediate_size` or more, or `None`: all. See [`MoneConfig`].
        neuron_ratio (`float` or `list[float]`, *optional*):
            The same as a share of `moe_intermediate_size`, in (0, 1]. One of the two at most.
        neuron_select_on (`str`, defaults to `"abs_act"`):
            What ranks neurons: `"abs_act"` (|act(gate)|, the paper's), `"abs_gate"`, `"act"` or `"abs_product"`
            (|act(gate) * up|).
        neuron_aux_loss_coef (`float`, defaults to 0.0), neuron_aux_mode (`str`, defaults to `"normalized"`):
            Weight and form (`"normalized"` or `"literal"`) of the neuron-level balance loss, averaged over layers: see
            `hf_models.moe.neurons`.
        k_sampling (`str`, defaults to `"none"`):
            M-MoE (arXiv 2509.26520): how training draws the active experts per token: one number for an optimizer step
            (`"global_batch"`), for a micro-batch (`"micro_batch"`), or one for each layer of a micro-batch
            (`"layer"`). `MatryoshkaExpertsCallback` draws; see [`MMoeConfig`].
        k_min (`int`, *optional*), k_max (`int`, *optional*):
            Range of the draw; `None`: 1 and `num_experts_per_tok`.
        k_distribution (`str`, defaults to `"uniform"`), k_tau (`float`, defaults to 2.0):
            `"uniform"`, or `"capacity"`: probability proportional to k^(1 / k_tau).
        k_budget (`float`, *optional*):
            Activation budget: at most `k_budget` times the expected number of active experts, over all layers.
        k_seed (`int`, defaults to 0):
            Seed of the draws, which are the same on every rank.
        aux_k (`str`, defaults to `"sampled"`):
            Balance the experts chosen at the drawn k (`"sampled"`) or at `k_max` (`"max"`).

    Every other field means what it means in [`Qwen3MoeConfig`]. Field names of Sigma-V2 files (`n_routed_experts`) are
    understood.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type.
        StrictDataclassClassValidationError: values that do not fit together; the message names the field and the
        remedy.
    """

    model_type = "sigma_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"n_routed_experts": "num_experts", "num_local_experts": "num_experts"}

    # The plans follow the names of the modules, which are Qwen3-MoE's; taken from the installed release, whose plan
    # vocabulary moves between versions.
    base_model_tp_plan = {
        name: style
        for name, style in Qwen3MoeConfig.base_model_tp_plan.items()
        if not name.startswith("layers.*.mlp.") or ".experts" in name or ".gate." in name
    }
    base_model_ep_plan = dict(getattr(Qwen3MoeConfig, "base_model_ep_plan", None) or {})
    base_model_pp_plan = dict(Qwen3MoeConfig.base_model_pp_plan)

    vocab_size: int = 200064
    hidden_size: int = 1536
    num_hidden_layers: int = 56
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.0125
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    moe_intermediate_size: int = 768
    num_experts: int = 96
    num_experts_per_tok: int = 1
    num_experts_per_tok_per_layer: list[int] | None = None
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    norm_top1_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    router_aux_loss_type: str = "global_batch"
    router_aux_loss_coef: float | int = 1e-3
    aux_scoring_func: str = "softmax"
    top1_lbl_temperature: float | int = 0.1
    router_z_loss_coef: float | int = 0.0
    expert_bias_update_rate: float | int = 0.0
    expert_bias_cap: float | int | None = None
    output_router_logits: bool = False
    neuron_top_k: int | list[int] | None = None
    neuron_ratio: float | int | list[float | int] | None = None
    neuron_select_on: str = "abs_act"
    neuron_aux_loss_coef: float | int = 0.0
    neuron_aux_mode: str = "normalized"
    k_sampling: str = "none"
    k_min: int | None = None
    k_max: int | None = None
    k_distribution: str = "uniform"
    k_tau: float | int = 2.0
    k_budget: float | int | None = None
    k_seed: int = 0
    aux_k: str = "sampled"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not divisible by "
                    f"num_attention_heads={self.num_attention_heads}, so "
                    "head_dim cannot be derived. Set head_dim, or change one of the two."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_experts_per_tok_per_layer:
            self.num_experts_per_tok = max(self.num_experts_per_tok_per_layer)
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        if auto_map := getattr(type(self), "_family_auto_map", None):
            kwargs["auto_map"] = dict(auto_map)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SigmaMoeConfig":
        """A named shape (`"sigma-moe-tiny"`, `"sigma-v2-200b"`, `"demo"`, `"evidence"`, `"evidence-small"`),
        any field overridden. `ValueError` if unknown."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known. Choose one of {sorted(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The parent assigns overrides one by one after validation; merged first, they are checked and derived like any
        # value.
        fields = {name for kind in cls.__mro__ if issubclass(kind, SigmaMoeConfig) for name in kind.__annotations__}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        if "num_experts_per_tok" in given:
            given.setdefault("num_experts_per_tok_per_layer", None)
        if given.keys() & {"neuron_top_k", "neuron_ratio"}:  # the file's choice of one must not meet the other
            given = {"neuron_top_k": None, "neuron_ratio": None} | given
        return super().from_dict({**config_dict, **given}, **kwargs)

    def own_fields(self) -> dict[str, Any]:
        """What another class of the family takes over: every field but those that say which model it is."""
        identity = ("model_type", "auto_map", "architectures", "transformers_version")
        return {name: value for name, value in self.to_dict().items() if name not in identity}

    @property
    def top_k_per_layer(self) -> list[int]:
        """Active experts per token of each layer, as in force."""
        return self.num_experts_per_tok_per_layer or [self.num_experts_per_tok] * self.num_hidden_layers

    def neurons_of(self, layer: int, width: int) -> int:
        """Neurons that a network of `width` neurons in a layer keeps."""
        if self.neuron_top_k is not None:
            top_k = self.neuron_top_k
            return min(top_k[layer] if isinstance(top_k, list) else top_k, width)
        if self.neuron_ratio is not None:
            ratio = self.neuron_ratio
            return max(1, round((ratio[layer] if isinstance(ratio, list) else ratio) * width))
        return width

    @property
    def k_range(self) -> tuple[int, int]:
        """Smallest and largest number of active experts that training may draw."""
        return self.k_min or 1, self.k_max or self.num_experts_per_tok

    def validate_attention_heads(self):
        """Query heads share key-value heads in equal groups, rotary needs an even head_dim, a window has a width."""
        if min(self.num_attention_heads, self.num_key_value_heads) < 1:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} and num_key_value_heads={self.num_key_value_heads} "
                "must be >= 1."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}. Choose a divisor."
            )
        if self.head_dim is not None and (self.head_dim < 1 or self.head_dim % 2):
            what = "odd" if self.head_dim % 2 else "not positive"
            raise ValueError(f"head_dim={self.head_dim} is {what}; rotary embeddings need a positive even one.")
        if self.use_sliding_window and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                f"use_sliding_window=True with sliding_window={self.sliding_window}. Give the width of the window, "
                "in tokens."
            )

    def validate_experts_per_token(self):
        """Every layer activates between 1 and `num_experts` experts."""
        per_layer = self.num_experts_per_tok_per_layer
        if per_layer is None:
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(
                    f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and "
                    f"num_experts={self.num_experts}."
                )
            return
        if len(per_layer) != self.num_hidden_layers:
            raise ValueError(
                f"num_experts_per_tok_per_layer has {len(per_layer)} entries but "
                f"num_hidden_layers={self.num_hidden_layers}. "
                "Give one integer per layer, or None."
            )
        bad = {layer: k for layer, k in enumerate(per_layer) if not 1 <= k <= self.num_experts}
        if bad:
            raise ValueError(
                f"num_experts_per_tok_per_layer has values outside 1..num_experts={self.num_experts} (layer: value): "
                f"{bad}."
            )

    def validate_router(self):
        """Known score functions and losses, sane coefficients."""
        _require_known(self, "scoring_func", SCORE_FUNCTIONS)
        _require_known(self, "aux_scoring_func", SCORE_FUNCTIONS)
        _require_known(self, "router_aux_loss_type", AUX_LOSS_TYPES)
        if self.top1_lbl_temperature <= 0:
            raise ValueError(
                f"top1_lbl_temperature={self.top1_lbl_temperature} must be positive (0.1 is recommended)."
            )
        if self.expert_bias_cap is not None and self.expert_bias_cap <= 0:
            raise ValueError(f"expert_bias_cap={self.expert_bias_cap} must be positive; None turns it off.")
        for field in ("router_aux_loss_coef", "router_z_loss_coef", "expert_bias_update_rate"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative; 0 turns it off.")

    def validate_neurons(self):
        """Every layer keeps at least one neuron of an expert, by one of the two fields."""
        _require_known(self, "neuron_select_on", NEURON_SELECTIONS)
        _require_known(self, "neuron_aux_mode", NEURON_AUX_MODES)
        if self.neuron_top_k is not None and self.neuron_ratio is not None:
            raise ValueError(
                f"neuron_top_k={self.neuron_top_k} and neuron_ratio={self.neuron_ratio} say the same thing. Give one."
            )
        for field, fits, allowed in (
            ("neuron_top_k", lambda k: k >= 1, ">= 1"),
            ("neuron_ratio", lambda ratio: 0 < ratio <= 1, "in (0, 1]"),
        ):
            value = getattr(self, field)
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"{field} has {len(value)} entries but num_hidden_layers={self.num_hidden_layers}. Give one per "
                    "layer, or one number for all."
                )
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(map(fits, values)):
                raise ValueError(f"{field}={value} must be {allowed}.")
        if not self.neuron_aux_loss_coef >= 0:
            raise ValueError(f"neuron_aux_loss_coef={self.neuron_aux_loss_coef} must not be negative; 0 turns it off.")

    def validate_k_sampling(self):
        """A range of active experts that the layers have, and a known way to draw from it."""
        _require_known(self, "k_sampling", K_SAMPLINGS)
        _require_known(self, "k_distribution", K_DISTRIBUTIONS)
        _require_known(self, "aux_k", AUX_KS)
        low, high = self.k_range
        if (self.k_min, self.k_max) != (None, None) and not 1 <= low <= high <= self.num_experts:
            raise ValueError(
                f"k_min={self.k_min} and k_max={self.k_max} do not give a range within 1..num_experts="
                f"{self.num_experts} (their defaults are 1 and num_experts_per_tok={self.num_experts_per_tok})."
            )
        if not self.k_tau > 0:
            raise ValueError(f"k_tau={self.k_tau} must be positive (the paper tried 2).")
        if self.k_budget is not None and not self.k_budget > 0:
            raise ValueError(f"k_budget={self.k_budget} must be positive (1.1, say); None turns it off.")


def _require_known(config: SigmaMoeConfig, field: str, known: tuple[str, ...]) -> None:
    if getattr(config, field) not in known:
        raise ValueError(f"{field}={getattr(config, field)!r} is not known. Choose one of {known}.")


__all__ = ["SigmaMoeConfig"]
