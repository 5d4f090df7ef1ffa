"""The `ClientApp` of a federation: local training, and what a client remembers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from ...client_states import ClientStates
from ...core import ClientMemory, pack, unpack
from ...messages import payload_from, update_message
from ...trainer import FederatedTrainer
from .nodes import BLOCK_COUNTS, NUM_EXAMPLES, POSITION
from .records import CLIENT, FEDERATION, NONCE, ROUND, about_in, array_of, files_in, packed, record_of


MEMORY, PROGRESS = "hf_sigma_memory", "hf_sigma_progress"
RECORD = "record"
_FEDERATION_ID = re.compile(r"[0-9a-f]{32}")

Federation = Callable[[Context], FederatedTrainer]


def client_of(context: Context, trainer: FederatedTrainer) -> str:
    """The client that a node is: `client-id` of its configuration; else the only one that its trainer has examples of,
    or of several, as in simulations, that of its `partition-id`.

    Raises:
        ValueError: the configuration tells none, or one without examples.
    """
    config, names = context.node_config, trainer.clients.names
    if "client-id" in config:
        client = str(config["client-id"])
    elif len(names) == 1:
        client = names[0]
    elif "partition-id" in config and int(config["partition-id"]) < len(names):
        client = names[int(config["partition-id"])]
    else:
        raise ValueError("This node does not know which client it is: give it a client-id by --node-config.")
    if client not in trainer.clients:
        raise ValueError(f"This node is {client!r}, and the trainer's dataset has no examples of that client.")
    return client


def flower_client_app(
    federation: Federation, *, client: Callable[[Context, FederatedTrainer], str] = client_of
) -> ClientApp:
    """Answers to [`FederatedStrategy`][trainers.federated.engines.flower.FederatedStrategy].

    With algorithms whose clients remember ([`FedLaAvg`][trainers.federated.FedLaAvg]), `memory-folder` in a node's
    configuration, or in that of the run, says where: in files, written before an upload leaves, which survive restarts
    of node and server. A node without one remembers in Flower's state of the run, for as long as its process and this
    run last.

    Args:
        federation: `(context) -> trainer` with the node's own examples; it is asked at each message, so keep what is
            slow to make. Only its local side is used.
        client: who the node is. The server compares it with the node's key.
    """
    app = ClientApp()

    @app.query("register")
    def register(message: Message, context: Context) -> Message:
        trainer = federation(context)
        name = client(context, trainer)
        rows = None if trainer.learns_heat else trainer.submodel(name)
        about: dict[str, Any] = {
            CLIENT: name,
            NUM_EXAMPLES: trainer.clients.count(name),
            POSITION: int(context.node_config.get("partition-id", 0)),
        }
        if (blocks := trainer.clients.num_blocks) is not None:
            about[BLOCK_COUNTS] = [trainer.clients.count(name, block) for block in range(blocks)]
        return _reply(message, [packed((rows, {}))] if rows else [], about)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trainer = federation(context)
        name, asked = client(context, trainer), about_in(message.content)
        payload = payload_from(*unpack(files_in(message.content)[0]))
        _go_on(context, payload.round)
        data = trainer.clients.data(name, payload.config.get("block"))
        memories = memory = None
        if "accepted_round" in payload.config:
            memories = _Memories(context, asked.get(FEDERATION), keep=trainer.engine.states.keep)
            memory = memories.load(name)
        own_rows = (trainer.submodel(name) if trainer.learns_heat else None) or {}
        updates = trainer.local.run(name, data, payload, memory=memory, own_rows=own_rows)
        if memories is not None:
            memories.save(name, memory)
        return _reply(message, [packed(update_message(update)) for update in updates], {CLIENT: name})

    @app.evaluate("score")
    def score(message: Message, context: Context) -> Message:
        trainer = federation(context)
        name, asked = client(context, trainer), about_in(message.content)
        candidates: dict[str, dict] = {}
        for key, tensor in unpack(files_in(message.content)[0])[0].items():
            candidate, _, parameter = key.partition("/")
            candidates.setdefault(candidate, {})[parameter] = tensor
        losses = trainer.local.score(trainer.scoring_data(name, int(asked[ROUND])), candidates)
        return _reply(message, [], {CLIENT: name} | {f"loss/{one}": float(loss) for one, loss in losses.items()})

    return app


def _reply(message: Message, files: list[bytes], about: dict[str, Any]) -> Message:
    return Message(record_of(files, about | {NONCE: about_in(message.content)[NONCE]}), reply_to=message)


def _go_on(context: Context, round: int) -> None:
    """Within a run, rounds only go up: a question that comes after a newer one was lost on its way, and to answer it
    would undo the newer one in the client's memory."""
    last = int(context.state[PROGRESS][ROUND]) if PROGRESS in context.state else -1
    if round < last:
        raise ValueError(f"Round {round} is over, this client has been asked in round {last} already.")
    context.state[PROGRESS] = ConfigRecord({ROUND: round})


class _Memories:
    """What clients remember in one federation, see [`flower_client_app`]."""

    def __init__(self, context: Context, federation: object, *, keep: int):
        if not isinstance(federation, str) or not _FEDERATION_ID.fullmatch(federation):
            raise ValueError(f"The server names its federation {federation!r}, 32 hexadecimal digits are expected.")
        folder = context.node_config.get("memory-folder") or context.run_config.get("memory-folder")
        self._state, self._keep = context.state, keep
        self._files = ClientStates(Path(str(folder)) / federation, keep=keep) if folder else None

    def load(self, client: str) -> ClientMemory:
        if self._files is not None:
            return self._files[client]
        memory = ClientMemory(keep=self._keep)
        if MEMORY in self._state:
            tensors, metadata = unpack(self._state[MEMORY]["file"].data)
            memory.load_state_dict(tensors, json.loads(metadata[RECORD]) | {"keep": self._keep})
        return memory

    def save(self, client: str, memory: ClientMemory) -> None:
        """When this returns, the upload may leave."""
        if self._files is not None:
            self._files[client] = memory
            self._files.sync()
            return
        tensors, record = memory.state_dict()
        file = pack(tensors, {RECORD: json.dumps(record)})
        self._state[MEMORY] = ArrayRecord({"file": array_of(file)})
