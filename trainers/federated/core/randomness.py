"""Randomness that protects a person comes from the operating system; a seed is for simulations that say so.

Noise that can be drawn again can be subtracted again. So every uniform number is made of 52 bits of `os.urandom` of
its own: there is no seed to guess and no state that one draw could betray of the next. Floating-point numbers are a
grid, and a proof for real-valued noise does not carry over to their last bit; nothing here claims that it does.
"""

import hashlib
import math
import os

import torch


_BITS = 52


class PrivateSource:
    """Uniform and normal numbers from the operating system."""

    simulation = False

    def uniform(self, shape: tuple[int, ...], *about: object) -> torch.Tensor:
        """Float64 in the open interval (0, 1); `about` matters to a simulation only."""
        count = math.prod(shape)
        words = torch.frombuffer(bytearray(os.urandom(8 * max(count, 1))), dtype=torch.int64)[:count]
        return (((words & (2**_BITS - 1)).double() + 0.5) / 2**_BITS).reshape(shape)

    def normal(self, shape: tuple[int, ...], *about: object) -> torch.Tensor:
        """Standard normal, float64."""
        return torch.special.ndtri(self.uniform(shape, *about))


class SimulatedSource(PrivateSource):
    """Repeatable numbers, where nobody needs protection: those `about` the same round or client are the same, in
    whatever order they are drawn, so that a resumed simulation goes on as it would have."""

    simulation = True

    def __init__(self, seed: int):
        self.seed = seed

    def uniform(self, shape: tuple[int, ...], *about: object) -> torch.Tensor:
        """Float64 in the open interval (0, 1), from the seed and what they are about."""
        digest = hashlib.sha256(repr((self.seed, *about)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(shape, generator=generator, dtype=torch.float64).clamp(2.0**-54, 1 - 2.0**-53)


def random_source(*, simulation: bool = False, seed: int | None = None) -> PrivateSource:
    """The operating system's numbers; a seed's with `simulation=True` alone.

    Raises:
        ValueError: a seed without `simulation=True`, or the other way round.
    """
    if simulation != (seed is not None):
        raise ValueError(
            f"simulation={simulation} with seed={seed}: what protects people comes from the operating system and has "
            "no seed. Give both simulation=True and a seed in an experiment, neither where there are real clients."
        )
    return SimulatedSource(seed) if simulation else PrivateSource()
