"""Weights in the dtype or layout that the products need, made once for each optimizer step where that is certain to be
right."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary


_casts: WeakIdKeyDictionary = WeakIdKeyDictionary()
_transposed: WeakIdKeyDictionary = WeakIdKeyDictionary()
_steps = 0  # optimizer steps of this process


def cast_weight(weight: torch.Tensor, dtype: torch.dtype, *, learning: bool) -> torch.Tensor:
    """`weight` in `dtype`, contiguous.

    While `learning`, a copy made since the last optimizer step, in-place change or replacement of the memory of
    `weight` is used again. What only `weight.data` knows of (`weight.data.mul_(2)` between two training forwards
    without an optimizer) is not seen: call [`clear_casts`] after it. Nothing is kept

    - without `learning`: averaged or merged weights are often put into `.data` to evaluate them;
    - while a CUDA graph is captured: its replays must cast what is there then;
    - once `fully_shard` has been used: its parameters are filled behind every counter, and a kept copy would undo the
      sharding.
    """
    if weight.dtype == dtype:
        return weight.contiguous()
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if not learning or capturing or weight.is_inference() or FSDPModule.__subclasses__():
        return weight.detach().to(dtype).contiguous()
    key = (weight._version, weight.data_ptr(), _steps, dtype)
    known = _casts.get(weight)
    if known is None or known[0] != key:
        _casts[weight] = known = (key, weight.detach().to(dtype).contiguous())
    return known[1]


def transposed_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """A contiguous copy of `weight (E, n, m)` as `(E, m, n)`, kept until `weight` changes; for inference.

    None where no copy is certain to be right or worth its memory: with gradients on, for inference tensors, which
    count no changes, once `fully_shard` has been used, for the first time while a CUDA graph is captured, and while
    `torch.compile` traces, which has no memory addresses (make the copy outside and pass it in). As in
    [`cast_weight`], `weight.data.mul_(2)` is not seen: call [`clear_casts`] after it.
    """
    if torch.compiler.is_compiling():
        return None
    training = torch.is_grad_enabled() and weight.requires_grad
    if training or weight.is_inference() or FSDPModule.__subclasses__():
        return None
    key = (weight._version, weight.data_ptr(), weight.dtype)
    known = _transposed.get(weight)
    if known is None or known[0] != key:
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        _transposed.pop(weight, None)  # first, or there would be room for two
        _transposed[weight] = known = (key, weight.detach().transpose(1, 2).contiguous())
    return known[1]


def clear_casts() -> None:
    """Forget all copies of weights."""
    _casts.clear()
    _transposed.clear()


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)
