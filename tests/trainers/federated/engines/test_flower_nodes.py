"""Nodes are the clients of their keys: what they say of themselves is compared with it, and refused by name."""

import copy
import json

import pytest


pytest.importorskip("flwr")

from tests.trainers.federated.engines.flower_grid import (  # noqa: E402
    LocalGrid,
    as_superlinks_have_it,
    key_pair,
    nodes_of,
    reply_of,
    server_of,
)
from tests.trainers.federated.tiny_federation import (  # noqa: E402
    Quadratic,
    assert_same,
    federation,
    quadratic_clients,
)
from trainers.federated import FedAvg  # noqa: E402
from trainers.federated.engines.flower import Nodes, read_identities, write_identities  # noqa: E402


TARGETS = {"a": 0.0, "b": 4.0, "c": 8.0}
KEYS = {client: key_pair()[1] for client in (*TARGETS, "stranger")}


def _nodes(folder, saying=(), **targets):
    """Nodes 100, 101, 102 with the keys of a, b, c; `saying` has who gives another name as its own."""
    rows = quadratic_clients(targets or TARGETS)
    nodes = nodes_of(folder, rows, Quadratic, FedAvg, rounds=3)
    for client, said in dict(saying).items():
        (other,) = nodes_of(folder, quadratic_clients({said: TARGETS[client]}), Quadratic, FedAvg, rounds=3).values()
        nodes[100 + list(TARGETS).index(client)] = other
    return {
        node: (app, config, as_superlinks_have_it(KEYS[client]))
        for (node, (app, config, _)), client in zip(sorted(nodes.items()), targets or TARGETS)
    }


def _registered(timeout=0.2, clients=TARGETS):
    return Nodes({client: KEYS[client] for client in clients}, timeout=timeout)


def test_keys_say_who_nodes_are_in_the_order_of_the_file(tmp_path):
    nodes, grid = _registered(clients="cab"), LocalGrid(_nodes(tmp_path))
    server = server_of(tmp_path, grid, Quadratic, FedAvg, nodes=nodes, rounds=3)
    assert server.trainer.clients.names == ["c", "a", "b"]
    assert {client: nodes.node(client) for client in "abc"} == {"a": 100, "b": 101, "c": 102}
    server.run(grid)
    alone = federation(tmp_path / "alone", Quadratic(), quadratic_clients(TARGETS), FedAvg(), rounds=3)
    alone.train()
    assert_same(server.trainer.strategy.parameters, alone.strategy.parameters)


def test_a_node_that_claims_anothers_name_is_refused_and_named(tmp_path, caplog):
    nodes, grid = _registered(), LocalGrid(_nodes(tmp_path, saying={"c": "a"}))
    with pytest.raises(TimeoutError, match=r"missing: \['c'\].*node 102.*says that it is 'a', by its key it is 'c'"):
        nodes.wait(grid)
    assert nodes.client(100) == "a" and nodes.client(102) is None
    assert set(nodes.refused) == {102} and "Node 102 is refused" in caplog.text
    assert sorted(nodes.online(grid)) == ["a", "b"]


def test_a_key_that_nobody_knows_is_refused_and_the_others_train(tmp_path):
    grid = LocalGrid(_nodes(tmp_path, a=0.0, b=4.0, stranger=100.0))
    server = server_of(tmp_path, grid, Quadratic, FedAvg, nodes=_registered(clients="ab"), rounds=3)
    server.run(grid)
    assert server.nodes.refused == {102: "its key is none of those in the identities"}
    assert [record["accepted"] for record in server.trainer.history] == [["a", "b"]] * 3


def test_who_says_another_name_later_does_not_count(tmp_path):
    """Nor does who answers in place of another node: it does not know the nonce."""
    grid = LocalGrid(_nodes(tmp_path))
    server = server_of(tmp_path, grid, Quadratic, FedAvg, nodes=_registered(), rounds=3)

    def arrivals(reply):
        client, round = reply_of(reply)
        if (client, round) == ("c", 1):
            reply.content["about"]["client"] = "a"
        if (client, round) == ("c", 2):
            forged = copy.deepcopy(reply)
            forged.metadata.__dict__["_src_node_id"] = 100
            forged.content["about"]["client"] = "a"
            return [forged, reply]
        return [reply]

    grid.arrivals = arrivals
    server.run(grid)
    assert server.failures == {
        1: {"c": "it says that it is 'a'"},
        2: {"a": "it answers no question that it was asked now"},
    }
    history = server.trainer.history
    assert [record["accepted"] for record in history] == [["a", "b", "c"], ["a", "b"], ["a", "b", "c"]]
    assert history[1]["missing"] == ["c"]


def test_keys_without_identities_are_no_simulation(tmp_path):
    with pytest.raises(ValueError, match="say whose they are, by identities"):
        Nodes(timeout=0.2).wait(LocalGrid(_nodes(tmp_path)), 3)


def test_in_simulations_a_name_is_taken_once(tmp_path):
    nodes = {node: (app, config, b"none") for node, (app, config, _) in _nodes(tmp_path, saying={"c": "a"}).items()}
    known = Nodes(timeout=0.2)
    with pytest.raises(TimeoutError, match="missing: 1; node 102 was refused: it says that it is 'a', whom node 100"):
        known.wait(LocalGrid(nodes), 3)
    assert sorted(known.population()["train_dataset"].names) == ["a", "b"]


def test_who_never_registers_is_asked_some_times_only(tmp_path):
    """And who comes back under a new number is whom its key says."""
    grid, nodes = LocalGrid(_nodes(tmp_path)), _registered()
    questions = []

    def arrivals(reply):
        questions.append(reply.metadata.src_node_id)
        return [] if reply.metadata.src_node_id == 102 else [reply]

    grid.arrivals = arrivals
    for _ in range(5):
        nodes.online(grid)
    assert questions == [100, 101, 102, 102, 102]
    assert nodes.refused == {102: "it did not register when asked 3 times"}
    grid.arrivals = lambda reply: [reply]
    grid.nodes[200], grid.states[200] = grid.nodes.pop(102), grid.states.pop(102)
    assert sorted(nodes.online(grid)) == ["a", "b", "c"] and nodes.node("c") == 200


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is no JSON"),
        ("[]", "must be"),
        (json.dumps({"a": "no key"}), "'a' is no public key"),
        (json.dumps({"a": KEYS["a"], "b": KEYS["a"]}), "'a' and 'b' have the same key"),
    ],
)
def test_identities_that_cannot_be(content, said, tmp_path):
    path = tmp_path / "identities.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_identities(path)


def test_identities_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "identities.json"
    write_identities(path, {"b": KEYS["b"], "a": KEYS["a"]})
    assert list(read_identities(path).items()) == [("b", KEYS["b"]), ("a", KEYS["a"])]
