"""The lowest part of a model, taken out of it and shared by two narrower ones."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.resnet.modeling_resnet import ResNetEmbeddings, ResNetPreTrainedModel
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTPreTrainedModel


class DcCclViTStem(ViTPreTrainedModel):
    """A ViT's embeddings: pixels `(batch, channels, height, width)` to tokens `(batch, N + 1, H)`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.stem = ViTEmbeddings(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stem.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stem.patch_embeddings = value

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.stem(pixel_values.to(self.dtype))


class DcCclResNetStem(ResNetPreTrainedModel):
    """A ResNet's stem: pixels `(batch, channels, height, width)` to a map of a quarter of the height and width."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.stem = ResNetEmbeddings(config)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.stem(pixel_values.to(self.dtype))


class DcCclSharedTokens(nn.Module):
    """In the place of a ViT's embeddings: tokens of the shared stem `(batch, N + 1, H)` to the submodel's width."""

    def __init__(self, width: int, own_width: int):
        super().__init__()
        # A ViT asks its embeddings for the dtype of this weight, by this name.
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Linear(width, own_width, bias=False)

    def forward(self, tokens: torch.Tensor, **_) -> torch.Tensor:
        return self.patch_embeddings.projection(tokens)


class DcCclSharedMap(nn.Module):
    """In the place of a ResNet's stem: the map `(batch, channels, height, width)` of the shared stem as it is, all of
    whose channels the submodel's first convolutions read."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


STEMS = {"resnet": DcCclResNetStem, "vit": DcCclViTStem}
_PLACES = {"resnet": ("resnet", "embedder"), "vit": ("vit", "embeddings")}


def build_stem(config: PreTrainedConfig) -> PreTrainedModel:
    """The shared encoder of a family in `STEMS`, freshly initialised."""
    return STEMS[config.model_type](config)


def stem_of(model: PreTrainedModel) -> nn.Module:
    """The stem inside an image classifier of a family in `STEMS`."""
    outer, inner = _PLACES[model.config.model_type]
    return getattr(getattr(model, outer), inner)


def replace_stem(model: PreTrainedModel, base_config: PreTrainedConfig) -> PreTrainedModel:
    """Make `model` read what the stem of `base_config` gives, under its argument `pixel_values`; returns it."""
    outer, inner = _PLACES[model.config.model_type]
    if model.config.model_type == "vit":
        stem = DcCclSharedTokens(base_config.hidden_size, model.config.hidden_size)
    else:
        stem = DcCclSharedMap()
    setattr(getattr(model, outer), inner, stem)
    return model


__all__ = [
    "STEMS",
    "DcCclResNetStem",
    "DcCclSharedMap",
    "DcCclSharedTokens",
    "DcCclViTStem",
    "build_stem",
    "replace_stem",
    "stem_of",
]
