"""Fused kernels of hf-sigma, installed and imported as ``sigma_kernels``.

Floor 0 of the tree: needs torch and Triton only and imports nothing of hf-sigma. Models reach it through guarded
imports and run on transformers' own backends where it, or Triton, is missing.
"""

import torch
import triton

from .grouped_mlp import moe_mlp
from .neuron_topk import bytes_per_token, neuron_topk_mlp
from .weight_casts import clear_casts, transposed_weight


def can_run(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`: on a GPU, or anywhere in Triton's interpreter
    (`TRITON_INTERPRET=1`)."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


__all__ = ["bytes_per_token", "can_run", "clear_casts", "moe_mlp", "neuron_topk_mlp", "transposed_weight"]
