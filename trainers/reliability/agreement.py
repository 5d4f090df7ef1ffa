"""Decisions that all ranks take together, in the same step: alone, one rank would leave the others in a collective."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist


T = TypeVar("T")


def any_rank(flag: bool, *, device: torch.device | None = None) -> bool:
    """Whether `flag` is true on any rank. A collective: every rank must call it. `device`: where the process group
    reduces (a GPU for NCCL); `None`: the CPU."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def from_all_ranks(value: Any) -> list[Any]:
    """`value` (small, picklable) of every rank, in the order of ranks. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def together(work: Callable[[], T]) -> list[T]:
    """What `work` returns (picklable) on every rank, in the order of ranks. A collective; what fails in one process
    fails in all, which would otherwise wait for it in the next collective.

    Raises:
        RuntimeError: another process failed; its traceback is the message. What fails in this one is raised as it is.
    """
    problem, value = None, None
    try:
        value = work()
    except Exception as error:
        problem = error
    told = "".join(traceback.format_exception(problem)) if problem else None
    values, failures = zip(*from_all_ranks((value, told)))
    if problem is not None:
        raise problem
    if any(failures):
        raise RuntimeError("Another process failed:\n" + next(filter(None, failures)))
    return list(values)


__all__ = ["any_rank", "from_all_ranks", "together"]
