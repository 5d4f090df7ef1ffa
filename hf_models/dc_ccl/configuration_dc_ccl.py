# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configurations of DC-CCL (arXiv 2303.10361): a large submodel on the cloud, a small one on both sides, and a control
model that stands in for the large one where that cannot run."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .joint_cache import joint_text_config


CONTROL_LOSSES = ("mse", "centered_mse", "kl")
FUSIONS = ("sum",)
SHAREABLE = ("resnet", "vit")  # families whose lowest part can be shared


def nested(config: dict | PreTrainedConfig, field: str) -> PreTrainedConfig:
    """A nested configuration out of what config.json holds; it names its `model_type`."""
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError(f"{field} names no model_type, such as 'vit'. Add it.")
    fields = dict(config)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


@strict
class DcCclDeviceConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DcCclDeviceModel`]: what a device holds, and nothing of the cloud's submodel.

    Args:
        co_config, control_config (`dict` or `PreTrainedConfig`):
            Of the co-submodel F_s and the control model G: any image classifier, or causal language model, of the
            Auto classes, with the same labels (the same vocabulary). `None` for both: a small ResNet.
        base_config (`dict` or `PreTrainedConfig`, *optional*):
            Of the model whose lowest part is shared, with `shared_encoder`.
        shared_encoder (`bool`, defaults to `False`):
            Both submodels read the stem of `base_config` instead of pixels: of a ViT the patch embedding, of a ResNet
            the stem.
        split_ratio (`float`, *optional*):
            For the record: the share of the width that went to the small submodel of a vertical split.
        fusion (`str`, defaults to `"sum"`):
            How submodels meet: the sum of their logits, the only one known.
        control_loss (`str`, defaults to `"mse"`):
            What G is distilled by: `"mse"` on raw logits, as in the code of the first author; `"centered_mse"`, after
            subtracting the mean over classes, to which the softmax is blind; `"kl"`.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type.
        StrictDataclassClassValidationError: values that do not fit together; the message names the remedy.
    """

    model_type = "dc_ccl_device"
    sub_configs = {"co_config": AutoConfig, "control_config": AutoConfig, "base_config": AutoConfig}

    co_config: dict | PreTrainedConfig | None = None
    control_config: dict | PreTrainedConfig | None = None
    base_config: dict | PreTrainedConfig | None = None
    shared_encoder: bool = False
    split_ratio: float | None = None
    fusion: str = "sum"
    control_loss: str = "mse"
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.co_config is None and self.control_config is None:
            self.co_config, self.control_config = _small_resnet(16), _small_resnet(16)
        for field in self.sub_configs:
            if getattr(self, field) is not None:
                setattr(self, field, nested(getattr(self, field), field))
        present = [config for config in self.submodel_configs.values() if config is not None]
        if present and self.id2label is None and "num_labels" not in kwargs and not self.of_text:
            self.id2label = dict(present[0].id2label)
        if self.of_text:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(self.co_config.get_text_config(decoder=True), name, None))
        if auto_map := getattr(type(self), "_family_auto_map", None):
            kwargs["auto_map"] = dict(auto_map)
        super().__post_init__(**kwargs)
        if not self.of_text:
            self.label2id = {label: index for index, label in self.id2label.items()}
            if len({config.num_labels for config in present}) == 1:  # else `validate_submodels` says so
                self.name_labels()

    @property
    def submodel_configs(self) -> dict[str, PreTrainedConfig | None]:
        """The configurations of the submodels by the names of their modules."""
        return {"control_model": self.control_config, "co_submodel": self.co_config}

    @property
    def of_text(self) -> bool:
        """Whether the submodels are language models."""
        return getattr(self.co_config, "vocab_size", None) is not None

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary that language models share; `None` for images."""
        return getattr(self.co_config, "vocab_size", None)

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        for config in self.submodel_configs.values():
            config.vocab_size = value

    @property
    def image_size(self) -> Any:
        """Height and width of images, where a submodel's configuration says them."""
        return getattr(self.base_config or self.co_config, "image_size", None)

    @property
    def num_channels(self) -> int:
        """Channels of images."""
        return getattr(self.base_config or self.co_config, "num_channels", 3)

    @property
    def cached_configs(self) -> list[PreTrainedConfig]:
        """Submodels in the order of their layers in a cache. The co-submodel is in every sum, so it comes first: a
        cache is as long as its first layer."""
        return [self.co_config, *(c for name, c in self.submodel_configs.items() if name != "co_submodel")]

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Of language models, what generation makes a cache from: the layers of all submodels."""
        return joint_text_config(self.cached_configs) if self.of_text else self

    def name_labels(self) -> None:
        """Give all submodels the labels of the whole, as many as these are."""
        for config in self.submodel_configs.values():
            if config is not None and not self.of_text:
                config.id2label = dict(self.id2label)
                config.label2id = {label: index for index, label in self.id2label.items()}

    def validate_choices(self):
        """Known words in every field that is a choice."""
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion={self.fusion!r} is not known. Choose one of {FUSIONS}.")
        if self.control_loss not in CONTROL_LOSSES:
            raise ValueError(f"control_loss={self.control_loss!r} is not known. Choose one of {CONTROL_LOSSES}.")
        if self.split_ratio is not None and not 0 < self.split_ratio < 1:
            raise ValueError(f"split_ratio={self.split_ratio} must lie between 0 and 1: the small submodel's share.")

    def validate_submodels(self):
        """All submodels are there and give logits of one width: these are added."""
        missing = [name for name, config in self.submodel_configs.items() if config is None]
        if missing:
            raise ValueError(f"no configuration of {', '.join(missing)}. Give all of {list(self.submodel_configs)}.")
        word = "vocab_size" if self.of_text else "num_labels"
        sizes = {name: getattr(config, word, None) for name, config in self.submodel_configs.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"logits are added, but {word} differs: {sizes}. Give all submodels the same.")

    def validate_shared_encoder(self):
        """A shared encoder is of a family that has a stem, and the submodels are of the same."""
        if not self.shared_encoder:
            return
        kind = getattr(self.base_config, "model_type", None)
        if kind not in SHAREABLE:
            raise ValueError(f"shared_encoder needs a base_config of {SHAREABLE}, got {kind}. Leave it out otherwise.")
        others = {c.model_type for c in self.submodel_configs.values() if c is not None} - {kind}
        if others:
            raise ValueError(f"submodels of type {sorted(others)} cannot read the stem of a {kind}.")


@strict
class DcCclConfig(DcCclDeviceConfig):
    r"""
    Configuration of a [`DcCclForImageClassification`] or a [`DcCclForCausalLM`]: a [`DcCclDeviceConfig`] and the
    cloud's submodel. [`split_vertically`] makes one out of the configuration of one model.

    Args:
        cloud_config (`dict` or `PreTrainedConfig`, *optional*):
            Of the cloud submodel F_c. `None` for all three: small ResNets.
    """

    model_type = "dc_ccl"
    sub_configs = {"cloud_config": AutoConfig, **DcCclDeviceConfig.sub_configs}

    cloud_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if self.cloud_config is None and self.co_config is None and self.control_config is None:
            self.cloud_config = _small_resnet(32)
        super().__post_init__(**kwargs)

    @property
    def submodel_configs(self) -> dict[str, PreTrainedConfig | None]:
        """The configurations of the submodels by the names of their modules."""
        return {
            "cloud_submodel": self.cloud_config,
            "control_model": self.control_config,
            "co_submodel": self.co_config,
        }

    def device_config(self) -> DcCclDeviceConfig:
        """The configuration of the part that a device holds."""
        own = ("co_config", "control_config", "base_config", "shared_encoder", "split_ratio", "fusion", "control_loss")
        fields = {name: getattr(self, name) for name in own}
        nested_fields = {n: v.to_dict() for n, v in fields.items() if isinstance(v, PreTrainedConfig)}
        labels = {} if self.of_text else {"id2label": dict(self.id2label)}
        return DcCclDeviceConfig(**(fields | nested_fields | labels))


def _small_resnet(width: int) -> PreTrainedConfig:
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [1, 1], "layer_type": "basic"}
    return AutoConfig.for_model("resnet", **sizes)


__all__ = ["DcCclConfig", "DcCclDeviceConfig"]
