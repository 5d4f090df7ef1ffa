r"""Cross-entropy of a linear head over a large vocabulary, without its logits: `linear_cross_entropy`.

    z = h W^T + b,   loss[n] = logsumexp(z[n]) - z[n, y[n]]
    dz = g (softmax(z) - onehot(y)),   dh = dz W,   dW = dz^T h,   db = sum_n dz

z is made block by block, in the forward for the logsumexp and once more in the backward; one number a token is kept in
between. The alternative, gradients in the forward, saves one product of four but keeps a gradient of W, V x H numbers
in fp32, for every loss until its backward: with the twelve losses of a grid of layers and widths that is most of what
the logits would take. On a CPU blocks stay in the caches, which pays for the second pass where the vocabulary is
large: 2.2 and 1.3 times as fast as torch's plain logits at 32768 classes and widths 32 and 128, 0.8 times at 2048
classes and 384 (one thread, fp32; `python -m sigma_kernels.benchmarks linear_cross_entropy`).

Several heads that are prefixes of one (`W[:, :d]`) go through [`linear_cross_entropy_grid`] together: W is read once
for all, and there is one gradient of W instead of one, and a copy padded to the full width, for each.
"""

import torch


REDUCTIONS = ("mean", "sum", "none")
# Numbers in a block of logits in torch: what a core's cache holds. Fastest of 2^16 to 2^23 at widths 32, 128 and 768.
BLOCK = 2**19
MAX_ROWS = 1024  # of a block


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """`cross_entropy(hidden @ weight.T + bias, labels)` in fp32 (float64 of float64), with memory that does not grow
    with tokens times vocabulary.

    Args:
        hidden: `(N, H)`. Strides do not matter here and for `weight`: slices are not copied.
        weight: `(V, H)`, rows are classes.
        bias: `(V,)` or None. An entry of -inf takes its class out.
        labels: `(N,)`, integers from 0 to V - 1, or `ignore_index`.
        ignore_index: tokens with this label have loss 0, no gradient, and do not count for the mean.
        reduction: `"mean"` over the tokens that count (0 if there are none, never NaN), `"sum"`, or `"none"`: `(N,)`.

    Operands are rounded to the dtype of autocast where it is on, else to the one that holds both; sums are fp32.
    Gradients have the dtype of what they belong to, only those that are needed are computed, and equal inputs give
    equal bits. On a GPU nothing waits for it, so a label that is no class is not refused there: its loss is NaN.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown reduction; without the kernels, a label that
            is no class.
    """
    if hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {hidden.shape[1]} wide and weight {weight.shape[1]}: slice the wider one, no copy is made."
        )
    losses = linear_cross_entropy_grid([hidden], weight, bias, labels, ignore_index=ignore_index, reduction=reduction)
    return losses.squeeze(0)


def linear_cross_entropy_grid(
    hiddens: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Losses `(cells,)`, or `(cells, N)` with `"none"`, of heads that are prefixes of one: entry c is
    `linear_cross_entropy(hiddens[c], weight[:, :d], bias, labels)` with `d` the width of `hiddens[c]`.

    `hiddens` are `(N, d)`, each with a `d` of its own and all of one dtype; for the rest see [`linear_cross_entropy`].
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known. Choose one of {', '.join(REDUCTIONS)}.")
    hiddens = list(hiddens)
    _check(hiddens, weight, bias, labels)
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hiddens[0].dtype, weight.dtype)
    losses, _ = torch.ops.sigma_kernels.linear_cross_entropy(hiddens, weight, bias, labels, ignore_index, dtype)
    if reduction == "none":
        return losses
    total = losses.sum(1)
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


def _check(hiddens, weight, bias, labels) -> None:
    shapes = [tuple(hidden.shape) for hidden in hiddens]
    fits = hiddens and weight.dim() == 2 and labels.dim() == 1 and weight.shape[0] > 0
    fits = fits and all(len(s) == 2 and s[0] == labels.shape[0] and s[1] <= weight.shape[1] for s in shapes)
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"Expected hidden (N, H), weight (V, H), bias (V,) or None and labels (N,), got hidden "
            f"{', '.join(map(str, shapes))}, weight {tuple(weight.shape)}, "
            f"bias {None if bias is None else tuple(bias.shape)}, labels {tuple(labels.shape)}."
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}.")
    numbers = [*hiddens, weight, *([] if bias is None else [bias])]
    if not all(t.is_floating_point() for t in numbers) or len({t.dtype for t in hiddens}) > 1:
        raise ValueError(f"hidden, weight and bias must be floating point, got {[str(t.dtype) for t in numbers]}.")
    if any(t.device != weight.device for t in (*numbers, labels)):
        raise ValueError(f"All must be on one device, got {[str(t.device) for t in (*numbers, labels)]}.")


# --- the operator


@torch.library.custom_op("sigma_kernels::linear_cross_entropy", mutates_args=())
def _forward(
    hiddens: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and logsumexp of each cell, `(cells, N)` in fp32 or float64; losses of ignored tokens are 0."""
    compute = _forward_by_torch
    if _has_kernels(weight, dtype):
        from .linear_cross_entropy_launch import forward as compute
    with torch.autocast(weight.device.type, enabled=False), torch.cuda.device_of(weight):
        return compute(hiddens, weight, bias, labels, ignore_index, dtype)


@_forward.register_fake
def _(hiddens, weight, bias, labels, ignore_index, dtype):
    losses = weight.new_empty(len(hiddens), labels.shape[0], dtype=_wide(dtype))
    return losses, torch.empty_like(losses)


@torch.library.custom_op("sigma_kernels::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    hiddens: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients of the hiddens, W and b for `grad (cells, N)`; those not `wanted` (one entry each) are empty."""
    compute = _backward_by_torch
    if _has_kernels(weight, dtype):
        from .linear_cross_entropy_launch import backward as compute
    with torch.autocast(weight.device.type, enabled=False), torch.cuda.device_of(weight):
        return compute(grad, hiddens, weight, bias, labels, lse, ignore_index, dtype, wanted)


@_backward.register_fake
def _(grad, hiddens, weight, bias, labels, lse, ignore_index, dtype, wanted):
    return new_gradients(hiddens, weight, bias, wanted)


def new_gradients(hiddens, weight, bias, wanted):
    """Uninitialised gradients of the hiddens, W and b; empty where not `wanted`."""
    *of_hiddens, of_weight, of_bias = wanted
    dhiddens = [hidden.new_empty(hidden.shape if want else 0) for hidden, want in zip(hiddens, of_hiddens)]
    dweight = weight.new_empty(weight.shape if of_weight else 0)
    return dhiddens, dweight, weight.new_empty(0) if not of_bias else bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    hiddens, weight, bias, labels, ctx.ignore_index, ctx.dtype = inputs
    _, lse = output
    ctx.save_for_backward(*hiddens, weight, *([] if bias is None else [bias]), labels, lse)
    ctx.cells, ctx.has_bias = len(hiddens), bias is not None
    ctx.mark_non_differentiable(lse)


def _autograd(ctx, grad, _):
    saved = ctx.saved_tensors
    hiddens, weight, (labels, lse) = list(saved[: ctx.cells]), saved[ctx.cells], saved[-2:]
    bias = saved[ctx.cells + 1] if ctx.has_bias else None
    of_hiddens, of_weight, of_bias, *_ = ctx.needs_input_grad
    wanted = [*of_hiddens, of_weight, of_bias]
    dhiddens, dweight, dbias = torch.ops.sigma_kernels.linear_cross_entropy_backward(
        grad, hiddens, weight, bias, labels, lse, ctx.ignore_index, ctx.dtype, wanted
    )
    dhiddens = [dhidden if want else None for dhidden, want in zip(dhiddens, of_hiddens)]
    return dhiddens, dweight if of_weight else None, dbias if of_bias else None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _has_kernels(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    if dtype == torch.float64 or weight.device.type not in ("cpu", "cuda"):
        return False
    try:
        import triton
    except ImportError:  # no wheels for macOS and Windows
        return False
    return weight.is_cuda or triton.knobs.runtime.interpret


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- torch


def _blocks(rows: int, classes: int, width: int) -> tuple[list[slice], list[slice]]:
    """Slices of the rows and of the classes: a block of logits and one of W have at most [`BLOCK`] numbers."""
    tall = max(1, min(rows, MAX_ROWS, BLOCK))
    step = max(1, BLOCK // max(tall, width))
    return [slice(at, min(at + tall, rows)) for at in range(0, rows, tall)], [
        slice(at, min(at + step, classes)) for at in range(0, classes, step)
    ]


def _counted(hiddens, labels, ignore_index, dtype):
    """Rows that count, their labels, and their hidden states rounded to `dtype`: what is ignored is not multiplied."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    target = labels[rows].long()
    every = rows.numel() == labels.numel()
    return rows, target, [(h if every else h[rows]).to(dtype).to(_wide(dtype)) for h in hiddens]


def _logits(x, weight, bias):
    """`(rows, classes)` of a block; `weight` is a block of W as wide as the widest head."""
    weight = weight[:, : x.shape[1]].T
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _forward_by_torch(hiddens, weight, bias, labels, ignore_index, dtype):
    wide, classes = _wide(dtype), weight.shape[0]
    rows, target, xs = _counted(hiddens, labels, ignore_index, dtype)
    losses, lses = (weight.new_zeros(len(xs), labels.shape[0], dtype=wide) for _ in range(2))
    if rows.numel() == 0:
        return losses, lses
    if not 0 <= int(target.min()) <= int(target.max()) < classes:
        wrong = target[(target < 0) | (target >= classes)][0]
        raise ValueError(f"A label is {int(wrong)}: labels are 0 to {classes - 1}, or ignore_index={ignore_index}.")
    lse = weight.new_full((len(xs), len(rows)), -torch.inf, dtype=wide)
    chosen = torch.empty_like(lse)
    in_rows, in_classes = _blocks(len(rows), classes, weight.shape[1])
    for block in in_classes:
        w = weight[block].to(dtype).to(wide)
        b = None if bias is None else bias[block].to(wide)
        for cell, x in enumerate(xs):
            for part in in_rows:
                logits = _logits(x[part], w, b)
                at = target[part] - block.start
                here = ((at >= 0) & (at < logits.shape[1])).nonzero().squeeze(1)
                chosen[cell, part][here] = logits[here, at[here]]
                top = logits.amax(1)
                top = top.where(top.isfinite(), 0.0)  # a block of -inf, whose difference would be NaN
                part_lse = logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
                lse[cell, part] = torch.logaddexp(lse[cell, part], part_lse)
    lses[:, rows] = lse
    losses[:, rows] = lse - chosen
    return losses, lses


def _backward_by_torch(grad, hiddens, weight, bias, labels, lse, ignore_index, dtype, wanted):
    wide, cells = _wide(dtype), range(len(hiddens))
    *of_hiddens, of_weight, of_bias = wanted
    rows, target, xs = _counted(hiddens, labels, ignore_index, dtype)
    dhiddens, dweight, dbias = new_gradients(hiddens, weight, bias, wanted)
    grad, lse = grad[:, rows], lse[:, rows]
    dxs = [torch.zeros_like(x) if want else None for x, want in zip(xs, of_hiddens)]
    in_rows, in_classes = _blocks(len(rows), *weight.shape)
    for block in in_classes:
        w = weight[block].to(dtype).to(wide)
        b = None if bias is None else bias[block].to(wide)
        dw = torch.zeros_like(w) if of_weight else None
        db = w.new_zeros(len(w)) if of_bias else None
        for cell, part in ((cell, part) for cell in cells for part in in_rows):
            x = xs[cell][part]
            dz = _dlogits(_logits(x, w, b), lse[cell, part], target[part] - block.start, grad[cell, part])
            if of_hiddens[cell]:
                dxs[cell][part].addmm_(dz, w[:, : x.shape[1]])
            if of_weight:
                dw[:, : x.shape[1]].addmm_(dz.T, x)
            if of_bias:
                db += dz.sum(0)
        if of_weight:
            dweight[block] = dw
        if of_bias:
            dbias[block] = db
    for cell in cells:
        if of_hiddens[cell]:
            dhiddens[cell].zero_()[rows] = dxs[cell].to(hiddens[cell].dtype)
    return dhiddens, dweight, dbias


def _dlogits(logits, lse, at, grad):
    """`grad (softmax - onehot)` in the place of a block of logits; `at`: the place of the label, or outside."""
    dz = logits.sub_(lse[:, None]).exp_()
    here = ((at >= 0) & (at < dz.shape[1])).nonzero().squeeze(1)
    dz[here, at[here]] -= 1.0
    return dz.mul_(grad[:, None])
