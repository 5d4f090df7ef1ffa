"""The obvious version of every kernel: the definition of correct, differentiable by autograd, in any dtype."""

import torch
from torch.nn import functional as F


def moe_mlp(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """`out[t] = sum_k s[t,k] W2[e] (silu(g) * u)`, `(g, u) = W1[e] x[t]`, `e = index[t,k]`.

    Args:
        hidden_states: `(tokens, H)`.
        gate_up_proj: `(E, 2 I, H)`, gate rows first.
        down_proj: `(E, H, I)`.
        top_k_index: `(tokens, K)`, integers; a pair whose index is E or more contributes nothing.
        top_k_weights: `(tokens, K)`.

    Returns `(tokens, H)` in the dtype of `hidden_states`.
    """
    out = torch.zeros_like(hidden_states)
    for token in range(hidden_states.shape[0]):
        for slot in range(top_k_index.shape[1]):
            expert = int(top_k_index[token, slot])
            if expert < gate_up_proj.shape[0]:
                gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2)
                row = F.linear(F.silu(gate) * up, down_proj[expert])
                out[token] = out[token] + row * top_k_weights[token, slot].to(row.dtype)
    return out
