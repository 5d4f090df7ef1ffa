"""Memory of one step: what is allocated on a CPU or a GPU, inside operators too, and what autograd keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Bytes above those at the beginning."""

    peak: int
    left: int  # at the end
    largest: int | None  # single allocation; None on a GPU, whose allocator is not asked for it


def allocations(step: Callable[[], object], device: torch.device) -> Allocations:
    """What `step` allocates on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return Allocations(peak - before, torch.cuda.memory_allocated(device) - before, None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    # A dispatch mode would not see what custom operators allocate; the allocator reports every block.
    sizes, events = [], list(profiled.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    total = peak = 0
    for _, size in sorted(sizes, key=lambda entry: entry[0]):
        total += size
        peak = max(peak, total)
    return Allocations(peak, total, max((size for _, size in sizes), default=0))


def kept_bytes(step: Callable[[], torch.Tensor], known: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `step`, each storage once, without those of `known`."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    for tensor in (result, *known):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(size for pointer, size in storages.items() if pointer)


def resident_bytes() -> tuple[int, int] | None:
    """Memory of this process that is resident, and the most that ever was; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return tuple(1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
