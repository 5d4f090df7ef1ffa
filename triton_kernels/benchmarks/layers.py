"""The layers that are compared: ours, those of transformers, and others where they are installed.

All get the same tensors, in the layout of transformers. transformers' own functions run through a module that it
decorates itself, as they do in a model.
"""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from ..grouped_mlp import moe_mlp


# (hidden states, top_k_index, top_k_weights) -> output
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

OURS, BASELINE = "sigma_kernels", "grouped_mm"
# transformers' `batched_mm` copies the weights of every pair.
MAX_COPIED_BYTES = 8e9


def layers(
    gate_up: nn.Parameter, down: nn.Parameter, *, pairs: int, compute_dtype: torch.dtype, training: bool
) -> dict[str, Layer]:
    """Layers by name, ours first; those that cannot run here or need too much memory are left out."""
    found: dict[str, Layer] = {
        OURS: lambda x, index, weights: moe_mlp(x, gate_up, down, index, weights, compute_dtype=compute_dtype)
    }
    found[BASELINE] = of_transformers(BASELINE, gate_up, down)
    if pairs * 3 * down[0].numel() * gate_up.element_size() * (2 if training else 1) <= MAX_COPIED_BYTES:
        found["batched_mm"] = of_transformers("batched_mm", gate_up, down)
    if gate_up.is_cuda and gate_up.dtype == torch.bfloat16:
        found |= _others(gate_up, down)
    return found


def of_transformers(name: str, gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    """The experts of transformers on the backend `name`."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = gate_up.shape[0]
            self.gate_up_proj, self.down_proj, self.act_fn = gate_up, down, nn.SiLU()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError("the eager loop is not compared")

    # `hidden_act` is what sonicmoe reads in place of the module's activation.
    return Experts(SimpleNamespace(_experts_implementation=name, hidden_act="silu"))


def _others(gate_up: nn.Parameter, down: nn.Parameter) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    if _installed("liger_kernel.ops.fused_moe"):
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        found["liger"] = lambda x, index, weights: LigerFusedMoEFunction.apply(x, gate_up, down, index, weights)
    if _installed("scattermoe.mlp"):
        found["scattermoe"] = _scattermoe(gate_up, down)
    if _installed("kernels") and _installed("cutlass"):
        found["sonicmoe"] = of_transformers("sonicmoe", gate_up, down)
    return found


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent package is missing
        return False


def _scattermoe(gate_up: nn.Parameter, down: nn.Parameter) -> Layer:
    from scattermoe.mlp import GLUMLP

    experts, hidden, inner = down.shape
    modules: dict[int, nn.Module] = {}

    def layer(x, index, weights):
        slots = index.shape[1]
        if slots not in modules:
            module = GLUMLP(hidden, inner, experts, top_k=slots, activation=nn.SiLU())
            # Its gate is the second half, ours the first: which half is which does not change what it costs.
            module.experts.weight, module.output_experts.weight = gate_up, down
            modules[slots] = module
        return modules[slots](x, weights, index)

    return layer
