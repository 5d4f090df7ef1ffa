"""Decisions that all ranks take together, in the same step: alone, one rank would leave the others in a collective."""

from typing import Any

import torch
import torch.distributed as dist


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


__all__ = ["any_rank", "from_all_ranks"]
