"""A `FederatedTrainer`'s rounds as a Flower `Strategy`: Flower carries messages, everything else is the Trainer's.

Who is there is whom the grid lists when a round begins; nobody is waited for. What comes late, twice or broken does
not count, and a client's answer is acknowledged in its next question, by the round that the algorithm accepted from it
last: until then the client keeps both what it sent and what it had before.
"""

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from transformers.utils import logging

from ...core import UploadError
from ...messages import payload_message
from ...trainer import FederatedTrainer
from .nodes import Nodes
from .questions import AnswerError, Questions
from .records import CLIENT, FEDERATION, ROUND, SCORE, TRAIN, packed, update_in


logger = logging.get_logger(__name__)

FEDERATION_FILE = "federation_id"


class FederatedStrategy(Strategy):
    """See the module. [`run`] does all; [`Strategy.start`] alone goes on from where the trainer is.

    Args:
        trainer: with the strategy, the model, and of the clients what [`Nodes.population`] has.
        nodes: of which all clients are registered.
        timeout: seconds of a round. Who has not answered by then is missing in it.
    """

    def __init__(self, trainer: FederatedTrainer, nodes: Nodes, *, timeout: float = 3600.0):
        self.trainer, self.nodes, self.timeout = trainer, nodes, timeout
        self.failures: dict[int, dict[str, str]] = {}  # of each round, whose answer did not count before it was read
        self._federation, self._grid = secrets.token_hex(16), None
        self._questions = Questions(TRAIN, ttl=timeout)

    def run(self, grid: Grid, *, resume: bool = False) -> Result:
        """All rounds, or with `resume` those that are left.

        Raises:
            ValueError: see [`FederatedTrainer.begin`][trainers.federated.FederatedTrainer].
        """
        trainer = self.trainer
        first = trainer.begin(resume)
        if trainer.args.save_strategy != "no":
            self._federation = _federation_id(trainer.args.output_dir, fresh=first == 0)
        served = ArrayRecord(torch_state_dict=trainer.strategy.parameters)
        result = self.start(grid, served, num_rounds=trainer.rounds - first, timeout=self.timeout)
        trainer.finish()
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's: what goes to the clients of the next round. `arrays` and `config` say nothing that the trainer
        does not know."""
        trainer, self._grid = self.trainer, grid
        self._questions = Questions(TRAIN, ttl=self.timeout)
        if trainer.control.should_training_stop:
            return []
        trainer.control = trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        round, down = trainer.state.global_step, 0
        present = self.nodes.online(grid)
        if trainer.availability is not None:
            present = sorted(set(present) & set(trainer.availability.available(round)))
        messages = []
        for client in trainer.select(round, present):
            file = packed(payload_message(trainer.strategy.payload(round, client)))
            messages.append(self._questions.to(self.nodes.node(client), [file], **self._about(round)))
            down += len(file)
        trainer.meter.add(down, direction="down", round=round)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's: the end of a round; what is served from now on, and how many counted."""
        trainer = self.trainer
        if trainer.control.should_training_stop:
            return None, None
        round, updates, up = trainer.state.global_step, [], 0
        for client, _, files in self._answers(round, self._questions, replies):
            try:
                updates += [update_in(client, file) for file in files]
                up += sum(map(len, files))
            except UploadError as error:
                self._fail(round, client, error.reason)
        trainer.meter.add(up, direction="up", round=round)
        log = trainer.close_round(round, updates, score=self._score)
        counts = {"clients": len(log.accepted), "rejected": len(log.rejected), "missing": len(log.missing)}
        return ArrayRecord(torch_state_dict=trainer.strategy.parameters), MetricRecord(counts)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's: nothing. The trainer evaluates on the server; candidates are scored when a round ends."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Flower's: nothing."""
        return None

    def summary(self) -> None:
        """Flower's: tell what runs."""
        trainer = self.trainer
        logger.info(
            "%s over %d clients, %d rounds",
            type(trainer.strategy).__name__,
            len(trainer.clients.names),
            trainer.rounds,
        )

    def _score(
        self, round: int, clients: Sequence[str], candidates: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, dict[str, float]]:
        """See [`Engine.score`][trainers.federated.engines.Engine]."""
        tensors = {f"{name}/{key}": tensor for name, model in candidates.items() for key, tensor in model.items()}
        file, questions, losses = packed((tensors, {})), Questions(SCORE, ttl=self.timeout), {}
        messages = [questions.to(self.nodes.node(client), [file], **self._about(round)) for client in clients]
        replies = self._grid.send_and_receive(messages, timeout=self.timeout)
        for client, about, _ in self._answers(round, questions, replies):
            told = {name: about.get(f"loss/{name}") for name in candidates}
            if all(isinstance(loss, float) for loss in told.values()):
                losses[client] = told
            else:
                self._fail(round, client, "its losses are no numbers")
        self.trainer.meter.add(len(file) * len(messages), direction="down", round=round, what="candidates")
        return losses

    def _answers(
        self, round: int, questions: Questions, replies: Iterable[Message]
    ) -> Iterable[tuple[str, Mapping, list[bytes]]]:
        """Those of clients that are whom they say they are."""
        for reply in replies:
            try:
                node, about, files = questions.answer(reply)
            except AnswerError as error:
                self._fail(round, self.nodes.client(error.node) or f"node {error.node}", error.reason)
                continue
            client, claimed = self.nodes.client(node), about.get(CLIENT)
            if claimed == client:
                yield client, about, files
            else:
                self._fail(round, client, f"it says that it is {claimed!r}")

    def _about(self, round: int) -> dict[str, str | int]:
        return {FEDERATION: self._federation, ROUND: round}

    def _fail(self, round: int, client: str, reason: str) -> None:
        known = self.failures.setdefault(round, {}).get(client)
        self.failures[round][client] = reason if known is None else f"{known}; {reason}"
        logger.warning("Round %d: the answer of %r does not count: %s", round, client, reason)


def _federation_id(folder: str | os.PathLike, *, fresh: bool) -> str:
    """A name for what clients remember of this run, however often its server is started again."""
    path = Path(folder) / FEDERATION_FILE
    if fresh:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".unfinished")
        scratch.write_text(secrets.token_hex(16), encoding="utf-8")
        os.replace(scratch, path)
    return path.read_text(encoding="utf-8").strip()
