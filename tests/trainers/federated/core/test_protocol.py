"""What holds of every algorithm: bad updates, interrupted runs, orders of arrival, and clients that misbehave."""

import copy
import functools
import json
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.federated.core.simulated_clients import assert_same_state
from trainers.federated.core import (
    MCPSGD,
    MIFA,
    MMPSGD,
    BlockSchedule,
    ClientMemory,
    ClientUpdate,
    FedAdam,
    FedAvg,
    FedLaAvg,
    FedProx,
    FedSGD,
    FedSubAvg,
    Robust,
    RoundStore,
    RoundwiseSubmodelAvg,
    WaitForAll,
)


CLIENTS = [f"user/{index}" for index in range(7)]
SCHEDULE = BlockSchedule.by_rounds([2, 1])
SIMULATED = Robust(clip_norm=1.0, noise_multiplier=0.1, simulation=True, seed=1)
ROWS = {client: {"table": torch.tensor([0, 1 + index % 3])} for index, client in enumerate(CLIENTS)}
MAKES = {
    "FedAvg": lambda: FedAvg(clients_per_round=4),
    "FedAvg noisy": lambda: FedAvg(clients_per_round=4, weighting="clients", robust=SIMULATED),
    "FedAvg median": lambda: FedAvg(weighting="clients", robust=Robust(rule="median")),
    "FedProx": lambda: FedProx(proximal=0.1, clients_per_round=4),
    "FedSGD": lambda: FedSGD(),
    "FedAdam": lambda: FedAdam(clients_per_round=4, seed=3),
    "FedSubAvg": lambda: FedSubAvg(clients_per_round=4),
    "FedSubAvg streaming": lambda: FedSubAvg(clients_per_round=2, heat="streaming"),
    "RoundwiseSubmodelAvg": lambda: RoundwiseSubmodelAvg(clients_per_round=4),
    "FedLaAvg": lambda: FedLaAvg(learning_rate=0.1, clients_per_round=3),
    "FedLaAvg server": lambda: FedLaAvg(learning_rate=0.1, clients_per_round=2, memory="server", retire_after=4),
    "MIFA": lambda: MIFA(learning_rate=0.1, clients_per_round=3),
    "WaitForAll": lambda: WaitForAll(clients_per_round=3),
    "MMPSGD": lambda: MMPSGD(SCHEDULE, average="tail", tail_visits=2),
    "MCPSGD": lambda: MCPSGD(SCHEDULE, clients_per_round=4, separate="restart_from_mixed"),
    "MCPSGD final": lambda: MCPSGD(SCHEDULE, compare="final"),
}


def started(name):
    algorithm = MAKES[name]()
    generator = torch.Generator().manual_seed(0)
    parameters = {"table": torch.randn(5, 2, generator=generator), "b": torch.randn(3, generator=generator)}
    sub = algorithm.takes_rows and algorithm.robust.rule == "mean"
    algorithm.start(parameters, CLIENTS, involvement=ROWS if sub and "streaming" not in name else None)
    return algorithm


def trained(algorithm, round, client, memories):
    """What a client sends, random but the same for the same round, client and received parameters."""
    payload, made = algorithm.payload(round, client), []
    for chain, received in zip(algorithm.chains, (payload.tensors, payload.separate)):
        generator = torch.Generator().manual_seed(1000 * round + 10 * CLIENTS.index(client) + len(chain))
        delta = {k: 0.1 * torch.randn(v.shape, generator=generator) - 0.05 * v for k, v in received.items()}
        if "client_memory" in algorithm.requires:
            delta = memories.setdefault(client, ClientMemory()).upload(payload, delta)
        rows = payload.rows
        if getattr(algorithm, "heat", None) == "streaming":
            rows, delta["table"] = ROWS[client], delta["table"][ROWS[client]["table"]]
        made.append(ClientUpdate(client, round, delta, rows, 1 + CLIENTS.index(client), chain=chain))
    return made


def losses_of(algorithm, round):
    return {
        client: {
            name: float(sum(t.double().sum() for t in model.values())) * math.sin(round + index)
            for name, model in algorithm.candidates().items()
        }
        for index, client in enumerate(CLIENTS)
    }


def step(algorithm, round, memories, available=CLIENTS):
    sent = [u for c in algorithm.select(round, available) for u in trained(algorithm, round, c, memories)]
    log = algorithm.aggregate(round, sent)
    if algorithm.candidates():
        algorithm.compare(round, losses_of(algorithm, round))
    return log


@pytest.mark.parametrize("name", MAKES)
def test_an_interrupted_run_goes_on_bit_for_bit(name, tmp_path):
    """State through files, the server killed between rounds, and after the selection of a round."""
    store, through, memories = RoundStore(tmp_path), started(name), {}
    for round in range(7):
        step(through, round, memories)
    through.select(7, CLIENTS[2:])
    if name == "MCPSGD":  # killed with a comparison open
        through.aggregate(7, [u for c in CLIENTS[2:4] for u in trained(through, 7, c, memories)])
    state = through.state_dict()
    store.commit(7, state["tensors"], state["record"])
    tensors, record = store.load(7)
    resumed, its_memories = started(name), copy.deepcopy(memories)
    resumed.load_state_dict({"tensors": tensors, "record": record})
    assert_same_state(through, resumed)
    assert resumed.candidates().keys() == through.candidates().keys()
    for round in range(8, 14):
        logs = [step(a, round, m) for a, m in ((through, memories), (resumed, its_memories))]
        assert logs[0] == logs[1]
        assert_same_state(through, resumed)
        for block in (0, 1, None):
            mine, its = through.predictor(block), resumed.predictor(block)
            assert all(torch.equal(mine[key], its[key]) for key in mine)
    json.dumps(logs[0].to_dict(), allow_nan=False)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(sorted(MAKES)), st.integers(0, 2**31))
def test_the_order_of_arrival_does_not_matter(name, seed):
    orders, algorithms, memories = random.Random(seed), [started(name), started(name)], [{}, {}]
    for round in range(4):
        logs = []
        for algorithm, memory, shuffled in zip(algorithms, memories, (False, True)):
            chosen = algorithm.select(round, CLIENTS)
            sent = [update for client in chosen for update in trained(algorithm, round, client, memory)]
            if shuffled:
                orders.shuffle(sent)
            logs.append(algorithm.aggregate(round, sent))
        assert logs[0] == logs[1]
        assert_same_state(*algorithms)


def changed(update, **changes):
    values = {"client": update.client, "round": update.round, "tensors": dict(update.tensors)}
    values |= {"rows": update.rows, "num_examples": update.num_examples, "chain": update.chain}
    return ClientUpdate(**(values | {"metrics": update.metrics} | changes))


def with_b(make):
    """Another tensor in the place of "b"."""
    return lambda update: changed(update, tensors=update.tensors | {"b": make(update.tensors["b"])})


def poisoned(value):
    def poison(update):
        tensor = update.tensors["b"].clone()
        tensor[1] = value
        return changed(update, tensors=update.tensors | {"b": tensor})

    return poison


BAD = {
    "NaN": (poisoned(math.nan), "b: 1 of its 3 values are NaN or infinite"),
    "infinity": (poisoned(math.inf), "b: 1 of its 3 values are NaN or infinite"),
    "too long": (poisoned(1e4), "its norm is 1e\\+04, at most 100"),
    "shape": (lambda u: changed(u, tensors=u.tensors | {"b": torch.ones(4)}), "b: its shape"),
    "dtype": (lambda u: changed(u, tensors=u.tensors | {"b": torch.ones(3).half()}), "b: its dtype"),
    "missing tensor": (lambda u: changed(u, tensors={"table": u.tensors["table"]}), "b: it is missing"),
    "strange tensor": (lambda u: changed(u, tensors=u.tensors | {"z": torch.ones(1)}), "z: nobody asked"),
    "old round": (lambda u: changed(u, round=u.round - 1), "belongs to round 1"),
    "future round": (lambda u: changed(u, round=u.round + 1), "belongs to round 3"),
    "no examples": (lambda u: changed(u, num_examples=0), "num_examples|num_samples is 0"),
    "unknown client": (lambda u: changed(u, client="nobody"), "nobody of that name"),
    "not asked": (lambda u: changed(u, client=CLIENTS[6]), "not asked in round 2"),
    "chain": (lambda u: changed(u, chain="third"), "no chain 'third'"),
    "rows": (lambda u: changed(u, rows={"b": torch.tensor([9])}), "b: (its rows reach from 9|whole tensors)"),
}
MALFORMED = {
    "sparse rows": (
        lambda u: changed(u, rows={"b": torch.tensor([1]).to_sparse()}),
        "b: (its rows are no vector|whole tensors)",
    ),
    "rows that are none": (lambda u: changed(u, rows=None), "its rows are None, not by name"),
    "chain that is a list": (lambda u: changed(u, chain=["mixed"]), r"its chain is \['mixed'\], a name"),
    "chain that is an object": (lambda u: changed(u, chain={}), r"its chain is \{\}, a name"),
    "round that is text": (lambda u: changed(u, round="2"), "its round is '2', a whole number"),
    "round that is a fraction": (lambda u: changed(u, round=2.0), "its round is 2.0, a whole number"),
    "no metrics": (lambda u: changed(u, metrics=None), "its metrics are None, not by name"),
    "metrics in a list": (lambda u: changed(u, metrics=[1.0]), r"its metrics are \[1.0\], not by name"),
    "a metric that is text": (lambda u: changed(u, metrics={"loss": "low"}), "'loss' is 'low', a number"),
    "a metric that is none": (lambda u: changed(u, metrics={"loss": None}), "'loss' is None, a number"),
    "a metric without a name": (lambda u: changed(u, metrics={3: 0.5}), "metric 3 is 0.5"),
    "a metric beyond floats": (lambda u: changed(u, metrics={"n": 10**400}), "'n' is 1000.*a number"),
    "no tensors": (lambda u: changed(u, tensors=None), "tensors by name are expected, not NoneType"),
    "sparse": (with_b(torch.Tensor.to_sparse), "b: it is sparse or nested"),
    "nested": (with_b(lambda b: torch.nested.nested_tensor([b])), "b: it is sparse or nested"),
    "without values": (with_b(lambda b: b.to("meta")), "b: it has no values, only a shape"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in MAKES for kind in BAD]
    + [(name, kind) for name in ("FedSubAvg", "FedLaAvg", "WaitForAll", "MCPSGD") for kind in MALFORMED],
)
def test_a_bad_update_is_named_and_changes_nothing(name, kind, caplog):
    """The round is as if it had not been sent."""
    spoil, reason = (BAD | MALFORMED)[kind]
    ends = []
    for sends_bad in (True, False):
        algorithm, memories = started(name), {}
        algorithm.max_update_norm = 100.0
        for round in range(2):
            step(algorithm, round, memories, CLIENTS[:5])
        there = algorithm.select(2, CLIENTS[:6])
        sent = {client: trained(algorithm, 2, client, memories) for client in there}
        bad = spoil(sent[there[0]][0])
        others = [update for client in there[1:] for update in sent[client]]
        log = algorithm.aggregate(2, [*others[:1], *([bad] if sends_bad else []), *others[1:]])
        assert log.accepted == sorted(there[1:])
        if sends_bad:
            assert list(log.rejected) == [bad.client] and repr(bad.client) in caplog.text
            assert re.search(reason, log.rejected[bad.client])
        ends.append(algorithm)
    assert_same_state(*ends)


@pytest.mark.parametrize("name", MAKES)
def test_an_update_that_comes_twice_counts_once(name):
    ends = []
    for times in (1, 2):
        algorithm, memories = started(name), {}
        for round in range(3):
            sent = [u for c in algorithm.select(round, CLIENTS) for u in trained(algorithm, round, c, memories)]
            log = algorithm.aggregate(round, sent * times)
            assert set(log.rejected) == (set(log.accepted) if times == 2 else set())
            assert all("already" in reason for reason in log.rejected.values())
        ends.append(algorithm)
    assert_same_state(*ends)


@pytest.mark.fault(
    "a third of federated clients vanish, return, send NaN or twice", survived_if="each is named and none averaged"
)
@pytest.mark.parametrize("name", MAKES)
def test_a_third_of_the_clients_misbehave(name, survived):
    """The parameters stay finite, every fault is in a log, and whoever comes back is welcome."""
    algorithm, memories, chance, faults = started(name), {}, random.Random(5), 0
    last_accepted = {}
    for round in range(24):
        faulty = set(chance.sample(CLIENTS, 2)) if round % 6 < 4 else set()
        sent, vanished, poisonous, twice = [], set(), set(), set()
        for client in algorithm.select(round, CLIENTS):
            updates = trained(algorithm, round, client, memories)
            fate = chance.choice(["vanishes", "NaN", "twice"]) if client in faulty else "is sound"
            if fate == "vanishes":
                vanished.add(client)
            elif fate == "NaN":
                poisonous.add(client)
                sent += [poisoned(math.nan)(update) for update in updates]
            else:
                sent += updates * (2 if fate == "twice" else 1)
                twice |= {client} if fate == "twice" else set()
        log = algorithm.aggregate(round, sent)
        faults += len(vanished | poisonous | twice)
        assert set(log.missing) == vanished and set(log.rejected) == poisonous | twice
        assert all("NaN" in log.rejected[client] for client in poisonous) and not poisonous & set(log.accepted)
        assert all("already" in log.rejected[client] for client in twice) and twice <= set(log.accepted)
        last_accepted |= dict.fromkeys(log.accepted, round)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in algorithm.parameters.values())
    assert sorted(last_accepted) == CLIENTS and faults > 5
    survived(faults)


def test_false_is_no_round():
    algorithm = started("FedAvg")
    sent = [changed(trained(algorithm, 0, client, {})[0], round=round) for client, round in zip(CLIENTS, (False, 0))]
    log = algorithm.aggregate(0, sent)
    assert log.accepted == CLIENTS[1:2]
    assert log.rejected == {CLIENTS[0]: "its round is False, a whole number is expected"}


def test_a_log_has_the_metrics_of_what_was_accepted():
    """Not of what came last, nor the examples that a client claims."""
    for name in MAKES:
        algorithm, memories = started(name), {}
        algorithm._num_examples = dict.fromkeys(CLIENTS, 3)
        first, *rest = (trained(algorithm, 0, client, memories) for client in algorithm.select(0, CLIENTS))
        again = [changed(update, metrics={"loss": 99.0}) for update in first]
        first = [changed(update, metrics={"loss": 0.5 if update.chain == "mixed" else 7.0}) for update in first]
        bad = [poisoned(math.nan)(changed(update, metrics={"loss": 99.0})) for update in rest[0]]
        log = algorithm.aggregate(0, [*first, *again, *bad])
        client = first[0].client
        assert (log.metrics, log.num_examples) == ({client: {"loss": 0.5}}, {client: 3})
        assert not {"metrics", "num_examples"} & log.to_dict().keys() and log.to_dict()["accepted"] == [client]


def test_a_sum_that_overflows_names_the_largest_and_the_state_stays():
    for name in ("FedAvg", "FedSubAvg streaming", "MMPSGD", "FedLaAvg", "FedLaAvg server", "MCPSGD"):
        algorithm, memories = started(name), {}
        step(algorithm, 0, memories)
        before = copy.deepcopy(algorithm.state_dict())
        huge = torch.finfo(torch.float32).max
        large = -0.05 * huge if "FedLaAvg" in name and "server" not in name else 0.05 * huge  # those send gradients
        sent = []
        for client, value in zip(CLIENTS, (large, 1.0)):
            for chain in algorithm.chains:
                tensors = {"table": torch.zeros(5, 2), "b": torch.full((3,), value)}
                sent.append(ClientUpdate(client, 1, tensors, {}, 1, chain=chain))
        algorithm._parameters = {k: torch.full_like(v, huge) for k, v in algorithm._parameters.items()}
        kept = algorithm.parameters
        with pytest.raises(FloatingPointError, match=r"Round 1: .*largest update: 'user/0', norm 2.947e\+37"):
            algorithm.aggregate(1, sent)
        after = algorithm.state_dict()
        assert after["record"] == before["record"]
        assert all(torch.equal(algorithm.parameters[key], kept[key]) for key in kept)
        for group in before["tensors"].keys() - {"parameters"}:
            assert all(torch.equal(t, after["tensors"][group][k]) for k, t in before["tensors"][group].items())


def test_selection_is_uniform_repeatable_and_of_those_who_are_there():
    algorithm, counts = FedAvg(clients_per_round=3, seed=2), dict.fromkeys(CLIENTS, 0)
    algorithm.start({"x": torch.zeros(1)}, CLIENTS)
    for round in range(700):
        chosen = algorithm.select(round, reversed(CLIENTS))
        assert chosen == algorithm.select(round, CLIENTS) and len(set(chosen)) == 3
        for client in chosen:
            counts[client] += 1
    assert all(abs(count - 300) < 5 * math.sqrt(700 * 3 / 7 * 4 / 7) for count in counts.values())
    assert algorithm.select(700, CLIENTS[5:]) == CLIENTS[5:] and algorithm.select(701, []) == []
    other = FedAvg(clients_per_round=3, seed=3)
    other.start({"x": torch.zeros(1)}, CLIENTS)
    assert any(other.select(r, CLIENTS) != algorithm.select(r, CLIENTS) for r in range(10))


@pytest.mark.parametrize("name", MAKES)
def test_a_round_without_anybody(name):
    algorithm, memories = started(name), {}
    step(algorithm, 0, memories, [])
    log = step(algorithm, 1, memories)
    assert log.accepted


def test_mistakes_of_whoever_runs_it_are_named():
    algorithm = FedAvg()
    with pytest.raises(RuntimeError, match="call start first"):
        algorithm.select(0, [])
    for parameters, clients, options, message in (
        ({"x": torch.zeros(1, dtype=torch.int64)}, ["a"], {}, "only floating-point"),
        ({"x": torch.zeros(1)}, ["a", "a"], {}, "each once"),
        ({"x": torch.zeros(1)}, [], {}, "at least one"),
        ({"x": torch.zeros(1)}, ["a"], {"num_examples": {"a": 0}}, "no positive number for 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            algorithm.start(parameters, clients, **options)
    algorithm.start({"x": torch.zeros(1)}, ["a"])
    with pytest.raises(ValueError, match="not among the 1 clients"):
        algorithm.select(0, ["b"])
    with pytest.raises(ValueError, match="not among the 1 clients"):
        algorithm.payload(0, "b")
    with pytest.raises(ValueError, match="compares no candidates"):
        algorithm.compare(0, {})
    algorithm.aggregate(3, [])
    for round in (3, 2, True, 4.0):
        with pytest.raises(ValueError, match="last round that was aggregated is 3"):
            algorithm.aggregate(round, [])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    algorithm = FedAvg()
    algorithm.start({"x": torch.zeros(2)}, ["a", "b"])
    others = [FedAvg(), FedAvg(), FedProx(proximal=0.0)]
    others[0].start({"x": torch.ones(3)}, ["a", "b"])
    others[1].start({"x": torch.ones(2)}, ["a", "c"])
    others[2].start({"x": torch.ones(2)}, ["a", "b"])
    for other, message in zip(others, ("another model", "population", "algorithm is 'FedProx'")):
        with pytest.raises(ValueError, match=message):
            algorithm.load_state_dict(other.state_dict())
    assert bool((algorithm.parameters["x"] == 0).all())


def test_what_was_handed_out_is_never_written_to():
    for name in MAKES:
        algorithm, memories = started(name), {}
        state = algorithm.state_dict()
        kept = copy.deepcopy(state["tensors"])
        for round in range(4):
            step(algorithm, round, memories)
        for group, tensors in kept.items():
            assert all(torch.equal(tensor, state["tensors"][group][key]) for key, tensor in tensors.items())


def test_an_algorithm_tells_the_arguments_it_was_made_with():
    plain = FedAvg().options()
    assert plain == FedAvg(seed=0, weighting="examples").options() == copy.deepcopy(FedAvg()).options()
    assert {name for name in plain if FedAvg(robust=Robust(clip_norm=2.0)).options()[name] != plain[name]} == {
        "robust"
    }
    made = FedSubAvg(heat={"table": torch.ones(3)}, max_correction=4.0, clients_per_round=3).options()
    assert (made["max_correction"], made["clients_per_round"]) == (4.0, 3)
    assert made["heat"] != FedSubAvg(heat={"table": torch.zeros(3)}).options()["heat"]
    assert MMPSGD(SCHEDULE, average="tail").options()["schedule"] == {"blocks": [0, 0, 1], "starts": []}
    options = FedLaAvg(learning_rate=functools.partial(max, 0.1)).options()
    assert json.loads(json.dumps(options)) == options and options["learning_rate"] == "partial"
