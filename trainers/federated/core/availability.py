"""Which clients are there in a round: models of availability, for simulations and for tests.

Each has `available(round)`, the clients in order, and `to_dict()`, plain JSON, of which [`availability_from_dict`]
makes it again. Rounds count from 0.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Availability(Protocol):
    """What an engine needs."""

    def available(self, round: int) -> list[str]:
        """The clients that are there in `round`."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""


@dataclass(frozen=True)
class Alternating:
    """Groups of clients, one at a time: group g for `lengths[g]` rounds, then the next, and again from the first.

    Two groups of E rounds each are the availability of the MNIST runs of FedLaAvg (arXiv 2002.07399).

    Args:
        lengths: one number for each group, or one for all.
    """

    groups: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...]

    def __init__(self, groups: Sequence[Sequence[str]], lengths: int | Sequence[int]):
        lengths = [lengths] * len(groups) if isinstance(lengths, int) else list(lengths)
        if not groups or len(lengths) != len(groups) or min(lengths) < 1:
            raise ValueError(f"lengths={lengths}: a positive number of rounds for each of {len(groups)} groups.")
        object.__setattr__(self, "groups", tuple(tuple(group) for group in groups))
        object.__setattr__(self, "lengths", tuple(lengths))

    def available(self, round: int) -> list[str]:
        """The clients that are there in `round`."""
        rest = round % sum(self.lengths)
        for group, length in zip(self.groups, self.lengths):
            if rest < length:
                return list(group)
            rest -= length
        raise AssertionError("a remainder is smaller than the sum")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"kind": "alternating", "groups": [list(g) for g in self.groups], "lengths": list(self.lengths)}


@dataclass(frozen=True)
class SleepWindow:
    """Clients that are there for some hours of each day, as devices are that train while their owners sleep.

    A window from 22 h on for 8 hours ends at 6 h: the end of one that runs over midnight is on the next day. (The code
    released with arXiv 2002.07399 takes a client whose window does so for always available.)

    Args:
        starts: `{client: hour}` at which its window begins, from 0 on and below 24.
        hours: how long it lasts; the end itself is outside.
        rounds_per_day: rounds from one midnight to the next; round 0 is at midnight.
    """

    starts: Mapping[str, float]
    rounds_per_day: int
    hours: float = 8.0

    def __post_init__(self):
        if self.rounds_per_day < 1 or not 0 < self.hours <= 24:
            raise ValueError(f"rounds_per_day={self.rounds_per_day}, hours={self.hours}: no day has that.")
        for client, hour in self.starts.items():
            if not 0 <= hour < 24:
                raise ValueError(f"The window of {client!r} begins at {hour}, which is no hour of a day.")

    @classmethod
    def from_activity(
        cls, activity: Mapping[str, Sequence[float]], *, rounds_per_day: int, hours: int = 8
    ) -> "SleepWindow":
        """Windows of `hours` full hours in which each client is least active: its sleep. Of equally quiet windows the
        one in the middle, as FedLaAvg's Sentiment140 runs centre it in the gap between a user's tweets (our
        reading).

        Args:
            activity: `{client: hours of the day, such as 13.25, at which it did something}`.
        """
        return cls(
            {client: _quietest(times, hours) for client, times in activity.items()}, rounds_per_day, float(hours)
        )

    def available(self, round: int) -> list[str]:
        """The clients that are there in `round`."""
        hour = 24 * (round % self.rounds_per_day) / self.rounds_per_day
        return [client for client, start in self.starts.items() if (hour - start) % 24 < self.hours]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "kind": "sleep_window",
            "starts": dict(self.starts),
            "rounds_per_day": self.rounds_per_day,
            "hours": self.hours,
        }


@dataclass(frozen=True)
class Trace:
    """What was recorded: the clients of each round, from the first again after the last."""

    rounds: tuple[tuple[str, ...], ...]

    def __init__(self, rounds: Sequence[Sequence[str]]):
        if not rounds:
            raise ValueError("A trace has at least one round.")
        object.__setattr__(self, "rounds", tuple(tuple(clients) for clients in rounds))

    @classmethod
    def from_file(cls, path: str | Path) -> "Trace":
        """From a JSON file: a list of lists of clients."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def available(self, round: int) -> list[str]:
        """The clients that are there in `round`."""
        return list(self.rounds[round % len(self.rounds)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"kind": "trace", "rounds": [list(clients) for clients in self.rounds]}


@dataclass(frozen=True)
class Bernoulli:
    """Every client is there or not, independently in each round.

    Args:
        probability: `{client: probability}`.
        seed: rounds may be asked about in any order, the answer is the same.
    """

    probability: Mapping[str, float]
    seed: int = 0

    def __post_init__(self):
        for client, chance in self.probability.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"The probability of {client!r} is {chance}.")

    def available(self, round: int) -> list[str]:
        """The clients that are there in `round`."""
        draws = random.Random(f"{self.seed}/{round}")
        return [client for client, chance in self.probability.items() if draws.random() < chance]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"kind": "bernoulli", "probability": dict(self.probability), "seed": self.seed}


_KINDS = {"alternating": Alternating, "sleep_window": SleepWindow, "trace": Trace, "bernoulli": Bernoulli}


def availability_from_dict(values: Mapping[str, Any]) -> Availability:
    """From `to_dict`. `ValueError` of a kind that is not known."""
    options = dict(values)
    kind = options.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is not known. Choose one of {', '.join(_KINDS)}.")
    return _KINDS[kind](**options)


def _quietest(times: Sequence[float], hours: int) -> int:
    """The hour at which the quietest window begins."""
    counts = [0] * 24
    for time in times:
        counts[int(time) % 24] += 1
    active = [sum(counts[(start + offset) % 24] for offset in range(hours)) for start in range(24)]
    quiet = [count == min(active) for count in active]
    if all(quiet):
        return 0
    # runs of quiet starts around the clock: the middle of the longest
    runs = []
    for start in range(24):
        if quiet[start] and not quiet[start - 1]:
            length = next(n for n in range(1, 25) if not quiet[(start + n) % 24])
            runs.append((length, start))
    length, start = max(runs, key=lambda run: (run[0], -run[1]))
    return (start + (length - 1) // 2) % 24
