"""The launches of the layer, recorded from the layer's own code: to compile them for a GPU that is not there, or to
time them one by one. No argument list is written a second time: what is compiled or timed is what runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from triton.runtime.jit import KernelInterface

from . import (
    grouped_mlp,
    grouped_mlp_kernels,
    linear_cross_entropy_kernels,
    neuron_topk,
    neuron_topk_kernels,
    sinkhorn_kernels,
)
from .autotune import HEAD_KERNELS, NEURON_KERNELS, TRANSPORT_KERNELS, Shape
from .linear_cross_entropy_launch import backward, forward


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Launch:
    """One launch: calling it launches again."""

    kernel: KernelInterface
    grid: tuple[int, ...]
    arguments: tuple
    options: dict = field(hash=False)

    def __call__(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return self.kernel.fn.__name__

    @property
    def role(self) -> str:
        """What the kernel does in the layer, one of `autotune.KERNELS` or of the other lists there."""
        if self.name.removesuffix("_kernel") in NEURON_KERNELS + HEAD_KERNELS + TRANSPORT_KERNELS:
            return self.name.removesuffix("_kernel")
        if self.name == "rows_kernel":
            return "down" if self.options["SCALE"] else "dx"
        if self.name == "weight_grad_kernel":
            return "dw2" if self.options["GATHER_LEFT"] else "dw1"
        return {"up_kernel": "up", "dz_kernel": "dz"}.get(self.name, "decode")


class _Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: KernelInterface, launches: list[Launch], perform: bool):
        self.kernel, self.launches, self.perform = kernel, launches, perform

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(Launch(self.kernel, grid, arguments, options))
            if self.perform:
                self.launches[-1]()

        return launch


@contextmanager
def recorded(*, perform: bool) -> Iterator[list[Launch]]:
    """The launches of the layer made inside, in order; without `perform` they are only noted."""
    launches: list[Launch] = []
    real = [
        (module, name, value)
        for module in (grouped_mlp_kernels, linear_cross_entropy_kernels, neuron_topk_kernels, sinkhorn_kernels)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and not name.startswith("_")
    ]
    try:
        for module, name, kernel in real:
            setattr(module, name, _Recorder(kernel, launches, perform))
        yield launches
    finally:
        for module, name, kernel in real:
            setattr(module, name, kernel)


def layer_launches(
    shape: Shape,
    slots: int,
    *,
    learning: bool,
    masters: bool = False,
    device: str | torch.device = "meta",
    perform: bool = False,
) -> list[Launch]:
    """Launches of one forward of the layer, and with `learning` of its backward, at `shape.rows` rows per expert.

    On the meta device nothing is computed, but shapes, types and alignment are those of real tensors. With `masters`
    the weights are fp32 and the products in `shape.dtype`, as under autocast. `rows = 0` is one token.
    """
    tokens = max(1, shape.rows * shape.experts // slots)
    dtype = DTYPES[shape.dtype]
    like = {"device": device, "dtype": torch.float32 if masters else dtype}
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
    w1 = torch.randn(shape.experts, 2 * shape.inner, shape.hidden, **like).mul_(shape.hidden**-0.5)
    w2 = torch.randn(shape.experts, shape.hidden, shape.inner, **like).mul_(shape.inner**-0.5)
    weights = torch.rand(tokens, slots, device=device)
    # Every expert has the mean load, and each token distinct experts.
    index = torch.arange(tokens * slots, device=device).remainder_(shape.experts).view(tokens, slots)
    with recorded(perform=perform) as launches:
        # Below the operator, which would not run on the meta device.
        out, z, *rows = grouped_mlp._forward._init_fn(x, w1, w2, index, weights, dtype, False, learning)
        if learning:
            grad = torch.randn_like(out)
            dz = torch.empty_like(z)  # not over z: launches are timed many times
            grouped_mlp._gradients(grad, x, w1, w2, weights, z, dz, *rows, False, [True] * 4)
    return launches


def neuron_launches(
    shape: Shape,
    slots: int,
    *,
    neuron_top_k: int,
    select_on: str = "abs_act",
    transposed: bool = True,
    device: str | torch.device = "meta",
) -> list[Launch]:
    """Launches of `neuron_topk_mlp` for one token, as in [`layer_launches`]; `transposed`: with a copy of W_down."""
    like = {"device": device, "dtype": DTYPES[shape.dtype]}
    x = torch.randn(1, shape.hidden, **like)
    w1 = torch.randn(shape.experts, 2 * shape.inner, shape.hidden, **like)
    w2 = torch.randn(shape.experts, shape.hidden, shape.inner, **like)
    w2_t = w2.transpose(1, 2).contiguous() if transposed else None
    index = torch.arange(slots, device=device).remainder_(shape.experts)[None]
    weights = torch.rand(1, slots, device=device)
    with recorded(perform=False) as launches:
        neuron_topk._launch(x, w1, w2, w2_t, index, weights, neuron_top_k, select_on)
    return launches


def head_launches(
    width: int,
    classes: int,
    tokens: int,
    dtype: str,
    *,
    full_width: int | None = None,
    cells: int = 1,
    bias: bool = True,
    masters: bool = False,
) -> list[Launch]:
    """Launches of `linear_cross_entropy` and its backward for a head that is the prefix `[:, :width]` of one with
    `full_width`, as in [`layer_launches`]; with several `cells`, of `linear_cross_entropy_grid` with equal ones."""
    like = {"device": "meta", "dtype": DTYPES[dtype]}
    full_width = full_width or width
    of_weight = like | ({"dtype": torch.float32} if masters else {})
    weight = torch.empty(classes, full_width, **of_weight)[:, : width if cells == 1 else full_width]
    offset = torch.empty(classes, **of_weight) if bias else None
    hiddens = [torch.empty(tokens, full_width, **like)[:, :width]] * cells
    labels = torch.empty(tokens, device="meta", dtype=torch.int64)
    arguments = (hiddens, weight, offset, labels)
    with recorded(perform=False) as launches:
        losses, lse = forward(*arguments, -100, DTYPES[dtype])
        wanted = [True] * (cells + 1) + [bias]
        backward(torch.empty_like(losses), *arguments, lse, -100, DTYPES[dtype], wanted)
    return launches


def transport_launches(images: int, rows: int, columns: int, dtype: str, *, kept: int = 1) -> list[Launch]:
    """The launch of `sinkhorn`, as in [`layer_launches`]; `kept`: of how many iterations it writes the potentials."""
    like = {"device": "meta", "dtype": torch.float32}
    cost = torch.empty(images, rows, columns, device="meta", dtype=DTYPES[dtype])
    theta, gamma = torch.empty(images, rows, **like), torch.empty(images, columns, **like)
    potentials = torch.empty(kept, images, rows, **like), torch.empty(kept, images, columns, **like)
    with recorded(perform=False) as launches:
        sinkhorn_kernels.forward(cost, theta, gamma, 0.1, 30, 1.0, torch.empty(cost.shape, **like), *potentials)
    return launches
