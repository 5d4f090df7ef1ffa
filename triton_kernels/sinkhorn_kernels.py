"""Sinkhorn's iterations in one program an image, and their launch.

An iteration reads the cost once: a tile of rows gives the potentials of these rows, which nothing else has to wait
for, and with them its part of the sums of all columns, kept as a largest exponent and a sum below it. Potentials and
sums of columns stay in registers. A last reading of the cost writes the plan. Sums are fp32, exponents are of two.
"""

import math

import triton
import triton.language as tl

from .autotune import transport_tile


LOWEST = tl.constexpr(-1e30)  # in the place of the largest of nothing: a difference of infinities would be NaN
LN2 = tl.constexpr(math.log(2))


@triton.jit
def _exponents(cost, in_rows, in_columns, scale):
    """A tile of -C, for powers of two."""
    return tl.load(cost, mask=in_rows[:, None] & in_columns[None, :], other=0.0).to(tl.float32) * scale


@triton.jit
def _potential(total, top, damping):
    """Of sums `total * 2^top`; 0 where there is no mass."""
    return tl.where(total == 0, 0.0, -damping * (tl.log2(total) + top))


@triton.jit(do_not_specialize=["images", "rows", "columns", "steps", "kept"])
def sinkhorn_kernel(
    cost, theta, gamma, plan, phi, psi,
    scale, damping, images, rows, columns, steps, kept,
    stride_b, stride_n, stride_m,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The plan of an image, and the potentials of its `kept` last iterations; `scale` is -log2(e) / eps."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BM)
    inside = at < columns
    theta += image * rows
    cost += image * stride_b + at.to(tl.int64)[None, :] * stride_m
    mass = tl.load(gamma + image * columns + at, mask=inside, other=0.0)
    log_mass = tl.log2(mass)
    of_columns = tl.zeros((BM,), tl.float32)
    top, total = tl.full((BM,), LOWEST, tl.float32), tl.zeros((BM,), tl.float32)
    for step in range(steps):
        slot = step - steps + kept
        top, total = tl.full((BM,), LOWEST, tl.float32), tl.zeros((BM,), tl.float32)
        for start in tl.range(0, rows, BN, num_stages=STAGES):
            i = start + tl.arange(0, BN)
            c = _exponents(cost + i.to(tl.int64)[:, None] * stride_n, i < rows, inside, scale)
            x = c + (log_mass + of_columns)[None, :]
            row_top = tl.maximum(tl.max(x, axis=1), LOWEST)
            of_rows = _potential(tl.sum(tl.exp2(x - row_top[:, None]), axis=1), row_top, damping)
            if slot >= 0:
                tl.store(phi + (slot * images + image) * rows + i, of_rows * LN2, mask=i < rows)
            x = c + (tl.log2(tl.load(theta + i, mask=i < rows, other=0.0)) + of_rows)[:, None]
            highest = tl.maximum(top, tl.max(x, axis=0))
            total = total * tl.exp2(top - highest) + tl.sum(tl.exp2(x - highest[None, :]), axis=0)
            top = highest
        of_columns = _potential(total, top, damping)
        if slot >= 0:
            tl.store(psi + (slot * images + image) * columns + at, of_columns * LN2, mask=inside)
    # exp(top + psi), without the difference of large numbers that it would be.
    mass *= tl.where(total == 0, 0.0, tl.exp2(-damping * tl.log2(total)) * tl.exp2(top * (1 - damping)))
    tl.debug_barrier()  # phi is read by others than those who wrote it
    phi += ((kept - 1) * images + image) * rows
    for start in tl.range(0, rows, BN, num_stages=STAGES):
        i = start + tl.arange(0, BN)
        c = _exponents(cost + i.to(tl.int64)[:, None] * stride_n, i < rows, inside, scale)
        of_rows = tl.load(phi + i, mask=i < rows, other=0.0) / LN2
        x = c + (tl.log2(tl.load(theta + i, mask=i < rows, other=0.0)) + of_rows)[:, None]
        written = plan + (image * rows + i)[:, None] * columns + at[None, :]
        tl.store(written, tl.exp2(x - top[None, :]) * mass[None, :], mask=(i < rows)[:, None] & inside[None, :])


def forward(cost, theta, gamma, eps, num_iterations, damping, plan, phi, psi) -> None:
    """Writes plan, phi and psi; marginals are fp32."""
    images, rows, columns = cost.shape
    if images == 0:
        return
    tile = transport_tile(columns)
    sinkhorn_kernel[(images,)](
        *(cost, theta.contiguous(), gamma.contiguous(), plan, phi, psi),
        *(-1 / (eps * math.log(2)), damping, images, rows, columns, num_iterations, len(phi), *cost.stride()),
        BN=tile.rows, BM=tile.columns, STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip
