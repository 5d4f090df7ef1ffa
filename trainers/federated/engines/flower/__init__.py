"""A federation of Flower: clients are nodes, the algorithm and the Trainer around it are those of one process.

    def federation(context, **whose):
        strategy = FedLaAvg(learning_rate=0.1)
        return FederatedTrainer(model(), args, strategy=strategy, rounds=50, local_steps=10, **whose)

    def on_a_node(context):
        return federation(context, train_dataset=examples_here(), partition_by="user")

    server_app, client_app = flower_server_app(federation), flower_client_app(on_a_node)

`federated_digits/` is such an app. Wherever it runs, in Flower's simulation or on nodes of its own, the models are bit
for bit those of [`InProcessEngine`][trainers.federated.engines.InProcessEngine], for as long as the same clients take
part and their processes compute alike (one thread each, the same libraries).

`python -m trainers.federated.engines.flower simulation` or `... deployment` runs an app on this machine.
"""

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ImportError(
        'The Flower engine needs flwr: pip install "hf-sigma[flower]" in an environment of its own, since flwr wants '
        "older versions of what other extras bring (protobuf, packaging, rich, typer)."
    ) from error

from .client_app import client_of, flower_client_app
from .nodes import Nodes, RemoteClients, read_identities, write_identities
from .server_app import flower_server_app
from .strategy import FederatedStrategy


__all__ = [
    "FederatedStrategy",
    "Nodes",
    "RemoteClients",
    "client_of",
    "flower_client_app",
    "flower_server_app",
    "read_identities",
    "write_identities",
]
