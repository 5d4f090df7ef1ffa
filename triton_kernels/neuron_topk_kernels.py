"""Neuron experts at decoding: of the `k` neurons that a token keeps, and of no other, W_up and W_down are read.

    g = W_gate[e] x,   S = the k neurons of largest score(g)
    out[t] = sum_slots s sum_{j in S} silu(g_j) (W_up[e]_j x) W_down[e]_:j

`neuron_gate_kernel` multiplies the gate, `neuron_select_kernel` picks and lists S, ascending; `neuron_up_down_kernel`
reads the rows of W_up and W_down^T in that list, some neurons a program; `neuron_sum_kernel` adds what the programs
found, in a fixed order: no atomics. Sums are fp32. `k`, tokens, K and E never compile a kernel again.
"""

import triton
import triton.language as tl


@triton.jit
def _rounded(x, like: tl.constexpr):
    """fp32 numbers rounded to nearest even in dtype `like`. bf16 by its bits: the interpreter would truncate."""
    if like == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    elif like == tl.float16:
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["K", "E"])
def neuron_gate_kernel(
    x, w1, index, gate,
    K, H, I, E,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """gate[pair] = W_gate[e] x, summed in fp32."""
    pair = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    expert = tl.load(index + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    w1 += expert * 2 * I * H + cols[:, None] * H
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, H, BK):
        h = start + tl.arange(0, BK)
        xs = tl.load(x + pair // K * H + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        mask = (cols < I)[:, None] & (h < H)[None, :]
        total += tl.sum(tl.load(w1 + h[None, :], mask=mask, other=0.0).to(tl.float32) * xs, axis=1)
    total = _rounded(total, gate.dtype.element_ty)
    tl.store(gate + pair * I + cols, total.to(gate.dtype.element_ty), mask=cols < I)


@triton.jit
def _silu(gate, inside):
    """Gates and their silu, both as fp32 numbers of the dtype of the gates."""
    g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    return g, _rounded(g * tl.sigmoid(g), gate.dtype.element_ty)


@triton.jit
def _keys(g, silu, inside, SCORE: tl.constexpr):
    """Unsigned numbers in the order of the scores; 0, which is above no threshold, where not `inside`."""
    score = silu if SCORE == "act" else tl.abs(g) if SCORE == "abs_gate" else tl.abs(silu)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(inside, (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True), 0)


@triton.jit(do_not_specialize=["k", "E"])
def neuron_select_kernel(
    gate, index, kept, act,
    k, I, E,
    SCORE: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """kept[pair] = the k neurons of largest score, ascending, of equal ones the first; act[pair] = their silu(gate).

    Exact: scores are compared by their bits, and the k-th largest is found two bits at a time. k < I < 2^15. All
    are searched at once and listed BN at a time: a wider prefix sum needs more registers than there are.
    """
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair)
    if (expert < 0) | (expert >= E):
        return
    gate += pair * I
    kept += pair * k
    act += pair * k
    every = tl.arange(0, BLOCK)
    g, silu = _silu(gate + every, every < I)
    key = _keys(g, silu, every < I, SCORE)
    threshold = tl.zeros((), tl.uint32)
    for step in range(16):
        unit = tl.full((), 1, tl.uint32) << (30 - 2 * step)
        # How many reach each of the next three thresholds: three counts of 20 bits, added up as one number.
        counts = (key >= threshold + unit).to(tl.int64)
        counts += (key >= threshold + 2 * unit).to(tl.int64) << 20
        counts += (key >= threshold + 3 * unit).to(tl.int64) << 40
        reach = tl.sum(counts, axis=0)
        digit = ((reach & 0xFFFFF) >= k).to(tl.uint32)
        digit += (((reach >> 20) & 0xFFFFF) >= k).to(tl.uint32) + ((reach >> 40) >= k).to(tl.uint32)
        threshold += digit * unit
    room = k - tl.sum((key > threshold).to(tl.int32), axis=0)  # for those that equal the threshold
    seen = tl.zeros((), tl.int32)  # above the threshold, and 2^16 times equal to it
    for start in range(0, I, BN):
        cols = start + tl.arange(0, BN)
        inside = cols < I
        some_g, some_silu = _silu(gate + cols, inside)
        one = _keys(some_g, some_silu, inside, SCORE)
        above = one > threshold
        equal = (one == threshold) & inside
        both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = seen + tl.cumsum(both, 0) - both
        equal_before = before >> 16
        at = (before & 0xFFFF) + tl.minimum(equal_before, room)
        keep = above | (equal & (equal_before < room))
        tl.store(kept + at, cols, mask=keep)
        tl.store(act + at, some_silu.to(act.dtype.element_ty), mask=keep)
        seen += tl.sum(both, axis=0)


@triton.jit(do_not_specialize=["K", "E", "k", "splits"])
def neuron_up_down_kernel(
    x, w1, w2, index, kept, act, partial,
    K, H, I, E, k, splits, stride_h, stride_j,
    BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial[pair, split] = sum over BJ kept neurons of act (W_up x) W_down, the latter by its strides."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    expert = tl.load(index + pair).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    at = split * BJ + tl.arange(0, BJ)
    live = at < k
    neuron = tl.load(kept + pair * k + at, mask=live, other=0).to(tl.int64)
    w1 += (expert * 2 + 1) * I * H + neuron[:, None] * H
    up = tl.zeros((BJ,), tl.float32)
    for start in range(0, H, BK):
        h = start + tl.arange(0, BK)
        xs = tl.load(x + pair // K * H + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        mask = live[:, None] & (h < H)[None, :]
        up += tl.sum(tl.load(w1 + h[None, :], mask=mask, other=0.0).to(tl.float32) * xs, axis=1)
    factor = tl.where(live, tl.load(act + pair * k + at, mask=live, other=0.0).to(tl.float32) * up, 0.0)[:, None]
    w2 += expert * H * I + neuron[:, None] * stride_j
    partial += (pair * splits + split) * H
    for start in range(0, H, BK):
        h = start + tl.arange(0, BK)
        mask = live[:, None] & (h < H)[None, :]
        rows = tl.load(w2 + h[None, :].to(tl.int64) * stride_h, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial + h, tl.sum(rows * factor, axis=0), mask=h < H)


@triton.jit(do_not_specialize=["K", "E", "splits"])
def neuron_sum_kernel(
    partial, index, scale, out,
    K, H, E, splits,
    BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[token] = sum_slots s sum_splits partial, in the order of the slots."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for slot in range(0, K):
        pair = token * K + slot
        expert = tl.load(index + pair)
        if (expert >= 0) & (expert < E):
            row = tl.zeros((BN,), tl.float32)
            for start in range(0, splits, BS):
                split = start + tl.arange(0, BS)
                mask = (split < splits)[:, None] & (cols < H)[None, :]
                rows = partial + (pair * splits + split[:, None]) * H + cols[None, :]
                row += tl.sum(tl.load(rows, mask=mask, other=0.0), axis=0)
            total += row * tl.load(scale + pair).to(tl.float32)
    tl.store(out + token * H + cols, total.to(out.dtype.element_ty), mask=cols < H)
