r"""The mixture-of-experts SwiGLU layer as one differentiable operator, `moe_mlp`.

    out[t] = sum_k s[t,k] W2[e] (silu(g) * u),   (g, u) = W1[e] x[t],   e = index[t,k]

It keeps `(g, u)` for the backward, 2 I numbers a pair, and no copy of the gathered tokens. See `grouped_mlp_kernels`
for what each kernel does.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton

from . import grouped_mlp_kernels as kernels
from .autotune import Tile, tiles_for
from .routing import Rows, Tiles, sort_rows, tile_rows
from .weight_casts import cast_weight


# Up to so many pairs a forward without gradient multiplies vectors: sorting and tiles of 16 rows would cost more.
DECODE_PAIRS = 64
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moe_mlp(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
    sentinels: bool = False,
) -> torch.Tensor:
    """Output `(tokens, H)` of a mixture of SwiGLU experts, in the dtype of `hidden_states`.

    Args:
        hidden_states: `(tokens, H)`.
        gate_up_proj: `(E, 2 I, H)`, rows are outputs, gate rows first.
        down_proj: `(E, H, I)`.
        top_k_index: `(tokens, K)`, integers from 0 to E - 1; others are not checked, which would wait for the GPU.
            Neither K nor the number of tokens is compiled in.
        top_k_weights: `(tokens, K)`, used in fp32.
        compute_dtype: of the products; by default that of `gate_up_proj`. Weights in another dtype are cast, in
            training once for each optimizer step; gradients have the dtype of what they belong to.
        sentinels: indices of E or more may occur and contribute nothing (expert parallelism).

    Deterministic: equal inputs give equal bits, gradients included. Sums are fp32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; the message names them.
    """
    dtype = compute_dtype or gate_up_proj.dtype
    check_layer(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, dtype)
    arguments = (gate_up_proj, down_proj, top_k_index, top_k_weights)
    differentiable = (hidden_states, gate_up_proj, down_proj, top_k_weights)
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    out, *_ = torch.ops.sigma_kernels.moe_mlp(hidden_states.to(dtype), *arguments, dtype, sentinels, learning)
    return out.to(hidden_states.dtype)


def check_layer(x, w1, w2, index, weights, dtype) -> None:
    """Raise `ValueError`, naming what does not fit, unless these are tensors of a layer that computes in `dtype`."""
    fits = [t.dim() for t in (x, w1, w2, index, weights)] == [2, 3, 3, 2, 2]
    fits = fits and w1.shape == (w2.shape[0], 2 * w2.shape[2], w2.shape[1])
    if not fits or x.shape[1] != w2.shape[1] or index.shape != weights.shape or index.shape[0] != x.shape[0]:
        raise ValueError(
            "Expected (T, H), (E, 2 I, H), (E, H, I), (T, K), (T, K), got "
            f"hidden_states {tuple(x.shape)}, gate_up_proj {tuple(w1.shape)}, down_proj {tuple(w2.shape)}, "
            f"top_k_index {tuple(index.shape)}, top_k_weights {tuple(weights.shape)}."
        )
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"top_k_index must be int64 or int32, got {index.dtype}.")
    for name, given in (("compute_dtype", dtype), ("gate_up_proj", w1.dtype), ("down_proj", w2.dtype)):
        if given not in COMPUTE_DTYPES:
            raise ValueError(f"The experts compute in {', '.join(map(str, COMPUTE_DTYPES))}; {name} is {given}.")
    if any(t.device != x.device for t in (w1, w2, index, weights)):
        raise ValueError(f"All must be on one device, got {[str(t.device) for t in (x, w1, w2, index, weights)]}.")


# --- the operator


@torch.library.custom_op("sigma_kernels::moe_mlp", mutates_args=())
def _forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
    sentinels: bool,
    learning: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, pre-activations in expert order `(P, 2 I)`, and the two tensors of `routing.Rows`; the last three are
    empty without `learning`."""
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of the layer
        w1, w2 = cast_weight(w1, dtype, learning=learning), cast_weight(w2, dtype, learning=learning)
        return _compute(x.contiguous(), w1, w2, index.contiguous(), weights.contiguous(), sentinels, learning)


def _compute(x, w1, w2, index, weights, sentinels, learning):
    (tokens, hidden), (experts, _, inner), slots = x.shape, w2.shape, index.shape[1]
    pairs = tokens * slots
    empty = x.new_empty(0, dtype=torch.int32)
    if pairs == 0:
        start = x.new_zeros(experts + 1 if learning else 0, dtype=torch.int32)
        return x.new_zeros(tokens, hidden), x.new_empty((0, 2 * inner) if learning else (0,)), start, empty
    if not learning and pairs <= DECODE_PAIRS:
        return _decode(x, w1, w2, index, weights), x.new_empty(0), empty, empty.clone()

    rows = sort_rows(index, experts)
    z = x.new_empty((pairs, 2 * inner) if learning else (0,))
    a = x.new_empty(pairs, inner)
    per_pair = x.new_zeros(pairs, hidden) if sentinels else x.new_empty(pairs, hidden)
    tiles, cut = tiles_for(experts, hidden, inner, x.dtype, pairs, x.device), _cutter(rows)
    sizes = (slots, hidden, inner, experts)
    launch_tiles(kernels.up_kernel, tiles["up"], rows, cut, inner, (x, w1, z, a), sizes, SAVE=learning)
    sizes = (hidden, inner, inner, 1, experts)  # W2 as (inner, hidden), by its strides
    launch_tiles(kernels.rows_kernel, tiles["down"], rows, cut, hidden, (a, w2, weights, per_pair), sizes, SCALE=True)
    if not learning:
        rows = (empty, empty.clone())
    return _sum_slots(per_pair, slots), z, *rows


@_forward.register_fake
def _(x, w1, w2, index, weights, dtype, sentinels, learning):
    pairs, (experts, width, _) = index.numel(), w1.shape
    rows = [x.new_empty(n if learning else 0, dtype=torch.int32) for n in (experts + 1, pairs)]
    return x.new_empty(x.shape), x.new_empty((pairs, width) if learning else (0,)), *rows


def _decode(x, w1, w2, index, weights):
    (tokens, hidden), (experts, _, inner), slots = x.shape, w2.shape, index.shape[1]
    a, out = x.new_empty(tokens * slots, inner), torch.empty_like(x)
    tile = tiles_for(experts, hidden, inner, x.dtype, tokens * slots, x.device)["decode"]
    sizes = (slots, hidden, inner, experts)
    options = {"BN": tile.columns, "BK": tile.depth, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    grid = (tokens * slots, triton.cdiv(inner, tile.columns))
    kernels.decode_up_kernel[grid](x, w1, index, a, *sizes, **options)
    kernels.decode_down_kernel[(tokens, triton.cdiv(hidden, tile.columns))](
        a, w2, index, weights, out, *sizes, **options
    )
    return out


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    z: torch.Tensor,
    dz: torch.Tensor,
    expert_start: torch.Tensor,
    row_pair: torch.Tensor,
    sentinels: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, W1, W2 and the routing weights; those not `wanted` are empty."""
    with torch.cuda.device_of(x):
        dtypes = w1.dtype, w2.dtype
        w1, w2 = cast_weight(w1, x.dtype, learning=True), cast_weight(w2, x.dtype, learning=True)
        grad, x, weights = grad.to(x.dtype).contiguous(), x.contiguous(), weights.contiguous()
        return _differentiate(grad, x, w1, w2, weights, z, dz, Rows(expert_start, row_pair), sentinels, wanted, dtypes)


def _differentiate(grad, x, w1, w2, weights, z, dz, rows, sentinels, wanted, dtypes):
    (tokens, hidden), (experts, _, inner), slots = x.shape, w2.shape, weights.shape[1]
    pairs = tokens * slots
    nothing = [x.new_empty(0) for _ in range(4)]
    if pairs == 0:
        zeros = (torch.zeros_like(t, dtype=dtype) for t, dtype in zip((x, w1, w2), (x.dtype, *dtypes)))
        return tuple(t if want else e for t, e, want in zip((*zeros, torch.zeros_like(weights)), nothing, wanted))
    tiles, cut = tiles_for(experts, hidden, inner, x.dtype, pairs, x.device), _cutter(rows)
    new = x.new_zeros if sentinels else x.new_empty
    scaled_a = x.new_empty(pairs, inner)
    partial = new(triton.cdiv(inner, tiles["dz"].columns), pairs, dtype=torch.float32)
    arguments = (grad, w2, z, dz, weights, scaled_a, partial)
    launch_tiles(kernels.dz_kernel, tiles["dz"], rows, cut, inner, arguments, (slots, hidden, inner, experts, pairs))
    dx, dw1, dw2, dweights = nothing
    if wanted[3]:
        dweights = partial.sum(0).view(tokens, slots).to(weights.dtype)
    if wanted[2]:
        dw2 = _weight_grad(tiles["dw2"], grad, scaled_a, w2, dtypes[1], rows, slots, gather="left")
    if wanted[1]:
        dw1 = _weight_grad(tiles["dw1"], dz, x, w1, dtypes[0], rows, slots, gather="right")
    if wanted[0]:
        per_pair = new(pairs, hidden)
        sizes = (hidden, 2 * inner, 1, hidden, experts)
        tensors = (dz, w1, weights, per_pair)
        launch_tiles(kernels.rows_kernel, tiles["dx"], rows, cut, hidden, tensors, sizes, SCALE=False)
        dx = _sum_slots(per_pair, slots)
    return dx, dw1, dw2, dweights


def _sum_slots(per_pair: torch.Tensor, slots: int) -> torch.Tensor:
    """Per-token sums. For K = 1 a pair is a token; otherwise the slots of a token lie side by side, in their order."""
    if slots == 1:
        return per_pair
    # The dtype is named because autocast, which is on in here, would make it fp32 on a GPU; the sum itself is in fp32.
    return per_pair.view(-1, slots, per_pair.shape[1]).sum(1, dtype=per_pair.dtype)


_BACKWARD = (
    "(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor weights, Tensor{} z, Tensor expert_start, Tensor row_pair, "
    "bool sentinels, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _backward_in_place(grad, x, w1, w2, weights, z, *rest):
    return _gradients(grad, x, w1, w2, weights, z, z, *rest)


def _backward(grad, x, w1, w2, weights, z, *rest):
    return _gradients(grad, x, w1, w2, weights, z, torch.empty_like(z), *rest)


def _backward_fake(grad, x, w1, w2, weights, z, expert_start, row_pair, sentinels, wanted):
    return tuple(t.new_empty(t.shape) if want else x.new_empty(0) for t, want in zip((x, w1, w2, weights), wanted))


# Eager mode writes dz over z; a second backward through the same graph is an error, of autograd's own or, under hooks
# for saved tensors, of `_autograd`. A traced graph may not change what its forward returned.
torch.library.custom_op(
    "sigma_kernels::moe_mlp_backward_", _backward_in_place, mutates_args=("z",), schema=_BACKWARD.format("(a!)")
).register_fake(_backward_fake)
torch.library.custom_op(
    "sigma_kernels::moe_mlp_backward", _backward, mutates_args=(), schema=_BACKWARD.format("")
).register_fake(_backward_fake)


def _setup_context(ctx, inputs, output):
    x, w1, w2, _, weights, _, ctx.sentinels, _ = inputs
    _, z, expert_start, row_pair = output
    ctx.save_for_backward(x, w1, w2, weights, z, expert_start, row_pair)
    ctx.mark_non_differentiable(z, expert_start, row_pair)
    ctx.z_version = z._version


def _autograd(ctx, grad, *_):
    x, w1, w2, weights, z, expert_start, row_pair = ctx.saved_tensors
    if type(z) is torch.Tensor and z._version != ctx.z_version:
        raise RuntimeError(
            "The pre-activations of moe_mlp were modified by an inplace operation: by a first backward."
        )
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[4]]
    ops = torch.ops.sigma_kernels
    backward = ops.moe_mlp_backward_ if type(z) is torch.Tensor else ops.moe_mlp_backward
    gradients = backward(grad, x, w1, w2, weights, z, expert_start, row_pair, ctx.sentinels, wanted)
    dx, dw1, dw2, dweights = (gradient if want else None for gradient, want in zip(gradients, wanted))
    return dx, dw1, dw2, None, dweights, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


# --- launches


def _cutter(rows: Rows) -> Callable[[int], Tiles]:
    """Tiles by their number of rows, cut once for all kernels that use the same."""
    return cache(lambda block_rows: tile_rows(rows.expert_start, rows.row_pair.shape[0], block_rows))


def launch_tiles(kernel, tile: Tile, rows: Rows, cut, columns: int, tensors: tuple, sizes: tuple, **options) -> None:
    """Start `kernel` on every tile of rows and every block of `columns`."""
    tiles = cut(tile.rows)
    num_tiles = tiles.tile_row.shape[0]
    blocks = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}
    kernel[(num_tiles * triton.cdiv(columns, tile.columns),)](
        *tensors,
        rows.row_pair,
        rows.expert_start,
        *tiles,
        num_tiles,
        *sizes,
        **blocks,
        **options,
        **numerics(tensors[0]),
        **tile.launch,
    )


def _weight_grad(tile: Tile, left, right, weight, dtype, rows, slots, *, gather) -> torch.Tensor:
    expert_start, row_pair = rows
    experts, m, n = weight.shape
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    grid = (experts * triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)
    kernels.weight_grad_kernel[grid](
        left, right, out, row_pair, expert_start, slots, m, n,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right",
        **numerics(left), **tile.launch,
    )  # fmt: skip
    return out


def numerics(operand: torch.Tensor) -> dict:
    """How tiles are multiplied: fp32 by three tf32 products, which keep fp32's precision on tensor cores."""
    interpreted = triton.knobs.runtime.interpret
    return {"PRECISION": "tf32x3" if operand.dtype == torch.float32 else "tf32", "UPCAST": bool(interpreted)}
