"""Averages that a few bad clients cannot move far, noise, and what an accountant computes for it.

The order is amplify, clip, aggregate, add noise: FedSubAvg multiplies rows by up to N (arXiv 2109.07704), and a norm
that was clipped before would not be one after. The median and the trimmed mean are those of Yin et al. (arXiv
1803.01498), clipping and noise those of DP-FedAvg (McMahan et al., arXiv 1710.06963), from memory of the papers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .protocol import Tensors, check_choice, norm_of
from .randomness import random_source


@dataclass(frozen=True)
class Robust:
    """What an algorithm does between amplification and the server's step.

    Args:
        rule: `"mean"`, `"median"` or `"trimmed_mean"`, each coordinate by itself over the clients.
        trim: of the trimmed mean, the share of clients that is left out at each end.
        clip_norm: an update whose norm is larger, after amplification, is scaled down to it.
        noise_multiplier: z. The average of n updates gets Gaussian noise of standard deviation z * clip_norm / n in
            every coordinate, also in those that no client sent; see [`epsilon_spent`].
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

    def clipped(self, tensors: Tensors) -> Tensors:
        """One client's amplified update, no longer than `clip_norm`."""
        return tensors if self.clip_norm is None else clip_norm(tensors, self.clip_norm)

    def centre(self, stacked: torch.Tensor) -> torch.Tensor:
        """Of `(clients, ...)`, by the median or the trimmed mean."""
        clients = len(stacked)
        return trimmed_mean(stacked, (clients - 1) // 2 if self.rule == "median" else int(self.trim * clients))

    def noise(self, like: torch.Tensor, clients: int, *about: object) -> torch.Tensor:
        """For an average over `clients`, float64. `about`: what distinguishes this draw in a simulation."""
        source = random_source(simulation=self.simulation, seed=self.seed)
        drawn = source.normal(tuple(like.shape), *about).to(like.device)
        return drawn * (self.noise_multiplier * self.clip_norm / clients)


def clip_norm(tensors: Mapping[str, torch.Tensor], limit: float) -> Tensors:
    """The tensors, scaled down together so that their norm is at most `limit`."""
    norm = norm_of(tensors)
    return dict(tensors) if norm <= limit else {name: tensor * (limit / norm) for name, tensor in tensors.items()}


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

    It is that of one client's whole data against the same rounds with zeros in its place, in the released averages,
    given who was selected: for a mean over equally weighted updates clipped to `clip_norm`, of clients whose selection
    depends on nobody's data. Sampling is not counted in the client's favour: K clients drawn without replacement out
    of those that happen to be awake are no Poisson sample. That the noise is made of floating-point numbers, and what
    the server itself sees, are not counted either.

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
