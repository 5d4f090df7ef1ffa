"""A federation in this process: the real apps, and a grid that carries their messages as Flower's bytes."""

import itertools
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from tests.trainers.federated.tiny_federation import federation
from trainers.federated.engines.flower import FederatedStrategy, Nodes, flower_client_app
from trainers.federated.engines.flower.records import files_in, update_in


SERVER = 1


class LocalGrid(Grid):
    """Nodes are `{node id: (app, node_config, public key)}`; `arrivals(client reply) -> replies` plays the network."""

    def __init__(self, nodes, *, run_id=7, run_config=None):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER
        self.nodes, self.offline, self.arrivals = dict(nodes), set(), lambda reply: [reply]
        self._run_id, self._run_config, self._ids = run_id, run_config or {}, itertools.count()
        self.states = {node: RecordDict() for node in nodes}

    def restart(self, node):
        """What a node's process knew is gone."""
        self.states[node] = RecordDict()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return [node for node in self.nodes if node not in self.offline]

    def get_nodes(self):
        return [NodeInfo(node_id=node, public_key=self.nodes[node][2]) for node in self.get_node_ids()]

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        return [arrived for message in list(messages) for arrived in self.arrivals(self.answer(message))]

    def answer(self, message):
        """What a node's app replies, both over the wire."""
        message.metadata.__dict__["_message_id"] = str(next(self._ids))
        node = message.metadata.dst_node_id
        app, config, _ = self.nodes[node]
        context = Context(self._run_id, node, dict(config), self.states[node], self._run_config)
        received = message_from_proto(message_to_proto(message))
        try:
            reply = app(received, context)
        except Exception as error:  # as Flower's own backends do
            reply = Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=received)
        return message_from_proto(message_to_proto(reply))


def key_pair():
    """(private, public), OpenSSH text of a new key."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private.decode(), public.decode()


def as_superlinks_have_it(public):
    """A public key as a grid lists it."""
    return serialization.load_ssh_public_key(public.encode()).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def clients_of(dataset):
    """In the order of their names."""
    return sorted(set(dataset["user"]))


def nodes_of(folder, dataset, model, strategy, *, rounds, memory=False, **options):
    """One node for each client, which has its own rows only; makers, since each builds its own."""

    def app_of(client):
        own = [index for index, user in enumerate(dataset["user"]) if user == client]
        mine = dict(options)
        if "block_by" in mine:
            mine["block_by"] = [mine["block_by"][index] for index in own]
        return flower_client_app(
            lambda context: federation(
                Path(folder) / f"node-{client}", model(), dataset.select(own), strategy(), rounds=rounds, **mine
            )
        )

    def config_of(index, client):
        where = {"memory-folder": str(Path(folder) / f"memory-{client}")} if memory else {}
        return {"partition-id": index} | where

    return {
        100 + index: (app_of(client), config_of(index, client), b"made by the engine")
        for index, client in enumerate(clients_of(dataset))
    }


def server_of(folder, grid, model, strategy, *, rounds, count=None, nodes=None, timeout=5.0, **options):
    """A strategy whose clients are registered."""
    nodes = nodes or Nodes(timeout=timeout)
    nodes.wait(grid, count)
    options.pop("block_by", None)
    known = nodes.population()
    dataset = known.pop("train_dataset")
    trainer = federation(
        Path(folder) / "server", model(), dataset, strategy(), rounds=rounds, partition_by=None, **options, **known
    )
    return FederatedStrategy(trainer, nodes, timeout=timeout)


def reply_of(reply):
    """`(client, round)` of a reply to a training question; `(None, None)` of others."""
    if reply.has_error() or reply.metadata.message_type != "train":
        return None, None
    update = update_in("?", files_in(reply.content)[0])
    return reply.content["about"]["client"], update.round
