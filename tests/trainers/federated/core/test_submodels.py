"""FedSubAvg (arXiv 2109.07704) by enumeration of all rounds, and what must hold whatever the heat."""

import re
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.federated.core.simulated_clients import assert_same_state
from trainers.federated.core import ClientUpdate, FedAvg, FedSubAvg, Robust, RoundwiseSubmodelAvg, exact_heat


N, K = 6, 2
OWNERS = [[0, 1, 2, 3, 4, 5], [0, 1, 2], [3], [1, 4, 5], [2], []]  # of each row: heats 6, 3, 1, 3, 1, 0
CLIENTS = [f"c{index}" for index in range(N)]
INVOLVEMENT = {
    client: {"table": torch.tensor([row for row, owners in enumerate(OWNERS) if index in owners])}
    for index, client in enumerate(CLIENTS)
}


def start(algorithm, involvement=INVOLVEMENT, dtype=torch.float64, **options):
    parameters = {"table": torch.zeros(len(OWNERS), 2, dtype=dtype), "dense": torch.zeros(3, dtype=dtype)}
    algorithm.start(parameters, CLIENTS, involvement=involvement, **options)
    return algorithm


def deltas(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return {
        client: {
            "table": torch.randn(len(INVOLVEMENT[client]["table"]), 2, generator=generator, dtype=dtype),
            "dense": torch.randn(3, generator=generator, dtype=dtype),
        }
        for client in CLIENTS
    }


def updates(clients, made, round=0, examples=None):
    return [
        ClientUpdate(client, round, made[client], INVOLVEMENT[client], 1 if examples is None else examples[client])
        for client in clients
    ]


def expected_step(make):
    """The mean over all C(N, K) rounds of what a round does."""
    made, total = deltas(), 0
    for chosen in combinations(CLIENTS, K):
        algorithm = start(make())
        algorithm.aggregate(0, updates(chosen, made))
        total = total + algorithm.parameters["table"]
    return total / comb(N, K)


def target():
    made, mean = deltas(), torch.zeros(len(OWNERS), 2, dtype=torch.float64)
    for row, owners in enumerate(OWNERS):
        for owner in owners:
            client = CLIENTS[owner]
            mean[row] += made[client]["table"][INVOLVEMENT[client]["table"].tolist().index(row)] / len(owners)
    return mean


@pytest.mark.parametrize(
    ("make", "ratios"),
    [
        (lambda: FedAvg(weighting="clients"), [1, 3 / 6, 1 / 6, 3 / 6, 1 / 6]),
        (RoundwiseSubmodelAvg, [1, 0.8, 1 / 3, 0.8, 1 / 3]),
        (FedSubAvg, [1, 1, 1, 1, 1]),
    ],
    ids=["FedAvg", "RoundwiseSubmodelAvg", "FedSubAvg"],
)
def test_three_aggregators_by_enumeration(make, ratios):
    ratios = torch.tensor([*ratios, 0.0], dtype=torch.float64)
    torch.testing.assert_close(expected_step(make), target() * ratios[:, None], rtol=1e-12, atol=1e-12)
    assert comb(N - 3, K) / comb(N, K) == pytest.approx(0.2)


def test_with_all_rows_everywhere_it_is_fedavg_bit_for_bit():
    everywhere = {client: {"table": torch.arange(len(OWNERS))} for client in CLIENTS}
    generator = torch.Generator().manual_seed(0)
    one, other = FedSubAvg(), FedAvg(weighting="clients")
    for algorithm in (one, other):
        start(algorithm, everywhere, dtype=torch.float32)
    for round in range(5):
        sent = [
            ClientUpdate(
                client,
                round,
                {"table": torch.randn(6, 2, generator=generator), "dense": torch.randn(3, generator=generator)},
                everywhere[client] if client != "c2" else {},
                1,
            )
            for client in CLIENTS[round % 3 :]
        ]
        logs = [algorithm.aggregate(round, sent) for algorithm in (one, other)]
        assert logs[0] == logs[1]
    assert all(torch.equal(one.parameters[name], other.parameters[name]) for name in one.parameters)


@pytest.mark.parametrize("make", [FedSubAvg, RoundwiseSubmodelAvg, FedAvg])
def test_rows_that_nobody_owns_never_move(make):
    """Not even if a client decays all rows and sends the whole table."""
    algorithm = start(make())
    for round in range(3):
        sent = updates(CLIENTS[:3], deltas(), round)
        whole = {"table": torch.full((6, 2), -0.1, dtype=torch.float64), "dense": torch.zeros(3, dtype=torch.float64)}
        log = algorithm.aggregate(round, [*sent, ClientUpdate("c4", round, whole, {}, 1)])
        assert log.accepted == ["c0", "c1", "c2", "c4"]
    table = algorithm.parameters["table"]
    assert bool((table[5] == 0).all()) and bool((table[:5] != 0).any(1)[[0, 1, 3, 4]].all())
    assert bool((table[2] == 0).all())  # c3's alone, which was never there


def test_one_local_step_of_everybody_is_preconditioned_gradient_descent():
    """x <- x - gamma D grad f with D = diag(N / n_m), f the mean of the clients' losses (our reading, digest 4)."""
    generator, gamma = torch.Generator().manual_seed(5), 0.05
    algorithm = start(FedSubAvg())
    goals = torch.randn(N, len(OWNERS), 2, generator=generator, dtype=torch.float64)
    x = torch.zeros(len(OWNERS), 2, dtype=torch.float64)
    heat = torch.tensor([len(owners) for owners in OWNERS], dtype=torch.float64)
    for round in range(4):
        sent = []
        for index, client in enumerate(CLIENTS):
            payload = algorithm.payload(round, client)
            rows = payload.rows["table"]
            gradient = payload.tensors["table"] - goals[index][rows]
            tensors = {"table": -gamma * gradient, "dense": torch.zeros(3, dtype=torch.float64)}
            sent.append(ClientUpdate(client, round, tensors, payload.rows, 1))
        log = algorithm.aggregate(round, sent)
        gradient = torch.zeros_like(x)
        for index, client in enumerate(CLIENTS):
            rows = INVOLVEMENT[client]["table"]
            gradient[rows] += (x[rows] - goals[index][rows]) / N
        preconditioner = torch.where(heat > 0, N / heat.clamp_min(1), 1.0)[:, None]
        metric = float((preconditioner * (gamma * gradient) ** 2).sum())
        assert log.elementwise_gradient_norm == pytest.approx(metric, rel=1e-9)
        x = x - gamma * preconditioner * gradient
        torch.testing.assert_close(algorithm.parameters["table"], x, rtol=1e-12, atol=1e-12)


def test_the_metric_is_the_same_whoever_averages():
    """It is made of the plain average, which the three aggregators scale differently."""
    made = deltas()
    logs = [
        start(make()).aggregate(0, updates(["c1", "c3"], made)).elementwise_gradient_norm
        for make in (lambda: FedAvg(weighting="clients"), FedSubAvg, RoundwiseSubmodelAvg)
    ]
    assert logs == pytest.approx([logs[0]] * 3, rel=1e-9)


def test_the_form_of_the_released_code():
    """c_m = examples of all / examples of those that have m; examples weigh in the round."""
    examples = {client: index + 1 for index, client in enumerate(CLIENTS)}
    algorithm = start(FedSubAvg(weighting="examples"), num_examples=examples)
    heat = exact_heat(INVOLVEMENT, {"table": 6}, weights=examples)["table"]
    assert heat.tolist() == [21, 6, 4, 13, 3, 0]
    torch.testing.assert_close(algorithm.correction("table")[:5], 21 / heat[:5])
    assert algorithm.correction("table")[5] == 1 and bool((algorithm.correction("dense") == 1).all())
    made = deltas()
    algorithm.aggregate(0, updates(["c1", "c5"], made, examples=examples))
    row = 2 * made["c1"]["table"][1] / 8 * 21 / 6  # row 1 belongs to c0, c1, c2
    torch.testing.assert_close(algorithm.parameters["table"][1], row)
    torch.testing.assert_close(algorithm.parameters["dense"], (2 * made["c1"]["dense"] + 6 * made["c5"]["dense"]) / 8)


def test_with_equal_examples_both_forms_coincide():
    examples, made = dict.fromkeys(CLIENTS, 7), deltas()
    one = start(FedSubAvg())
    other = start(FedSubAvg(weighting="examples"), num_examples=examples)
    for algorithm in (one, other):
        algorithm.aggregate(0, updates(["c0", "c4", "c2"], made, examples=examples))
    torch.testing.assert_close(one.parameters["table"], other.parameters["table"], rtol=1e-14, atol=1e-14)


def test_the_correction_is_capped():
    algorithm = start(FedSubAvg(max_correction=2.5))
    assert algorithm.correction("table").tolist() == [1, 2, 2.5, 2, 2.5, 1]


def test_given_heat_replaces_counting():
    heat = {"table": torch.tensor([6, 3, 2, 3, 1.5, 0])}
    algorithm = FedSubAvg(heat=heat)
    algorithm.start({"table": torch.zeros(6, 2, dtype=torch.float64), "dense": torch.zeros(3).double()}, CLIENTS)
    assert algorithm.correction("table").tolist() == [1, 2, 3, 2, 4, 1]
    algorithm.aggregate(0, updates(["c3"], made := deltas()))
    torch.testing.assert_close(algorithm.parameters["table"][2], 3 * made["c3"]["table"][1])


def test_streaming_heat_becomes_exact_once_everybody_was_there():
    algorithm = FedSubAvg(heat="streaming")
    algorithm.start({"table": torch.zeros(6, 2, dtype=torch.float64), "dense": torch.zeros(3).double()}, CLIENTS)
    made = deltas()
    algorithm.aggregate(0, updates(["c0", "c1"], made))  # row 3 is c1's, of two clients seen
    assert algorithm.correction("table").tolist() == [1, 1, 1, 2, 1, 1]
    for round, client in enumerate(["c2", "c3", "c4", "c5", "c1"], start=1):
        algorithm.aggregate(round, updates([client], made, round))
    assert algorithm.correction("table").tolist() == [1, 2, 6, 2, 6, 1]


def test_caps_come_after_amplification():
    """c3 owns row 2 alone: with N/n = 6 an update of norm 1 counts as one of norm 6, and is clipped as such."""
    algorithm = start(FedSubAvg(robust=Robust(clip_norm=3.0)))
    made = {"table": torch.zeros(2, 2, dtype=torch.float64), "dense": torch.zeros(3, dtype=torch.float64)}
    made["table"][1, 0] = 1.0  # c3 has rows 0 and 2 and no other
    assert INVOLVEMENT["c3"]["table"].tolist() == [0, 2]
    log = algorithm.aggregate(0, [ClientUpdate("c3", 0, made, INVOLVEMENT["c3"], 1)])
    assert algorithm.parameters["table"][2].tolist() == [3.0, 0.0] and log.norms["c3"] == 1.0


LONE = {f"u{index:02}": {"t": torch.tensor([index])} for index in range(20)}  # everybody has one row, of his own


def lone_round(values, **options):
    """A round of clients who own a row each, so that c = 20 of all (streaming: of those who came)."""
    algorithm = FedSubAvg(**options)
    streams = options.get("heat") == "streaming"
    algorithm.start({"t": torch.zeros(20, 1)}, list(LONE), involvement=None if streams else LONE)
    sent = [ClientUpdate(c, 0, {"t": torch.tensor([[v]])}, LONE[c], 1, {"loss": v}) for c, v in values.items()]
    return algorithm, algorithm.aggregate(0, sent)


@pytest.mark.parametrize("heat", ["exact", "streaming", {"t": torch.ones(20)}], ids=["exact", "streaming", "given"])
@pytest.mark.parametrize(
    ("options", "value", "reason"),
    [
        ({"max_update_norm": 2.0}, 1.0, "its norm is 20 once it is amplified, at most 2 is allowed"),
        ({"max_update_norm": 2.0}, 2.5, "its norm is 2.5, at most 2 is allowed"),
        ({}, 3e38, r"its norm is 3e\+38, and no number once it is amplified"),
        ({"robust": Robust(clip_norm=1.0)}, 3e38, r"its norm is 3e\+38, and no number once it is amplified"),
        ({"max_update_norm": 1e39}, 3e38, r"its norm is 3e\+38, and no number once it is amplified"),
    ],
)
def test_what_is_too_large_once_amplified_is_refused_by_name(heat, options, value, reason, caplog):
    """The round is as if it had not been sent, in the logs, in the parameters and in heat that streams."""
    if heat == "streaming":  # two came, each with a row of its own: c = 20 / (20 / 2)
        reason = reason.replace("norm is 20", "norm is 4")
        value = 2.0 if value == 1.0 else value
    one, log = lone_round({"u03": value, "u04": 0.01}, heat=heat, **options)
    assert log.accepted == ["u04"] and list(log.rejected) == ["u03"] and "'u03' rejected" in caplog.text
    assert re.fullmatch(reason, log.rejected["u03"])
    assert list(log.norms) == list(log.metrics) == list(log.num_examples) == ["u04"]
    other, _ = lone_round({"u04": 0.01}, heat=heat, **options)
    assert_same_state(one, other)
    assert bool((one.parameters["t"].reshape(-1).nonzero() == 4).all())


def test_when_nobody_is_left_the_state_stays():
    for heat in ("exact", "streaming"):
        algorithm, log = lone_round({"u03": 3e38, "u04": 3e38}, heat=heat)
        assert not log.accepted and list(log.rejected) == ["u03", "u04"]
        assert log.events == ["no update counts: the parameters stay"]
        fresh, _ = lone_round({}, heat=heat)
        assert_same_state(algorithm, fresh)
        algorithm.aggregate(1, [ClientUpdate("u03", 1, {"t": torch.ones(1, 1)}, LONE["u03"], 1)])
        assert algorithm.parameters["t"][3] != 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(CLIENTS), min_size=1, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(clients, shuffle):
    made = deltas(torch.float32)
    for make in (FedSubAvg, RoundwiseSubmodelAvg, lambda: FedSubAvg(heat="streaming")):
        ends = []
        for order in (sorted(clients), shuffle.sample(clients, len(clients))):
            algorithm = start(make(), dtype=torch.float32)
            log = algorithm.aggregate(0, updates(order, made))
            ends.append((algorithm.parameters["table"], algorithm.parameters["dense"], log))
        assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1]) and ends[0][2] == ends[1][2]


BAD_ROWS = {
    "not its own": (torch.tensor([0, 4]), "1 of its rows are not in its submodel"),
    "twice": (torch.tensor([0, 0]), "not increasing"),
    "out of the table": (torch.tensor([0, 6]), "reach from 0 to 6"),
    "negative": (torch.tensor([-1, 0]), "reach from -1"),
    "of another type": (torch.tensor([0.0, 1.0]), "no vector of int64"),
    "of another length": (torch.tensor([0]), r"its shape is \(2, 2\) instead of \(1, 2\)"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_rejected_by_name(kind):
    rows, reason = BAD_ROWS[kind]
    algorithm = start(FedSubAvg())
    tensors = {"table": torch.ones(2, 2, dtype=torch.float64), "dense": torch.ones(3, dtype=torch.float64)}
    log = algorithm.aggregate(0, [ClientUpdate("c1", 0, tensors, {"table": rows}, 1)])
    assert not log.accepted and re.search(reason, log.rejected["c1"])
    assert bool((algorithm.parameters["dense"] == 0).all())


def test_submodels_go_down():
    algorithm = start(FedSubAvg())
    payload = algorithm.payload(0, "c1")
    assert payload.rows["table"].tolist() == [0, 1, 3] and payload.tensors["table"].shape == (3, 2)
    assert payload.tensors["dense"].shape == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "examples", "heat": "streaming"}, "needs heat='exact'"),
        ({"max_correction": 0.5}, "max_correction=0.5"),
        ({"heat": "guessed"}, "heat='guessed'"),
        ({"robust": Robust(rule="trimmed_mean")}, "no majority"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FedSubAvg(**options)


def test_wrong_involvement_is_named():
    for involvement, message in (
        (None, "give it to start"),
        ({client: {"table": torch.tensor([9])} for client in CLIENTS}, "the table has 6"),
        ({client: {"other": torch.tensor([0])} for client in CLIENTS}, "'other', which is no parameter"),
        ({"c0": {"table": torch.tensor([0])}}, "differ"),
    ):
        with pytest.raises(ValueError, match=message):
            start(FedSubAvg(), involvement)
    with pytest.raises(ValueError, match="no majority"):
        start(FedAvg(weighting="clients", robust=Robust(rule="median")))
    with pytest.raises(ValueError, match="heat of 'table' does not fit"):
        start(FedSubAvg(heat={"table": torch.ones(3)}))
