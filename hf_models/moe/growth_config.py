# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configurations under growth: everything that goes with a layer, an expert or the experts per token, and what of the
function that cannot keep."""

import copy
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import logging

from .configuration_mone import EXPERT_COUNT_FIELDS, number_of_experts
from .growth_plan import GrowthPlan, layer_order


logger = logging.get_logger(__name__)

OUR_MODEL_TYPES = ("sigma_moe", "mone", "m_moe")
HOSTS = (*OUR_MODEL_TYPES, "qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3")

# One entry per layer, if they are lists.
PER_LAYER_FIELDS = (
    "layer_types",
    "mlp_layer_types",
    "moe_layer_freq",
    "num_experts_per_tok_per_layer",
    "neuron_top_k",
    "neuron_ratio",
)
# Lists whose length says nothing about layers.
_NOT_PER_LAYER = ("architectures", "eos_token_id", "mlp_only_layers", "keys_to_ignore_at_inference")


def read_config(raw: dict) -> PreTrainedConfig:
    """The configuration that config.json describes. `ValueError` if growth does not know its `model_type`."""
    model_type = raw.get("model_type")
    if model_type not in HOSTS or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type={model_type!r} is not known to growth. Known are {HOSTS}.")
    return CONFIG_MAPPING[model_type].from_dict(raw)


def expert_layers(config: PreTrainedConfig) -> list[bool]:
    """For each layer whether it has experts (the others have a dense MLP), by transformers' rule for the family."""
    layers = range(config.num_hidden_layers)
    if config.model_type in ("deepseek_v2", "deepseek_v3"):
        return [layer >= (config.first_k_dense_replace or 0) for layer in layers]
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        dense, step = config.mlp_only_layers or (), config.decoder_sparse_step
        return [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    return [True for _ in layers]


def grow_config(config: PreTrainedConfig | dict, plan: GrowthPlan) -> PreTrainedConfig | dict:
    """The configuration of the grown model, of the type of `config` (a dict is a config.json, read and written by its
    class). Nothing but what growth changes differs.

    Raises:
        ValueError: a model or a value that growth does not know, or a plan that the configuration cannot express; the
            message names the field, the value and the remedy.
    """
    if isinstance(config, dict):
        return grow_config(read_config(config), plan).to_dict()
    _refuse_ungrowable(config)
    _refuse_broken_routing(config, plan)
    order = layer_order(config.num_hidden_layers, plan)
    grown = copy.deepcopy(config)
    for field, value in (_depth_changes(config, order) | _width_changes(config, plan)).items():
        if field == "num_experts_per_tok_per_layer" and value is not None:
            value = [value[source] for source in order]
        setattr(grown, field, value)
    grown.validate()
    return grown


def selection_bias_scale(config: PreTrainedConfig, plan: GrowthPlan) -> float:
    """What balancing biases are multiplied by.

    They are added to scores, and softmax scores shrink when there are more experts; sigmoid scores do not. Only our
    family has both softmax scores and a bias.
    """
    return 1 / plan.width_factor if _biases_softmax(config) and plan.router_scale_fix == "auto" else 1.0


def _biases_softmax(config: PreTrainedConfig) -> bool:
    return config.model_type in OUR_MODEL_TYPES and config.scoring_func == "softmax"


def what_changes_the_function(config: PreTrainedConfig, plan: GrowthPlan) -> list[str]:
    """Why the grown model does not compute what the source computes; empty if it does, up to rounding."""
    reasons = []
    if plan.depth_factor > 1 and plan.depth_copy_init == "copy":
        reasons.append("depth_copy_init='copy': repeated layers act twice ('zero_output' keeps the function)")
    if plan.width_factor == 1:
        return reasons
    if plan.noise_alpha > 0 and plan.noise_targets:
        reasons.append(f"noise_alpha={plan.noise_alpha}: copies differ from their originals (0 turns the noise off)")
    return reasons + _what_routing_changes(config, plan)


def _what_routing_changes(config: PreTrainedConfig, plan: GrowthPlan) -> list[str]:
    reasons = []
    if _spares_top_1(config) and config.k_sampling != "none":
        if config.k_range[0] == 1 < config.k_range[1]:
            reasons.append(
                "k_min=1: one expert is weighed by its raw score, several by shares of 1, so that at one of the two "
                "ends of the range the weights become others (at num_experts_per_tok they are kept)"
            )
    if plan.topk_policy == "keep":
        reasons.append("topk_policy='keep': copies compete with originals for the same places ('scale' avoids it)")
    elif plan.router_scale_fix == "none" and (_router_scale_changes(config, plan) or _mixes_top_1(config)):
        reasons.append("router_scale_fix='none': the weights of the selected experts add up to another sum ('auto')")
    if plan.router_scale_fix == "none" and _biases_softmax(config):
        reasons.append("router_scale_fix='none': biases, unless they are zero, outweigh smaller scores ('auto')")
    if plan.router_init == "random":
        reasons.append("router_init='random': copies are selected by other directions than their originals ('copy')")
    groups, chosen = _groups(config)
    if config.model_type == "deepseek_v3" and chosen < groups:
        reasons.append(
            f"topk_group={chosen} of n_group={groups}: groups are chosen by their two best experts, which are now "
            "copies of one (setting topk_group = n_group before would avoid it)"
        )
    return reasons


def _refuse_ungrowable(config: PreTrainedConfig) -> None:
    if config.model_type not in HOSTS:
        raise ValueError(f"model_type={config.model_type!r} is not known to growth. Known are {HOSTS}.")
    if getattr(config, "host_config", None) is not None:
        raise ValueError(
            f"host_config of this {config.model_type!r} is not null: its layers are those of another model. Grow that "
            "model, then convert it again."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config is not null: quantised weights have no room for noise of a percent. Dequantise the "
            "checkpoint first."
        )
    if getattr(config, "moe_layer_freq", None) not in (None, 1) and not isinstance(config.moe_layer_freq, list):
        raise ValueError(
            f"moe_layer_freq={config.moe_layer_freq!r}: transformers gives experts to every layer from "
            "first_k_dense_replace on, so it cannot load this checkpoint. Only 1 or a list is grown."
        )


def _groups(config: PreTrainedConfig) -> tuple[int, int]:
    """Number of groups of experts, and of those among them that a token may choose from."""
    limited = config.model_type == "deepseek_v3" or (
        config.model_type == "deepseek_v2" and config.topk_method == "group_limited_greedy"
    )
    return (config.n_group or 1, config.topk_group or 1) if limited else (1, 1)


def _refuse_broken_routing(config: PreTrainedConfig, plan: GrowthPlan) -> None:
    experts, top_k = number_of_experts(config), config.num_experts_per_tok
    groups, chosen = _groups(config)
    if experts < 1 or not any(expert_layers(config)):
        raise ValueError(
            f"num_experts={experts} and the rules for dense layers leave no layer with experts. "
            "Growth is for mixtures of experts."
        )
    if experts % groups:
        raise ValueError(f"n_group={groups} does not divide the {experts} experts. Choose a divisor.")
    if not 1 <= top_k <= experts // groups * chosen:
        raise ValueError(
            f"num_experts_per_tok={top_k} is not between 1 and the {experts // groups * chosen} experts that a token "
            "can choose from. Correct the source."
        )
    if plan.width_factor > 1 and plan.expert_order == "append" and chosen < groups:
        raise ValueError(
            f"expert_order='append' with width_factor={plan.width_factor} breaks n_group={groups}: copies would come "
            "into other groups than their originals. Use expert_order='interleave'."
        )


def _depth_changes(config: PreTrainedConfig, order: list[int]) -> dict[str, Any]:
    """Fields that go with layers, except experts per token; none if `order` leaves the layers as they are."""
    layers = config.num_hidden_layers
    if order == list(range(layers)):
        return {}
    changes: dict[str, Any] = {"num_hidden_layers": len(order)}
    for field, value in config.to_dict().items():
        if not isinstance(value, (list, tuple)):
            continue
        if field in PER_LAYER_FIELDS and field != "num_experts_per_tok_per_layer":
            if len(value) != layers:
                raise ValueError(f"{field} has {len(value)} entries for {layers} layers. Correct the source.")
            changes[field] = [value[source] for source in order]
        elif len(value) == layers and field not in (*_NOT_PER_LAYER, *PER_LAYER_FIELDS):
            logger.warning(
                f"{field} has as many entries as there were layers, but is not known to go with them: kept."
            )
    if (window_layers := getattr(config, "max_window_layers", None)) is not None:
        within = sum(source < window_layers for source in order)
        changes["max_window_layers"] = within + max(0, window_layers - layers)
    has_experts = [expert_layers(config)[source] for source in order]
    return changes | _dense_layer_changes(config, has_experts)


def _dense_layer_changes(config: PreTrainedConfig, has_experts: list[bool]) -> dict[str, Any]:
    """Fields that say which layers are dense, given for each target layer whether it has experts."""
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        dense = [layer for layer, moe in enumerate(has_experts) if not moe]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if config.model_type not in ("deepseek_v2", "deepseek_v3"):
        return {}
    leading = has_experts.index(True)
    if not all(has_experts[leading:]):
        raise ValueError(
            f"first_k_dense_replace={config.first_k_dense_replace} dense layers would be repeated behind layers with "
            "experts, which the config cannot express. Use depth_method='interposition', or "
            f"keep_first={config.first_k_dense_replace}."
        )
    return {"first_k_dense_replace": leading}


def _width_changes(config: PreTrainedConfig, plan: GrowthPlan) -> dict[str, Any]:
    """Fields that go with experts or with experts per token; per-layer experts per token for the source's layers."""
    present, experts, factor = config.to_dict(), number_of_experts(config), plan.topk_factor
    changes: dict[str, Any] = {name: experts * plan.width_factor for name in EXPERT_COUNT_FIELDS if name in present}
    for field in ("num_experts_per_tok", "k_min", "k_max"):
        if present.get(field) is not None:
            changes[field] = present[field] * factor
    if factor > 1 and present.get("k_sampling", "none") != "none":
        changes["k_min"] = (present.get("k_min") or 1) * factor  # null is 1, which would now be less of the model
    if per_layer := present.get("num_experts_per_tok_per_layer"):
        changes["num_experts_per_tok_per_layer"] = [k * factor for k in per_layer]
    if (scale := selection_bias_scale(config, plan)) != 1:
        for field in ("expert_bias_update_rate", "expert_bias_cap"):
            if present[field]:
                changes[field] = present[field] * scale
    if factor > 1 and plan.router_scale_fix == "auto":
        if _mixes_top_1(config):
            raise ValueError(
                f"num_experts_per_tok_per_layer={per_layer} with norm_topk_prob=True: layers with one expert weigh it "
                f"by its raw score, but with {factor} they would renormalise, and the config cannot turn that off for "
                "some layers only. Set router_scale_fix='none' to grow all the same; the function changes."
            )
        changes |= _router_scale_changes(config, plan)
    return changes


def _spares_top_1(config: PreTrainedConfig) -> bool:
    """Whether weights are renormalised except in layers with one expert, as only our family has it."""
    return config.model_type in OUR_MODEL_TYPES and config.norm_topk_prob and not config.norm_top1_prob


def _mixes_top_1(config: PreTrainedConfig) -> bool:
    """Whether some layers renormalise and others, with one expert, do not."""
    ks = config.top_k_per_layer if _spares_top_1(config) else []
    return 1 in ks and set(ks) != {1}


def _router_scale_changes(config: PreTrainedConfig, plan: GrowthPlan) -> dict[str, Any]:
    """What keeps the sum of the selected experts' weights when experts and experts per token grow by one factor.

    Softmax weights shrink by the factor on their own, and renormalised weights add up to 1 whatever there is.
    """
    ours = config.model_type in OUR_MODEL_TYPES
    sigmoid = config.scoring_func == "sigmoid" if ours else config.model_type == "deepseek_v3"
    changes: dict[str, Any] = {}
    renormalised = getattr(config, "norm_topk_prob", False)
    if _spares_top_1(config) and set(config.top_k_per_layer) == {1}:
        # One expert is weighed by its raw score; several would be renormalised, unless told not to be.
        changes["norm_topk_prob"] = renormalised = False
    if sigmoid and not renormalised:
        changes["routed_scaling_factor"] = config.routed_scaling_factor / plan.topk_factor
    return changes


__all__ = [
    "HOSTS",
    "OUR_MODEL_TYPES",
    "PER_LAYER_FIELDS",
    "expert_layers",
    "grow_config",
    "read_config",
    "selection_bias_scale",
    "what_changes_the_function",
]
