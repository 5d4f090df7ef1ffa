# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""The smallest image classifier: softmax regression on pixels, as in FedLaAvg's MNIST runs, or an MLP on them.

transformers has no model that is linear in the pixels, and a convex task needs one. A saved model brings this file
along, so that it loads wherever transformers is.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import can_return_tuple


@strict
class PixelMlpConfig(PreTrainedConfig):
    """
    Args:
        image_size (`int`), num_channels (`int`): of the images.
        hidden_sizes (`list[int]`, *optional*): widths of the hidden layers; none: softmax regression.
    """

    model_type = "pixel_mlp"

    image_size: int = 8
    num_channels: int = 1
    hidden_sizes: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.hidden_sizes is None:
            self.hidden_sizes = []
        super().__post_init__(**kwargs)


class PixelMlpForImageClassification(PreTrainedModel):
    """Pixels to logits. Softmax regression begins at zero, where its loss is the same for every class."""

    config: PixelMlpConfig
    config_class = PixelMlpConfig
    base_model_prefix = "layers"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: PixelMlpConfig):
        super().__init__(config)
        sizes = [config.num_channels * config.image_size**2, *config.hidden_sizes]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(sizes[:-1], sizes[1:]))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if self.config.hidden_sizes:
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            else:
                nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """`pixel_values` `(batch, channels, size, size)`, `labels` `(batch,)`."""
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        logits = self.classifier(hidden)  # (batch, labels)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register("pixel_mlp", PixelMlpConfig, exist_ok=True)
AutoModelForImageClassification.register(PixelMlpConfig, PixelMlpForImageClassification, exist_ok=True)
PixelMlpConfig.register_for_auto_class()
PixelMlpForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["PixelMlpConfig", "PixelMlpForImageClassification"]
