"""Mixture-of-experts SwiGLU layer: every weight byte read once, activations of 2I a pair kept for the backward.

    out[t] = sum_k s[t,k] W2[e] (silu(g) * u),   (g, u) = W1[e] x[t],   e = index[t,k]

Forward: `up_kernel` gathers x, multiplies by W1 and applies SwiGLU; `rows_kernel` multiplies by W2 and the routing
weight and stores each row where its pair belongs, so that for K = 1 the result is the output and for K > 1 a sum over
adjacent rows, in a fixed order. Backward, from the saved pre-activations z = (g, u):

    dA' = dO W2,   ds = <dA', a>,   dz = dSwiGLU(s dA')      `dz_kernel`: dz in the place of z, s a for dW2
    dW2 = dO^T (s a),   dW1 = dz^T x                         `weight_grad_kernel`: zeros for idle experts, one pass
    dx  = sum_k dz W1                                        `rows_kernel`

The output of W2 is never stored for the backward: ds comes out of dA'. Accumulators are fp32; nothing is atomic.
Numbers that change from step to step (pairs, tiles, K) are not specialised: they never compile a kernel again.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, mask, UPCAST: tl.constexpr):
    """A tile; in fp32 under the interpreter, whose bf16 arithmetic is wrong."""
    tile = tl.load(pointer, mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit(do_not_specialize=["num_tiles", "K", "E"])
def up_kernel(
    x, w1, z, a, row_pair, expert_start, tile_expert, tile_row,
    num_tiles, K, H, I, E,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z = x[token] W1[e]^T if SAVE, and a = silu(gate) * up, in expert order."""
    tile = tl.program_id(0) % num_tiles  # the tiles of one expert side by side: they share its weights in the cache
    cols = tl.program_id(0) // num_tiles * BN + tl.arange(0, BN)
    expert = tl.load(tile_expert + tile).to(tl.int64)  # offsets of experts need more than 32 bits at real sizes
    if expert >= E:
        return
    rows = tl.load(tile_row + tile) + tl.arange(0, BM)
    live = rows < tl.load(expert_start + expert + 1)
    token = (tl.load(row_pair + rows, mask=live, other=0) // K).to(tl.int64)
    in_cols = cols < I
    gate_w = w1 + expert * 2 * I * H + cols[None, :] * H
    up_w = gate_w + I * H
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        in_k = k < H
        xs = _load(x + token[:, None] * H + k[None, :], live[:, None] & in_k[None, :], UPCAST)  # (BM, BK)
        weights = in_k[:, None] & in_cols[None, :]
        gate = tl.dot(xs, _load(gate_w + k[:, None], weights, UPCAST), gate, input_precision=PRECISION)
        up = tl.dot(xs, _load(up_w + k[:, None], weights, UPCAST), up, input_precision=PRECISION)
    at = rows.to(tl.int64)[:, None]
    mask = live[:, None] & in_cols[None, :]
    if SAVE:
        tl.store(z + at * 2 * I + cols[None, :], gate.to(z.dtype.element_ty), mask=mask)
        tl.store(z + at * 2 * I + I + cols[None, :], up.to(z.dtype.element_ty), mask=mask)
    tl.store(a + at * I + cols[None, :], (gate * tl.sigmoid(gate) * up).to(a.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tiles", "E"])
def rows_kernel(
    left, w, scale, out, row_pair, expert_start, tile_expert, tile_row,
    num_tiles, N, R, stride_n, stride_r, E,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[pair] = scale[pair] * (left[row] @ w[e]), w[e] being (R, N) by its strides; the factor only with SCALE."""
    tile = tl.program_id(0) % num_tiles
    cols = tl.program_id(0) // num_tiles * BN + tl.arange(0, BN)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert >= E:
        return
    rows = tl.load(tile_row + tile) + tl.arange(0, BM)
    live = rows < tl.load(expert_start + expert + 1)
    pair = tl.load(row_pair + rows, mask=live, other=0).to(tl.int64)
    in_cols = cols < N
    w += expert * N * R + cols[None, :] * stride_n
    left += rows.to(tl.int64)[:, None] * R
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(0, R, BK):
        r = start + tl.arange(0, BK)
        in_r = r < R
        tile_left = _load(left + r[None, :], live[:, None] & in_r[None, :], UPCAST)  # (BM, BK)
        tile_w = _load(w + r[:, None] * stride_r, in_r[:, None] & in_cols[None, :], UPCAST)  # (BK, BN)
        accumulator = tl.dot(tile_left, tile_w, accumulator, input_precision=PRECISION)
    if SCALE:
        accumulator *= tl.load(scale + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    mask = live[:, None] & in_cols[None, :]
    tl.store(out + pair[:, None] * N + cols[None, :], accumulator.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(da, s, z, dz, scaled_a, rows, live, cols, I):
    """Store dz and s a at `rows` x `cols`; the sum over `cols` of da * a. `da` is without the routing weight s."""
    at = rows.to(tl.int64)[:, None]
    mask = live[:, None] & (cols < I)[None, :]
    z += at * 2 * I
    dz += at * 2 * I
    gate = tl.load(z + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    up = tl.load(z + I + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    ds = tl.sum(da * silu * up, axis=1)
    tl.store(scaled_a + at * I + cols[None, :], (s * silu * up).to(scaled_a.dtype.element_ty), mask=mask)
    da *= s
    dgate = da * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dz + cols[None, :], dgate.to(dz.dtype.element_ty), mask=mask)
    tl.store(dz + I + cols[None, :], (da * silu).to(dz.dtype.element_ty), mask=mask)
    return ds


@triton.jit(do_not_specialize=["num_tiles", "K", "E", "P"])
def dz_kernel(
    grad, w2, z, dz, scale, scaled_a, partial, row_pair, expert_start, tile_expert, tile_row,
    num_tiles, K, H, I, E, P,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dz, which may be z itself; s a for dW2; partial[block of columns, pair], whose sum over blocks is ds."""
    tile = tl.program_id(0) % num_tiles
    block = tl.program_id(0) // num_tiles
    cols = block * BN + tl.arange(0, BN)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert >= E:
        return
    rows = tl.load(tile_row + tile) + tl.arange(0, BM)
    live = rows < tl.load(expert_start + expert + 1)
    pair = tl.load(row_pair + rows, mask=live, other=0).to(tl.int64)
    token = pair // K
    in_cols = cols < I
    w2 += expert * H * I + cols[None, :]
    da = tl.zeros((BM, BN), tl.float32)  # the gradient of a, before the routing weight
    for start in range(0, H, BK):
        h = start + tl.arange(0, BK)
        in_h = h < H
        dout = _load(grad + token[:, None] * H + h[None, :], live[:, None] & in_h[None, :], UPCAST)  # (BM, BK)
        weights = _load(w2 + h[:, None] * I, in_h[:, None] & in_cols[None, :], UPCAST)  # (BK, BN)
        da = tl.dot(dout, weights, da, input_precision=PRECISION)
    # Half of the columns at a time: as one, the elementwise part needs all 255 registers and spills hundreds of bytes.
    left, right = tl.split(tl.permute(tl.reshape(da, (BM, 2, BN // 2)), (0, 2, 1)))
    s = tl.load(scale + pair, mask=live, other=0.0).to(tl.float32)[:, None]
    half = block * BN + tl.arange(0, BN // 2)
    ds = _swiglu_backward(left, s, z, dz, scaled_a, rows, live, half, I)
    ds += _swiglu_backward(right, s, z, dz, scaled_a, rows, live, half + BN // 2, I)
    tl.store(partial + block.to(tl.int64) * P + pair, ds, mask=live)


@triton.jit(do_not_specialize=["K"])
def weight_grad_kernel(
    left, right, out, row_pair, expert_start,
    K, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[e] (M, N) = sum over the rows of e of left[row]^T right[row]; a gathered side is read at the row's token."""
    blocks_n = tl.cdiv(N, BN)
    blocks = tl.cdiv(M, BM) * blocks_n
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    m = block // blocks_n * BM + tl.arange(0, BM)
    n = block % blocks_n * BN + tl.arange(0, BN)
    first, last = tl.load(expert_start + expert), tl.load(expert_start + expert + 1)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(first, last, BK):
        rows = start + tl.arange(0, BK)
        live = rows < last
        token = (tl.load(row_pair + rows, mask=live, other=0) // K).to(tl.int64)
        left_at = token if GATHER_LEFT else rows.to(tl.int64)
        right_at = token if GATHER_RIGHT else rows.to(tl.int64)
        tile_left = _load(left + left_at[:, None] * M + m[None, :], live[:, None] & (m < M)[None, :], UPCAST)
        tile_right = _load(right + right_at[:, None] * N + n[None, :], live[:, None] & (n < N)[None, :], UPCAST)
        accumulator = tl.dot(tl.trans(tile_left), tile_right, accumulator, input_precision=PRECISION)
    out += expert * M * N + m[:, None] * N + n[None, :]
    tl.store(out, accumulator.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["K", "E"])
def decode_up_kernel(
    x, w1, index, a,
    K, H, I, E,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a[pair] = silu(x W_gate) * (x W_up) for one pair: vectors, no tiles, no sorting."""
    pair = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    expert = tl.load(index + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    w1 += expert * 2 * I * H + cols[:, None] * H
    gate = tl.zeros((BN,), tl.float32)
    up = tl.zeros((BN,), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        xs = tl.load(x + pair // K * H + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        mask = (cols < I)[:, None] & (k < H)[None, :]
        gate += tl.sum(tl.load(w1 + k[None, :], mask=mask, other=0.0).to(tl.float32) * xs, axis=1)
        up += tl.sum(tl.load(w1 + I * H + k[None, :], mask=mask, other=0.0).to(tl.float32) * xs, axis=1)
    tl.store(a + pair * I + cols, (gate * tl.sigmoid(gate) * up).to(a.dtype.element_ty), mask=cols < I)


@triton.jit(do_not_specialize=["K", "E"])
def decode_down_kernel(
    a, w2, index, scale, out,
    K, H, I, E,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[token] = sum_k s W2[e] a[pair], in the order of the slots."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for slot in range(0, K):
        pair = token * K + slot
        expert = tl.load(index + pair).to(tl.int64)
        if (expert >= 0) & (expert < E):
            w = w2 + expert * H * I + cols[:, None] * I
            product = tl.zeros((BN,), tl.float32)
            for start in range(0, I, BK):
                k = start + tl.arange(0, BK)
                mask = (cols < H)[:, None] & (k < I)[None, :]
                activation = tl.load(a + pair * I + k, mask=k < I, other=0.0).to(tl.float32)[None, :]
                product += tl.sum(tl.load(w + k[None, :], mask=mask, other=0.0).to(tl.float32) * activation, axis=1)
            total += product * tl.load(scale + pair).to(tl.float32)
    tl.store(out + token * H + cols, total.to(out.dtype.element_ty), mask=cols < H)
