"""Who lets clients train: processes of ours, or a federation."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ..core import ClientUpdate
from .in_process import InProcessEngine


class Engine(Protocol):
    """What [`FederatedTrainer`][trainers.federated.FederatedTrainer] asks for in each round."""

    def train(self, round: int, clients: Sequence[str]) -> list[ClientUpdate]:
        """What these clients sent, in any order; of those that don't answer, nothing."""

    def score(
        self, round: int, clients: Sequence[str], candidates: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, dict[str, float]]:
        """The loss of each candidate at each of these clients, for algorithms that require `"client_loss"`."""

    def begin(self, *, fresh: bool) -> None:
        """Before the first round of a run; `fresh`: none was there before, clients have nothing to remember."""


__all__ = ["Engine", "InProcessEngine"]
