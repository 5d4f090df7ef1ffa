"""Averages that a few bad clients cannot move far, noise, and what an accountant computes for it.

The order is amplify, clip, aggregate, add noise: FedSubAvg multiplies rows by up to N (arXiv 2109.07704), and a norm
that was clipped before would not be one after. The median and the trimmed mean are those of Yin et al. (arXiv
1803.01498), clipping and noise those of DP-FedAvg (McMahan et al., arXiv 1710.06963), from memory of the papers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .exchange import Tensors
from .protocol import check_choice, norm_of
from .randomness import random_source


@dataclass(frozen=True)
class Robust:
    """What an algorithm does between amplification and the server's step.

    Args:
        rule: `"mean"`, `"median"` or `"trimmed_mean"`, each coordinate by itself over the clients.
        trim: of the trimmed mean, the share of clients that is left out at each end; unless it is 0, at least one
            where there are three or more.
        clip_norm: an update whose norm is larger, after amplification, is scaled down to it.
        noise_multiplier: z. The average of n updates gets Gaussian noise of standard deviation z * clip_norm / n in
            every coordinate, also in those that no client sent; see [`epsilon_spent`] for what that hides. Where
            `start` is given involvement, rows that nobody has get none, and stay: who has which rows counts as
            public then. Where it is not, nobody's rows, such as that of padding, cannot be told and move too.
        simulation, seed: noise from a seed; both or neither. Without, from the operating system: such a run does not
            repeat, resumed or not.
    """

    rule: str = "mean"
    trim: float = 0.1
    clip_norm: float | None = None
    noise_multiplier: float = 0.0
    simulation: bool = False
    seed: int | None = None

    def __post_init__(self):
        check_choice("rule", self.rule, ("mean", "median", "trimmed_mean"))
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim={self.trim} must be in [0, 0.5): it is left out at both ends.")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive; None does not clip.")
        if self.noise_multiplier < 0 or (self.noise_multiplier and self.clip_norm is None):
            raise ValueError("noise_multiplier must not be negative, and needs clip_norm, which it is a multiple of.")
        if self.noise_multiplier and self.rule != "mean":
            raise ValueError(f"noise is scaled to a mean; with rule={self.rule!r} it would mean nothing.")
        random_source(simulation=self.simulation, seed=self.seed)

    def clipped(self, tensors: Tensors, norm: float) -> Tensors:
        """One client's amplified update, which has this norm, no longer than `clip_norm`."""
        return tensors if self.clip_norm is None or norm <= self.clip_norm else _scaled(tensors, self.clip_norm / norm)

    def cut(self, clients: int) -> int:
        """How many are left out at each end."""
        if self.rule == "median":
            return (clients - 1) // 2
        if self.rule == "mean" or not self.trim or clients < 3:
            return 0
        return max(1, int(self.trim * clients))

    def centre(self, stacked: torch.Tensor) -> torch.Tensor:
        """Of `(clients, ...)`, by the median or the trimmed mean."""
        return trimmed_mean(stacked, self.cut(len(stacked)))

    def too_few(self, clients: int) -> str:
        """What a log must say if the average of so many is a plain mean though another rule was asked for."""
        if self.rule == "mean" or (self.rule == "trimmed_mean" and not self.trim) or self.cut(clients):
            return ""
        return f"rule={self.rule!r} needs 3 updates, of {clients} it is a plain mean: one client can move it anywhere"

    def noise(self, like: torch.Tensor, clients: int, *about: object) -> torch.Tensor:
        """For an average over `clients`, float64. `about`: what distinguishes this draw in a simulation."""
        source = random_source(simulation=self.simulation, seed=self.seed)
        drawn = source.normal(tuple(like.shape), *about).to(like.device)
        return drawn * (self.noise_multiplier * self.clip_norm / clients)


def clip_norm(tensors: Mapping[str, torch.Tensor], limit: float) -> Tensors:
    """The tensors, scaled down together so that their norm is at most `limit`."""
    norm = norm_of(tensors)
    return dict(tensors) if norm <= limit else _scaled(tensors, limit / norm)


def _scaled(tensors: Mapping[str, torch.Tensor], factor: float) -> Tensors:
    return {name: tensor * factor for name, tensor in tensors.items()}


def trimmed_mean(stacked: torch.Tensor, cut: int) -> torch.Tensor:
    """The mean of each coordinate over the first dimension without its `cut` smallest and `cut` largest values."""
    if not 0 <= 2 * cut < len(stacked):
        raise ValueError(f"cut={cut} at both ends leaves nothing of {len(stacked)}.")
    if cut == 0:
        return stacked.mean(0)
    return stacked.sort(0).values[cut : len(stacked) - cut].mean(0)


def coordinate_median(stacked: torch.Tensor) -> torch.Tensor:
    """The median of each coordinate over the first dimension; of an even number, the mean of the middle two."""
    return trimmed_mean(stacked, (len(stacked) - 1) // 2)


def epsilon_spent(
    noise_multiplier: float,
    participations: int | Sequence[int],
    delta: float,
) -> float:
    """The epsilon, at `delta`, of Gaussian mechanisms composed, by the Rényi accountant of `opacus` (extra `privacy`).

    It is that of one client's updates against the same rounds with zeros in their place, in the released parameters,
    given who was selected, whose update counted and who is known to have which rows: for a mean over equally weighted
    updates clipped to `clip_norm`, of clients whose selection depends on nobody's data, amplified, if at all, by what
    is public. Sampling is not counted in the client's favour: K clients drawn without replacement out of those that
    happen to be awake are no Poisson sample.

    Not covered: that the noise is made of floating-point numbers; what the server itself sees; the logs, in which
    clients' norms and losses stand without noise; involvement and heat, which are exact unless they were collected
    by [`RandomisedResponse`][trainers.federated.core.RandomisedResponse], at a price of its own.

    Args:
        participations: in how many rounds the client took part; of several numbers the largest counts, so that the
            answer holds for each client.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must be in (0, 1).")
    rounds = participations if isinstance(participations, int) else max(participations, default=0)
    if rounds == 0:
        return 0.0
    if not noise_multiplier > 0:
        return math.inf
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise ImportError("epsilon_spent needs opacus: pip install 'hf-sigma[privacy]'.") from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, 1.0, rounds)]
    return float(accountant.get_epsilon(delta))
