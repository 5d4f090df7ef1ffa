"""The kernels of `linear_cross_entropy` and their launches: what its operator runs on GPUs, and in the interpreter."""

from typing import NamedTuple

import torch
import triton

from . import linear_cross_entropy_kernels as kernels
from .autotune import Tile, head_tiles
from .linear_cross_entropy import new_gradients


WORKSPACE = 2**25  # numbers of the gradient of the logits that exist at a time, if the tokens leave a tile of classes
# Programs that a kernel is cut into where tokens and width give fewer: some for each multiprocessor of a large GPU.
PROGRAMS = 1024
MAX_UNITS = 2**14  # of classes in the workspace: a grid has at most 65535 programs in its second direction
MAX_SPLITS = 16  # of the sum over classes in the gradient of hidden
# The largest gradient of a logit after scaling: fp16 would lose what is small, and has room for more above.
LARGEST = 1024.0


class _Head(NamedTuple):
    """One cell: a prefix of W, and the hidden states that it sees."""

    x: torch.Tensor  # (N, D) in the dtype of the products
    weight: torch.Tensor
    bias: torch.Tensor | None
    tiles: dict[str, Tile]

    def logits(self, name: str) -> dict:
        """Options of a kernel that makes logits."""
        return _options(self.tiles[name], self.x, BIAS=self.bias is not None)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of x and W."""
        return (*self.x.stride(), *self.weight.stride())


def _heads(hiddens, weight, bias, dtype) -> list[_Head]:
    return [_Head(h.to(dtype), weight, bias, head_tiles(h.shape[1], h.shape[0], dtype)) for h in hiddens]


def _options(tile: Tile, x: torch.Tensor, **options: bool) -> dict:
    """How a kernel is compiled: fp32 by three tf32 products, which keep its precision on tensor cores."""
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    options |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "UPCAST": bool(triton.knobs.runtime.interpret)}
    return options | {"PRECISION": precision} | tile.launch


def forward(hiddens, weight, bias, labels, ignore_index, dtype):
    """Losses and logsumexp of each cell, `(cells, N)` in fp32; losses of ignored tokens are 0."""
    counts = labels != ignore_index
    target = torch.where(counts, labels.long(), -1)
    tokens, classes = len(labels), weight.shape[0]
    lse = weight.new_empty(len(hiddens), tokens, dtype=torch.float32)
    chosen = torch.full_like(lse, torch.nan)  # what labels that are no class keep
    for cell, head in enumerate(_heads(hiddens, weight, bias, dtype) if tokens else []):
        tile = head.tiles["head_lse"]
        of_tokens, of_classes = triton.cdiv(tokens, tile.rows), triton.cdiv(classes, tile.columns)
        each = triton.cdiv(of_classes, max(1, PROGRAMS // of_tokens))
        splits = triton.cdiv(of_classes, each)
        partial = lse.new_empty(splits, tokens)
        kernels.head_lse_kernel[(of_tokens, splits)](
            *(head.x, weight, bias, target, partial, chosen[cell], tokens, classes, each, head.x.shape[1]),
            *head.strides, **head.logits("head_lse"),
        )  # fmt: skip
        lse[cell] = partial.logsumexp(0)
    return torch.where(counts, lse - chosen, 0.0), lse


def backward(grad, hiddens, weight, bias, labels, lse, ignore_index, dtype, wanted):
    """Gradients of the hiddens, W and b; those not `wanted` are empty."""
    *of_hiddens, of_weight, of_bias = wanted
    dhiddens, dweight, dbias = new_gradients(hiddens, weight, bias, wanted)
    tokens, (classes, full) = len(labels), weight.shape
    if tokens == 0:
        return dhiddens, dweight.zero_(), dbias.zero_()
    counts = labels != ignore_index
    target, grad = torch.where(counts, labels.long(), -1), torch.where(counts, grad, 0.0)
    scale = (grad.abs().amax() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    grad = grad / scale
    heads = _heads(hiddens, weight, bias, dtype)
    unit = max(max(h.tiles["head_dlogits"].columns, h.tiles["head_dhidden"].depth) for h in heads)
    unit = max(unit, *(h.tiles["head_dweight"].rows for h in heads))
    step = unit * min(max(1, WORKSPACE // tokens // unit), triton.cdiv(classes, unit), MAX_UNITS)
    dz = weight.new_empty(tokens, step, dtype=dtype)
    partial = [_partial(head) if want else None for head, want in zip(heads, of_hiddens)]
    # Sums over cells are fp32: in the gradient of W itself, or in a block of it.
    in_place = len(heads) == 1 or weight.dtype == torch.float32
    if of_weight and in_place and len(heads) > 1:
        dweight.zero_()
    for first in range(0, classes, step):
        here = min(step, classes - first)
        if of_weight:
            dw = dweight[first : first + here] if in_place else lse.new_zeros(here, full)
        db = lse.new_zeros(here)
        for cell, head in enumerate(heads):
            _store_dlogits(head, target, lse[cell], grad[cell], dz, first, triton.cdiv(here, unit) * unit)
            if of_hiddens[cell]:
                _add_dhidden(head, dz, partial[cell], first, triton.cdiv(here, unit) * unit)
            if of_weight:
                _store_dweight(head, dz, scale, dw, add=len(heads) > 1)
            if of_bias:
                db += dz[:, :here].sum(0, dtype=torch.float32)
        if of_weight and not in_place:
            dweight[first : first + here] = dw
        if of_bias:
            dbias[first : first + here] = db * scale
    for dhidden, total in zip(dhiddens, partial):
        if total is not None:
            dhidden.copy_(total.sum(0) * scale)
    return dhiddens, dweight, dbias


def _store_dlogits(head, target, lse, grad, dz, first, width):
    tile, (tokens, step) = head.tiles["head_dlogits"], dz.shape
    kernels.head_dlogits_kernel[(triton.cdiv(tokens, tile.rows), width // tile.columns)](
        *(head.x, head.weight, head.bias, target, lse, grad, dz),
        *(tokens, head.weight.shape[0], first, head.x.shape[1], step, *head.strides),
        **head.logits("head_dlogits"),
    )  # fmt: skip


def _partial(head) -> torch.Tensor:
    """Zeros `(splits, N, D)` for the gradient of x."""
    tile, (tokens, width) = head.tiles["head_dhidden"], head.x.shape
    programs = triton.cdiv(tokens, tile.rows) * triton.cdiv(width, tile.columns)
    splits = max(1, min(MAX_SPLITS, PROGRAMS // programs))
    return head.x.new_zeros(splits, tokens, width, dtype=torch.float32)


def _add_dhidden(head, dz, partial, first, width):
    tile, (splits, tokens, columns) = head.tiles["head_dhidden"], partial.shape
    each = triton.cdiv(triton.cdiv(width, tile.depth), splits) * tile.depth
    grid = (triton.cdiv(tokens, tile.rows), triton.cdiv(columns, tile.columns), splits)
    kernels.head_dhidden_kernel[grid](
        *(dz, head.x, head.weight, partial, tokens, head.weight.shape[0], first, each, width, columns, dz.shape[1]),
        *head.weight.stride(), **_options(tile, head.x),
    )  # fmt: skip


def _store_dweight(head, dz, scale, dw, *, add):
    tile, (tokens, width) = head.tiles["head_dweight"], head.x.shape
    grid = (triton.cdiv(dw.shape[0], tile.rows), triton.cdiv(width, tile.columns))
    kernels.head_dweight_kernel[grid](
        *(dz, head.x, scale, dw, tokens, dw.shape[0], width, dz.shape[1], *head.x.stride(), dw.stride(0)),
        **_options(tile, head.x, ADD=add),
    )  # fmt: skip
