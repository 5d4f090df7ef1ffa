"""What a model costs a device, and a limit that refuses what does not fit."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


class DeviceBudgetError(ValueError):
    """A model that does not fit; the message has every limit that it breaks."""


@dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """What a model needs.

    Args:
        parameters (`int`): shared ones count once.
        bytes (`int`): parameters and buffers as they lie in memory.
        peak_bytes (`int`, *optional*): the most bytes that tensors held at a time during one pass over the example:
            parameters, buffers, inputs and intermediate results, with what was said to lie beside them; without what
            the runtime itself takes.
        flops (`int`, *optional*): of that pass, two for a multiplication with its addition; matrix products,
            convolutions and attention are counted, nothing else.
    """

    parameters: int
    bytes: int
    peak_bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceBudget:
    """Limits of a device; `None` is no limit.

    Example:
        >>> budget = DeviceBudget(max_bytes=4_000_000, max_flops=20_000_000)
        >>> cost = budget.check(model, {"pixel_values": torch.zeros(1, 3, 32, 32)})
    """

    max_parameters: int | None = None
    max_bytes: int | None = None
    max_peak_bytes: int | None = None
    max_flops: int | None = None

    def check(
        self,
        model: nn.Module,
        example: Mapping[str, Any] | None = None,
        *,
        training: bool = False,
        extra_bytes: int = 0,
    ) -> DeviceCost:
        """What the model costs.

        Args:
            example: arguments of the forward, one sample as a device has it. Models on the meta device take meta
                tensors.
            training: the pass is forward and backward of the output's `loss`; by default forward alone.
            extra_bytes: what lies in memory during the pass and is no part of it, such as the moments of an optimizer
                or a copy of the weights to return to.

        Raises:
            DeviceBudgetError: the model breaks a limit.
            ValueError: a limit of memory in use or of FLOPs, and no example to count them on.
        """
        if example is None and (self.max_peak_bytes is not None or self.max_flops is not None):
            raise ValueError("max_peak_bytes and max_flops are counted on a pass: give an `example` to `check`.")
        cost = device_cost(model, example, training=training, extra_bytes=extra_bytes)
        self.admit(cost, type(model).__name__)
        return cost

    def admit(self, cost: DeviceCost, what: str) -> None:
        """Return if the cost of `what`, known from before, is within the limits; `DeviceBudgetError` if not. What was
        not counted breaks none."""
        found = {name: (getattr(cost, name), getattr(self, f"max_{name}")) for name in asdict(cost)}
        broken = [
            f"{value:,} {name.replace('_', ' ')} (at most {limit:,})"
            for name, (value, limit) in found.items()
            if limit is not None and value is not None and value > limit
        ]
        if broken:
            raise DeviceBudgetError(f"{what} does not fit the device: it has {', '.join(broken)}.")


def device_cost(
    model: nn.Module, example: Mapping[str, Any] | None = None, *, training: bool = False, extra_bytes: int = 0
) -> DeviceCost:
    """The cost of a model, see [`DeviceBudget.check`]. The model is left as it was, gradients included."""
    parameters = {id(p): p for p in model.parameters()}.values()
    resident = {id(t): t for t in [*parameters, *model.buffers()]}.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in resident)
    count = sum(parameter.numel() for parameter in parameters)
    if example is None:
        return DeviceCost(parameters=count, bytes=size)
    counter, memory = FlopCounterMode(display=False), _PeakMemory([*resident, *tree_leaves(dict(example))])
    with evaluating(model), torch.set_grad_enabled(training), memory, counter:
        _one_pass(model, example, training)
    peak, flops = memory.peak + extra_bytes, counter.get_total_flops()
    return DeviceCost(parameters=count, bytes=size, peak_bytes=peak, flops=flops)


def _one_pass(model: nn.Module, example: Mapping[str, Any], training: bool) -> None:
    output = model(**example)
    if training:
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(f"The output of {type(model).__name__} has no loss: put `labels` into the example.")
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


class _PeakMemory(TorchDispatchMode):
    """The largest sum of the storages that were alive after any operation."""

    def __init__(self, tensors: list[Any]):
        super().__init__()
        self._alive = WeakIdKeyDictionary(ref_type=weakref.ref)  # storage -> bytes
        self._track(tensors)
        self.peak = sum(self._alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._track(tree_leaves(result))
        self.peak = max(self.peak, sum(self._alive.values()))
        return result

    def _track(self, tensors: list[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage] = storage.nbytes()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
