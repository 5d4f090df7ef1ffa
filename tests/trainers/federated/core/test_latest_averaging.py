"""FedLaAvg (arXiv 2002.07399): where it converges, how stale it gets, and what happens when messages are lost."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.federated.core.simulated_clients import (
    assert_same_state,
    quadratic,
    run_round,
    scalar,
    update_of,
)
from trainers.federated.core import (
    MIFA,
    Alternating,
    ClientMemory,
    ClientUpdate,
    FedLaAvg,
    MemoryMismatch,
    RoundStore,
    Trace,
    WaitForAll,
)


def plain_loop(e, groups, lengths, g, steps, rounds):
    """FedLaAvg on (x - e_i)^2 in a few lines of Python numbers."""
    x, u, path = 0.0, dict.fromkeys(e, 0.0), []
    present = Alternating(groups, lengths)
    for round in range(rounds):
        fresh = {}
        for client in present.available(round):
            y = x
            for _ in range(steps):
                y -= g * 2 * (y - e[client])
            fresh[client] = (x - y) / g
        u |= fresh
        x -= g * sum(u.values()) / len(e)
        path.append(x)
    return path


TWO = ({"a": 0.0, "b": 10.0}, (("a",), ("b",)), (50, 150))
FOUR = ({"a": 0.0, "b": 1.0, "c": 10.0, "d": 11.0}, (("a", "b"), ("c", "d")), (50, 150))


@pytest.mark.parametrize("memory", ["client", "server"])
@pytest.mark.parametrize(
    ("toy", "g", "steps", "rounds", "optimum"),
    [(TWO, 0.01, 1, 8_000, 5.0), (TWO, 0.001, 1, 40_000, 5.0), (FOUR, 1e-4, 10, 20_000, 5.5)],
)
def test_it_converges_to_the_optimum(memory, toy, g, steps, rounds, optimum):
    """5.0000 and 5.5000, by a plain loop, which the state machine follows through two changes of the group."""
    e, groups, lengths = toy
    path = plain_loop(e, groups, lengths, g, steps, rounds)
    assert max(abs(x - optimum) for x in path[-sum(lengths) :]) < 5e-5
    algorithm, memories = FedLaAvg(learning_rate=g, memory=memory), {}
    algorithm.start({"x": torch.zeros((), dtype=torch.float64)}, list(e))
    trains = {client: quadratic(minimum, rate=g, steps=steps) for client, minimum in e.items()}
    present = Alternating(groups, lengths)
    for round in range(220):
        run_round(algorithm, round, trains, available=present.available(round), memories=memories)
        assert scalar(algorithm) == pytest.approx(path[round], rel=1e-9, abs=1e-12)


@st.composite
def absences(draw):
    """Clients that are there at least once in any E successive rounds, and otherwise as it happens."""
    clients, bound = draw(st.integers(2, 7)), draw(st.integers(1, 4))
    names, last, rounds = [f"c{i}" for i in range(clients)], [-1] * clients, []
    for round in range(40):
        there = [i for i in range(clients) if round - last[i] >= bound or draw(st.booleans())]
        last = [round if i in there else last[i] for i in range(clients)]
        rounds.append([names[i] for i in there])
    return names, bound, rounds, draw(st.integers(1, clients))


@settings(max_examples=40, deadline=None)
@given(absences())
def test_staleness_is_bounded(setting):
    """Lemma 1: no gradient in use is older than ceil(N/K) E - 1 rounds, once all have taken part."""
    names, bound, rounds, k = setting
    algorithm = FedLaAvg(learning_rate=0.1, clients_per_round=k, memory="server")
    algorithm.start({"x": torch.zeros(1)}, names)
    limit = math.ceil(len(names) / k) * bound - 1
    for round, there in enumerate(rounds):
        chosen = algorithm.select(round, there)
        assert len(chosen) == min(k, len(there))
        algorithm.aggregate(round, [ClientUpdate(c, round, {"x": torch.ones(1)}, {}, 1) for c in chosen])
        if round >= limit:
            assert max(round - algorithm.accepted_round(name) for name in names) <= limit


def test_those_away_longest_come_first():
    algorithm = FedLaAvg(learning_rate=0.1, clients_per_round=2, memory="server")
    algorithm.start({"x": torch.zeros(1)}, ["d", "c", "b", "a"])
    seen = []
    for round, there in enumerate(["abcd", "abcd", "ad", "abc"]):
        seen.append(algorithm.select(round, there))
        algorithm.aggregate(round, [ClientUpdate(c, round, {"x": torch.ones(1)}, {}, 1) for c in seen[-1]])
    assert seen == [["d", "c"], ["b", "a"], ["d", "a"], ["c", "b"]]


def noisy(seed, rate):
    """Local training that differs by client and by what was received."""
    generator = torch.Generator().manual_seed(seed)
    goal = torch.randn(4, 3, generator=generator)

    def train(received):
        y = received["w"]
        for _ in range(3):
            y = y - rate * (y - goal) * 0.7
        return {"w": y - received["w"]}

    return train


def machines(memory, clients=5, rate=0.05, **options):
    algorithm = FedLaAvg(learning_rate=rate, clients_per_round=2, memory=memory, **options)
    algorithm.start({"w": torch.zeros(4, 3)}, [f"c{i}" for i in range(clients)])
    return algorithm, {f"c{i}": noisy(i, rate) for i in range(clients)}


def test_the_memory_of_clients_is_the_memory_of_the_server_bit_for_bit():
    (by_clients, trains), (by_server, _) = machines("client"), machines("server")
    memories = {}
    for round in range(40):
        there = [c for i, c in enumerate(trains) if (round // 5 + i) % 3]
        logs = [run_round(a, round, trains, available=there, memories=memories) for a in (by_clients, by_server)]
        assert logs[0].accepted == logs[1].accepted
        assert torch.equal(by_clients.parameters["w"], by_server.parameters["w"])


def assert_consistent(algorithm, memories):
    """The server's sum is the sum of what each client will say was accepted from it."""
    total = torch.zeros(4, 3, dtype=torch.float64)
    for client, memory in memories.items():
        if (round := algorithm.accepted_round(client)) >= 0:
            total += memory._latest[round]["w"].double()
    torch.testing.assert_close(algorithm._total["w"].double(), total, rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_lost_and_late_uploads_leave_both_sides_agreed(data):
    algorithm, trains = machines("client")
    memories, late = {}, []
    for round in range(12):
        arriving, asked = [], algorithm.select(round, list(trains))
        for client in asked:
            update = update_of(algorithm, round, client, trains[client], memories=memories)
            fate = data.draw(st.sampled_from(["arrives", "is lost", "is late", "comes twice"]))
            arriving += [update] * {"arrives": 1, "is lost": 0, "is late": 0, "comes twice": 2}[fate]
            late += [update] if fate == "is late" else []
        if late and data.draw(st.booleans()):
            arriving.append(late.pop())
        log = algorithm.aggregate(round, arriving)
        for update in arriving:
            if update.round != round:
                assert f"belongs to round {update.round}" in log.rejected[update.client]
        assert set(log.missing) <= set(asked) - set(log.accepted)
        assert_consistent(algorithm, memories)


def test_a_lost_upload_without_acknowledgement_would_bias(monkeypatch):
    """That the test above can fail: a client that takes every upload for accepted."""
    algorithm, trains = machines("client")
    memories = {}
    for round in range(12):
        run_round(algorithm, round, trains, memories=memories, lose=["c1"] if round == 3 else [])
    assert algorithm.accepted_round("c1") >= 0
    honest = ClientMemory.upload

    def believing(self, payload, delta):
        newest = max(self._latest, default=-1)
        return honest(
            self, SimpleNamespace(round=payload.round, config=payload.config | {"accepted_round": newest}), delta
        )

    monkeypatch.setattr(ClientMemory, "upload", believing)
    algorithm, trains = machines("client")
    memories = {}
    with pytest.raises((AssertionError, KeyError)):
        for round in range(12):
            run_round(algorithm, round, trains, memories=memories, lose=["c1", "c3"] if round in (3, 5) else [])
            assert_consistent(algorithm, memories)


def test_a_server_that_comes_back_as_it_was_a_round_ago(tmp_path):
    """Uploads of the lost round are forgotten by the clients; the run goes on as if it had not happened."""
    store = RoundStore(tmp_path)
    (algorithm, trains), (undisturbed, _) = machines("client"), machines("client")
    memories, other = {}, {}
    for round in range(6):
        run_round(algorithm, round, trains, memories=memories)
        run_round(undisturbed, round, trains, memories=other)
        state = algorithm.state_dict()
        store.commit(round, state["tensors"], state["record"])
    run_round(algorithm, 6, trains, memories=memories)  # and killed before the commit
    back, _ = machines("client")
    tensors, record = store.load(store.latest())
    back.load_state_dict({"tensors": tensors, "record": record})
    for round in range(6, 14):
        run_round(back, round, trains, memories=memories)
        run_round(undisturbed, round, trains, memories=other)
        assert_same_state(back, undisturbed)
        assert_consistent(back, memories)


def test_a_server_that_comes_back_as_it_was_long_ago():
    """With `keep` for as many rounds nothing is lost; with less the client says so, and a reset is the way out."""
    for keep in (6, 2):
        algorithm, trains = machines("client")
        memories = {client: ClientMemory(keep=keep) for client in trains}
        for round in range(5):
            run_round(algorithm, round, trains, memories=memories)
        state = algorithm.state_dict()
        for round in range(5, 12):
            run_round(algorithm, round, trains, memories=memories)
        algorithm.load_state_dict(state)
        if keep == 2:
            with pytest.raises(MemoryMismatch, match="call reset_memory"):
                for round in range(5, 12):
                    run_round(algorithm, round, trains, memories=memories)
            x = algorithm.parameters["w"].clone()
            algorithm.reset_memory()
            assert torch.equal(algorithm.parameters["w"], x)
        for round in range(12, 20):
            run_round(algorithm, round, trains, memories=memories)
            assert_consistent(algorithm, memories)


def test_memory_of_a_client_survives_its_own_restart():
    algorithm, trains = machines("client")
    memories, copies = {}, {}
    twin, _ = machines("client")
    for round in range(10):
        run_round(algorithm, round, trains, memories=memories)
        run_round(twin, round, trains, memories=copies)
        for client, memory in copies.items():
            copies[client] = ClientMemory()
            copies[client].load_state_dict(*memory.state_dict())
    assert_same_state(algorithm, twin)
    with pytest.raises(ValueError, match="keep=1"):
        ClientMemory(keep=1)


def test_old_gradients_are_replayed_with_the_current_rate():
    algorithm = FedLaAvg(learning_rate=lambda round: 1.0 if round == 0 else 0.5, memory="server")
    algorithm.start({"x": torch.zeros(1)}, ["a", "b"])
    algorithm.aggregate(0, [ClientUpdate("a", 0, {"x": -torch.ones(1)}, {}, 1)])  # u = 1, x = -1/2
    log = algorithm.aggregate(1, [])
    assert float(algorithm.parameters["x"]) == -0.75 and log.elementwise_gradient_norm == pytest.approx(0.0625)


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    """The server divides by gamma what a client sends, which is finite itself."""
    ends = []
    for sends_bad in (True, False):
        algorithm = FedLaAvg(learning_rate=0.1, memory="server")
        algorithm.start({"x": torch.zeros(2)}, ["a", "b"])
        sent = [ClientUpdate("b", 0, {"x": torch.ones(2)}, {}, 1)]
        bad = ClientUpdate("a", 0, {"x": torch.tensor([3e38, 0.0])}, {}, 1)
        log = algorithm.aggregate(0, [bad, *sent] if sends_bad else sent)
        assert log.accepted == list(log.norms) == ["b"]
        if sends_bad:
            assert log.rejected == {"a": "its norm is 3e+38, its gradient would not be finite"}
        ends.append(algorithm)
    assert_same_state(*ends)


def test_warmup_collects_without_moving():
    algorithm, _ = machines("server", warmup_rounds=2)
    for round in range(3):
        assert bool((algorithm.parameters["w"] == 0).all())
        algorithm.aggregate(round, [ClientUpdate(f"c{round}", round, {"w": torch.ones(4, 3)}, {}, 1)])
    torch.testing.assert_close(algorithm.parameters["w"], torch.full((4, 3), 3 / 5))


def test_divisors():
    for divisor, x in (("total", 1 / 5), ("seen", 1.0)):
        algorithm, _ = machines("server", divisor=divisor)
        algorithm.aggregate(0, [ClientUpdate("c0", 0, {"w": torch.ones(4, 3)}, {}, 1)])
        torch.testing.assert_close(algorithm.parameters["w"], torch.full((4, 3), x))


def test_the_departed_are_retired_and_may_return():
    algorithm, _ = machines("server", clients=2, rate=1.0, retire_after=2)
    algorithm.aggregate(0, [ClientUpdate("c0", 0, {"w": -torch.ones(4, 3)}, {}, 1)])
    for round in (1, 2, 3):
        log = algorithm.aggregate(round, [ClientUpdate("c1", round, {"w": -torch.zeros(4, 3)}, {}, 1)])
    assert log.events == ["'c0' was retired: its gradient was older than 2 rounds"]
    x = algorithm.parameters["w"].clone()
    assert bool((algorithm._total["w"] == 0).all()) and algorithm.accepted_round("c0") == -1
    algorithm.aggregate(4, [ClientUpdate("c1", 4, {"w": -torch.ones(4, 3)}, {}, 1)])
    torch.testing.assert_close(algorithm.parameters["w"], x - 1)  # one client counts
    algorithm.aggregate(5, [ClientUpdate("c0", 5, {"w": -torch.ones(4, 3)}, {}, 1)])
    torch.testing.assert_close(algorithm.parameters["w"], x - 2)  # both, with gradient 1


def test_unbalanced_data():
    for weighting, key in (("loss", "loss_scale"), ("steps", "step_scale")):
        algorithm = FedLaAvg(learning_rate=0.1, weighting=weighting)
        algorithm.start({"x": torch.zeros(1)}, ["a", "b"], num_examples={"a": 30, "b": 10})
        config = algorithm.payload(0, "a").config
        assert config == {"learning_rate": 0.1, "accepted_round": -1, key: 1.5}
        with pytest.raises(ValueError, match="needs num_examples"):
            algorithm.start({"x": torch.zeros(1)}, ["a", "b"])


def test_one_that_never_answers_does_not_keep_its_place():
    algorithm, trains = machines("client")
    memories, asked = {}, []
    for round in range(10):
        asked += algorithm.select(round, list(trains))
        log = run_round(algorithm, round, trains, memories=memories, lose=["c0"])
        assert log.missing == (["c0"] if "c0" in asked[-2:] else [])
    assert all(3 <= asked.count(client) <= 5 for client in trains)
    assert algorithm.accepted_round("c0") == -1


def test_mifa_draws_at_random_and_remembers():
    algorithm = MIFA(learning_rate=0.1, clients_per_round=2, memory="server", seed=3)
    names = [f"c{i}" for i in range(6)]
    algorithm.start({"x": torch.zeros(1)}, names)
    chosen = [algorithm.select(round, names) for round in range(20)]
    assert len({tuple(pair) for pair in chosen}) > 5
    algorithm.aggregate(0, [ClientUpdate("c0", 0, {"x": -0.1 * torch.ones(1)}, {}, 1)])
    algorithm.aggregate(1, [])
    torch.testing.assert_close(algorithm.parameters["x"], torch.tensor([-2 * 0.1 / 6]))


def test_mifa_with_everybody_is_fedlaavg():
    one, other = MIFA(learning_rate=0.1, memory="server"), FedLaAvg(learning_rate=0.1, memory="server")
    trace = Trace([["a"], ["b", "c"], ["c"]])
    trains = {client: quadratic(i, rate=0.1) for i, client in enumerate("abc")}
    for algorithm in (one, other):
        algorithm.start({"x": torch.zeros(2)}, list("abc"))
        for round in range(9):
            run_round(algorithm, round, trains, available=trace.available(round))
    assert torch.equal(one.parameters["x"], other.parameters["x"])


def test_wait_for_all_moves_once_everybody_has_contributed():
    algorithm = WaitForAll()
    algorithm.start({"x": torch.zeros(2)}, list("abc"))
    sent = {"a": (1.0, 1), "b": (4.0, 2), "c": (2.0, 1)}

    def aggregate(round, clients):
        return algorithm.aggregate(
            round, [ClientUpdate(c, round, {"x": torch.full((2,), sent[c][0])}, {}, sent[c][1]) for c in clients]
        )

    assert algorithm.select(0, "ab") == ["a", "b"]
    aggregate(0, "ab")
    assert algorithm.select(1, "ab") == [] and bool((algorithm.parameters["x"] == 0).all())
    algorithm._selected = None  # nobody was asked, one comes all the same
    assert "contributed to this step already" in aggregate(1, "a").rejected["a"]
    log = aggregate(2, "c")
    assert log.events == ["everybody has contributed: one step"]
    assert algorithm.parameters["x"].tolist() == [2.75, 2.75] and algorithm.select(3, "abc") == list("abc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "nobody"}, "memory='nobody'"),
        ({"weighting": "size"}, "weighting='size'"),
        ({"divisor": "some"}, "divisor='some'"),
        ({"retire_after": 3}, "memory='server'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FedLaAvg(learning_rate=0.1, **options)


def test_whole_models_only():
    with pytest.raises(ValueError, match="works on whole models"):
        FedLaAvg(learning_rate=0.1).start({"x": torch.zeros(2)}, ["a"], involvement={"a": {"x": torch.tensor([0])}})
