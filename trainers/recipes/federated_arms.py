"""The federated algorithms by name, with what a comparison gives all of them: rate, participants, seed."""

from collections.abc import Callable
from dataclasses import dataclass

from ..federated import (
    MIFA,
    FedAdam,
    FedAvg,
    FedLaAvg,
    FedProx,
    FedSGD,
    FedSubAvg,
    RoundwiseSubmodelAvg,
    WaitForAll,
)
from ..federated.core import FederatedAlgorithm
from .arguments import QUIET


# Clients take plain steps; what is clever is the server's.
SILENT_SGD = QUIET | {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "remove_unused_columns": False,
}
# Why the recipes here take neither --optimizer msign nor --reliability on.
OF_CLIENTS = (
    "clients begin every round with a fresh optimizer, so that no period of steps passes, and the federated trainer "
    "commits rounds and refuses bad updates itself. Leave it out."
)


@dataclass(frozen=True)
class Shared:
    """What arms take from a comparison.

    Args:
        learning_rate: of the clients' plain SGD.
        clients_per_round: K; `None`: all that are there.
        seed: of the selection: in a round, arms that draw at random draw the same clients.
        weighting: of averages, `"clients"` or `"examples"`; of latest averages, `"none"` or `"loss"`, where it says
            the same.
        proximal: mu of FedProx.
        server_learning_rate: of FedAdam's server; its clients have the rate that is searched.
        max_correction: cap of FedSubAvg's N/n_m; 0: none.
    """

    learning_rate: float
    clients_per_round: int | None
    seed: int
    weighting: str = "examples"
    proximal: float = 1.0
    server_learning_rate: float = 0.01
    max_correction: float = 0.0


def _averaged(kind: type[FedAvg], **own: Callable[[Shared], object]) -> Callable[[Shared], FederatedAlgorithm]:
    def make(shared: Shared) -> FederatedAlgorithm:
        options = {name: value(shared) for name, value in own.items()}
        return kind(
            clients_per_round=shared.clients_per_round, seed=shared.seed, weighting=shared.weighting, **options
        )

    return make


def _latest(kind: type[FedLaAvg]) -> Callable[[Shared], FederatedAlgorithm]:
    def make(shared: Shared) -> FederatedAlgorithm:
        return kind(
            learning_rate=shared.learning_rate,
            clients_per_round=shared.clients_per_round,
            seed=shared.seed,
            weighting="loss" if shared.weighting == "examples" else "none",
        )

    return make


ARMS: dict[str, Callable[[Shared], FederatedAlgorithm]] = {
    "fed_la_avg": _latest(FedLaAvg),
    "mifa": _latest(MIFA),
    "wait_for_all": _averaged(WaitForAll),
    "fed_avg": _averaged(FedAvg),
    "fed_prox": _averaged(FedProx, proximal=lambda shared: shared.proximal),
    "fed_adam": _averaged(FedAdam, learning_rate=lambda shared: shared.server_learning_rate),
    "fed_sgd": _averaged(FedSGD),
    "fed_sub_avg": _averaged(FedSubAvg, max_correction=lambda shared: shared.max_correction or None),
    "roundwise": _averaged(RoundwiseSubmodelAvg),
}


def strategy_of(arm: str, shared: Shared) -> FederatedAlgorithm:
    """A new strategy. `ValueError` for an arm that is not known."""
    require_arms([arm])
    return ARMS[arm](shared)


def require_arms(arms: list[str], known: object = ARMS) -> None:
    """`ValueError` that names what is not known, and for none at all."""
    if not arms or (strange := sorted(set(arms) - set(known))):
        raise ValueError(f"arms {strange if arms else arms} are not known; choose from {', '.join(known)}.")


__all__ = ["ARMS", "OF_CLIENTS", "Shared", "require_arms", "strategy_of"]
