"""Grad-CAM (arXiv 1610.02391) of concepts on a vision transformer: the heatmap of read-outs that have no transport."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import num_prefix_tokens


def grad_cam(
    model: PreTrainedModel, pixel_values: torch.Tensor, *, concepts: Sequence[int] | None = None
) -> torch.Tensor:
    r"""Maps `(batch, N, M)`, fp32, not negative, as `heatmaps` takes them, of the `concepts` (indices), or of all.

        map_j(n) = relu(sum_d alpha_jd h_nd),   alpha_jd = 1/N sum_n d z_j / d h_nd

    with the concept logits z and the patches h that enter the backbone's last block: what leaves it has no gradient
    where concepts are read from the CLS token. Whether the backbone is frozen does not matter; parameters get no
    gradient. One backward pass of the last block for each concept.

    Args:
        model: [`DotCbmModel`] or [`DotCbmForImageClassification`], of every read-out but `"linear_probe"`.
    """
    body = model.base_model
    if body.config.readout == "linear_probe":
        raise ValueError("a linear probe has no concepts to make maps of.")
    was_training, entered = model.training, []
    handle = last_block(body.backbone).register_forward_pre_hook(
        lambda block, args, kwargs: _as_leaf(args, kwargs, entered), with_kwargs=True
    )
    model.eval()
    try:
        with torch.enable_grad():
            logits = body(pixel_values).concept_logits.sum(0)  # (M,), images do not mix
            chosen = range(len(logits)) if concepts is None else concepts
            (hidden,) = entered
            slopes = [torch.autograd.grad(logits[index], hidden, retain_graph=True)[0] for index in chosen]
    finally:
        handle.remove()
        model.train(was_training)
    prefix = num_prefix_tokens(body.backbone.config)
    patches = hidden.detach()[:, prefix:].float()
    weights = torch.stack([slope[:, prefix:].float().mean(1) for slope in slopes], dim=1)  # (batch, M, D)
    return torch.einsum("bnd,bmd->bnm", patches, weights).clamp_min(0.0)


def last_block(backbone: nn.Module) -> nn.Module:
    """The last transformer block; transformers' blocks are all of one class. `ValueError` if there is none."""
    blocks = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"{type(backbone).__name__} has no transformer blocks that are marked as transformers' own.")
    return blocks[-1]


def _as_leaf(args: tuple, kwargs: dict, entered: list[torch.Tensor]) -> tuple[tuple, dict]:
    """The block's input as a leaf of its own, also put into `entered`."""
    entered.append((args[0] if args else kwargs["hidden_states"]).detach().requires_grad_())
    return (entered[-1], *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}


__all__ = ["grad_cam", "last_block"]
