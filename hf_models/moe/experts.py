"""The kernels of `sigma_kernels` as backends of transformers' experts.

    model.set_experts_implementation("sigma_triton")       # every mixture of SwiGLU experts, training and inference
    model.set_experts_implementation("sigma_neurons")      # MoNE: decoding reads only the neurons that are kept

Weights, checkpoints, adapters and parallel plans stay as they are. Where the kernels cannot run (no GPU, no Triton)
the stock `grouped_mm` computes, with one warning; experts that they cannot compute are refused by name.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate, grouped_mm_experts_forward
from transformers.utils import logging


logger = logging.get_logger(__name__)

NAME = "sigma_triton"
NEURONS = "sigma_neurons"
# Above, several tokens share an expert, and a product over all its neurons reads them once.
MAX_DECODED_PAIRS = 64
# Attribute of the experts module -> the value that the kernels compute.
_LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def sigma_triton_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of an experts module, `(tokens, H)`, `(tokens, K)`, `(tokens, K)` -> `(tokens, H)`.

    Computes in the dtype of the weights, under autocast in that of autocast, then with a copy of the weights that is
    made once per optimizer step: the stock backend runs fp32 there.

    Raises:
        ValueError: experts with biases, another layout, another gate or another activation than SwiGLU's.
    """
    require_swiglu(self)
    kernel = _kernel(hidden_states.device)
    if kernel is None:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    device = hidden_states.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return kernel(
        hidden_states,
        self.gate_up_proj,
        self.down_proj,
        top_k_index,
        top_k_weights,
        compute_dtype=autocast,
        sentinels=getattr(self, "_is_expert_parallel", True),  # transformers 5.17 always looks for them
    )


def sigma_neurons_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward of experts that keep their top neurons (`neurons.py`), shapes as above; `grouped_mm` but where few
    tokens are decoded: there, on GPUs and CPUs, the rest of the up and down projections is not read.

    A transposed copy of the down projection, a third of the experts' memory, is made at the first such step and kept
    while the weight is the same.
    """
    decodes = not self.training and not torch.is_grad_enabled() and top_k_index.numel() <= MAX_DECODED_PAIRS
    supported = getattr(self, "selects_neurons", False) and self.neuron_select_on != "abs_product"
    supported = supported and isinstance(self.act_fn, (nn.SiLU, SiLUActivation))
    whole = supported and self.down_proj.shape[-1] == self.neuron_width  # a shard is refused where it is masked
    if decodes and whole:
        try:
            from sigma_kernels import neuron_topk_mlp, transposed_weight
        except ImportError as error:
            logger.warning_once(f"{NEURONS} needs Triton and hf-sigma's kernels ({error}); 'grouped_mm' computes.")
        else:
            return neuron_topk_mlp(
                hidden_states,
                self.gate_up_proj,
                self.down_proj,
                top_k_index,
                top_k_weights,
                self.neuron_top_k,
                select_on=self.neuron_select_on,
                down_proj_t=transposed_weight(self.down_proj),
                sentinels=getattr(self, "_is_expert_parallel", True),
            )
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def require_swiglu(experts: nn.Module) -> None:
    """Raise `ValueError`, naming class, field and another backend, unless the kernels compute these experts."""
    problems = [
        f"{name}={getattr(experts, name)}"
        for name, value in _LAYOUT.items()
        if getattr(experts, name, value) is not value
    ]
    plain = getattr(experts._apply_gate, "__func__", None) is _default_apply_gate
    if not plain and getattr(experts, "selects_neurons", True):
        problems.append("a gate of its own (_apply_gate)")
    activation = getattr(experts, "act_fn", None)
    if not isinstance(activation, (nn.SiLU, SiLUActivation)):
        problems.append(f"the activation {type(activation).__name__}")
    if problems:
        raise ValueError(
            f"experts_implementation={NAME!r} computes silu(gate) * up without biases; {type(experts).__name__} has "
            f"{', '.join(problems)}. Choose 'grouped_mm'."
        )


def _kernel(device: torch.device) -> Callable[..., torch.Tensor] | None:
    try:
        from sigma_kernels import can_run, moe_mlp
    except ImportError as error:
        logger.warning_once(f"{NAME} needs Triton and hf-sigma's kernels ({error}); 'grouped_mm' computes instead.")
        return None
    if can_run(device):
        return moe_mlp
    logger.warning_once(f"{NAME} has no kernels for {device.type!r} tensors; 'grouped_mm' computes instead.")
    return None


def register() -> None:
    """Make the backends known to transformers."""
    ExpertsInterface.register(NAME, sigma_triton_experts_forward)
    ExpertsInterface.register(NEURONS, sigma_neurons_experts_forward)
