# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""MoNE, a mixture of neuron experts (arXiv 2510.05781), on Sigma-MoE's trunk or inside another model.

    E(x) = sum_{j in S(x)} a_j (W_up[j] . x) W_down[:, j],   a = act(W_gate x),   S(x) = top-K_N of |a|

The choice of neurons is in `neurons.py`; here are the models, and [`MoneForCausalLM.from_moe`], which makes one of any
SwiGLU mixture of experts (or dense SwiGLU language model) without touching a weight.
"""

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from .balance import RoutingWindow
from .configuration_mone import HOST_DECIDES, MoneConfig
from .configuration_sigma_moe import SigmaMoeConfig
from .elastic import apply_experts_of_config, captured_routing, routers_of
from .modeling_sigma_moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
    register_expert_layouts,
)
from .neurons import BACKENDS, idle_neuron_parameters, neuron_sparse


# Hosts whose language model is `model` and `lm_head` and nothing else (no scaling, no softcap), with SwiGLU networks.
MOE_HOSTS = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3")
DENSE_HOSTS = ("llama", "mistral", "qwen2", "qwen3")
HOSTS = MOE_HOSTS + DENSE_HOSTS
_SHARED = re.compile(r"\.shared_experts?$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class MoneModel(SigmaMoeModel):
    """The decoder without a head, on Sigma-MoE's trunk. Raises `ValueError` for a config with a host, which has a body
    of its own class: use [`MoneForCausalLM`]."""

    config: MoneConfig
    config_class = MoneConfig

    def __init__(self, config: MoneConfig):
        if config.host_config is not None:
            raise ValueError(
                f"host_config={config.host_config.model_type!r}: the body is that model's own. Use "
                "AutoModelForCausalLM and its `.model`."
            )
        super().__init__(config)


# GenerationMixin by name: transformers would put another class in front of one that a Hub repository brings.
class MoneForCausalLM(SigmaMoeForCausalLM, GenerationMixin):
    """Language model whose tokens use the top neurons of their experts.

    On its own trunk everything is Sigma-MoE's, with `neuron_aux_loss_coef` for the balance of neurons. With
    `config.host_config` the body is that model's, under its own parameter names.
    """

    config: MoneConfig
    config_class = MoneConfig
    body_class = MoneModel

    def __init__(self, config: MoneConfig):
        if config.host_config is None:
            super().__init__(config)
            return
        _require_host(config.host_config)
        PreTrainedModel.__init__(self, config)
        self._keep_in_fp32_modules_strict = []  # the trunk's; the body brings its own
        self.model = AutoModel.from_config(config.host_config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.routing_window = RoutingWindow()
        choose_neurons_in(self.model, config)
        if self._has_routers:
            apply_experts_of_config(self)
        self.post_init()

    @property
    def routers(self) -> list[nn.Module]:
        """The router of each layer that has one, in order."""
        return routers_of(self) if self._has_routers else []

    @property
    def _has_routers(self) -> bool:
        return self.config.host_config is None or self.config.host_config.model_type in MOE_HOSTS

    def num_active_parameters(self, include_embeddings: bool = False) -> int:
        """As in the parent; of a dense host, everything but the neurons that a token leaves out."""
        if self._has_routers:
            return super().num_active_parameters(include_embeddings)
        count = self.num_parameters() - idle_neuron_parameters(self)
        if not include_embeddings:
            count -= len({self.lm_head.weight, self.get_input_embeddings().weight}) * self.lm_head.weight.numel()
        return count

    def _run_body(self, records_routing: bool, **inputs):
        if self.config.host_config is None:
            return super()._run_body(records_routing, **inputs)
        if not (records_routing and self._has_routers):
            return self.model(**inputs), None, None
        with captured_routing(self.model) as calls:
            outputs = self.model(**inputs)
        last = [layer[-1] for layer in calls]
        return outputs, tuple(call.router_logits for call in last), tuple(call.indices for call in last)

    @classmethod
    @torch.no_grad()
    def from_moe(
        cls,
        model: PreTrainedModel | str | Path,
        *,
        neuron_ratio: float | list[float] | None = None,
        neuron_top_k: int | list[int] | None = None,
        config_overrides: dict | None = None,
        **kwargs,
    ) -> "MoneForCausalLM":
        """A MoNE of a causal language model, a folder or a Hub id, its weights as they are.

        Sigma-MoE becomes a MoNE on the same trunk; Qwen2/3-MoE, OLMoE, Mixtral and DeepSeek-V2/V3, and the dense
        Llama, Mistral and Qwen2/3, become hosts. At `neuron_ratio=1` the logits are theirs, bit for bit.

        Args:
            model: shares its tensors with the result; `kwargs` go to `from_pretrained` of a folder or id.
            neuron_ratio, neuron_top_k: see [`MoneConfig`]; 0.5 if neither is given.
            config_overrides: other fields of [`MoneConfig`], such as `neuron_select_on`.

        Raises:
            TypeError: a model wrapped by PEFT or another library.
            ValueError: another architecture, activation or router; a quantised model, or one that is not on one
                device.
        """
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} are options of loading, but `model` is loaded already.")
        _require_plain(model)
        router_class = getattr(getattr(model, "body_class", None), "router_class", None)
        if router_class not in (None, cls.body_class.router_class):
            raise ValueError(
                f"{type(model).__name__} routes by {router_class.__name__}, which {cls.__name__} has not. Give a "
                "sister of it a body with this router_class, and load the weights there."
            )
        config = _config_with(model.config, neuron_ratio, neuron_top_k, config_overrides or {})
        config.dtype = model.dtype
        with torch.device("meta"):
            mone = cls._from_config(config, **_implementations(model))
        mone.load_state_dict(model.state_dict(), assign=True)
        # What no checkpoint holds (rotary frequencies) was made on the meta device too.
        owners = dict(mone.named_modules())
        for name, buffer in model.named_buffers():
            owner, _, leaf = name.rpartition(".")
            owners[owner]._buffers[leaf] = buffer
        mone.tie_weights()
        if mone.routers and model.config._experts_implementation in BACKENDS:
            mone.set_experts_implementation(model.config._experts_implementation)
        mone.generation_config = model.generation_config
        return mone.eval()


def _require_plain(model: PreTrainedModel) -> None:
    """Raise unless `model` is one of transformers', without adapters, unquantised and on one device."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{type(model).__name__} is not a transformers model. Merge an adapter first: "
            "peft_model.merge_and_unload()."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(f"{type(model).__name__} has adapters. Merge or remove them first.")
    devices = {tensor.device for tensor in model.parameters()}
    if getattr(model, "is_quantized", False) or len(devices) > 1 or torch.device("meta") in devices:
        raise ValueError(
            f"{type(model).__name__} is quantised, or on {sorted(map(str, devices))}. Load it unquantised on one "
            "device; what comes out can be saved, and loaded with any device_map."
        )


def _config_with(config: PreTrainedConfig, neuron_ratio, neuron_top_k, overrides: dict) -> MoneConfig:
    """Configuration of a MoNE of a model with `config`."""
    given = {"neuron_ratio": neuron_ratio, "neuron_top_k": neuron_top_k} | overrides
    if isinstance(config, SigmaMoeConfig):
        fields = config.own_fields()
    else:
        _require_host(config)
        if theirs := sorted(set(given) & set(HOST_DECIDES)):
            raise ValueError(f"config_overrides has {theirs}, which the host decides. Change the host first.")
        fields = {"host_config": config.to_dict()} | _balance_of_host(config)
    return MoneConfig(**fields | given)


def choose_neurons_in(body: PreTrainedModel, config: MoneConfig) -> None:
    """Put the choice of neurons into the experts of `body`, into shared experts on request, and into the feed-forward
    networks of a model that has no experts. Changes the classes of these instances only."""
    has_experts = number_of_sparse_layers(body) > 0
    for name, module in body.named_modules():
        is_experts = hasattr(module, "_apply_gate")
        is_network = all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        shared = _SHARED.search(name) is not None
        wanted = is_experts or (is_network and (config.neuron_shared_expert if shared else not has_experts))
        if not wanted:
            continue
        if is_experts and (module.has_bias or module.is_transposed or not module.is_concatenated):
            raise ValueError(f"{name} of {type(body).__name__} has experts of another layout than SwiGLU's.")
        module.__class__ = neuron_sparse(type(module))
        module.choose_neurons(config, int(_LAYER.search(name).group(1)))


def _balance_of_host(host: PreTrainedConfig) -> dict:
    """The weight of a host's balance loss as ours, which sums over layers and is 1 at balance; see `convert.py`. A
    host that is not asked for its router logits adds none."""
    coefficient = getattr(host, "router_aux_loss_coef", None) or 0.0
    if not getattr(host, "output_router_logits", False) or host.model_type not in MOE_HOSTS:
        coefficient = 0.0
    per_layer = coefficient * (getattr(host, "num_experts_per_tok", None) or 1) / host.num_hidden_layers
    return {"router_aux_loss_coef": per_layer, "router_aux_loss_type": "switch"}


def number_of_sparse_layers(body: PreTrainedModel) -> int:
    """Layers of `body` with experts."""
    return sum(hasattr(module, "_apply_gate") for module in body.modules())


def _require_host(config: PreTrainedConfig) -> None:
    if config.model_type not in HOSTS:
        raise ValueError(
            f"model_type={config.model_type!r} is not known as a host of neuron experts. Known: sigma_moe, "
            f"{', '.join(HOSTS)}."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r}: neuron experts are gated by silu.")


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    return {"attn_implementation": model.config._attn_implementation}


class MoneForSequenceClassification(SigmaMoeForSequenceClassification):
    """The decoder with a classifier on the last real token."""

    config: MoneConfig
    config_class = MoneConfig
    body_class = MoneModel


class MoneForTokenClassification(SigmaMoeForTokenClassification):
    """The decoder with a classifier on every token."""

    config: MoneConfig
    config_class = MoneConfig
    body_class = MoneModel


register_expert_layouts("mone")

__all__ = ["MoneForCausalLM", "MoneForSequenceClassification", "MoneForTokenClassification", "MoneModel"]
