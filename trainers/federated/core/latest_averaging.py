r"""FedLaAvg: an average over the *latest* gradient of every client, available or not.

    u_i: the sum of the gradients that client i took in its last participation, (received - local) / gamma; at first 0
    G <- (1/N) sum_i u_i,     x <- x - gamma G,     each round, with all N clients

Yan et al., arXiv 2002.07399 (INFORMS Journal on Computing 2023), algorithms 2 and 3, as the online supplement and the
authors' code have them. What happens when messages are lost is ours: the paper loses none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .averaging import WEIGHTINGS
from .exchange import NEVER, AggregationLog, CheckedUpdate, ClientUpdate, Payload, Tensors
from .protocol import FederatedAlgorithm, check_choice, norm_of, require_finite
from .uploads import UploadError


class MemoryMismatch(RuntimeError):
    """A client lacks the gradient that the server says it has accepted from it."""


class ClientMemory:
    """A client's side of [`FedLaAvg`] with `memory="client"`: it uploads differences to what the server has of it.

    A client cannot know whether an upload arrived. So it keeps the new gradient beside the accepted one until the
    next payload says, in `config["accepted_round"]`, which round the server has: lost uploads are then forgotten, and
    accepted ones become the base of the next difference. Asked twice in a round it sends the same upload.

    Args:
        keep: gradients kept, at least the accepted one and the one that is under way. A server that commits its state
            every k rounds may come back as it was k rounds ago: then k + 1, so that what it has is still here.
    """

    def __init__(self, *, keep: int = 2):
        if keep < 2:
            raise ValueError(f"keep={keep} must be at least 2: the accepted gradient, and the one under way.")
        self.keep = keep
        self._latest: dict[int, Tensors] = {}

    def upload(self, payload: Payload, delta: Mapping[str, torch.Tensor]) -> Tensors:
        """What goes into [`ClientUpdate.tensors`] after local training moved the received parameters by `delta`.

        Raises:
            MemoryMismatch: the server knows a gradient that is not here any more. Until
                [`FedLaAvg.reset_memory`], this client can send nothing that is right.
        """
        round, accepted = payload.round, int(payload.config["accepted_round"])
        if accepted != NEVER and accepted not in self._latest:
            raise MemoryMismatch(
                f"The server has the gradient of round {accepted}, here are those of rounds {sorted(self._latest)}: "
                "raise `keep` above the rounds between two commits of the server, and call reset_memory on it."
            )
        fresh = self._latest.get(round) if round > accepted else None
        # newer than what was accepted, and not of this round: lost, or of a life of the server that is over
        self._latest = {known: u for known, u in self._latest.items() if known <= accepted}
        if fresh is None:
            fresh = accumulated_gradient(delta, payload.config["learning_rate"])
        base = self._latest.get(accepted)
        self._latest[round] = fresh
        self._latest = {known: self._latest[known] for known in sorted(self._latest)[-self.keep :]}
        return difference(fresh, base)

    def state_dict(self) -> tuple[Tensors, dict[str, Any]]:
        """Flat tensors and a JSON-able record, for whatever an engine keeps of a client."""
        tensors = {f"{round}/{name}": u for round, latest in self._latest.items() for name, u in latest.items()}
        return tensors, {"rounds": sorted(self._latest), "keep": self.keep}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.keep, self._latest = record["keep"], {int(round): {} for round in record["rounds"]}
        for key, tensor in tensors.items():
            round, _, name = key.partition("/")
            self._latest[int(round)][name] = tensor


def accumulated_gradient(delta: Mapping[str, torch.Tensor], learning_rate: float) -> Tensors:
    """u = (received - local) / gamma: with plain SGD, the sum of the local gradients. With momentum or Adam on the
    client it is a stand-in for them."""
    return {name: -tensor / learning_rate for name, tensor in delta.items()}


def difference(new: Tensors, old: Tensors | None) -> Tensors:
    """d = u_new - u_old, on the client or on the server: the same numbers."""
    return new if old is None else {name: tensor - old[name] for name, tensor in new.items()}


class FedLaAvg(FederatedAlgorithm):
    """Federated latest averaging (arXiv 2002.07399).

    Of those that are available, the K whose last participation is longest ago take part; this, not the memory, is
    what bounds staleness: if everybody is available once in every E rounds, no gradient in use is older than
    ceil(N/K) E - 1 rounds. One that was asked in vain counts as having taken part here, or a client that never answers
    would be asked for ever.

    Args:
        learning_rate: gamma, or a function of the round. Clients train by plain SGD with it
            (`config["learning_rate"]`); old gradients are replayed with the current one.
        memory: `"client"`, clients keep u_i and upload u_new - u_i ([`ClientMemory`]); `"server"`, they upload their
            change and the server keeps N gradients: for adapters, or where clients cannot keep anything.
        warmup_rounds: collect gradients for so many rounds before x moves.
        weighting: for unbalanced data, with s_i = N n_i / sum_j n_j and `num_examples` of the start: `"none"`;
            `"loss"`, clients multiply their loss by `config["loss_scale"]` = s_i; `"steps"`, clients take
            `config["step_scale"]` = s_i times as many steps.
        divisor: `"total"`, N, as in the paper: until everybody took part, steps are short; `"seen"`, the clients with
            a gradient (ours).
        retire_after: with `memory="server"`, forget a client's gradient when it is older than so many rounds, and
            don't count it in the divisor until it comes back (ours).
        clients_per_round, max_update_norm, seed: see [`FederatedAlgorithm`]. A limit on the norm of differences does
            not bound the gradients themselves.
    """

    def __init__(
        self,
        *,
        learning_rate: float | Callable[[int], float],
        clients_per_round: int | None = None,
        memory: str = "client",
        warmup_rounds: int = 0,
        weighting: str = "none",
        divisor: str = "total",
        retire_after: int | None = None,
        max_update_norm: float | None = None,
        seed: int = 0,
    ):
        super().__init__(clients_per_round=clients_per_round, max_update_norm=max_update_norm, seed=seed)
        check_choice("memory", memory, ("client", "server"))
        check_choice("weighting", weighting, ("none", "loss", "steps"))
        check_choice("divisor", divisor, ("total", "seen"))
        if retire_after is not None and (memory != "server" or retire_after < 1):
            raise ValueError("retire_after is a positive number of rounds and needs memory='server'.")
        self.learning_rate, self.memory, self.warmup_rounds = learning_rate, memory, warmup_rounds
        self.weighting, self.divisor, self.retire_after = weighting, divisor, retire_after
        self.requires = frozenset({"client_memory"} if memory == "client" else ())

    def _begin(self) -> None:
        if self.weighting != "none" and self._num_examples is None:
            raise ValueError(f"weighting={self.weighting!r} needs num_examples of every client at the start.")
        self._total = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        self._accepted: dict[str, int] = {}
        self._tried: dict[str, int] = {}
        self._latest: dict[str, Tensors] = {}
        self._retired: list[str] = []

    def rate(self, round: int) -> float:
        """gamma in a round."""
        return float(self.learning_rate(round) if callable(self.learning_rate) else self.learning_rate)

    def accepted_round(self, client: str) -> int:
        """The round of the gradient that is in use for a client; -1 for none."""
        return self._accepted.get(client, NEVER)

    def reset_memory(self) -> None:
        """Forget all gradients: x stays, everybody begins anew. The way out when clients lost theirs."""
        self._require_start()
        self._begin()

    def _choose(self, round: int, present: list[str]) -> list[str]:
        """Longest since the last participation first; never before all, ties in the order of the start."""
        oldest = sorted(present, key=lambda client: self._tried.get(client, NEVER))[: self.clients_per_round]
        return sorted(oldest, key=self._clients.__getitem__)

    def _config(self, round: int, client: str) -> dict[str, Any]:
        config: dict[str, Any] = {"learning_rate": self.rate(round)}
        if self.memory == "client":
            config["accepted_round"] = self.accepted_round(client)
        if self.weighting != "none":
            scale = len(self._clients) * self._num_examples[client] / sum(self._num_examples.values())
            config["loss_scale" if self.weighting == "loss" else "step_scale"] = scale
        return config

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round, see [`FederatedAlgorithm.aggregate`]; x moves in rounds without updates too."""
        chains, log = self._sifted(round, updates)
        rate, fresh = self.rate(round), {}
        arrived = self._in_range(chains["mixed"], rate, log)
        if self.memory == "server":
            fresh = {update.client: accumulated_gradient(update.tensors, rate) for update in arrived}
            differences = [difference(u, self._latest.get(client)) for client, u in fresh.items()]
        else:
            differences = [update.tensors for update in arrived]
        accepted = self._accepted | {update.client: round for update in arrived}
        leaving = self._leaving(round, accepted)
        differences += [{name: -u for name, u in self._latest[client].items()} for client in leaving]
        total = {name: _summed(own, [d[name] for d in differences]) for name, own in self._total.items()}
        require_finite(total, f"Round {round}: the summed gradients", log)
        for client in leaving:
            del accepted[client]
            log.events.append(f"{client!r} was retired: its gradient was older than {self.retire_after} rounds")
        retired = sorted((set(self._retired) | set(leaving)) - accepted.keys())
        divisor = len(accepted) if self.divisor == "seen" else len(self._clients) - len(retired)
        parameters = self._stepped(round, total, max(divisor, 1), log)
        tried = self._asked(round)
        self._close(round, parameters, log)
        self._total, self._accepted, self._retired = total, accepted, retired
        self._latest = {c: u for c, u in (self._latest | fresh).items() if c in accepted}
        self._tried |= dict.fromkeys(log.accepted if tried is None else tried, round)
        return log

    def _in_range(self, sifted: list[CheckedUpdate], rate: float, log: AggregationLog) -> list[CheckedUpdate]:
        """Without changes that the server would divide by gamma and could not hold."""
        if self.memory == "client":
            return sifted
        largest = min(torch.finfo(x.dtype).max for x in self._parameters.values())
        for update in sifted:
            if update.norm > largest * rate:
                log._withdraw(update.client, f"its norm is {update.norm:.4g}, its gradient would not be finite")
        return [update for update in sifted if update.client in log.norms]

    def _leaving(self, round: int, accepted: Mapping[str, int]) -> list[str]:
        if self.retire_after is None:
            return []
        return sorted(client for client, last in accepted.items() if round - last > self.retire_after)

    def _stepped(self, round: int, total: Tensors, divisor: int, log: AggregationLog) -> Tensors:
        average = {name: u.double() / divisor for name, u in total.items()}
        log.elementwise_gradient_norm = (self.rate(round) * norm_of(average)) ** 2
        if round < self.warmup_rounds:
            return self._parameters
        return {
            name: (x.double() - self.rate(round) * average[name]).to(x.dtype) for name, x in self._parameters.items()
        }

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:
        order = list(self._clients)
        tensors["total"] = dict(self._total)
        tensors["memory"] = {
            f"{self._clients[client]}/{name}": u
            for client, latest in self._latest.items()
            for name, u in latest.items()
        }
        record["accepted"] = [self._accepted.get(client, NEVER) for client in order]
        record["tried"] = [self._tried.get(client, NEVER) for client in order]
        record["retired"] = self._retired

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        self._check_like_parameters(tensors["total"])
        order = list(self._clients)
        self._total, self._retired = self._placed(tensors["total"]), list(record["retired"])
        self._accepted = {client: last for client, last in zip(order, record["accepted"]) if last != NEVER}
        self._tried = {client: last for client, last in zip(order, record["tried"]) if last != NEVER}
        latest: dict[str, Tensors] = {}
        for key, u in tensors.get("memory", {}).items():
            index, _, name = key.partition("/")
            latest.setdefault(order[int(index)], {})[name] = u.to(self._parameters[name].device)
        self._latest = latest


class MIFA(FedLaAvg):
    """FedLaAvg's memory with random participants: MIFA (Gu et al., NeurIPS 2021), as FedLaAvg's supplement tells it.

    Its analysis has everybody take part in the first round; here those who have not yet count as zeros, as in
    FedLaAvg. With `clients_per_round=None` all that are available take part. Options as [`FedLaAvg`].
    """

    def _choose(self, round: int, present: list[str]) -> list[str]:
        return FederatedAlgorithm._choose(self, round, present)


class WaitForAll(FederatedAlgorithm):
    """x stays until each of the N clients has contributed an update from it; then one averaged step. The baseline that
    arXiv 2002.07399's code calls naive.

    Clients that have contributed already are not selected; one that never answers keeps all waiting.

    Args:
        weighting: `"examples"`, or `"clients"`: all alike.
        clients_per_round, max_update_norm, seed: see [`FederatedAlgorithm`].
    """

    def __init__(self, *, weighting: str = "examples", **options: Any):
        super().__init__(**options)
        check_choice("weighting", weighting, WEIGHTINGS)
        self.weighting = weighting

    def _begin(self) -> None:
        self._waiting = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in self._parameters.items()}
        self._weights: dict[str, float] = {}

    def _choose(self, round: int, present: list[str]) -> list[str]:
        return super()._choose(round, [client for client in present if client not in self._weights])

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> AggregationLog:
        """Close a round, see [`FederatedAlgorithm.aggregate`]."""
        chains, log = self._sifted(round, updates)
        weights = self._weights | {u.client: self._weight(u, self.weighting) for u in chains["mixed"]}
        waiting, parameters = self._waiting, self._parameters
        for update in chains["mixed"]:
            waiting = {name: t + weights[update.client] * update.tensors[name] for name, t in waiting.items()}
        if len(weights) == len(self._clients):
            total = sum(weights.values())
            parameters = {name: (x.double() + waiting[name] / total).to(x.dtype) for name, x in parameters.items()}
            log.elementwise_gradient_norm = (norm_of(waiting) / total) ** 2
            log.events.append("everybody has contributed: one step")
        self._close(round, parameters, log)
        if len(weights) == len(self._clients):
            self._begin()
        else:
            self._waiting, self._weights = waiting, weights
        return log

    def _check(self, update: ClientUpdate, *args: Any) -> dict[str, float]:
        if update.client in self._weights:
            raise UploadError(update.client, "it has contributed to this step already")
        return super()._check(update, *args)

    def _save(self, tensors: dict[str, Tensors], record: dict[str, Any]) -> None:
        tensors["waiting"], record["weights"] = dict(self._waiting), dict(self._weights)

    def _load(self, tensors: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        self._waiting, self._weights = self._placed(tensors["waiting"]), dict(record["weights"])


def _summed(total: torch.Tensor, changes: Sequence[torch.Tensor]) -> torch.Tensor:
    """In the total's dtype, summed in float64, in the order given."""
    exact = total.to(torch.float64, copy=True)
    for change in changes:
        exact += change
    return exact.to(total.dtype)
