"""A run on a disk: which rounds there are, what it is a run of, and taking it up again."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from ..reliability.agreement import from_all_ranks, together
from .core import FederatedAlgorithm, RoundStore
from .round_log import RoundLog


logger = logging.get_logger(__name__)


class Commits:
    """Rounds of one run, which the main process writes and all processes take up.

    Args:
        store: where; `None`: nothing is kept.
        log: what happened, of which a committed round has what was there by then.
        description: what a run must agree in to be gone on with, JSON values.
        writes: whether this is the main process.
        every: rounds from one commit to the next.
    """

    def __init__(
        self, store: RoundStore | None, log: RoundLog, description: Mapping[str, Any], *, writes: bool, every: int
    ):
        self._store, self._log, self._description = store, log, dict(description)
        self._writes, self._every = writes, every

    def latest(self) -> int | None:
        """The last round that is whole; the same in all processes."""
        return together(lambda: self._store.latest() if self._store is not None and self._writes else None)[0]

    def take_up(self, strategy: FederatedAlgorithm, last: int) -> None:
        """Put strategy and log where they were behind a round.

        Raises:
            ValueError: the round is of another run.
        """
        tensors, record = together(lambda: self._store.load(last) if self._writes else None)[0]
        known = record["run"]
        names = sorted(known.keys() | self._description)
        if odd := [name for name in names if known.get(name) != self._description.get(name)]:
            told = ", ".join(f"{name}={known.get(name)!r} (now {self._description.get(name)!r})" for name in odd)
            raise ValueError(f"Rounds of another run are here: {told}. Give another output_dir.")
        together(lambda: self._log.begin(record["log_bytes"]) if self._writes else None)
        self._log.history, self._log.logs = from_all_ranks((self._log.history, self._log.logs))[0]
        strategy.load_state_dict({"tensors": tensors, "record": record["strategy"]})
        logger.warning(f"Going on behind round {last}.")

    def commit(self, strategy: FederatedAlgorithm, round: int, *, last: bool) -> bool:
        """Write a round if it is time to; whether it was."""
        if self._store is None or not (last or (round + 1) % self._every == 0):
            return False
        together(lambda: self._write(strategy, round) if self._writes else None)
        return True

    def _write(self, strategy: FederatedAlgorithm, round: int) -> None:
        state = strategy.state_dict()
        record = {"run": self._description, "strategy": state["record"], "log_bytes": self._log.sync()}
        self._store.commit(round, state["tensors"], record)


def agree_on(strategy: FederatedAlgorithm) -> None:
    """Let all processes have the main one's state, where the strategy draws from the operating system."""
    robust = getattr(strategy, "robust", None)
    if robust is None or not robust.noise_multiplier or robust.simulation:
        return
    if dist.is_initialized() and dist.get_world_size() > 1:
        strategy.load_state_dict(from_all_ranks(_on_cpu(strategy.state_dict()))[0])


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, dict[str, torch.Tensor]] = {
        group: {name: tensor.cpu() for name, tensor in found.items()} for group, found in state["tensors"].items()
    }
    return state | {"tensors": tensors}
