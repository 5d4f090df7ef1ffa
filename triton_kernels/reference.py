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


def neuron_mask(
    gate: torch.Tensor, activated: torch.Tensor, neuron_top_k: int, *, select_on: str = "abs_act"
) -> torch.Tensor:
    """Which neurons `(..., I)` are kept: the `neuron_top_k` of largest score, of equal ones the first."""
    score = {"abs_act": activated.abs, "abs_gate": gate.abs, "act": activated.clone}[select_on]()
    kept = score.sort(dim=-1, descending=True, stable=True).indices[..., :neuron_top_k]
    return torch.zeros_like(gate, dtype=torch.bool).scatter(-1, kept, True)


def neuron_topk_mlp(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    neuron_top_k: int,
    *,
    select_on: str = "abs_act",
    stored_in: torch.dtype | None = None,
) -> torch.Tensor:
    """`out[t] = sum_k s[t,k] sum_{j in S} silu(g_j) (W_up[e]_j x) W_down[e]_:j`, `S` by [`neuron_mask`]: only what is
    kept is computed. `stored_in`: the gate `g` and `silu(g)` are rounded to this dtype."""
    out, inner = torch.zeros_like(hidden_states), down_proj.shape[2]
    wide, stored_in = hidden_states.dtype, stored_in or hidden_states.dtype
    for token in range(hidden_states.shape[0]):
        for slot in range(top_k_index.shape[1]):
            expert = int(top_k_index[token, slot])
            if expert < gate_up_proj.shape[0]:
                x = hidden_states[token]
                gate = F.linear(x, gate_up_proj[expert, :inner]).to(stored_in).to(wide)
                activated = F.silu(gate).to(stored_in).to(wide)
                kept = neuron_mask(gate, activated, neuron_top_k, select_on=select_on).nonzero().squeeze(-1)
                neurons = activated[kept] * F.linear(x, gate_up_proj[expert, inner:][kept])
                row = F.linear(neurons, down_proj[expert][:, kept])
                out[token] = out[token] + row * top_k_weights[token, slot].to(wide)
    return out


def masked_neuron_mlp(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    neuron_top_k: int,
    *,
    select_on: str = "abs_act",
) -> torch.Tensor:
    """The same as [`neuron_topk_mlp`], as training computes it: all neurons, and a mask that stops values and
    gradients of those that are not kept."""
    out = torch.zeros_like(hidden_states)
    for expert in range(gate_up_proj.shape[0]):
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2, dim=-1)
        activated = F.silu(gate)
        keep = neuron_mask(gate, activated, neuron_top_k, select_on=select_on)
        rows = F.linear(activated * up * keep, down_proj[expert])
        out = out.index_add(0, token, rows * top_k_weights[token, slot, None].to(rows.dtype))
    return out


def polar_factor(matrix: torch.Tensor, *, rtol: float | None = None) -> torch.Tensor:
    """`sign(W) = U_r V_r^T` of one matrix `(m, n)`, a rank-one term for each singular value above `rtol * s_1`; by
    default `rtol = max(m, n) * eps`."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rtol = max(matrix.shape) * torch.finfo(matrix.dtype).eps if rtol is None else rtol
    out = torch.zeros_like(matrix)
    for i in range(len(s)):
        if s[i] > rtol * s[0]:
            out = out + torch.outer(u[:, i], vt[i])
    return out


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """`loss[n] = logsumexp(z[n]) - z[n, y[n]]`, `z = h W^T + b`, for `hidden (N, H)`, `weight (V, H)` and labels `y`;
    0 where the label is `ignore_index`, which does not count for the mean. The mean of nothing is 0."""
    counts = labels != ignore_index
    logits = F.linear(hidden, weight, bias)  # (N, V)
    chosen = logits.gather(1, labels.where(counts, 0)[:, None]).squeeze(1)
    losses = torch.where(counts, logits.logsumexp(1) - chosen, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() / (counts.sum().clamp(min=1) if reduction == "mean" else 1)


def sinkhorn(
    cost: torch.Tensor,
    theta: torch.Tensor,
    gamma: torch.Tensor,
    *,
    eps: float = 0.1,
    num_iterations: int = 30,
    rho: float | None = None,
) -> torch.Tensor:
    """Plan `(B, N, M)` of entropic transport from `theta (B, N)` to `gamma (B, M)` or `(M,)`: potentials of rows and
    then of columns, and again, damped by `rho / (rho + eps)`."""
    damping = 1.0 if rho is None else rho / (rho + eps)
    log_theta = theta.log()[:, :, None]
    log_gamma = gamma.log()[..., None, :].expand(cost.shape[0], 1, cost.shape[2])
    f, g = torch.zeros_like(log_theta), torch.zeros_like(log_gamma)
    for _ in range(num_iterations):
        f = -damping * (log_gamma + g - cost / eps).logsumexp(2, keepdim=True)
        g = -damping * (log_theta + f - cost / eps).logsumexp(1, keepdim=True)
    return (log_theta + f + log_gamma + g - cost / eps).exp()
