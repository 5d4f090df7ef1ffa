"""Layers of neuron experts for the tests of the CPU path, of the interpreted kernels and of a GPU."""

import torch

from sigma_kernels import neuron_topk_mlp, reference


# Relative root-mean-square errors; in the interpreter bf16 is truncated where it is stored.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def layer(tokens, slots, experts, hidden, inner, *, dtype=torch.float32, sentinels=False):
    """Inputs by name; `sentinels`: half of the indices, in no order, are E."""
    rows = [torch.randperm(2 * experts if sentinels else experts)[:slots] for _ in range(tokens)]
    index = torch.stack(rows) if rows else torch.zeros(0, slots, dtype=torch.int64)
    return {
        "hidden_states": torch.randn(tokens, hidden).to(dtype),
        "gate_up_proj": (torch.randn(experts, 2 * inner, hidden) / hidden**0.5).to(dtype),
        "down_proj": (torch.randn(experts, hidden, inner) / inner**0.5).to(dtype),
        "top_k_index": index.clamp(max=experts),
        "top_k_weights": torch.rand(tokens, slots) + 0.1,
    }


def transposed(inputs):
    """The copy of W_down that makes a neuron a row."""
    return inputs["down_proj"].transpose(1, 2).contiguous()


def exact(inputs, neuron_top_k, **options):
    """The reference in float64, whose gate is stored as the layer's."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    dtype = inputs["gate_up_proj"].dtype
    return reference.neuron_topk_mlp(**wide, neuron_top_k=neuron_top_k, stored_in=dtype, **options)


def error(got, expected):
    """Relative root-mean-square error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def check_against_reference(inputs, neuron_top_k, *, select_on="abs_act", sentinels=False):
    """With and without the transposed copy."""
    expected = exact(inputs, neuron_top_k, select_on=select_on)
    for down_proj_t in (None, transposed(inputs)):
        options = {"select_on": select_on, "sentinels": sentinels, "down_proj_t": down_proj_t}
        got = neuron_topk_mlp(**inputs, neuron_top_k=neuron_top_k, **options)
        assert got.dtype == inputs["hidden_states"].dtype and got.shape == inputs["hidden_states"].shape
        assert error(got, expected) < LIMITS[inputs["gate_up_proj"].dtype] or not expected.any() and not got.any()


def tied_layer(tokens=3, experts=2, inner=12):
    """Gates of a few equal values, zeros and both signs among them, every neuron with an output of its own."""
    gates = torch.tensor([0.0, 2.0, -2.0, 0.0, 2.0, -0.0, 2.0, 1.0, 1.0, -2.0, 0.0, 2.0])[:inner]
    gate_up = torch.zeros(experts, 2 * inner, inner + 1)
    gate_up[:, :inner, 0] = gates
    gate_up[:, inner:, 0] = 1.0
    inputs = layer(tokens, 1, experts, inner + 1, inner)
    hidden = torch.zeros(tokens, inner + 1)
    hidden[:, 0] = 1.0
    return inputs | {"hidden_states": hidden, "gate_up_proj": gate_up}


def mask_of(gate, neuron_top_k, *, select_on="abs_act"):
    """The reference's choice by the gate."""
    return reference.neuron_mask(gate, torch.nn.functional.silu(gate), neuron_top_k, select_on=select_on)


def chosen(inputs, neuron_top_k, **options):
    """Which neurons of the first token's expert contribute: neuron j writes to output j, and W_up x is 1."""
    experts, hidden, inner = inputs["down_proj"].shape
    down = torch.eye(hidden, inner).expand(experts, -1, -1).contiguous()
    # A gate of zero contributes nothing either way: zeros are told apart by the reference's mask.
    got = neuron_topk_mlp(**inputs | {"down_proj": down}, neuron_top_k=neuron_top_k, **options)
    return got[0, :inner] != 0
