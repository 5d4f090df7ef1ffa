r"""Polar factor of a batch of matrices, the matrix sign of MSign (arXiv 2602.01734, definition 5.1):

    W = U S V^T (thin SVD),   r = rank(W),   sign(W) = U_r V_r^T

Directions whose singular value is at most `rtol * s_1` belong to the null space and are left out: a thin SVD returns
arbitrary vectors for them, which would enter with full weight.

Two backends. `"svd"` is the definition. `"polar_express"` iterates X <- a X + (b X X^T + c (X X^T)^2) X with the
coefficients that are optimal for singular values in [1e-4, 1] (Amsel et al., arXiv 2505.16932): matrix products only,
of all matrices of one shape at once. They are cuBLAS' batched products, which a kernel of our own could beat only by
using that X X^T is symmetric, at most a third of the work once in a hundred steps; so there is none.

Error of the factor, ||X - sign(W)||_F / sqrt(r), against an SVD in float64, as measured on 256 x 256 in fp32 with
condition k = s_1 / s_r: polar_express 3e-6 at k <= 1e2, 5e-6 at 1e3, 3e-5 at 1e4; svd 2e-6, 9e-6, 6e-5. Both grow as
3e-9 k and no fp32 method does much better, since rounding W already moves its factor by eps k.

What the iteration does with tiny singular values: it multiplies them by up to 9e4, so that they end anywhere between
0 and 1. Its result is therefore used only where X X^T = I to 1e-3 (every direction has arrived) and where X^T W shows
that every singular value is above the cut. Every other matrix goes to the SVD, rank-deficient and zero ones included:
a fixed number of steps, then one look from the host at which those are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


BACKENDS = ("auto", "svd", "polar_express")
# Optimal quintics for [1e-4, 1] one after the other, each for the image of the one before (with the paper's cushion of
# 0.024); after the ninth all that began in the interval is within 2e-14 of 1, in exact arithmetic.
COEFFICIENTS = (
    (8.31882162289, -23.6889616606, 17.3693081555),
    (4.15567751784, -2.96092507227, 0.543206900544),
    (4.13852858683, -2.95646573689, 0.543816052611),
    (4.06914365363, -2.93875231119, 0.546481201768),
    (3.79201725954, -2.83358377495, 0.54925172343),
    (2.91812898567, -2.18286880194, 0.475581209102),
    (2.04657177283, -1.42973531942, 0.393379552921),
    (1.87638560123, -1.2515386966, 0.375153902962),
    (1.87500002779, -1.25000005474, 0.375000026959),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # the quintics grow fast above 1, where rounding may put the largest singular value
ARRIVED = 1e-3  # ||X X^T - I||_F; rounding alone leaves 3e-7 sqrt(rank)


class Polar(NamedTuple):
    """What [`polar_with_rank`] returns; leading dimensions as those of its argument."""

    factor: torch.Tensor  # (..., m, n) in fp32, or float64
    spectral_norm: torch.Tensor  # (...,) s_1; by polar_express an estimate from below
    rank: torch.Tensor  # (...,) int64, singular values above the cut


def polar_factor(matrices: torch.Tensor, *, backend: str = "auto", rtol: float | None = None) -> torch.Tensor:
    """`sign(W)` `(..., m, n)` of `W (..., m, n)` in its dtype; see [`polar_with_rank`]."""
    return polar_with_rank(matrices, backend=backend, rtol=rtol).factor.to(matrices.dtype)


@torch.no_grad()
def polar_with_rank(matrices: torch.Tensor, *, backend: str = "auto", rtol: float | None = None) -> Polar:
    """Polar factor, spectral norm and rank of matrices `(..., m, n)`, computed in fp32, of float64 in float64.

    Args:
        matrices: real, floating point. One with NaN or infinities gives NaN and rank 0, and does not touch the others.
        backend: `"svd"`; `"polar_express"`, with the SVD for what it cannot do; `"auto"`: the SVD on CPUs, where it is
            not slower, polar_express elsewhere.
        rtol: singular values of at most `rtol * s_1` count as zero. `None`: `max(m, n) * eps` of fp32 (or float64).
            bf16 and fp16 inputs carry rounding noise above that cut: there, a matrix of low rank needs one of about
            1e-2, or the fp32 weight that it was rounded from.

    Raises `ValueError` for an unknown backend, fewer than two dimensions, another kind of number or rtol outside
    [0, 1).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known. Choose one of {BACKENDS}.")
    if matrices.ndim < 2 or not matrices.is_floating_point():
        raise ValueError(
            f"matrices are {matrices.dtype} of shape {tuple(matrices.shape)}: give floating point numbers of shape "
            "(..., rows, columns)."
        )
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol={rtol} is not in [0, 1): it is a share of the largest singular value.")
    *lead, rows, columns = matrices.shape
    dtype = torch.float64 if matrices.dtype == torch.float64 else torch.float32
    if matrices.numel() == 0:
        nothing = matrices.new_zeros(lead, dtype=dtype)
        return Polar(matrices.to(dtype), nothing, nothing.long())
    work = matrices.to(dtype).reshape(-1, rows, columns)
    rtol = max(rows, columns) * torch.finfo(dtype).eps if rtol is None else rtol
    finite = work.isfinite().all(dim=(-2, -1))
    work = torch.where(finite[:, None, None], work, 0.0)
    on_cpu = work.device.type == "cpu"
    with _full_precision(work.device.type):
        if backend == "svd" or (backend == "auto" and on_cpu):
            result = _by_svd(work, rtol)
        else:
            result = _by_polar_express(work, rtol)
    factor = torch.where(finite[:, None, None], result.factor, torch.nan)
    norm = torch.where(finite, result.spectral_norm, torch.nan)
    return Polar(factor.reshape(matrices.shape), norm.reshape(lead), (result.rank * finite).reshape(lead))


def spectral_norm(matrices: torch.Tensor, *, iterations: int = 10) -> torch.Tensor:
    """Largest singular value `(...,)` of `(..., m, n)` by power iteration on W^T W from a fixed start, in fp32
    (float64 of float64). Never too large. Random matrices, whose first singular values lie close together, are the
    hard case: on average 2 to 3 % too small after 10 iterations, 1 % after 20, at worst 13 and 8 %."""
    work = matrices.to(torch.float64 if matrices.dtype == torch.float64 else torch.float32)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(work.shape[-1], 1, generator=generator).to(work)
    # Scaled, or squares of large or small entries leave the range of fp32.
    size = work.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(work.dtype).tiny)
    work = work / size
    v = start.expand(*work.shape[:-2], *start.shape)
    for _ in range(iterations):
        v = work.mT @ (work @ v)
        v = v / v.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(work.dtype).tiny)
    return ((work @ v).norm(dim=(-2, -1), keepdim=True) * size).squeeze(-1).squeeze(-1)


def _by_svd(work: torch.Tensor, rtol: float) -> Polar:
    u, s, vt = torch.linalg.svd(work, full_matrices=False)
    keep = s > rtol * s[:, :1]
    return Polar((u * keep[:, None, :]) @ vt, s[:, 0], keep.sum(dim=-1))


def _by_polar_express(work: torch.Tensor, rtol: float) -> Polar:
    wide = work if work.shape[-2] <= work.shape[-1] else work.mT
    size = wide.shape[-2]
    eye = torch.eye(size, dtype=work.dtype, device=work.device)
    x, norm = _iterate(wide), spectral_norm(wide)
    arrived = (x @ x.mT - eye).norm(dim=(-2, -1)) <= ARRIVED
    # W X^T is the positive factor, whose eigenvalues are the singular values: Cholesky tells whether all are above.
    positive = wide @ x.mT
    positive = (positive + positive.mT) / 2 - (rtol * norm)[:, None, None] * eye
    positive = torch.where(arrived[:, None, None], positive, eye)  # Cholesky need not see what diverged
    above = torch.linalg.cholesky_ex(positive).info == 0
    left = (~(arrived & above)).nonzero().squeeze(-1)
    factor = x if wide is work else x.mT
    rank = torch.full((len(work),), size, device=work.device)
    if left.numel():
        by_svd = _by_svd(work[left], rtol)
        factor = factor.index_copy(0, left, by_svd.factor)
        norm, rank = norm.index_copy(0, left, by_svd.spectral_norm), rank.index_copy(0, left, by_svd.rank)
    return Polar(factor, norm, rank)


def _iterate(wide: torch.Tensor) -> torch.Tensor:
    """The iterate after all steps, `(batch, m, n)` with m <= n."""
    tiny = torch.finfo(wide.dtype).tiny
    x = wide / wide.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    # The Frobenius norm may be far above s_1, and costs steps; the Schatten norm of order 8 is within size^(1/8).
    gram = x @ x.mT
    bound = (gram @ gram).norm(dim=(-2, -1), keepdim=True) ** 0.25
    x = x / (SAFETY * bound).clamp_min(tiny)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """fp32 products in fp32: with TF32, bf16 or autocast no direction would arrive within [`ARRIVED`]."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
