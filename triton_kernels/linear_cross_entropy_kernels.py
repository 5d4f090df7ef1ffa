"""Cross-entropy of a linear head: logits live in registers, their gradient in a workspace of a few classes at a time.

    z = x W^T + b,   loss[n] = logsumexp(z[n]) - z[n, y[n]],   dz = g (softmax(z) - onehot(y))

`head_lse_kernel` multiplies x by the tiles of W of its split, one after the other, and keeps the running maximum and
sum of each row: (splits, tokens) numbers, whose logsumexp over splits is the result. Backward, for some thousand
classes at a time: `head_dlogits_kernel` multiplies again and stores dz, `head_dhidden_kernel` adds dz W to a partial
sum of its split, `head_dweight_kernel` multiplies dz^T x over all tokens. Accumulators are fp32; nothing is atomic. x
and W are read by their strides. The numbers of tokens and classes are not specialised.
"""

import triton
import triton.language as tl


@triton.jit
def _load(pointer, mask, like, UPCAST: tl.constexpr):
    """A tile in the dtype of the products; in fp32 under the interpreter, whose bf16 arithmetic is wrong."""
    tile = tl.load(pointer, mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile.to(like)


@triton.jit
def _logits(
    x, w, bias, rows, cols,
    tokens, classes, D, stride_n, stride_d, stride_wv, stride_wd,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of z; -inf beyond the last class."""
    live, inside = rows < tokens, cols < classes
    x += rows.to(tl.int64)[:, None] * stride_n
    w += cols.to(tl.int64)[None, :] * stride_wv
    z = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        d = start + tl.arange(0, BK)
        at = d.to(tl.int64)
        xs = _load(x + at[None, :] * stride_d, live[:, None] & (d < D)[None, :], x.dtype.element_ty, UPCAST)
        ws = _load(w + at[:, None] * stride_wd, (d < D)[:, None] & inside[None, :], x.dtype.element_ty, UPCAST)
        z = tl.dot(xs, ws, z, input_precision=PRECISION)
    if BIAS:
        z += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside[None, :], z, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "classes", "tiles"])
def head_lse_kernel(
    x, w, bias, labels, lse, chosen,
    tokens, classes, tiles, D, stride_n, stride_d, stride_wv, stride_wd,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """lse[split] = logsumexp over the `tiles` tiles of a split; chosen = z[n, y[n]] where the label is one of them."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * tiles
    last = tl.minimum(first + tiles, tl.cdiv(classes, BN))
    live = rows < tokens
    label = tl.load(labels + rows, mask=live, other=-1)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM,), tl.float32)
    for tile in range(first, last):
        cols = tile * BN + tl.arange(0, BN)
        z = _logits(
            x, w, bias, rows, cols, tokens, classes, D, stride_n, stride_d, stride_wv, stride_wd,
            BM, BN, BK, BIAS, PRECISION, UPCAST,
        )  # fmt: skip
        found += tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), axis=1)
        larger = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # nothing but -inf so far, whose difference is NaN
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        top = larger
    tl.store(lse + tl.program_id(1).to(tl.int64) * tokens + rows, top + tl.log(total), mask=live)
    here = (label >= first * BN) & (label < tl.minimum(last * BN, classes))
    tl.store(chosen + rows, found, mask=live & here)


@triton.jit(do_not_specialize=["tokens", "classes", "first"])
def head_dlogits_kernel(
    x, w, bias, labels, lse, grad, dz,
    tokens, classes, first, D, C, stride_n, stride_d, stride_wv, stride_wd,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dz (tokens, C) of the classes from `first` on: whole tiles, 0 beyond the last class."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    live, cols = rows < tokens, first + at
    z = _logits(
        x, w, bias, rows, cols, tokens, classes, D, stride_n, stride_d, stride_wv, stride_wd,
        BM, BN, BK, BIAS, PRECISION, UPCAST,
    )  # fmt: skip
    label = tl.load(labels + rows, mask=live, other=-1)
    g = tl.load(grad + rows, mask=live, other=0.0)
    p = tl.exp(z - tl.load(lse + rows, mask=live, other=0.0)[:, None])
    p = tl.where(cols[None, :] == label[:, None], p - 1.0, p) * g[:, None]
    tl.store(dz + rows.to(tl.int64)[:, None] * C + at[None, :], p.to(dz.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["tokens", "classes", "first", "each", "width"])
def head_dhidden_kernel(
    dz, x, w, out,
    tokens, classes, first, each, width, D, C, stride_wv, stride_wd,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out[split] (tokens, D) += dz W over the `each` classes of a split; dz has `width`. `x` only tells the dtype."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    live, in_d = rows < tokens, d < D
    dz += rows.to(tl.int64)[:, None] * C
    w += d.to(tl.int64)[None, :] * stride_wd
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(split * each, tl.minimum((split + 1) * each, width), BK):
        at = start + tl.arange(0, BK)
        cols = first + at
        left = _load(dz + at[None, :], live[:, None], x.dtype.element_ty, UPCAST)  # (BM, BK)
        right = (cols < classes)[:, None] & in_d[None, :]
        right = _load(w + cols.to(tl.int64)[:, None] * stride_wv, right, x.dtype.element_ty, UPCAST)  # (BK, BN)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    out += (split.to(tl.int64) * tokens + rows.to(tl.int64)[:, None]) * D + d[None, :]
    mask = live[:, None] & in_d[None, :]
    tl.store(out, tl.load(out, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["tokens", "classes"])
def head_dweight_kernel(
    dz, x, scale, out,
    tokens, classes, D, C, stride_n, stride_d, stride_o,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (classes, D) = scale dz^T x, added to what is there with ADD."""
    v = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    in_d = d < D
    x += d.to(tl.int64)[None, :] * stride_d
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, tokens, BK):
        rows = start + tl.arange(0, BK)
        live, at = rows < tokens, rows.to(tl.int64)[:, None]
        left = _load(dz + at * C + v[None, :], live[:, None], x.dtype.element_ty, UPCAST)  # (BK, BM)
        right = _load(x + at * stride_n, live[:, None] & in_d[None, :], x.dtype.element_ty, UPCAST)  # (BK, BN)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    total *= tl.load(scale)
    out += v.to(tl.int64)[:, None] * stride_o + d[None, :]
    mask = (v < classes)[:, None] & in_d[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)
