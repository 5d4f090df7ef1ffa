"""Messages that get lost, come twice, late or broken, and processes that begin anew: memories stay right."""

import pytest
import torch


pytest.importorskip("flwr")

from flwr.app import ArrayRecord, RecordDict  # noqa: E402

from tests.trainers.federated.engines.flower_grid import (  # noqa: E402
    LocalGrid,
    clients_of,
    nodes_of,
    reply_of,
    server_of,
)
from tests.trainers.federated.tiny_federation import (  # noqa: E402
    Quadratic,
    assert_same,
    clicks,
    federation,
    quadratic_clients,
    recommender,
)
from trainers.federated import FedAvg, FedLaAvg  # noqa: E402
from trainers.federated.client_states import ClientStates  # noqa: E402
from trainers.federated.engines.flower.questions import Questions  # noqa: E402
from trainers.federated.engines.flower.records import TRAIN, array_of, packed  # noqa: E402
from trainers.federated.messages import payload_message  # noqa: E402


ROUNDS = 10
SAVES = {"args": {"save_strategy": "steps"}}


def _latest(memory="client"):
    return FedLaAvg(learning_rate=0.1, clients_per_round=4, memory=memory)


class Network:
    """Loses, repeats and delays (to the next round) replies of clients, by `{(client, round): "lost", ...}`."""

    def __init__(self, fates):
        self.fates, self._held = fates, []

    def __call__(self, reply):
        fate, round = self.fates.get(reply_of(reply)), reply_of(reply)[1]
        due = [late for late in self._held if reply_of(late)[1] != round]
        self._held = [late for late in self._held if reply_of(late)[1] == round]
        if fate == "late":
            self._held.append(reply)
        return due + {None: [reply], "twice": [reply, reply], "lost": [], "late": []}[fate]


FATES = {
    **dict.fromkeys([("u0", 0), ("u5", 1), ("u0", 2), ("u1", 4), ("u3", 5), ("u2", 7)], "lost"),
    **dict.fromkeys([("u1", 0), ("u8", 2), ("u4", 3), ("u0", 4)], "twice"),
    **dict.fromkeys([("u2", 0), ("u7", 1), ("u6", 6)], "late"),
}


def _twin(folder, *, rounds=ROUNDS):
    """In one process, with the gradients on the server and the same losses."""
    lost = {at for at, fate in FATES.items() if fate != "twice"}
    twin = federation(
        folder,
        recommender(),
        clicks(),
        _latest("server"),
        rounds=rounds,
        arrivals=lambda update: [] if (update.client, update.round) in lost else [update],
    )
    twin.train()
    return twin


def _assert_memories_agree(folder, server, twin):
    """What each client holds for the round that the server accepted is what the twin's server holds of it."""
    (identity,) = {path.name for path in folder.glob("memory-*/*")}
    held = twin.strategy.state_dict()["tensors"]["memory"]
    compared = 0
    for index, client in enumerate(clients_of(clicks())):
        accepted = server.trainer.strategy.accepted_round(client)
        assert accepted == twin.strategy.accepted_round(client)
        tensors, record = ClientStates(folder / f"memory-{client}" / identity)[client].state_dict()
        if accepted >= 0:
            assert accepted in record["rounds"]
            mine = {name.partition("/")[2]: u for name, u in tensors.items() if name.startswith(f"{accepted}/")}
            assert_same(mine, {name: held[f"{index}/{name}"] for name in mine})
            compared += len(mine)
    assert compared == len(held) > 0


def test_memories_agree_bit_for_bit_after_losses_repeats_delays_and_restarts(tmp_path):
    """Nodes lose their process (and Flower's state) between rounds; the server is killed and goes on in a new run."""
    nodes = nodes_of(tmp_path, clicks(), recommender, _latest, rounds=ROUNDS, memory=True)
    grid = LocalGrid(nodes)
    grid.arrivals = network = Network(FATES)
    server = server_of(tmp_path, grid, recommender, _latest, count=9, rounds=ROUNDS, **SAVES)
    aggregate = server.aggregate_train

    def killed_in_round_5(server_round, replies):
        for node in grid.nodes:
            if (node + server_round) % 3 == 0:
                grid.restart(node)
        if server_round == 6:
            raise KeyboardInterrupt  # clients have trained, nothing is committed
        return aggregate(server_round, replies)

    server.aggregate_train = killed_in_round_5
    with pytest.raises(KeyboardInterrupt):
        server.run(grid)
    again = LocalGrid(nodes, run_id=8)
    again.arrivals = network
    first, server = server, server_of(tmp_path, again, recommender, _latest, count=9, rounds=ROUNDS, **SAVES)
    server.run(again, resume=True)
    twin = _twin(tmp_path / "twin")
    assert_same(server.trainer.strategy.parameters, twin.strategy.parameters)
    _assert_memories_agree(tmp_path, server, twin)
    history = server.trainer.history
    assert [record["accepted"] for record in history] == [record["accepted"] for record in twin.history]
    assert sum(len(record["missing"]) for record in history) > 5
    assert sum("already" in reason for record in history for reason in record["rejected"].values()) >= 3
    late = [reason for one in (first, server) for failed in one.failures.values() for reason in failed.values()]
    assert len(late) >= 2 and all("no question" in reason for reason in late)


def test_flowers_state_remembers_for_a_run_and_who_lost_it_is_named(tmp_path):
    dataset = quadratic_clients({"a": 0.0, "b": 4.0, "c": 8.0})
    served = {}
    for lose in (False, True):
        grid = LocalGrid(nodes_of(tmp_path, dataset, Quadratic, _latest, rounds=5))
        server = server_of(tmp_path, grid, Quadratic, _latest, count=3, rounds=5)
        aggregate = server.aggregate_train

        def after(server_round, replies, grid=grid, lose=lose, aggregate=aggregate):
            if lose and server_round == 3:
                grid.restart(101)
            return aggregate(server_round, replies)

        server.aggregate_train = after
        server.run(grid)
        served[lose] = server
    alone = federation(tmp_path / "alone", Quadratic(), dataset, _latest(), rounds=5)
    alone.train()
    assert_same(served[False].trainer.strategy.parameters, alone.strategy.parameters)
    assert served[False].failures == {}
    failures = served[True].failures
    assert set(failures) == {3, 4} and all(set(failed) == {"b"} for failed in failures.values())
    assert "MemoryMismatch" in failures[3]["b"]
    assert [record["missing"] for record in served[True].trainer.history] == [[], [], [], ["b"], ["b"]]
    assert served[True].trainer.strategy.accepted_round("b") == 2


def test_a_question_that_comes_after_a_newer_one_is_not_answered(tmp_path):
    grid = LocalGrid(nodes_of(tmp_path, clicks(), recommender, _latest, rounds=3, memory=True))
    server = server_of(tmp_path, grid, recommender, _latest, count=9, rounds=3)
    server.run(grid)
    before = {path: path.read_bytes() for path in tmp_path.glob("memory-*/*/*")}
    strategy = server.trainer.strategy
    strategy.start(strategy.parameters, server.trainer.clients.names)  # a payload of round 0
    file = packed(payload_message(strategy.payload(0, "u0")))
    (identity,) = {path.parent.name for path in before}
    late = Questions(TRAIN, ttl=9.0).to(server.nodes.node("u0"), [file], federation=identity, round=0)
    reply = grid.answer(late)
    assert reply.has_error() and "is over" in reply.error.reason
    assert {path: path.read_bytes() for path in tmp_path.glob("memory-*/*/*")} == before and len(before) == 9


def test_clients_keep_nothing_outside_their_folder(tmp_path):
    grid = LocalGrid(nodes_of(tmp_path, clicks(), recommender, _latest, rounds=3, memory=True))
    server = server_of(tmp_path, grid, recommender, _latest, count=9, rounds=3)
    server._federation = "../../elsewhere"
    server.run(grid)
    assert all(len(failed) == 4 for failed in server.failures.values()) and set(server.failures) == {0, 1, 2}
    assert "32 hexadecimal digits" in server.failures[0]["u0"]
    assert not list(tmp_path.rglob("elsewhere*"))


def test_nan_is_rejected_and_named(tmp_path):
    """A client whose data are broken: the others' average is that of the others alone."""
    dataset = quadratic_clients({"a": 0.0, "b": float("nan"), "c": 8.0})
    grid = LocalGrid(nodes_of(tmp_path, dataset, Quadratic, FedAvg, rounds=3))
    server = server_of(tmp_path, grid, Quadratic, FedAvg, count=3, rounds=3)
    server.run(grid)
    for record in server.trainer.history:
        assert record["accepted"] == ["a", "c"] and set(record["rejected"]) == {"b"}
        assert "NaN" in record["rejected"]["b"]
    honest = federation(tmp_path / "alone", Quadratic(), quadratic_clients({"a": 0.0, "c": 8.0}), FedAvg(), rounds=3)
    honest.train()
    assert torch.isfinite(server.trainer.model.x)
    assert_same(server.trainer.strategy.parameters, honest.strategy.parameters)


BROKEN = {
    "no safetensors": lambda reply: _with_file(reply, b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!"),
    "empty": lambda reply: _with_file(reply, b""),
    "no message": lambda reply: _with_file(reply, packed(({"x": torch.zeros(1)}, {}))),
    "metrics of another type": lambda reply: _with_file(
        reply, _said('{"round": 1, "num_examples": 1, "chain": "mixed", "metrics": []')
    ),
    "a chain that is a list": lambda reply: _with_file(
        reply, _said('{"round": 1, "num_examples": 1, "metrics": {}, "chain": []')
    ),
    "no files": lambda reply: reply.content.pop("files"),
    "nothing": lambda reply: reply.__dict__.update(_content=RecordDict()),
}


def _said(text):
    return packed(({}, {"message": text + "}"}))


def _with_file(reply, file):
    reply.content["files"] = ArrayRecord({"0": array_of(file)})


@pytest.mark.parametrize("kind", BROKEN)
def test_an_answer_that_cannot_be_read_is_named_and_the_round_goes_on(kind, tmp_path):
    dataset = quadratic_clients({"a": 0.0, "b": 4.0, "c": 8.0})
    grid = LocalGrid(nodes_of(tmp_path, dataset, Quadratic, FedAvg, rounds=3))
    server = server_of(tmp_path, grid, Quadratic, FedAvg, count=3, rounds=3)

    def arrivals(reply):
        if reply_of(reply) == ("b", 1):
            BROKEN[kind](reply)
        return [reply]

    grid.arrivals = arrivals
    server.run(grid)
    accepted = [record["accepted"] for record in server.trainer.history]
    assert accepted == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]]
    broken = server.trainer.history[1]
    if kind in ("metrics of another type", "a chain that is a list"):  # it can be read, and the algorithm refuses it
        assert set(broken["rejected"]) == {"b"} and server.failures == {}
    else:
        assert broken["missing"] == ["b"] and set(server.failures) == {1} and set(server.failures[1]) == {"b"}
