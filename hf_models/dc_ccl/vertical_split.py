# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Cut a model's width into a large and a small submodel that share its stem and meet again in the sum of logits.

Every layer's width falls into two unequal groups, and the weights between the groups are dropped, as in a convolution
of two groups of different sizes. Both groups read the whole stem. The widths and the sum are those of a replication of
the paper; that weights are dropped is our reading.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_dc_ccl import SHAREABLE, DcCclConfig
from .modeling_dc_ccl import DcCclForImageClassification
from .shared_encoder import stem_of


def split_vertically(
    model_or_config: PreTrainedModel | PreTrainedConfig, ratio: float = 0.125, **fields: Any
) -> DcCclConfig | DcCclForImageClassification:
    """Split a ViT or a ResNet: a configuration gives a [`DcCclConfig`], a model a [`DcCclForImageClassification`] with
    its weights, the control model starting as the co-submodel does.

    A ViT is cut by heads, and its MLP width in proportion; hidden size = heads x head size on either side. A ResNet is
    cut by the channels of every stage. Without weights between the groups, a ResNet in eval mode gives the sum of its
    two parts exactly; a ViT does not, since its layer norms look over both groups.

    Args:
        ratio: the small submodel's share of the width, rounded to whole heads, or to channels of which a layer can be
            made, at least one of each.
        fields: further ones of the [`DcCclConfig`], such as `control_loss`.

    Raises:
        ValueError: another family (give `DcCclConfig` the configurations of two whole models instead), or a ratio that
            leaves a side without width.
    """
    model = model_or_config if isinstance(model_or_config, PreTrainedModel) else None
    base = model_or_config.config if model is not None else model_or_config
    if base.model_type not in SHAREABLE:
        raise ValueError(
            f"a {base.model_type} is not split here, only {SHAREABLE}. Give DcCclConfig(cloud_config=, co_config=, "
            "control_config=) two whole models instead: any image classifiers with the same labels."
        )
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio} must lie between 0 and 1.")
    cut = {"resnet": _cut_resnet, "vit": _cut_vit}[base.model_type]
    cloud, small = cut(base, ratio)
    config = DcCclConfig(
        cloud_config=_like(base, cloud),
        co_config=_like(base, small),
        control_config=_like(base, small),
        base_config=_like(base, {}),
        shared_encoder=True,
        split_ratio=float(ratio),
        **({"id2label": dict(base.id2label)} | fields),
    )
    return config if model is None else _with_weights(config, model)


def _like(config: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    noted = (
        "architectures",
        "dtype",
        "transformers_version",
        "auto_map",
        "stage_names",
        "out_features",
        "out_indices",
    )
    fields = {name: value for name, value in config.to_dict().items() if name not in noted}
    return type(config)(**(fields | changes))


def _cut_vit(config: PreTrainedConfig, ratio: float) -> tuple[dict[str, int], dict[str, int]]:
    heads = config.num_attention_heads
    few = max(1, round(ratio * heads))
    if few >= heads:
        raise ValueError(f"ratio={ratio} of {heads} heads leaves the cloud none. Lower it, or take more heads.")
    head_size = config.hidden_size // heads
    few_wide = max(1, config.intermediate_size * few // heads)

    def part(count: int, wide: int) -> dict[str, int]:
        width = count * head_size
        sizes = {"hidden_size": width, "num_attention_heads": count, "intermediate_size": wide}
        return sizes | {"pooler_output_size": width}

    return part(heads - few, config.intermediate_size - few_wide), part(few, few_wide)


def _cut_resnet(config: PreTrainedConfig, ratio: float) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    unit = 4 if config.layer_type == "bottleneck" else 1  # a bottleneck has a quarter of the channels inside
    few = [max(unit, unit * round(ratio * width / unit)) for width in config.hidden_sizes]
    first, stem = config.hidden_sizes[0], config.embedding_size
    while first != stem and stem in (few[0], first - few[0]):
        few[0] += unit  # at the stem's own width a ResNet has no shortcut, whose weights would be lost
    many = [width - small for width, small in zip(config.hidden_sizes, few)]
    if min(many) < unit:
        raise ValueError(f"ratio={ratio} of {config.hidden_sizes} channels leaves the cloud none. Lower it.")
    return {"hidden_sizes": many}, {"hidden_sizes": few}


@torch.no_grad()
def _with_weights(config: DcCclConfig, model: PreTrainedModel) -> DcCclForImageClassification:
    split = DcCclForImageClassification(config).to(model.dtype)
    split.shared_encoder.stem.load_state_dict(stem_of(model).state_dict())
    source = model.state_dict()
    for submodel, last in ((split.cloud_submodel, False), (split.co_submodel, True), (split.control_model, True)):
        state = submodel.state_dict()
        for name, tensor in state.items():
            if name.endswith("patch_embeddings.projection.weight"):
                tensor.copy_(_selection(tensor, last))
            elif name in source:
                tensor.copy_(_group(source[name], tensor.shape, last))
        _pass_stem_on(submodel, source, last)
        if last:  # the sum has the bias once
            state["classifier.bias" if "classifier.bias" in state else "classifier.1.bias"].zero_()
    return split.eval()


def _pass_stem_on(submodel: PreTrainedModel, source: dict[str, torch.Tensor], last: bool) -> None:
    """Where a ResNet's first block adds the stem's map as it is, its narrower parts have a shortcut: it selects."""
    for name, module in submodel.named_modules():
        if name.endswith("shortcut") and not any(key.startswith(f"{name}.") for key in source):
            convolution, norm = getattr(module, "convolution", None), getattr(module, "normalization", None)
            if convolution is not None:
                convolution.weight.copy_(_selection(convolution.weight[..., 0, 0], last)[..., None, None])
                norm.weight.fill_((1 + norm.eps) ** 0.5)  # a norm that changes nothing


def _group(tensor: torch.Tensor, shape: torch.Size, last: bool) -> torch.Tensor:
    """The part of a weight inside one group: the first entries of every dimension that was cut, or the last."""
    for dim, size in enumerate(shape):
        start = tensor.shape[dim] - size if last else 0
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _selection(like: torch.Tensor, last: bool) -> torch.Tensor:
    """The matrix that keeps a group's entries of a token."""
    return _group(torch.eye(like.shape[1], dtype=like.dtype, device=like.device), like.shape, last)


__all__ = ["split_vertically"]
