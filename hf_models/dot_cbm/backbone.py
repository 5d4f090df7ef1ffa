"""Any vision transformer of `AutoModel` as a source of one global token and a grid of patch tokens."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_dot_cbm import WITHOUT_CLS, DotCbmConfig


class PatchTokens(NamedTuple):
    """`global_token (batch, D)`, `patches (batch, N, D)` by rows, `cls_attention (batch, N)` where wanted."""

    global_token: torch.Tensor
    patches: torch.Tensor
    cls_attention: torch.Tensor | None = None


def build_backbone(config: DotCbmConfig) -> PreTrainedModel:
    """The backbone of a config, without the parts that nothing here reads: they would be unused under DDP."""
    options = {"attn_implementation": "eager"} if config.saliency == "cls_attention" else {}
    backbone = AutoModel.from_config(config.backbone_config, **options)
    if config.backbone_config.model_type == "vit":
        backbone.pooler = None
    return backbone


def idle_parameters(backbone: PreTrainedModel, *, reads_global: bool) -> list[nn.Parameter]:
    """Parameters of a backbone that no output of ours depends on, whatever is trained: mask tokens, and SigLIP's
    pooling head where only patches carry gradient."""
    idle = [parameter for name, parameter in backbone.named_parameters() if name.endswith("mask_token")]
    if not reads_global and backbone.config.model_type in WITHOUT_CLS and getattr(backbone, "head", None) is not None:
        idle += list(backbone.head.parameters())
    return idle


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Tokens before the patches: CLS and registers."""
    if config.model_type in WITHOUT_CLS:
        return 0
    return 1 + (getattr(config, "num_register_tokens", 0) or 0)


def adapter_parameters(backbone: nn.Module) -> list[nn.Parameter]:
    """What PEFT has put into the layers of a backbone, known by the attribute with which its layers name them."""
    return [
        parameter
        for module in backbone.modules()
        for name in getattr(module, "adapter_layer_names", ())
        if isinstance(added := getattr(module, name, None), nn.Module)
        for parameter in added.parameters()
    ]


def patch_grid(config: DotCbmConfig, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of `height` x `width` pixels. What does not fill a patch, on the right
    and below, no backbone sees; heatmaps are drawn over it all the same, so choose sizes that patches fill."""
    rows, columns = height // config.patch_size[0], width // config.patch_size[1]
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels has no patch of {config.patch_size}. Resize it.")
    return rows, columns


def grid_of_patches(config: DotCbmConfig, num_patches: int) -> tuple[int, int]:
    """The grid that precomputed patches come from: that of the config's input size, or a square."""
    rows, columns = patch_grid(config, *config.input_size)
    if rows * columns == num_patches:
        return rows, columns
    side = round(num_patches**0.5)
    if side * side == num_patches:
        return side, side
    raise ValueError(
        f"{num_patches} precomputed patches are neither the {rows} x {columns} of input_size={config.input_size} nor "
        "a square. Pass grid=(rows, columns)."
    )


def patch_tokens(
    backbone: PreTrainedModel, config: DotCbmConfig, pixel_values: torch.Tensor, **recorded: Any
) -> tuple[PatchTokens, tuple[int, int], ModelOutput]:
    """Tokens of images `(batch, channels, height, width)`, their grid, and the backbone's own output, with what
    `recorded` (`output_hidden_states`, `output_attentions`) asks for.

    CLIP's final norm is applied to all its tokens, so that patches and CLS share a space. SigLIP has no CLS: its
    pooled output, or the mean of the patches, stands for it.
    """
    options = {name: value for name, value in recorded.items() if value is not None}
    if config.saliency == "cls_attention":
        options["output_attentions"] = True
    height, width = pixel_values.shape[-2:]
    native = config.backbone_config.image_size
    native = (native, native) if isinstance(native, int) else tuple(native)
    if (height, width) != native and "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters:
        options["interpolate_pos_encoding"] = True
    output = backbone(pixel_values=pixel_values, return_dict=True, **options)
    tokens, prefix = output.last_hidden_state, num_prefix_tokens(backbone.config)
    if backbone.config.model_type == "clip_vision_model":
        tokens = backbone.post_layernorm(tokens)
    patches = tokens[:, prefix:]
    grid = patch_grid(config, height, width)
    if patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{backbone.config.model_type} gives {patches.shape[1]} patch tokens, not the {grid[0]} x {grid[1]} of an "
            f"image of {height} x {width} pixels: this backbone has no plain grid of patches."
        )
    if prefix:
        global_token = tokens[:, 0]
    else:
        pooled = output.pooler_output
        global_token = patches.mean(1) if pooled is None else pooled
    attention = None
    if config.saliency == "cls_attention":
        if not output.attentions or output.attentions[-1] is None:
            raise ValueError(
                f"saliency='cls_attention' reads attention weights, which attn_implementation="
                f"{backbone.config._attn_implementation!r} does not return. Call set_attn_implementation('eager')."
            )
        attention = output.attentions[-1].mean(1)[:, 0, prefix:]  # (batch, N)
    return PatchTokens(global_token, patches, attention), grid, output


__all__ = [
    "PatchTokens",
    "adapter_parameters",
    "build_backbone",
    "grid_of_patches",
    "idle_parameters",
    "num_prefix_tokens",
    "patch_grid",
    "patch_tokens",
]
