"""The least that an expert layer has to move and to multiply, and how long that takes at best.

Counted is what a fused layer cannot avoid: every weight byte that is needed once, activations where one of its kernels
has to write or read them. A measured time below its floor means that work was left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """What a GPU reaches: bytes and operations a second."""

    bandwidth: float
    flops: float

    @property
    def ridge(self) -> float:
        """Operations a byte where bandwidth stops being the limit."""
        return self.flops / self.bandwidth


# bf16, by a part of the device's name; others need --bandwidth and --tflops. Reached by copies and large products, not
# the data sheet's.
PEAKS = {"H200": Peak(4.3e12, 790e12)}


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one call."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, peak: Peak) -> float:
        """The floor: the longer of moving and multiplying."""
        return max(self.bytes / peak.bandwidth, self.flops / peak.flops)


@dataclass(frozen=True)
class Load:
    """An expert layer and its tokens: `active` experts get one at least; `width` is the bytes of a number."""

    tokens: int
    slots: int
    experts: int
    active: int
    hidden: int
    inner: int
    width: int = 2

    @property
    def pairs(self) -> int:
        """(token, slot) pairs."""
        return self.tokens * self.slots

    def weights(self, experts: int) -> float:
        """Bytes of the weights of so many experts."""
        return 3.0 * experts * self.hidden * self.inner * self.width

    @property
    def _per_pair(self) -> float:
        # With several slots, rows are written for each pair and summed.
        return 2 * self.pairs * self.hidden * self.width if self.slots > 1 else 0

    def forward(self, *, training: bool) -> Work:
        """x and the active experts read, silu(g) u written and read, the output written; z written for training."""
        activations = 2 * self.tokens * self.hidden + 2 * self.pairs * self.inner
        activations += 2 * self.pairs * self.inner if training else 0
        moved = self.weights(self.active) + activations * self.width + self._per_pair
        return Work(moved, 6.0 * self.pairs * self.hidden * self.inner)

    def backward(self) -> Work:
        """The active experts read and gradients of all written; dout read for dz and dW2, z read, dz written and read
        for dW1 and dx, s a written and read, x read, dx written."""
        activations = 4 * self.tokens * self.hidden + (4 * 2 + 2) * self.pairs * self.inner
        moved = self.weights(self.active) + self.weights(self.experts) + activations * self.width + self._per_pair
        return Work(moved, 12.0 * self.pairs * self.hidden * self.inner)

    def work(self, mode: str) -> Work:
        """Of a mode of the benchmark."""
        if mode == "backward":
            return self.backward()
        if mode == "both":
            return self.forward(training=True) + self.backward()
        return self.forward(training=mode == "forward")


def peak_of(device: str, bandwidth: float | None, tflops: float | None) -> Peak | None:
    """Peak of a device by its name, or as given in TB/s and TFLOP/s; `None` if neither is known."""
    known = next((peak for name, peak in PEAKS.items() if name in device), None)
    if known is None and not (bandwidth and tflops):
        return None
    return Peak(
        1e12 * bandwidth if bandwidth else known.bandwidth,
        1e12 * tflops if tflops else known.flops,
    )
