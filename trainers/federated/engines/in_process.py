"""Clients in these processes: one model in each, which trains for one client after the other.

With several processes (`accelerate launch`), either each trains some of a round's clients, or all train each client
together, with a part of every batch each. The first gives the same bits whatever their number, since updates are
gathered and every process adds them up in the same order; the second is for few clients with much data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...reliability.agreement import from_all_ranks, together
from ..client_states import ClientStates
from ..core import ClientUpdate, Payload
from ..local import ClientData, LocalTraining
from ..messages import LayoutMeter, payload_message, update_message


Tensors = Mapping[str, torch.Tensor]
CLIENTS, DATA = "clients", "data"


class InProcessEngine:
    """See the module.

    Args:
        local: trains.
        data: `(client, block) -> examples`; block `None` where the algorithm has none.
        scoring: `(client, round) -> examples` that candidates of a round are scored on.
        payload: `(round, client) -> Payload`.
        states: what clients keep.
        meter: counts what would cross a wire.
        order: all clients, of which each belongs to one process, if clients keep anything.
        own_rows: of a client, see [`LocalTraining.run`][trainers.federated.local.LocalTraining.run].
        rank, size: this process, and how many there are.
        parallelism: what the processes share: `"clients"` or `"data"`.
        arrivals: `(update) -> updates`, what arrives of one: to play networks and clients that fail.
    """

    def __init__(
        self,
        local: LocalTraining,
        *,
        data: Callable[[str, int | None], ClientData],
        scoring: Callable[[str, int], ClientData],
        payload: Callable[[int, str], Payload],
        states: ClientStates,
        meter: LayoutMeter,
        order: Sequence[str] = (),
        own_rows: Callable[[str], Tensors] = lambda client: {},
        rank: int = 0,
        size: int = 1,
        parallelism: str = CLIENTS,
        arrivals: Callable[[ClientUpdate], Iterable[ClientUpdate]] | None = None,
    ):
        self.local, self.states, self.meter = local, states, meter
        self._data, self._scoring, self._payload, self._own_rows = data, scoring, payload, own_rows
        self._home = {client: index for index, client in enumerate(order)}
        self._rank, self._size = (0, 1) if parallelism == DATA else (rank, size)
        self._keeps = parallelism == CLIENTS or rank == 0
        self._shares_memory = parallelism == DATA and states.folder is not None
        self._arrivals = arrivals

    def begin(self, *, fresh: bool) -> None:
        """Forget what clients remember of a run that is no more."""
        if fresh and self._keeps and (self._rank == 0 or self.states.folder is None):
            self.states.clear()
        from_all_ranks(None)  # nobody trains before it is gone

    def train(self, round: int, clients: Sequence[str]) -> list[ClientUpdate]:
        """See [`Engine`][trainers.federated.engines.Engine]. What fails in one process fails in all."""
        return self._together(_Part(round), lambda part: self._train(part, clients)).updates

    def score(self, round: int, clients: Sequence[str], candidates: Mapping[str, Tensors]) -> dict[str, dict]:
        """See [`Engine`][trainers.federated.engines.Engine]."""
        return self._together(_Part(round, "candidates"), lambda part: self._score(part, clients, candidates)).scores

    def _train(self, part: "_Part", clients: Sequence[str]) -> None:
        for client in self._mine(clients):
            payload = self._payload(part.round, client)
            part.down += self.meter.size(payload_message(payload))
            data = self._data(client, payload.config.get("block"))
            memory = self.states[client] if "accepted_round" in payload.config else None
            updates = self.local.run(client, data, payload, memory=memory, own_rows=self._own_rows(client))
            if memory is not None and self._keeps:
                self.states[client] = memory
            for update in updates:
                part.up += self.meter.size(update_message(update))
                part.updates += [update] if self._arrivals is None else self._arrivals(update)
        self.states.sync()
        if self._shares_memory:
            from_all_ranks(None)  # the others read in the next round what one process has written in this

    def _score(self, part: "_Part", clients: Sequence[str], candidates: Mapping[str, Tensors]) -> None:
        sent = {f"{name}/{key}": tensor for name, model in candidates.items() for key, tensor in model.items()}
        for client in self._mine(clients):
            part.scores[client] = self.local.score(self._scoring(client, part.round), candidates)
            part.down += self.meter.size((sent, {}))

    def _mine(self, clients: Sequence[str]) -> list[str]:
        if self._home:
            return [client for client in clients if self._home[client] % self._size == self._rank]
        return list(clients[self._rank :: self._size])

    def _together(self, part: "_Part", work: Callable[["_Part"], None]) -> "_Part":
        """What all processes found, their parts in the order of processes."""
        if self._size == 1:
            work(part)
        else:

            def mine() -> _Part:
                work(part)
                return part.on_cpu()

            part = _Part(part.round, part.what).joined(together(mine))
        self.meter.add(part.down, direction="down", round=part.round, what=part.what)
        self.meter.add(part.up, direction="up", round=part.round, what=part.what)
        return part


@dataclass
class _Part:
    """What one process did in a round."""

    round: int
    what: str = ""
    updates: list[ClientUpdate] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    down: int = 0
    up: int = 0

    def joined(self, parts: Iterable["_Part"]) -> "_Part":
        for part in parts:
            self.updates += part.updates
            self.scores |= part.scores
            self.down, self.up = self.down + part.down, self.up + part.up
        return self

    def on_cpu(self) -> "_Part":
        updates = []
        for update in self.updates:
            tensors = {name: tensor.cpu() for name, tensor in update.tensors.items()}
            updates.append(replace(update, tensors=tensors, rows={t: own.cpu() for t, own in update.rows.items()}))
        return replace(self, updates=updates)
