"""Fused kernels of hf-sigma, installed and imported as ``sigma_kernels``.

Floor 0 of the tree: needs torch and Triton only and imports nothing of hf-sigma. Models reach it through guarded
imports and run on transformers' own backends where it, or Triton, is missing; what needs no Triton (MSign's
signs, cross-entropy by blocks) works there too.
"""

import torch

from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_grid
from .polar import Polar, polar_factor, polar_with_rank, spectral_norm
from .sinkhorn import sinkhorn


# Triton has no wheels for macOS and Windows: imported when they are asked for, with its ImportError.
_NEED_TRITON = ("bytes_per_token", "clear_casts", "moe_mlp", "neuron_topk_mlp", "transposed_weight")


def __getattr__(name: str):
    if name not in _NEED_TRITON:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .grouped_mlp import moe_mlp
    from .neuron_topk import bytes_per_token, neuron_topk_mlp
    from .weight_casts import clear_casts, transposed_weight

    found = (bytes_per_token, clear_casts, moe_mlp, neuron_topk_mlp, transposed_weight)
    globals().update(zip(_NEED_TRITON, found, strict=True))
    return globals()[name]


def can_run(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: on a GPU, or anywhere in Triton's interpreter
    (`TRITON_INTERPRET=1`)."""
    import triton

    return device.type == "cuda" or triton.knobs.runtime.interpret


__all__ = [
    "Polar",
    "can_run",
    "linear_cross_entropy",
    "linear_cross_entropy_grid",
    "polar_factor",
    "polar_with_rank",
    "sinkhorn",
    "spectral_norm",
    *_NEED_TRITON,
]
