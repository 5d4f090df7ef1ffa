"""The Flower engine over a grid in this process: the bits of the in-process engine, and messages that get lost."""

import pytest


pytest.importorskip("flwr")

from tests.trainers.federated.engines.flower_grid import LocalGrid, clients_of, nodes_of, server_of  # noqa: E402
from tests.trainers.federated.tiny_federation import assert_same, clicks, federation, recommender  # noqa: E402
from trainers.federated import MCPSGD, Alternating, BlockSchedule, FedAvg, FedLaAvg, FedSubAvg  # noqa: E402


KEPT = ("accepted", "rejected", "missing", "norms", "elementwise_gradient_norm", "loss", "bytes_up", "bytes_down")
STRATEGIES = {
    "FedAvg": lambda: FedAvg(clients_per_round=5),
    "FedSubAvg": lambda: FedSubAvg(clients_per_round=5),
    "FedSubAvg, streaming heat": lambda: FedSubAvg(clients_per_round=5, heat="streaming", max_correction=9.0),
    "FedLaAvg": lambda: FedLaAvg(learning_rate=0.1, clients_per_round=5),
    "MC-PSGD": lambda: MCPSGD(BlockSchedule.by_rounds([1, 2])),
}


def _model():
    return recommender(dropout=0.3)


def _same_rounds(one, other):
    assert [{name: record[name] for name in KEPT} for record in one.history] == [
        {name: record[name] for name in KEPT} for record in other.history
    ]


@pytest.mark.parametrize("name", STRATEGIES)
def test_models_and_logs_are_bit_for_bit_those_of_one_process(name, tmp_path):
    dataset, strategy, options = clicks(), STRATEGIES[name], {"rounds": 6}
    if name == "MC-PSGD":
        options["block_by"] = [row % 2 for row in range(len(dataset))]
    alone = federation(tmp_path / "alone", _model(), dataset, strategy(), **options)
    alone.train()
    grid = LocalGrid(nodes_of(tmp_path, dataset, _model, strategy, **options))
    server = server_of(tmp_path, grid, _model, strategy, count=9, **options)
    result = server.run(grid)
    assert server.trainer.clients.names == clients_of(dataset)
    assert_same(server.trainer.strategy.parameters, alone.strategy.parameters)
    assert_same(dict(result.arrays.to_torch_state_dict()), alone.strategy.parameters)
    assert_same(dict(server.trainer.model.state_dict()), dict(alone.model.state_dict()))
    _same_rounds(server.trainer, alone)
    assert server.failures == {} and all(record["accepted"] for record in alone.history)
    if name == "MC-PSGD":
        assert server.trainer.strategy.picks == alone.strategy.picks


def test_who_is_there_is_whom_the_grid_lists(tmp_path):
    """Nobody is waited for: with the nodes that an availability has, rounds are those of one process that has it."""
    dataset, strategy = clicks(), STRATEGIES["FedLaAvg"]
    availability = Alternating([clients_of(dataset)[:4], clients_of(dataset)[4:]], 2)
    alone = federation(tmp_path / "alone", _model(), dataset, strategy(), rounds=5, availability=availability)
    alone.train()
    grid = LocalGrid(nodes_of(tmp_path, dataset, _model, strategy, rounds=5))
    server = server_of(tmp_path, grid, _model, strategy, count=9, rounds=5)
    numbers = {client: 100 + index for index, client in enumerate(clients_of(dataset))}
    listed = grid.get_node_ids

    def there():
        present = availability.available(server.trainer.state.global_step)
        return [node for node in listed() if node in {numbers[client] for client in present}]

    grid.get_node_ids = there
    server.run(grid)
    assert_same(server.trainer.strategy.parameters, alone.strategy.parameters)
    _same_rounds(server.trainer, alone)
