# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""How M-MoE (arXiv 2509.26520) draws the active experts per token in training. Pure functions.

    "global_batch"   one k ~ P for an optimizer step, all micro-batches and layers
    "micro_batch"    one for each micro-batch
    "layer"          one for each layer of each micro-batch (the paper's best)

    P uniform on k_min..k_max, or ("capacity") P(k) proportional to k^(1 / tau)

A draw is a function of (seed, optimizer step, micro-batch, layer) alone: ranks agree without talking, a resumed run
draws what the uninterrupted one would have, and the recomputation of gradient checkpointing sees the same k. That all
tokens of all ranks share it, and the form of the activation budget, are ours: the paper's were not seen.
"""

import hashlib
import math
import struct
from dataclasses import asdict, dataclass, replace

from transformers import PreTrainedConfig

from .configuration_sigma_moe import K_DISTRIBUTIONS, K_SAMPLINGS


_DRAW, _BUDGET = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class ExpertSampling:
    """Range and law of the number of active experts. Fields as in `SigmaMoeConfig`.

    `k_budget` (ours) bounds what the layers of a micro-batch activate together: at most
    `ceil(k_budget * layers * E[k])`. While the draws exceed it, one layer drawn at random among those above `k_min`
    loses an expert.

    Raises:
        ValueError: an unknown name, an empty range, a temperature that is not positive, a budget below `k_min` or one
            without draws per layer.
    """

    k_min: int
    k_max: int
    k_sampling: str = "layer"
    k_distribution: str = "uniform"
    k_tau: float = 2.0
    k_budget: float | None = None
    k_seed: int = 0

    def __post_init__(self):
        for field, known in (("k_sampling", K_SAMPLINGS[1:]), ("k_distribution", K_DISTRIBUTIONS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} draws nothing. Choose one of {known}.")
        if not 1 <= self.k_min <= self.k_max:
            raise ValueError(f"k_min={self.k_min} and k_max={self.k_max} must satisfy 1 <= k_min <= k_max.")
        if not self.k_tau > 0:
            raise ValueError(f"k_tau={self.k_tau} must be positive (the paper tried 2).")
        if self.k_budget is None:
            return
        if self.k_sampling != "layer":
            raise ValueError(
                f"k_budget={self.k_budget} takes experts from single layers, but k_sampling={self.k_sampling!r} has "
                "one number for all. Use 'layer', or lower k_max."
            )
        if self.k_budget * self.expected_k < self.k_min:
            raise ValueError(
                f"k_budget={self.k_budget} allows {self.k_budget * self.expected_k:.2f} experts a layer, fewer than "
                f"k_min={self.k_min}."
            )

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "ExpertSampling | None":
        """What the config of a model says, `None` if it samples nothing."""
        if getattr(config, "k_sampling", "none") == "none":
            return None
        low = getattr(config, "k_min", None) or 1
        high = getattr(config, "k_max", None) or config.num_experts_per_tok
        rest = ("k_sampling", "k_distribution", "k_tau", "k_budget", "k_seed")
        return cls(low, high, **{name: getattr(config, name) for name in rest if hasattr(config, name)})

    def write_to(self, config: PreTrainedConfig) -> None:
        """Note in `config` how its model was trained: a checkpoint then tells the range in which k can be chosen."""
        for name, value in asdict(self).items():
            setattr(config, name, value)

    def probabilities(self) -> dict[int, float]:
        """`{k: P(k)}`."""
        ks = range(self.k_min, self.k_max + 1)
        weights = [1.0 if self.k_distribution == "uniform" else k ** (1 / self.k_tau) for k in ks]
        return {k: weight / sum(weights) for k, weight in zip(ks, weights)}

    @property
    def expected_k(self) -> float:
        """E[k], before any budget."""
        return sum(k * p for k, p in self.probabilities().items())

    def budget_of(self, num_layers: int) -> int | None:
        """The most experts that the layers may activate together, `None` for no bound."""
        if self.k_budget is None:
            return None
        return math.ceil(round(self.k_budget * num_layers * self.expected_k, 9))

    def draw(self, step: int, micro_step: int, num_layers: int) -> list[int]:
        """Active experts of each layer for micro-batch `micro_step` of the optimizer step after `step` others."""
        if self.k_sampling == "layer":
            keys = [(step, micro_step, layer) for layer in range(num_layers)]
        elif self.k_sampling == "micro_batch":
            keys = [(step, micro_step)] * num_layers
        else:
            keys = [(step,)] * num_layers
        probabilities = self.probabilities()
        ks = [_quantile(probabilities, _uniform(self.k_seed, _DRAW, *key)) for key in keys]
        budget = self.budget_of(num_layers)
        if budget is not None:
            for taken in range(sum(ks) - budget):
                above = [layer for layer, k in enumerate(ks) if k > self.k_min]
                ks[above[int(_uniform(self.k_seed, _BUDGET, step, micro_step, taken) * len(above))]] -= 1
        return ks


def phds_stages(
    k_min: int, k_max: int, *, anchor_share: float = 0.1, anchor_k: int | None = None, **law
) -> tuple[tuple[float, ExpertSampling], ...]:
    """A short adaptation of a trained model, after MoE-PHDS (arXiv 2509.23012): levels of sparsity mixed, then a short
    curriculum at high sparsity.

    **Our reading of an abstract**: the first `1 - anchor_share` of the steps draw k from `k_min..k_max`, one for a
    micro-batch; the rest from `k_min..anchor_k` (default: `k_min` alone). Order, length and levels of the authors are
    not known to us. Returns `(start as a fraction of the run, sampling)` for `MatryoshkaExpertsCallback`; `law` are
    other fields of [`ExpertSampling`].
    """
    if not 0 < anchor_share < 1:
        raise ValueError(f"anchor_share={anchor_share} must lie between 0 and 1.")
    mixed = ExpertSampling(k_min, k_max, **{"k_sampling": "micro_batch"} | law)
    return (0.0, mixed), (1 - anchor_share, replace(mixed, k_max=anchor_k or k_min))


def _quantile(probabilities: dict[int, float], u: float) -> int:
    for k, p in probabilities.items():
        u -= p
        if u < 0:
            return k
    return max(probabilities)  # rounding of the sum


def _uniform(*key: int) -> float:
    """A number in [0, 1) that depends on the key only, the same on every platform and in every version."""
    digest = hashlib.blake2b(struct.pack(f">{len(key)}q", *key), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


__all__ = ["ExpertSampling", "phds_stages"]
