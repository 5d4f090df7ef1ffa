"""Where the randomness of draws comes from: the operating system, or, in a simulation that says so, a seed.

A `torch.Generator` would not do on a user's device. Seeded on the CPU it keeps 32 of the seed's bits: whoever sees an
upload can go through all four thousand million seeds, subtract each one's noise, and find the mean that two uploads
share. So every uniform number that protects somebody is made of 52 bits of `os.urandom` of its own, and goes through
the normal distribution's inverse. There is no state that one draw could betray of the next.

What is uploaded twice for one text is linked by the text, and two draws betray more than one. So whoever goes through
the same texts again asks [`MemoisedNoise`], which says the same every time: 256 secret bits of `os.urandom`, expanded
for each text by SHAKE-256.

Floating-point numbers are a grid, and differential privacy of real-valued noise does not carry over to the last bit
of them; nothing here claims that it does.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch


_BITS = 52
SECRET_BYTES = 32


class PrivateNoise:
    """Noise from the operating system's entropy; no seed, no state, no repetition."""

    simulation = False

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Float64 in the open interval (0, 1)."""
        count = math.prod(shape)
        return _uniform(os.urandom(8 * count)).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal, float64."""
        return torch.special.ndtri(self.uniform(shape))

    def gamma(self, shape_parameter: torch.Tensor) -> torch.Tensor:
        """
        One draw of Gamma(a, 1) for every entry of a float64 tensor, with its implicit gradient with respect to a.

        Marsaglia and Tsang (2000), by rejection; entries below 1 by the power of a uniform number.
        """
        return _ReparameterisedGamma.apply(shape_parameter, self)

    def secret(self) -> bytes:
        """For [`MemoisedNoise`]."""
        return os.urandom(SECRET_BYTES)

    def _branch(self) -> "PrivateNoise":
        return self

    def _gamma(self, a: torch.Tensor) -> torch.Tensor:
        noise, shape = self._branch(), tuple(a.shape)
        power = noise.uniform(shape).to(a) ** (1 / a)
        d = torch.where(a < 1, a + 1, a) - 1 / 3
        drawn, still_open = torch.zeros_like(a), torch.ones_like(a, dtype=torch.bool)
        while still_open.any():  # whole shapes: what an entry gets does not depend on which others are open
            x, u = noise.normal(shape).to(a), noise.uniform(shape).to(a)
            v = (1 + x / (9 * d).sqrt()) ** 3
            good = (v > 0) & (u.log() < 0.5 * x**2 + d - d * v + d * v.clamp_min(1e-300).log())
            drawn = torch.where(still_open & good, d * v, drawn)
            still_open &= ~good
        return torch.where(a < 1, drawn * power, drawn).clamp_min(1e-300)


class SimulatedNoise(PrivateNoise):
    """Repeatable noise for experiments, where nobody needs protection. Its state can be saved and put back."""

    simulation = True

    def __init__(self, seed: int):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Float64 in the open interval (0, 1)."""
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return drawn.clamp(2.0**-54, 1 - 2.0**-53)

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal, float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def secret(self) -> bytes:
        """Of the seed and of how much was drawn: as repeatable as all the rest."""
        return bytes(torch.randint(256, (SECRET_BYTES,), generator=self.generator).tolist())


class MemoisedNoise(PrivateNoise):
    """
    A row of noise for each text, the same whenever the secret is asked about the text again.

    No table is kept: row i is SHAKE-256 of (secret, number of the call, digest of text i), so that another process
    with the secret, or a run that goes on, says the same, whatever else is in its batch.

    Args:
        secret: 32 bytes, see [`kept_secret`]. Whoever has it has the noise: it stays on the device.
        texts: what tells each row's text from others; the first entry of every shape is their number.
        simulation: the secret was made of a seed.
    """

    def __init__(self, secret: bytes, texts: Sequence[bytes], *, simulation: bool = False, branch: bytes = b""):
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes; it has {SECRET_BYTES}: see `kept_secret`.")
        self.simulation = simulation
        self._secret, self._branch_name, self._calls = secret, branch, 0
        self._digests = [hashlib.sha256(text).digest() for text in texts]

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Float64 in the open interval (0, 1). `ValueError` for a shape of another number of texts."""
        if not shape or shape[0] != len(self._digests):
            raise ValueError(f"noise of shape {tuple(shape)} for {len(self._digests)} texts: one row for each.")
        start, count = self._next(), math.prod(shape[1:])
        rows = [hashlib.shake_256(start + digest).digest(8 * count) for digest in self._digests]
        return _uniform(b"".join(rows)).reshape(shape)

    def _next(self) -> bytes:
        """What every row's stream of the next call begins with; of fixed length within a branch."""
        self._calls += 1
        return self._secret + hashlib.sha256(self._branch_name + self._calls.to_bytes(8, "big")).digest()

    def _branch(self) -> "MemoisedNoise":
        """For a number of calls that depends on the batch: what comes after it must not."""
        made = MemoisedNoise(self._secret, (), simulation=self.simulation, branch=self._next())
        made._digests = self._digests
        return made


def kept_secret(path: str | os.PathLike) -> bytes:
    """The secret of a device: 32 bytes of the operating system's, made the first time and read from then on.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.urandom(SECRET_BYTES))
        try:
            os.link(temporary, path)  # the first of two processes wins, and nobody reads a part of it
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{path} holds {len(secret)} bytes, a secret has {SECRET_BYTES}. Give another path.")
    return secret


def noise_source(*, simulation: bool = False, seed: int | None = None) -> PrivateNoise:
    """The operating system's noise; a seed's with `simulation=True` alone.

    Raises:
        ValueError: a seed without `simulation=True`, or the other way round.
    """
    if simulation != (seed is not None):
        raise ValueError(
            f"simulation={simulation} with seed={seed}: draws that protect people come from the operating system and "
            "have no seed. Give both simulation=True and a seed in an experiment, neither on a device."
        )
    return SimulatedNoise(seed) if simulation else PrivateNoise()


def _uniform(content: bytes) -> torch.Tensor:
    """One number of eight bytes, in the open interval (0, 1)."""
    if not content:
        return torch.zeros(0, dtype=torch.float64)
    words = torch.frombuffer(bytearray(content), dtype=torch.int64)
    return ((words & (2**_BITS - 1)).double() + 0.5) / 2**_BITS


class _ReparameterisedGamma(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: torch.Tensor, noise: PrivateNoise) -> torch.Tensor:
        drawn = noise._gamma(a)
        ctx.save_for_backward(a, drawn)
        return drawn

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        a, drawn = ctx.saved_tensors
        return gradient * torch._standard_gamma_grad(a, drawn), None


__all__ = ["MemoisedNoise", "PrivateNoise", "SimulatedNoise", "kept_secret", "noise_source"]
