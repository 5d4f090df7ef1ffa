# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""DC-CCL (arXiv 2303.10361): a large model on the cloud that learns from devices which never see it.

    h = E(x)                                shared encoder, or x itself
    z_serve  = F_c(h) + F_s(h)              what the cloud serves
    z_device = stopgrad(G(h)) + F_s(h)      what F_s is trained with, and what a device answers without the cloud

F_c is the cloud's large submodel, F_s the small co-submodel that both sides train, G the control model, distilled from
F_c, that stands in for it on the device. F_s needs nothing of F_c but its logits: G's take their place.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_dc_ccl import DcCclConfig, DcCclDeviceConfig
from .joint_cache import layers_of, new_cache, part_of
from .shared_encoder import build_stem, replace_stem


# What is added up in each branch.
BRANCHES = {
    "serve": ("cloud_submodel", "co_submodel"),
    "device": ("control_model", "co_submodel"),
    "cloud": ("cloud_submodel",),
    "control": ("control_model",),
    "co": ("co_submodel",),
}
PHASES = {
    "cloud": ("shared_encoder", "cloud_submodel"),
    "control": ("control_model",),
    "co": ("co_submodel",),
    "head": ("co_submodel.head",),
    "joint": ("shared_encoder", "cloud_submodel", "co_submodel"),
    "upper": ("cloud_submodel", "co_submodel"),
    "alone": ("shared_encoder", "co_submodel"),
    "teach": ("cloud_submodel",),
}


class DcCclPreTrainedModel(PreTrainedModel):
    """What whole models and device packages have in common: parts, branches that add them, phases that train them."""

    config: DcCclDeviceConfig
    config_class = DcCclDeviceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Losses are means over examples: the Trainer is to divide them by its accumulation steps, as it does where a model
    # takes no `num_items_in_batch`.
    accepts_loss_kwargs = False
    submodel_class = AutoModelForImageClassification

    def __init__(self, config: DcCclDeviceConfig):
        super().__init__(config)
        config.name_labels()  # `config.num_labels = 3`, as fine-tuning says it, is meant for every head
        self.num_labels = config.num_labels
        self._trained: tuple[str, ...] | None = None
        self.shared_encoder = build_stem(config.base_config) if config.shared_encoder else None
        for name, sub_config in config.submodel_configs.items():
            setattr(self, name, self._build(sub_config))
        self.post_init()

    def _build(self, config: PreTrainedConfig) -> PreTrainedModel:
        submodel = self.submodel_class.from_config(config)
        return replace_stem(submodel, self.config.base_config) if self.config.shared_encoder else submodel

    def submodels_of(self, branch: str) -> tuple[str, ...]:
        """Names of what is added up in `branch`. `ValueError` for one that this model does not have."""
        names = BRANCHES.get(branch, ())
        if not names or not set(names) <= set(self.config.submodel_configs):
            known = [name for name, parts in BRANCHES.items() if set(parts) <= set(self.config.submodel_configs)]
            raise ValueError(f"branch {branch!r} is not known to a {type(self).__name__}. Choose one of {known}.")
        return names

    # Phases

    def train_only(self, *parts: str) -> None:
        """Give gradients to `parts` (`"shared_encoder"`, names of submodels, or `"co_submodel.head"`, its last linear
        layer) and to nothing else. What is not trained stays in eval mode, also after `train()`: batch norms do not
        move and dropout is off."""
        self.requires_grad_(False)
        self._trained = parts
        for part in parts:
            for module in self._modules_of(part):
                module.requires_grad_(True)
        self.train(self.training)

    def train_all(self) -> None:
        """Give gradients to everything again, and `train()` its meaning in torch: the end of all phases."""
        self._trained = None
        self.requires_grad_(True)
        self.train(self.training)

    def set_phase(self, phase: str) -> None:
        """`train_only` by the name of a phase. The method's: `"cloud"`, `"control"`, `"co"`, and `"head"`, the
        co-submodel's last linear layer. Those of baselines: `"joint"`, all that is served; `"upper"`, both submodels
        on a frozen encoder; `"alone"`, encoder and co-submodel; `"teach"`, the cloud submodel on a frozen encoder."""
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is not known. Choose one of {tuple(PHASES)}.")
        if "cloud_submodel" in PHASES[phase] and "cloud_submodel" not in self.config.submodel_configs:
            raise ValueError(f"a {type(self).__name__} has no cloud submodel to train.")
        self.train_only(*PHASES[phase])

    def train(self, mode: bool = True):
        """As in torch; what the phase does not train stays in eval mode."""
        super().train(mode)
        if mode and getattr(self, "_trained", None) is not None:
            for child in self.children():
                child.eval()
            for part in self._trained:
                for module in self._modules_of(part):
                    module.train()
        return self

    def _modules_of(self, part: str) -> list[nn.Module]:
        if part == "shared_encoder" and self.shared_encoder is None:
            return []
        if part == "co_submodel.head":
            return [head_of(self.co_submodel)]
        return [getattr(self, part)]

    # Branches

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What both submodels read of `pixel_values (batch, channels, height, width)`: the shared encoder's output, or
        the input itself."""
        if self.shared_encoder is None:
            return pixel_values
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(self.shared_encoder, pixel_values)):
            return self.shared_encoder(pixel_values)

    def co_state(self) -> dict[str, torch.Tensor]:
        """A copy of what is exchanged: every entry of the co-submodel but the integer ones, which only count. Tied
        weights are there once."""
        once = {name for name, _ in (*self.co_submodel.named_parameters(), *self.co_submodel.named_buffers())}
        state = self.co_submodel.state_dict()
        return {n: t.detach().clone() for n, t in state.items() if n in once and t.is_floating_point()}

    def head_state(self) -> dict[str, torch.Tensor]:
        """The entries of [`co_state`] that are the last linear layer's."""
        head = {id(parameter) for parameter in head_of(self.co_submodel).parameters()}
        names = [name for name, parameter in self.co_submodel.named_parameters() if id(parameter) in head]
        return {name: tensor for name, tensor in self.co_state().items() if name in names}

    def load_co_update(self, update: Mapping[str, torch.Tensor]) -> None:
        """Put `update` (see [`co_state`]) in the co-submodel's place.

        Raises:
            ValueError: keys or shapes that are not those of the co-submodel; nothing is changed then.
        """
        own = self.co_state()
        if own.keys() != update.keys():
            raise ValueError(
                f"not a state of this co-submodel: missing {sorted(own.keys() - update.keys())[:3]}, "
                f"foreign {sorted(update.keys() - own.keys())[:3]}."
            )
        for name, tensor in own.items():
            if tensor.shape != update[name].shape:
                raise ValueError(f"{name} has shape {tuple(update[name].shape)}, not {tuple(tensor.shape)}.")
        self.co_submodel.load_state_dict(update, strict=False)

    def _answer(self, name: str, inputs: torch.Tensor, kwargs: dict[str, Any]) -> ImageClassifierOutput:
        """Output of a submodel; without a graph where neither it nor its input learns."""
        submodel = getattr(self, name)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(submodel, inputs)):
            return submodel(pixel_values=inputs, return_dict=True, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the co-submodel, which every sum holds; with a shared encoder, its."""
        return (self.shared_encoder or self.co_submodel).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace what `get_input_embeddings` gives."""
        (self.shared_encoder or self.co_submodel).set_input_embeddings(value)


def head_of(submodel: PreTrainedModel) -> nn.Module:
    """The last linear layer of a classifier, or the output embeddings of a language model."""
    if (embeddings := submodel.get_output_embeddings()) is not None:
        return embeddings
    linear = [m for m in submodel.modules() if isinstance(m, nn.Linear) and m.out_features == submodel.num_labels]
    if not linear:
        raise ValueError(f"{type(submodel).__name__} has no linear layer of {submodel.num_labels} outputs at its end.")
    return linear[-1]


def _learns(module: nn.Module, inputs: torch.Tensor) -> bool:
    return inputs.requires_grad or any(parameter.requires_grad for parameter in module.parameters())


class _ImageClassification(DcCclPreTrainedModel):
    """The forward of images."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    branch = "serve"

    def __init__(self, config: DcCclDeviceConfig):
        super().__init__(config)
        self.loss_type = "ForImageClassification"  # transformers reads it from a class name, and not from all of ours

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        branch: str | None = None,
        control_logits: torch.Tensor | None = None,
        shared_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classes of images by a branch.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            labels: `(batch,)`, -100 where there is none.
            branch: `"serve"` F_c + F_s, `"device"` G + F_s, or one submodel alone: `"cloud"`, `"control"`, `"co"`.
                `None`: `"serve"`, of a device package `"device"`.
            control_logits: `(batch, num_labels)`, taken for those of the first submodel of a sum, such as G's, which
                is then not called: both E and G are frozen while F_s learns, so they can be computed once.
            shared_features: what `encode` gives, in the place of `pixel_values`.

        Returns:
            `hidden_states` and `attentions`, where asked for, are those of the last submodel of the branch: F_s in a
            sum.
        """
        names = self.submodels_of(branch or self.branch)
        if (pixel_values is None) == (shared_features is None):
            raise ValueError("give pixel_values or shared_features, one of the two.")
        inputs = self.encode(pixel_values) if shared_features is None else shared_features
        if control_logits is not None:
            if len(names) == 1:
                raise ValueError(f"branch {branch!r} adds nothing: control_logits has no place in it.")
            logits, names = control_logits, names[1:]
        else:
            logits = 0
        for name in names:
            answer = self._answer(name, inputs, kwargs)
            logits = logits + answer.logits
        loss = None
        if labels is not None and self.config.problem_type in ("regression", "multi_label_classification"):
            loss = self.loss_function(labels, logits, self.config)
        elif labels is not None:
            labelled = (labels != -100).sum().clamp_min(1)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / labelled
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=answer.get("hidden_states"), attentions=answer.get("attentions")
        )


class DcCclDeviceModel(_ImageClassification):
    """What a device holds: shared encoder, control model and co-submodel, and nothing of the cloud's submodel. A
    repository of its own, under `AutoModelForImageClassification`, that transformers' exporters take.

    Example:
        >>> package = model.device_package()
        >>> package.save_pretrained("device-package")
        >>> exported = OnnxExporter().export(package, {"pixel_values": images}, config=OnnxConfig(dynamic=True))
        >>> exported.save_pretrained("device-onnx")
    """

    branch = "device"


class DcCclForImageClassification(_ImageClassification):
    """The whole: cloud submodel, co-submodel, control model and what they share."""

    config: DcCclConfig
    config_class = DcCclConfig

    def device_package(self) -> DcCclDeviceModel:
        """A copy of what a device holds, to be saved and published by itself."""
        return _packed(self, DcCclDeviceModel)


def _packed(model: DcCclPreTrainedModel, kind: type[DcCclPreTrainedModel]) -> DcCclPreTrainedModel:
    with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
        package = kind(model.config.device_config())
    for name in ("shared_encoder", *package.config.submodel_configs):
        setattr(package, name, copy.deepcopy(getattr(model, name)))
    package.config.dtype = model.config.dtype
    package.requires_grad_(True)
    return package.eval()


class _CausalLM(DcCclPreTrainedModel, GenerationMixin):
    """The forward of language models: the sum of next-token logits over one vocabulary."""

    main_input_name = "input_ids"
    input_modalities = ("text",)
    submodel_class = AutoModelForCausalLM
    branch = "serve"
    accepts_loss_kwargs = True
    _skip_keys_device_placement = ["past_key_values"]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        branch: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Next-token logits `(batch, length, vocab_size)` by a branch, as in [`DcCclForImageClassification`].

        Args:
            past_key_values: one cache for all submodels of the branch; keep to one branch while it is in use.
        """
        names = self.submodels_of(branch or self.branch)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config.cached_configs)
        shared = {"attention_mask": attention_mask, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if position_ids is not None:
            shared["position_ids"] = position_ids
        shared |= {name: kwargs.pop(name) for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        logits = None
        for name in names:
            submodel = getattr(self, name)
            learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in submodel.parameters())
            cache = None if past_key_values is None else self._part(past_key_values, name)
            with torch.set_grad_enabled(learns):
                answer = submodel(input_ids=input_ids, past_key_values=cache, return_dict=True, **shared)
            logits = answer.logits if logits is None else logits + answer.logits
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=answer.get("hidden_states"),
            attentions=answer.get("attentions"),
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **_) -> torch.Tensor | None:
        """The mask over tokens as it is: each submodel makes the masks of its own layers, also for static caches."""
        return attention_mask

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers; a cache that grows gets layers that keep no more than their own model's window."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if given is None and type(made) is DynamicCache and not made.offloading and not generation_config.is_assistant:
            made.layers = new_cache(self.config.cached_configs).layers

    def _part(self, cache: Cache, name: str) -> Cache:
        """The layers of one submodel, in the order of the config's `cached_configs`."""
        start, wanted = 0, self.config.submodel_configs[name]
        for config in self.config.cached_configs:
            if config is wanted:
                break
            start += layers_of(config)
        return part_of(cache, start, layers_of(wanted))

    @property
    def vocab_size(self) -> int:
        """The vocabulary of all submodels."""
        return self.config.vocab_size

    def get_output_embeddings(self) -> nn.Module:
        """Those of the co-submodel."""
        return self.co_submodel.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As in transformers, of all submodels: their vocabulary is one."""
        for name in self.config.submodel_configs:
            getattr(self, name).resize_token_embeddings(*args, **kwargs)
        return self.get_input_embeddings()


class DcCclDeviceForCausalLM(_CausalLM):
    """What a device holds of a [`DcCclForCausalLM`]; `generate` answers with G + F_s."""

    branch = "device"


class DcCclForCausalLM(_CausalLM):
    """DC-CCL over language models that share a vocabulary, and so a tokenizer. Not in the paper: the sum of logits
    carries over."""

    config: DcCclConfig
    config_class = DcCclConfig

    def device_package(self) -> DcCclDeviceForCausalLM:
        """A copy of what a device holds, to be saved and published by itself."""
        return _packed(self, DcCclDeviceForCausalLM)


__all__ = [
    "BRANCHES",
    "DcCclDeviceForCausalLM",
    "DcCclDeviceModel",
    "DcCclForCausalLM",
    "DcCclForImageClassification",
    "DcCclPreTrainedModel",
    "head_of",
]
