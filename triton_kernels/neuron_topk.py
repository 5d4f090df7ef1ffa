r"""Neuron experts (MoNE) at decoding, `neuron_topk_mlp`: few tokens, no gradient, only the neurons that are kept.

    g = W_gate[e] x,   S = the k_n neurons of largest score(g),   e = index[t,k]
    out[t] = sum_k s[t,k] sum_{j in S} silu(g_j) (W_up[e]_j x) W_down[e]_:j

The gate is always read whole, W_up and W_down only where `S` is: with r = k_n / I, (1 + 2 r) / 3 of an expert's bytes.
W_down is `(H, I)`, in which a neuron is a column, scattered over almost every cache line: its share is saved only with
a transposed copy, see [`transposed_weight`].

Gate and silu(gate) are rounded to the dtype of the weights before neurons are chosen. The masked layer of training and
prefill stores them so; near the threshold, finer numbers would choose other neurons than it did.
"""

from collections import defaultdict

import torch
import triton
from torch.nn import functional as F

from . import neuron_topk_kernels as kernels
from .autotune import tiles_for
from .grouped_mlp import check_layer


SELECT_ON = ("abs_act", "abs_gate", "act")
MAX_INNER = 16384  # the registers of the kernel that selects hold no more
# On a CPU, the largest share of neurons for which reading only their rows is faster than reading all rows in a go:
# `benchmarks/neurons.py`. Dot products of bf16 are slow one by one.
_UP_SHARE = {torch.float32: 0.8, torch.bfloat16: 0.45, torch.float16: 0.8}
_DOWN_SHARE = 0.8


def neuron_topk_mlp(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    neuron_top_k: int,
    *,
    select_on: str = "abs_act",
    down_proj_t: torch.Tensor | None = None,
    sentinels: bool = False,
) -> torch.Tensor:
    """Output `(tokens, H)` of a mixture of neuron experts, in the dtype of `hidden_states`; computed in that of the
    weights, sums in fp32. For decoding: time grows with the (token, slot) pairs, so above about 64 a dense layer wins.

    Args:
        hidden_states: `(tokens, H)`.
        gate_up_proj: `(E, 2 I, H)`, gate rows first.
        down_proj: `(E, H, I)`.
        top_k_index: `(tokens, K)`, integers from 0 to E - 1.
        top_k_weights: `(tokens, K)`, used in fp32.
        neuron_top_k: neurons kept of each expert and token; with I or more the layer is dense.
        select_on: score, `"abs_act"` (`|silu(g)|`), `"abs_gate"` (`|g|`) or `"act"` (`silu(g)`). Of equal ones the
            lowest index is kept. `"abs_product"` would need the whole of W_up and is not offered.
        down_proj_t: `(E, I, H)`, a contiguous transposed copy of `down_proj`, as [`transposed_weight`] keeps one.
        sentinels: indices of E or more may occur and contribute nothing (expert parallelism).

    On GPUs equal inputs give equal bits and nothing waits for the GPU; K, tokens and `neuron_top_k` compile nothing
    anew.

    Raises:
        RuntimeError: a gradient is asked for; train with the masked layer.
        ValueError: shapes, dtypes, devices or a score that do not fit.
    """
    check_layer(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_proj.dtype)
    _check(hidden_states, gate_up_proj, down_proj, top_k_weights, neuron_top_k, select_on, down_proj_t)
    x = hidden_states.to(gate_up_proj.dtype)
    arguments = (gate_up_proj, down_proj, down_proj_t, top_k_index, top_k_weights, neuron_top_k, select_on, sentinels)
    # Calling an operator costs some 50 us on the host, which only a graph has a use for.
    forward = torch.ops.sigma_kernels.neuron_topk_mlp if torch.compiler.is_compiling() else _compute
    return forward(x, *arguments).to(hidden_states.dtype)


def bytes_per_token(
    hidden: int, inner: int, slots: int, neuron_top_k: int, *, width: int = 2, transposed: bool = True
) -> int:
    """Bytes of expert weights that a token needs: of `slots` experts the gate, and what is kept of W_up and W_down.

    With the transposed copy this is `(1 + 2 r) / 3` of a dense layer's, `r = neuron_top_k / inner`; without it W_down
    is read whole, `(2 + r) / 3`. `width`: bytes of a number.
    """
    kept = min(neuron_top_k, inner)
    return slots * hidden * (inner + kept + (kept if transposed else inner)) * width


def _check(x, w1, w2, weights, neuron_top_k, select_on, w2_t) -> None:
    if select_on not in SELECT_ON:
        why = " needs all of W_up, which this layer does not read;" if select_on == "abs_product" else " is unknown:"
        raise ValueError(f"select_on={select_on!r}{why} choose one of {', '.join(SELECT_ON)}.")
    if neuron_top_k < 1:
        raise ValueError(f"neuron_top_k={neuron_top_k}: at least one neuron is kept.")
    if w2.shape[2] > MAX_INNER:
        raise ValueError(f"Experts may have up to {MAX_INNER} neurons, these have {w2.shape[2]}.")
    if w2.dtype != w1.dtype:
        raise ValueError(f"The weights must have one dtype, got {w1.dtype} and {w2.dtype}.")
    experts, hidden, inner = w2.shape
    if w2_t is not None:
        same = w2_t.shape == (experts, inner, hidden) and w2_t.dtype == w2.dtype and w2_t.device == w2.device
        if not same or not w2_t.is_contiguous():
            raise ValueError(
                f"down_proj_t must be contiguous, {(experts, inner, hidden)}, {w2.dtype} on {w2.device}, got "
                f"{tuple(w2_t.shape)}, {w2_t.dtype} on {w2_t.device}."
            )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, weights, w2_t)):
        raise RuntimeError(
            "neuron_topk_mlp is for decoding and has no backward: call it under torch.no_grad() or "
            "torch.inference_mode(), and train with the masked layer."
        )
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"neuron_topk_mlp runs on CPUs and CUDA devices, got {x.device}.")


@torch.library.custom_op("sigma_kernels::neuron_topk_mlp", mutates_args=())
def _forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w2_t: torch.Tensor | None,
    index: torch.Tensor,
    weights: torch.Tensor,
    neuron_top_k: int,
    select_on: str,
    sentinels: bool,
) -> torch.Tensor:
    return _compute(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on, sentinels)


@_forward.register_fake
def _(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on, sentinels):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _compute(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on, sentinels):
    if index.numel() == 0:
        return torch.zeros_like(x)
    x, w1, w2, index, weights = (tensor.contiguous() for tensor in (x, w1, w2, index, weights))
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        arguments = (x, w1, w2, w2_t, index, weights, neuron_top_k, select_on, sentinels)
        if not torch.is_autocast_enabled("cpu"):
            return _on_cpu(*arguments)
        with torch.autocast("cpu", enabled=False):  # it would cast the weights, all of them
            return _on_cpu(*arguments)
    if neuron_top_k >= w2.shape[2]:
        return torch.ops.sigma_kernels.moe_mlp(x, w1, w2, index, weights, x.dtype, sentinels, False)[0]
    with torch.cuda.device_of(x):
        return _launch(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on)


# --- Triton


def _launch(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on):
    (tokens, hidden), (experts, _, inner), slots = x.shape, w2.shape, index.shape[1]
    pairs = tokens * slots
    tiles = tiles_for(experts, hidden, inner, x.dtype, pairs, x.device)
    gate = x.new_empty(pairs, inner)
    tile = tiles["neuron_gate"]
    kernels.neuron_gate_kernel[(pairs, triton.cdiv(inner, tile.columns))](
        *(x, w1, index, gate, slots, hidden, inner, experts), BN=tile.columns, BK=tile.depth, **tile.launch
    )
    kept = x.new_empty(pairs, neuron_top_k, dtype=torch.int32)
    act = torch.empty_like(kept, dtype=x.dtype)
    tile = tiles["neuron_select"]
    kernels.neuron_select_kernel[(pairs,)](
        *(gate, index, kept, act, neuron_top_k, inner, experts),
        SCORE=select_on, BLOCK=triton.next_power_of_2(inner), BN=tile.columns, **tile.launch,
    )  # fmt: skip
    tile = tiles["neuron_up_down"]
    splits = triton.cdiv(neuron_top_k, tile.rows)
    partial = x.new_empty(pairs, splits, hidden, dtype=torch.float32)
    down, strides = (w2, (inner, 1)) if w2_t is None else (w2_t, (1, hidden))
    kernels.neuron_up_down_kernel[(pairs, splits)](
        *(x, w1, down, index, kept, act, partial, slots, hidden, inner, experts, neuron_top_k, splits, *strides),
        BJ=tile.rows, BK=tile.depth, **tile.launch,
    )  # fmt: skip
    tile, out = tiles["neuron_sum"], torch.empty_like(x)
    kernels.neuron_sum_kernel[(tokens, triton.cdiv(hidden, tile.columns))](
        *(partial, index, weights, out, slots, hidden, experts, splits), BS=tile.rows, BN=tile.columns, **tile.launch
    )
    return out


# --- torch, for CPUs


def _on_cpu(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on, sentinels):
    (tokens, hidden), (experts, _, inner), slots = x.shape, w2.shape, index.shape[1]
    expert, scale, token = index.view(-1), weights.view(-1).float(), torch.arange(tokens)
    if slots > 1:
        token = token.repeat_interleave(slots)
    if sentinels:
        here = (expert < experts).nonzero().squeeze(1)
        expert, scale, token = expert[here], scale[here], token[here]
    if (count := expert.numel()) == 0:
        return torch.zeros_like(x)
    experts_of, rows_of = expert.tolist(), defaultdict(list)
    for row, one in enumerate(experts_of):
        rows_of[one].append(row)
    xs = x if slots == 1 and not sentinels else x[token]  # (count, H)
    gate = _multiply(xs, w1[:, :inner], rows_of)
    act = F.silu(gate)
    if neuron_top_k >= inner:
        rows = _multiply(act * _multiply(xs, w1[:, inner:], rows_of), w2, rows_of)
    else:
        flat = _keep(gate, act, neuron_top_k, select_on).view(-1).nonzero().view(count, neuron_top_k)
        if neuron_top_k <= _UP_SHARE[x.dtype] * inner:
            to_up = torch.tensor([[(2 * e + 1 - row) * inner] for row, e in enumerate(experts_of)])
            up = _dots(xs, w1.view(-1, hidden), flat + to_up)
        else:
            up = _multiply(xs, w1[:, inner:], rows_of).take(flat)
        factor = act.take(flat) * up
        if w2_t is not None and neuron_top_k <= _DOWN_SHARE * inner:
            to_down = torch.tensor([[(e - row) * inner] for row, e in enumerate(experts_of)])
            rows = _sums(factor, w2_t.view(-1, hidden), flat + to_down)
        else:
            rows = _multiply(torch.zeros_like(act).put_(flat, factor), w2, rows_of)
    rows = rows.float() * scale[:, None]
    return torch.zeros(tokens, hidden).index_add_(0, token, rows).to(x.dtype)


def _multiply(x: torch.Tensor, weight: torch.Tensor, rows_of: dict[int, list[int]]) -> torch.Tensor:
    """`weight[e] x[row]` for the rows of each expert, `(rows, outputs)`; one row has a faster product, but in fp16."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, rows in rows_of.items():
        if len(rows) == 1 and x.dtype != torch.float16:
            torch.mv(weight[expert], x[rows[0]], out=out[rows[0]])
        else:
            out[rows] = F.linear(x[rows], weight[expert])
    return out


def _keep(gate, act, neuron_top_k, select_on):
    """The mask of the kept neurons, of equal scores the first. Bits are compared: NaN counts as large."""
    score = {"abs_act": act.abs, "abs_gate": gate.abs, "act": lambda: act + 0.0}[select_on]()  # -0 + 0 is 0
    key = score.float().view(torch.int32)
    if select_on == "act":
        key = key ^ ((key >> 31) & 0x7FFFFFFF)  # below zero, more bits are a smaller number
    threshold = key.kthvalue(key.shape[1] - neuron_top_k + 1, dim=1, keepdim=True).values
    keep = key >= threshold
    if int(keep.count_nonzero()) > key.shape[0] * neuron_top_k:
        above, equal = key > threshold, key == threshold
        keep = above | (equal & (equal.cumsum(1) <= neuron_top_k - above.sum(1, keepdim=True)))
    return keep


def _dots(x: torch.Tensor, table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """`table[at[row]] x[row]`, `(rows, n)`. `index_select` would write what it gathers and read it again; the
    derivative of a weighted `embedding_bag` in its weights is this product, and reads the table only."""
    row = torch.arange(at.shape[0]).repeat_interleave(at.shape[1])
    flat = at.view(-1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(x, table, flat, row[:0], row, 0).view(at.shape)


def _sums(factor: torch.Tensor, table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """`sum_i factor[row, i] table[at[row, i]]`, `(rows, H)`. A sum has one thread: those that idle get parts of it."""
    rows, each = at.shape
    parts = max(1, min(torch.get_num_threads() // rows, each))
    offsets = torch.arange(0, rows * each, each)
    if parts > 1:
        offsets = (offsets[:, None] + torch.arange(parts) * each // parts).view(-1)
    bags = F.embedding_bag(at.view(-1), table, offsets, mode="sum", per_sample_weights=factor.view(-1))
    return bags if parts == 1 else bags.view(rows, parts, -1).float().sum(1)
