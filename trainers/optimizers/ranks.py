"""MSign across ranks: each matrix is computed by one rank, and every rank ends up with its bits.

An SVD is not the same to the last bit on all devices, so replicas that each computed their own would drift apart.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .restoration import RestorationOptions, restore_views
from .targets import MatrixTarget


Job = tuple[MatrixTarget, torch.Tensor]


class MatrixReport(NamedTuple):
    """What happened to a matrix; of a stack of experts, means over all of them, on all ranks."""

    before: float  # stable rank
    after: float
    scale: float  # 1 where nothing was done
    matrices: int
    restored: int


def restore_weights(
    jobs: Sequence[Job], options: RestorationOptions, group: dist.ProcessGroup | str | None = "world"
) -> dict[str, MatrixReport]:
    """Restore weights in place, wherever their parts are; a collective: every rank calls it with the same weights.

    - A plain tensor is a replica (DDP). The matrices are shared out over the ranks of `group` by their cost, and
      broadcast.
    - A DTensor of experts, sharded by experts only, is restored where it is; replicas of a shard take the first one's.
    - Any other DTensor is gathered, one per rank at a time, computed by one rank, and sharded again.

    Args:
        jobs: targets and their weights, the latter as they are on this rank.
        group: the ranks that hold the same plain tensors; `"world"`: all; `None`: this one alone.

    Returns reports by the name of the matrix, the same on all ranks.

    Raises:
        ValueError: a weight without two dimensions (flattened shards).
        RuntimeError: plain tensors differ between ranks, so that they are no replicas.
    """
    for target, weight in jobs:
        if weight.ndim < 2:
            raise ValueError(
                f"{target.name} is {tuple(weight.shape)} in the optimizer: the weights are flattened into shards "
                "(FSDP1, DeepSpeed ZeRO). Shard the model with FSDP2, which keeps the matrices."
            )
    sharded = [(target, weight) for target, weight in jobs if isinstance(weight, DTensor)]
    plain = [(target, weight) for target, weight in jobs if not isinstance(weight, DTensor)]
    reports = _replicated(plain, options, group) if plain else {}
    local = [(target, weight) for target, weight in sharded if _whole_experts(weight)]
    for target, weight in local:
        reports |= _local_experts(target, weight, options)
    by_mesh: dict = {}
    for target, weight in sharded:
        if not _whole_experts(weight):
            by_mesh.setdefault(weight.device_mesh, []).append((target, weight))
    for mesh, gathered in by_mesh.items():
        reports |= _gathered(gathered, mesh, options)
    return {name: reports[name] for job in jobs for name in _names(*job)}


def owners_by_cost(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank computes what: the costliest first, each to the rank that has least to do."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = min(range(ranks), key=load.__getitem__)
        load[owners[i]] += costs[i]
    return owners


def cost(shape: Sequence[int]) -> float:
    """Of a polar factor of `(..., m, n)`, up to a constant: m n min(m, n) for each matrix."""
    *lead, rows, columns = shape
    return float(torch.Size(lead).numel() * rows * columns * min(rows, columns))


# --- replicas


def _replicated(
    jobs: Sequence[Job], options: RestorationOptions, group: dist.ProcessGroup | str | None
) -> dict[str, MatrixReport]:
    named = [item for target, weight in jobs for item in target.matrices(weight.detach())]
    views = [view for _, view in named]
    alone = group is None or not dist.is_available() or not dist.is_initialized()
    group = None if alone or group == "world" else group  # torch's word for the world
    if alone or dist.get_world_size(group) == 1:
        return _reports([name for name, _ in named], restore_views(views, options))
    _require_replicas(views, group)
    me, owners = dist.get_rank(group), owners_by_cost([cost(v.shape) for v in views], dist.get_world_size(group))
    mine = [i for i, owner in enumerate(owners) if owner == me]
    sums = torch.zeros(len(views), 5, device=views[0].device)
    if mine:
        sums[mine] = restore_views([views[i] for i in mine], options)
    dist.all_reduce(sums, group=group)
    changed = [i for i, restored in enumerate(sums[:, 1].tolist()) if restored]
    buffers = {i: views[i].contiguous() for i in changed}  # the view itself, unless it is cut out of a fused weight
    sent = [dist.broadcast(buffers[i], group=group, group_src=owners[i], async_op=True) for i in changed]
    for i, work in zip(changed, sent, strict=True):
        work.wait()
        if buffers[i].data_ptr() != views[i].data_ptr():
            views[i].copy_(buffers[i])
    return _reports([name for name, _ in named], sums)


def _require_replicas(views: list[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """One row of each matrix is compared: broadcasting over experts that live on one rank each would destroy them."""
    sample = torch.cat([view[..., 0, :].flatten().float() for view in views]).nan_to_num()
    least, most = sample.clone(), sample.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    if (most - least).max() > 1e-3 * torch.maximum(most.abs(), least.abs()).max():
        raise RuntimeError(
            "The weights differ between the ranks, so they are no replicas of each other, and MSign must not "
            "broadcast them. Give process_group=None if every rank has a model (or experts) of its own, or the group "
            "of ranks that hold the same weights."
        )


# --- shards


def _whole_experts(weight: DTensor) -> bool:
    """Whether every rank has whole matrices of the stack."""
    return weight.ndim > 2 and all(not isinstance(p, Shard) or p.dim == 0 for p in weight.placements)


def _local_experts(target: MatrixTarget, weight: DTensor, options: RestorationOptions) -> dict[str, MatrixReport]:
    local, mesh = weight.detach().to_local(), weight.device_mesh
    names, views = zip(*target.matrices(local), strict=True)
    sums = restore_views(list(views), options)
    for dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            dist.all_reduce(sums, group=mesh.get_group(dim))
        elif mesh.size(dim) > 1:
            dist.broadcast(local, group=mesh.get_group(dim), group_src=0)
    return _reports(names, sums)


def _gathered(jobs: Sequence[Job], mesh, options: RestorationOptions) -> dict[str, MatrixReport]:
    """Rounds of one weight per rank: what a rank holds besides its shards is its own weight and one in transit."""
    # On a mesh of several dimensions the first rank of each is the source, so that one rank computes everything.
    ranks, me = (mesh.size(), mesh.get_local_rank()) if mesh.ndim == 1 else (1, _first_or_none(mesh))
    owners = owners_by_cost([cost(weight.shape) for _, weight in jobs], ranks)
    queues = [[job for job, owner in zip(jobs, owners, strict=True) if owner == rank] for rank in range(ranks)]
    reports = {}
    for turn in zip_longest(*queues):
        held, sums = None, None
        for owner, job in enumerate(turn):
            if job is not None:
                whole = job[1].detach().full_tensor()  # on every rank, kept by one
                held = whole if owner == me else held
        del whole
        if held is not None:  # all ranks at once, each with a weight of its own
            sums = restore_views([view for _, view in turn[me][0].matrices(held)], options)
        for owner, job in enumerate(turn):
            if job is not None:
                reports |= _share(*job, owner, (held, sums) if owner == me else (None, None))
    return reports


def _share(
    target: MatrixTarget, weight: DTensor, owner: int, mine: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]
) -> dict[str, MatrixReport]:
    """Every rank's part of the weight that the owner holds, and its report."""
    local, mesh = weight.detach().to_local(), weight.device_mesh
    whole, sums = mine
    names = _names(target, weight)
    sums = torch.zeros(len(names), 5, device=local.device) if sums is None else sums
    for dim in range(mesh.ndim):
        dist.all_reduce(sums, group=mesh.get_group(dim))
    if sums[:, 1].any():
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=local.device) if whole is None else whole
        local.copy_(distribute_tensor(whole, mesh, weight.placements, src_data_rank=owner).to_local())
    return _reports(names, sums)


def _first_or_none(mesh) -> int | None:
    return 0 if not any(mesh.get_coordinate()) else None


def _names(target: MatrixTarget, weight: torch.Tensor) -> list[str]:
    return [name for name, _ in target.matrices(torch.empty(weight.shape, device="meta"))]


def _reports(names: Sequence[str], sums: torch.Tensor) -> dict[str, MatrixReport]:
    reports = {}
    for name, (number, restored, *totals) in zip(names, sums.tolist(), strict=True):
        reports[name] = MatrixReport(*(t / max(number, 1) for t in totals), int(number), int(restored))
    return reports


__all__ = ["MatrixReport", "cost", "owners_by_cost", "restore_weights"]
