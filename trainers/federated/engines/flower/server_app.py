"""The `ServerApp` of a federation."""

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ...trainer import FederatedTrainer
from .nodes import Nodes, read_identities
from .strategy import FederatedStrategy


def flower_server_app(
    federation: Callable[..., FederatedTrainer], *, done: Callable[[FederatedTrainer, Context], object] | None = None
) -> ServerApp:
    """Register the clients, train, and hand over what came of it.

    The run configuration may have `identities`, a file that says whose key is whose (see
    [`trainers.federated.engines.flower.nodes`]); or, in simulations, `num-clients`, how many there are; and
    `registration-timeout` (600 s), `round-timeout` (3600 s) and `resume` (false), to go on behind the last round in
    the trainer's `output_dir`.

    Args:
        federation: `(context, **whose) -> trainer`, where `whose` stands for dataset and clients: what
            [`Nodes.population`] has.
        done: `(trainer, context)`, at the end, with the model that is served: to evaluate and to save it.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        path = config.get("identities")
        identities = read_identities(str(path)) if path else None
        nodes = Nodes(identities, timeout=float(config.get("registration-timeout", 600)))
        nodes.wait(grid, None if identities else int(config.get("num-clients", 0)))
        trainer = federation(context, **nodes.population())
        strategy = FederatedStrategy(trainer, nodes, timeout=float(config.get("round-timeout", 3600)))
        strategy.run(grid, resume=bool(config.get("resume", False)))
        if done is not None:
            done(trainer, context)

    return app
