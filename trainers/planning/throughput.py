"""FLOPs to days: devices, utilisation and what they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from .shapes import PlanError
from .step_trace import StepTrace


@dataclass(frozen=True)
class Gpu:
    """A device by its maker's data sheet: memory in bytes (GB are 10^9), dense bf16 FLOP/s without sparsity."""

    name: str
    memory: float
    peak_flops: float


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80e9, 312e12),
    "h100": Gpu("H100 SXM 80 GB", 80e9, 989e12),
    "h200": Gpu("H200 SXM 141 GB", 141e9, 989e12),
    "b200": Gpu("B200 in HGX, 180 GB", 180e9, 2250e12),
}


@dataclass(frozen=True)
class Utilisation:
    """Range of model FLOPs utilisation, and where it is from."""

    low: float
    high: float
    source: str

    def __post_init__(self):
        if not 0 < self.low <= self.high <= 1:
            raise PlanError(f"mfu: {self.low} to {self.high} is no range of shares. Give LOW HIGH within (0, 1].")


# S: read in the source, here the abstract. Another model of the family on other accelerators: a range, no forecast.
SIGMA_STACK = Utilisation(
    0.0986,
    0.2108,
    "reported [S] for SIGMA-MoE 200B on 2,048 accelerators (arXiv 2512.13488, abstract), first and after 12 weeks of "
    "tuning; another model and other hardware than planned here",
)
ASSUMED_DENSE = Utilisation(0.30, 0.45, "assumed, for dense models in bf16; measure a few steps and give --mfu")


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """A run of a number of tokens. Pairs are (with the low utilisation, with the high one).

    Args:
        flops_per_token: forward and backward, by kind, averaged over the stages; half of causal attention's square,
            nothing that is computed again.
        recomputed: FLOPs per token of gradient checkpointing and attention's backward, which utilisation does not
            credit.
    """

    tokens: float
    tokens_per_step: int
    flops_per_token: dict[str, float]
    recomputed: float
    tokens_per_day: tuple[float, float]
    days: tuple[float, float]
    gpu_hours: tuple[float, float]
    cost: tuple[float, float] | None

    @property
    def step_flops(self) -> float:
        """Of an optimizer step, all GPUs."""
        return sum(self.flops_per_token.values()) * self.tokens_per_step


def flops_per_token(trace: StepTrace, tokens: int) -> tuple[dict[str, float], float]:
    """Forward and backward by kind, and what is computed again, of a trace of `tokens`.

    A backward has two products for each of the forward; what attention kernels compute again there counts as little
    as what checkpointing does.
    """
    model = {kind: 3 * flops / tokens for kind, flops in trace.forward_flops.items()}
    return model, max(0.0, sum(trace.step_flops.values()) / tokens - sum(model.values()))


def throughput_of(
    per_stage: Sequence[tuple[float, dict[str, float], float]],
    *,
    tokens: float,
    tokens_per_step: int,
    gpus: int,
    peak_flops: float,
    utilisation: Utilisation,
    price: float | None = None,
) -> Throughput:
    """`per_stage`: share of the tokens, and [`flops_per_token`] of each stage. `price`: of a GPU hour."""
    kinds = {kind for _, flops, _ in per_stage for kind in flops}
    mean = {kind: sum(share * flops.get(kind, 0.0) for share, flops, _ in per_stage) for kind in sorted(kinds)}
    rates = [u * gpus * peak_flops / sum(mean.values()) for u in (utilisation.low, utilisation.high)]
    hours = tuple(tokens / rate / 3600 * gpus for rate in rates)
    return Throughput(
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        flops_per_token=mean,
        recomputed=sum(share * again for share, _, again in per_stage),
        tokens_per_day=tuple(rate * 86400 for rate in rates),
        days=tuple(tokens / rate / 86400 for rate in rates),
        gpu_hours=hours,
        cost=None if price is None else tuple(each * price for each in hours),
    )
