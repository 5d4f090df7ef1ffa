"""The rule for every timing: two arms in alternating blocks, the median ratio with its interval, a verdict or none."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


MIN_BLOCKS = 10
CONFIDENCE = 0.95

TimingVerdict = Literal["holds", "at the limit", "fails", "not resolved"]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours divided by the baseline: the median over blocks, and an interval that holds it with `confidence`."""

    median: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Two arms on one clock: seconds of a step, medians over blocks, and the ratio of each block in order."""

    ratio: Ratio
    ours_seconds: float
    baseline_seconds: float
    ratios: list[float]


def time_alternately(
    ours: Callable[[], object], baseline: Callable[[], object], *, blocks: int, steps_per_block: int
) -> dict[str, Timing]:
    """Both arms on two clocks: `"process"` (CPU time of this process, all its threads) and `"wall"`.

    A block is `steps_per_block` steps of each arm, and counts with the ratio of their sums. The arms take turns step
    by step, so that both meet the same moods of the machine; every other block begins with the other arm. Each should
    have made its first steps before. On a busy machine, wall time counts the work of others too.

    Raises:
        ValueError: fewer than ten blocks, or no step in a block.
    """
    if blocks < MIN_BLOCKS or steps_per_block < 1:
        raise ValueError(
            f"blocks={blocks}, steps_per_block={steps_per_block}: at least {MIN_BLOCKS} blocks of a step are needed, "
            "or the interval of their median says nothing."
        )
    per_step = [[], []]  # of each arm, (blocks, 2 clocks)
    for block in range(blocks):
        totals = [[0.0, 0.0], [0.0, 0.0]]
        for _ in range(steps_per_block):
            for index in (0, 1) if block % 2 == 0 else (1, 0):
                for clock, seconds in enumerate(_seconds_of((ours, baseline)[index])):
                    totals[index][clock] += seconds
        for index in (0, 1):
            per_step[index].append([total / steps_per_block for total in totals[index]])
    timings = {}
    for clock, name in enumerate(("process", "wall")):
        our_blocks, baseline_blocks = ([block[clock] for block in arm] for arm in per_step)
        ratios = [a / b for a, b in zip(our_blocks, baseline_blocks, strict=True)]
        timings[name] = Timing(
            ratio=median_ratio(ratios),
            ours_seconds=statistics.median(our_blocks),
            baseline_seconds=statistics.median(baseline_blocks),
            ratios=ratios,
        )
    return timings


def _seconds_of(step: Callable[[], object]) -> tuple[float, float]:
    process_start, wall_start = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - process_start, time.perf_counter() - wall_start


def median_ratio(ratios: list[float]) -> Ratio:
    """The median and its distribution-free interval: the narrowest pair of order statistics, symmetric in rank, that
    holds the true median with at least 95 %.

    The pair (k + 1, n - k) misses it with probability 2 P(Binomial(n, 1/2) <= k); ten values give the second and the
    ninth, 97.9 %.

    Raises:
        ValueError: fewer than six values, whose whole range is not enough.
    """
    ordered, n = sorted(ratios), len(ratios)
    missed = [2 * sum(math.comb(n, j) for j in range(k + 1)) / 2**n for k in range(n // 2)]
    allowed = [k for k, probability in enumerate(missed) if probability <= 1 - CONFIDENCE]
    if not allowed:
        raise ValueError(f"{n} ratios have no interval of {CONFIDENCE:.0%}; six is the fewest.")
    k = allowed[-1]
    return Ratio(median=statistics.median(ordered), low=ordered[k], high=ordered[n - 1 - k], confidence=1 - missed[k])


def judge(ratio: Ratio, *, limit: float, resolution: float) -> TimingVerdict:
    """Whether the ratio is at most `limit`.

    `"fails"` if the whole interval lies above it. Otherwise an interval wider than `resolution` is `"not resolved"`,
    never a pass; a narrower one `"holds"` if it lies at or below the limit, and is `"at the limit"` if it encloses it.
    """
    if ratio.low > limit:
        return "fails"
    if ratio.high - ratio.low > resolution:
        return "not resolved"
    return "holds" if ratio.high <= limit else "at the limit"
