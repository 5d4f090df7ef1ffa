"""What passes between a server and its clients in a round, and what the round comes to."""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch


logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Involvement = Mapping[str, Mapping[str, torch.Tensor]]
NEVER = -1  # the round of a client that has not taken part
MIXED, SEPARATE = "mixed", "separate"
UNKEPT = ("metrics", "num_examples")  # of a round's log


@dataclass(frozen=True)
class Payload:
    """What goes down to one client in one round.

    Args:
        tensors: parameters, by name.
        rows: for tables of which the client gets only its submodel, which rows `tensors[name]` holds, in order.
        config: how to train, for the client to obey: `learning_rate` (of plain SGD), `local_steps`, `proximal` (mu:
            the client adds mu/2 ||y - received||^2 to its loss), `loss_scale`, `step_scale` (the client takes
            max(1, round(C * step_scale)) of its C steps), `block`, and `accepted_round`, see
            [`ClientMemory`][trainers.federated.core.latest_averaging.ClientMemory]. What is absent, the client's own
            settings decide.
        separate: the second chain, of algorithms that require `"two_chains"`: trained like the first, apart from it,
            with `separate_learning_rate` if the config has it.
    """

    round: int
    tensors: Tensors
    rows: Tensors = field(default_factory=dict)
    config: dict[str, str | int | float | bool] = field(default_factory=dict)
    separate: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class ClientUpdate:
    """What a client sends up.

    Args:
        client: whom the connection says it is, never what a payload claims.
        tensors: local minus received, in the dtype of what was served (fp32); of a client with memory, what
            [`ClientMemory.upload`][trainers.federated.core.latest_averaging.ClientMemory.upload] makes of it.
        rows: for tables of which `tensors[name]` holds only some rows, which, increasing.
        num_examples: what the client has; not the number of batches. Where `start` was told, that is believed.
        metrics: what the client measured, for logs.
        chain: `"mixed"`, or `"separate"` for the update of [`Payload.separate`].
    """

    client: str
    round: int
    tensors: Tensors
    rows: Tensors
    num_examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    chain: str = MIXED


@dataclass(frozen=True)
class CheckedUpdate(ClientUpdate):
    """An update that was checked, on the device of the parameters.

    Args:
        tensor_norms: of each tensor, all finite.
    """

    tensor_norms: dict[str, float] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Over all tensors together."""
        return joint_norm(self.tensor_norms.values())


@dataclass
class AggregationLog:
    """What a round came to.

    Args:
        accepted: clients whose update counts, in the order in which they were added up.
        rejected: of each client that sent something bad, late or twice, why it does not count; one that sent a good
            update too is accepted as well.
        missing: clients that were selected and sent nothing.
        norms: Euclidean norm of each accepted upload; the second chain's under `"<client>/separate"`. Whatever noise
            the averages get, this has none.
        step_norm: how far the served parameters moved.
        elementwise_gradient_norm: sum_m (N/n_m) d_m^2 with d the plain average of the updates and n_m the clients that
            have parameter m, as far as they are known: for small local steps, the element-wise gradient norm of
            FedSubAvg (arXiv 2109.07704, section 4) in our reading, times (learning rate x local steps)^2, seen
            through this round's clients.
        events: what else a reader must know.
        metrics: what each accepted update of the first chain says, by client; not kept, as `to_dict` leaves it out.
        num_examples: of the same clients, as they are believed; not kept either.
    """

    round: int
    accepted: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    step_norm: float = 0.0
    elementwise_gradient_norm: float = 0.0
    events: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    num_examples: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without what is not kept."""
        return {part.name: copy.deepcopy(getattr(self, part.name)) for part in fields(self) if part.name not in UNKEPT}

    def _reject(self, client: str, reason: str) -> None:
        known = self.rejected.get(client)
        self.rejected[client] = reason if known is None else f"{known}; {reason}"
        logger.warning("Round %d: update of %r rejected: %s", self.round, client, reason)

    def _withdraw(self, client: str, reason: str) -> None:
        """Reject the one update of a client that was accepted before."""
        self.accepted.remove(client)
        for known in (self.norms, self.metrics, self.num_examples):
            del known[client]
        self._reject(client, reason)


def joint_norm(norms: Iterable[float]) -> float:
    """Of tensors together, from the norm of each."""
    return sum([norm**2 for norm in norms]) ** 0.5
