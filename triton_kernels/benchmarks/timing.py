"""Arms timed in turns on one clock: the median of each, and of their ratios with an interval."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


MIN_BLOCKS = 10


class Clock(Protocol):
    """Seconds of one step."""

    def __call__(self, step: Callable[[], object]) -> float: ...


class CudaClock:
    """CUDA events around a step that starts with a cold L2 cache."""

    def __init__(self):
        size = 4 * torch.cuda.get_device_properties().L2_cache_size
        self._scratch = torch.empty(size, dtype=torch.int8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, step: Callable[[], object]) -> float:
        self._scratch.zero_()
        self._events[0].record()
        step()
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def process_clock(step: Callable[[], object]) -> float:
    """Processor time of a step, which the work of others on the machine hardly changes. Of one thread only."""
    start = time.process_time()
    step()
    return time.process_time() - start


def wall_clock(step: Callable[[], object]) -> float:
    """Wall time of a step on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def prepared_device(device: str, threads: int) -> tuple[torch.device, str, Clock]:
    """The device, its name in reports and the clock for it; a CPU computes with `threads` threads from now on."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        return chosen, torch.cuda.get_device_name(), CudaClock()
    torch.set_num_threads(threads)
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return chosen, name, process_clock if threads == 1 else wall_clock


@dataclass(frozen=True)
class Arm:
    """What is timed: `step(prepare())`, of which `prepare` is not timed."""

    name: str
    prepare: Callable[[], object]
    step: Callable[[object], object]


@dataclass(frozen=True)
class Interval:
    """A median, and order statistics that hold the true one with `confidence`."""

    median: float
    low: float
    high: float
    confidence: float


def median_interval(values: list[float], confidence: float = 0.95) -> Interval:
    """The narrowest symmetric pair of order statistics with at least `confidence`; six values are the fewest."""
    ordered, n = sorted(values), len(values)
    for k in range(n // 2 - 1, -1, -1):
        missed = 2 * sum(math.comb(n, j) for j in range(k + 1)) / 2**n
        if missed <= 1 - confidence:
            return Interval(statistics.median(ordered), ordered[k], ordered[n - 1 - k], 1 - missed)
    raise ValueError(f"{n} values have no interval of {confidence:.0%}; six is the fewest.")


def time_in_turns(arms: list[Arm], clock: Clock, *, blocks: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each arm, one median a block. Within a block the arms take turns step by step, and every other block
    begins at the other end, so that all meet the same moods of the machine.

    Raises:
        ValueError: fewer than ten blocks, or no step in a block.
    """
    if blocks < MIN_BLOCKS or steps < 1:
        raise ValueError(f"blocks={blocks}, steps={steps}: at least {MIN_BLOCKS} blocks of a step are needed.")
    for arm in arms:
        arm.step(arm.prepare())  # compile, allocate
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for block in range(blocks):
        samples: dict[str, list[float]] = {arm.name: [] for arm in arms}
        for _ in range(steps):
            for arm in arms if block % 2 == 0 else reversed(arms):
                state = arm.prepare()
                samples[arm.name].append(clock(lambda arm=arm, state=state: arm.step(state)))
        for name, values in samples.items():
            seconds[name].append(statistics.median(values))
    return seconds
