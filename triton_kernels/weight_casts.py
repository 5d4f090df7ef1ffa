"""Weights in the dtype that the products need, cast once for each optimizer step where that is certain to be right."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary


_casts: WeakIdKeyDictionary = WeakIdKeyDictionary()
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


def clear_casts() -> None:
    """Forget all copies of weights."""
    _casts.clear()


def _count_step(*_) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)
