"""What one client does in one round: C local steps from what it received, and the update that it sends.

    local = LocalTraining(model, optimizer=..., learning_rate=..., loss=..., batch_size=16, local_steps=10)
    updates = local.run("user 17", data, payload)

Nothing here knows an engine: whoever calls it, with equal payloads, data and seeds, gets equal bits. One model serves
any number of clients, one after the other, and is left as it was but for its values.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .core import ClientMemory, ClientUpdate, Payload
from .master_weights import MasterWeights
from .submodel_tables import SubmodelTables


logger = logging.get_logger(__name__)

Tensors = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]


class ClientData(Protocol):
    """The examples of one client."""

    def __len__(self) -> int:
        """How many."""

    def batch(self, indices: torch.Tensor | None) -> Mapping[str, Any]:
        """Some of them, collated as the model takes them; `None`: all, in their order."""


@dataclass(frozen=True)
class Shard:
    """One process' part of every batch, where the data of a client lie over several.

    Args:
        rank, size: this process, and how many there are.
        add_up: `(tensors) -> None`, in place, over all processes.
    """

    rank: int
    size: int
    add_up: Callable[[Sequence[torch.Tensor]], None]


class LocalTraining:
    """The local steps of any number of clients on one model.

    Args:
        model: of any kind, of which the trainable parameters travel; a PEFT model's are its adapter's.
        optimizer: `([(name, parameter)]) -> torch.optim.Optimizer`, made once; each client starts with fresh state.
        learning_rate: of a round; a payload's own comes first.
        loss: of a batch; by default what the model returns as such.
        batch_size: examples of a step; a client that has fewer takes all of them in every step.
        local_steps: C. Batches run through the client's examples in a new order each time, and the last one of each
            pass may be smaller.
        local_epochs: passes instead of steps.
        seed: of everything that is drawn; each (round, client) has randomness of its own.
        max_grad_norm: clip the gradient of a step; 0 does not.
        shard: set where the data of one client lie over several processes. `batch_size` is that of each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        learning_rate: Callable[[int], float],
        batch_size: int,
        local_steps: int | None = None,
        local_epochs: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        max_grad_norm: float = 0.0,
        shard: Shard | None = None,
    ):
        given = [number for number in (local_steps, local_epochs) if number is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(f"local_steps={local_steps}, local_epochs={local_epochs}: one of them, at least 1.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.model, self.learning_rate, self.loss = model, learning_rate, loss or loss_of
        self.batch_size, self.local_steps, self.local_epochs = batch_size, local_steps, local_epochs
        self.seed, self.max_grad_norm, self.shard = seed, max_grad_norm, shard
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise ValueError("The model has no trainable parameters.")
        self._weights = MasterWeights(self._trained)
        self._tables = SubmodelTables(model, self._weights)
        self._buffers = _Buffers(model)
        self.optimizer = optimizer(list(self._weights.masters.items()))
        self._order = torch.Generator()

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """What travels, as it is now: for [`FederatedAlgorithm.start`]. Copies, float32 at least."""
        kinds = {name: torch.promote_types(p.dtype, torch.float32) for name, p in self._trained.items()}
        return {name: p.detach().to(kinds[name], copy=True) for name, p in self._trained.items()}

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(iter(self._trained.values())).device

    def load(self, parameters: Tensors) -> None:
        """Put served parameters, all of them and whole, into the model."""
        self._weights.load(parameters)

    def run(
        self,
        client: str,
        data: ClientData,
        payload: Payload,
        *,
        memory: ClientMemory | None = None,
        own_rows: Tensors | None = None,
    ) -> list[ClientUpdate]:
        """One client's round: its update, and that of its second chain where the payload has one.

        Args:
            client: its name; with the payload's round, what its randomness comes from.
            memory: its side of [`FedLaAvg`] with `memory="client"`, see
                [`ClientMemory`][trainers.federated.core.ClientMemory]; it is changed.
            own_rows: of tables that came whole, the rows that the client reads: it sends these only.

        Raises:
            ValueError: no examples, or a payload that asks for what this client cannot do.
            MemoryMismatch: see [`ClientMemory`][trainers.federated.core.ClientMemory].
        """
        if not len(data):
            raise ValueError(f"{client!r} has no examples.")
        if ("accepted_round" in payload.config) != (memory is not None):
            raise ValueError("The algorithm and the client disagree on whether clients keep their gradients.")
        steps = self._steps(len(data), payload.config)
        rate = float(payload.config.get("learning_rate", self.learning_rate(payload.round)))
        update = self._chain(client, data, payload, payload.tensors, steps, rate, own_rows)
        if memory is not None:
            update = ClientUpdate(
                client,
                payload.round,
                memory.upload(payload, update.tensors),
                update.rows,
                update.num_examples,
                update.metrics,
            )
        if not payload.separate:
            return [update]
        rate = float(payload.config.get("separate_learning_rate", rate))
        return [update, self._chain(client, data, payload, payload.separate, steps, rate, own_rows, chain="separate")]

    @torch.no_grad()
    def score(
        self, data: ClientData, candidates: Mapping[str, Tensors], *, batch_size: int | None = None
    ) -> dict[str, float]:
        """The mean loss of each candidate, for [`FederatedAlgorithm.compare`]; the model keeps the last one."""
        if self.model.training:
            self.model.eval()
        losses = {}
        for name, parameters in candidates.items():
            self.load(parameters)
            seed_everything(self.seed, self.device)  # whatever a collator draws, it draws for all candidates alike
            losses[name] = mean_loss(self.model, data, self.loss, batch_size or self.batch_size)
        return losses

    def _steps(self, examples: int, config: Mapping[str, Any]) -> int:
        passes = math.ceil(examples / self._batch_of_all)
        steps = self.local_steps if self.local_steps is not None else self.local_epochs * passes
        steps = int(config.get("local_steps", steps))
        return max(1, round(steps * config.get("step_scale", 1.0)))

    @property
    def _batch_of_all(self) -> int:
        return self.batch_size * (self.shard.size if self.shard else 1)

    def _chain(
        self,
        client: str,
        data: ClientData,
        payload: Payload,
        received: Tensors,
        steps: int,
        rate: float,
        own_rows: Tensors | None,
        *,
        chain: str = "mixed",
    ) -> ClientUpdate:
        if not self.model.training:
            self.model.train()
        received = {name: received[name].to(self.device) for name in self._trained}
        seed = seed_of(self.seed, payload.round, client)
        seed_everything(seed + (self.shard.rank if self.shard else 0), self.device)
        self._order.manual_seed(seed)
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = dict(payload.rows)
        with self._tables.narrowed(rows, received) as start:
            self._weights.load(start)
            loss = self._train(data, steps, payload.config, start)
            tensors = self._weights.minus(start)
        self._buffers.restore()
        tensors |= {table: tensors[table][: len(own)] for table, own in rows.items()}
        for table, own in (own_rows or {}).items():
            if table not in rows:
                rows[table] = own
                tensors[table] = tensors[table][own.to(self.device)]
        return ClientUpdate(
            client, payload.round, tensors, rows, len(data), {"loss": loss, "steps": float(steps)}, chain
        )

    def _train(self, data: ClientData, steps: int, config: Mapping[str, Any], start: Tensors) -> float:
        """`steps` steps on the model as it stands; the mean of their losses."""
        scale, proximal = float(config.get("loss_scale", 1.0)), float(config.get("proximal", 0.0))
        masters, total = list(self._weights.masters.values()), 0.0
        origin = [start[name] for name in self._weights.masters] if proximal else []
        for indices in self._batches(len(data), steps):
            loss, weight = self._backward(data, indices, scale)
            self._weights.take_gradients()
            if self.shard:
                loss = self._add_up(masters, loss, weight)
            if proximal:
                _pull(masters, origin, proximal)
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(masters, self.max_grad_norm)
            self.optimizer.step()
            for master in masters:
                master.grad = None
            self._weights.give_values()
            total = total + loss
        return float(total) / steps

    def _backward(self, data: ClientData, indices: torch.Tensor | None, scale: float) -> tuple[torch.Tensor, int]:
        if self.shard:
            indices = torch.arange(len(data)) if indices is None else indices
            indices = indices[self.shard.rank * self.batch_size : (self.shard.rank + 1) * self.batch_size]
            if not len(indices):
                return torch.zeros((), device=self.device), 0
        loss = self.loss(self.model, data.batch(indices))
        (loss if scale == 1.0 else loss * scale).backward()
        return loss.detach(), len(data) if indices is None else len(indices)

    def _add_up(self, masters: list[nn.Parameter], loss: torch.Tensor, weight: int) -> torch.Tensor:
        """The gradient over all processes' parts of a batch, each weighing as many examples as it has."""
        for master in masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad * weight
        weights = torch.stack([loss.double() * weight, torch.tensor(float(weight), device=loss.device).double()])
        self.shard.add_up([*(master.grad for master in masters), weights])
        for master in masters:
            master.grad /= weights[1].to(master.dtype)
        return weights[0] / weights[1]

    def _batches(self, examples: int, steps: int) -> Iterator[torch.Tensor | None]:
        """Indices of each step's examples; `None`: all."""
        size, taken = self._batch_of_all, 0
        while taken < steps:
            if examples <= size:
                taken += 1
                yield None
                continue
            for indices in torch.randperm(examples, generator=self._order).split(size)[: steps - taken]:
                taken += 1
                yield indices


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """What the model returns as its loss."""
    outputs = model(**batch)
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]


@torch.no_grad()
def mean_loss(model: nn.Module, data: ClientData, loss: Loss, batch_size: int) -> float:
    """Over all examples, in their order; the model is taken as it is."""
    total = 0.0
    for indices in torch.arange(len(data)).split(batch_size):
        total += float(loss(model, data.batch(indices))) * len(indices)
    return total / len(data)


def seed_of(seed: int, round: int, client: str) -> int:
    """Of one client in one round, from 0 on and below 2^62."""
    digest = hashlib.sha256(f"{seed}/{round}/{client}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed whatever a collator or a model draws from: `random`, numpy, torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # `torch.manual_seed` would also reach for devices that are not there, which takes longer than a local step
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@torch.no_grad()
def _pull(masters: list[nn.Parameter], origins: Sequence[torch.Tensor], proximal: float) -> None:
    """Add the gradient of proximal/2 ||y - received||^2."""
    for master, origin in zip(masters, origins):
        pull = (master - origin) * proximal
        master.grad = pull if master.grad is None else master.grad + pull


class _Buffers:
    """Buffers that training writes to, such as batch statistics, are as before after every client: which clients a
    process had before must not matter."""

    def __init__(self, model: nn.Module):
        self._known = [(name, buffer, buffer._version, None) for name, buffer in model.named_buffers()]
        self._values = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._warned = False

    @torch.no_grad()
    def restore(self) -> None:
        changed = []
        for index, (name, buffer, version, _) in enumerate(self._known):
            if buffer._version != version:
                buffer.copy_(self._values[name])
                self._known[index] = (name, buffer, buffer._version, None)
                changed.append(name)
        if changed and not self._warned:
            self._warned = True
            logger.warning(
                f"Local training writes to the buffers {changed[:3]}. They are no parameters, do not travel, and stay "
                "as they were: models without batch statistics suit federated training better."
            )


__all__ = ["ClientData", "LocalTraining", "Shard", "loss_of", "mean_loss", "seed_everything", "seed_of"]
