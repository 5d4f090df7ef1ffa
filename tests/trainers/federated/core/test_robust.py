"""Robust averages against numpy and scipy, clipping, noise, and the accountant against its closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainers.federated.core import (
    ClientUpdate,
    FedAdam,
    FedAvg,
    FedSubAvg,
    Robust,
    clip_norm,
    coordinate_median,
    epsilon_spent,
    estimate_heat,
    trimmed_mean,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.25, 0.4]))
def test_medians_and_trimmed_means_are_numpys_and_scipys(clients, seed, share):
    values = torch.randn(clients, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    np.testing.assert_allclose(coordinate_median(values).numpy(), np.median(values.numpy(), axis=0), rtol=1e-12)
    at_least_one = 1.5 / clients if share and clients > 2 else 0.0  # scipy rounds down
    expected = stats.trim_mean(values.numpy(), max(share, at_least_one) if share * clients < 1 else share, axis=0)
    np.testing.assert_allclose(Robust(rule="trimmed_mean", trim=share).centre(values).numpy(), expected, rtol=1e-12)
    assert torch.equal(Robust(rule="median").centre(values), coordinate_median(values))


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="leaves nothing"):
        trimmed_mean(torch.ones(4, 2), 2)


def test_a_norm_is_clipped_over_all_tensors():
    tensors = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    assert clip_norm(tensors, 5.0) == tensors
    clipped = clip_norm(tensors, 1.0)
    torch.testing.assert_close(torch.stack([clipped["a"][0], clipped["b"][0, 0]]), torch.tensor([0.6, 0.8]))


def round_of(values, robust, **options):
    algorithm = FedAvg(weighting="clients", robust=robust, **options)
    algorithm.start({"x": torch.zeros(len(values[0]))}, [f"c{i}" for i in range(len(values))])
    sent = [ClientUpdate(f"c{i}", 0, {"x": torch.tensor(v)}, {}, 1) for i, v in enumerate(values)]
    algorithm.aggregate(0, sent)
    return algorithm.parameters["x"]


def test_one_liar_moves_a_mean_and_no_median():
    values = [[1.0, 2.0], [1.2, 2.2], [0.8, 1.8], [1e6, -1e6]]
    assert round_of(values, None)[0] > 1e5
    torch.testing.assert_close(round_of(values, Robust(rule="median")), torch.tensor([1.1, 1.9]))
    torch.testing.assert_close(round_of(values, Robust(rule="trimmed_mean", trim=0.25)), torch.tensor([1.1, 1.9]))
    assert float(round_of(values, Robust(clip_norm=3.0)).norm()) < 3


@pytest.mark.parametrize("clients", [3, 9, 10, 25])
def test_a_trimmed_mean_always_trims_one(clients):
    """However few the clients are, one liar is not averaged."""
    values = [[1.0]] * (clients - 1) + [[1e6]]
    assert float(round_of(values, Robust(rule="trimmed_mean"))) == 1.0
    assert float(round_of(values, Robust(rule="trimmed_mean", trim=0.0))) > 1e4


def test_too_few_to_leave_anybody_out_is_logged():
    for rule, trim, clients, told in (
        ("trimmed_mean", 0.1, 2, True),
        ("trimmed_mean", 0.1, 1, True),
        ("median", 0.1, 2, True),
        ("trimmed_mean", 0.1, 3, False),
        ("trimmed_mean", 0.0, 2, False),
        ("median", 0.1, 3, False),
        ("mean", 0.1, 1, False),
    ):
        algorithm = FedAvg(weighting="clients", robust=Robust(rule=rule, trim=trim))
        algorithm.start({"x": torch.zeros(1)}, ["a", "b", "c"])
        log = algorithm.aggregate(0, [ClientUpdate(c, 0, {"x": torch.ones(1)}, {}, 1) for c in "abc"[:clients]])
        assert [f"of {clients} it is a plain mean" in event for event in log.events] == [True] * told


def test_noise_has_the_deviation_that_is_stated():
    values = [[0.0] * 20_000 for _ in range(4)]
    x = round_of(values, Robust(clip_norm=2.0, noise_multiplier=1.5, simulation=True, seed=0)).double()
    std = 1.5 * 2.0 / 4
    assert abs(float(x.mean())) < 5 * std / math.sqrt(len(x)) and abs(float(x.std()) / std - 1) < 0.03
    assert stats.kstest(x.numpy() / std, "norm").pvalue > 1e-4
    again = round_of(values, Robust(clip_norm=2.0, noise_multiplier=1.5, simulation=True, seed=0))
    assert torch.equal(again.double(), x)
    torch.manual_seed(0)
    one = round_of(values, Robust(clip_norm=2.0, noise_multiplier=1.5))
    torch.manual_seed(0)
    assert not torch.equal(one, round_of(values, Robust(clip_norm=2.0, noise_multiplier=1.5)))


NOISY = Robust(clip_norm=1.0, noise_multiplier=1.0, simulation=True, seed=1)
GIVEN = {"t": torch.tensor([0.0, 1.0, 1.0, 0.0])}


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAvg(weighting="clients", robust=NOISY),
        lambda: FedAdam(weighting="clients", robust=NOISY),
        lambda: FedSubAvg(heat=GIVEN, robust=NOISY),
    ],
    ids=["FedAvg", "FedAdam", "FedSubAvg"],
)
def test_noise_reaches_rows_that_nobody_sent_and_none_that_nobody_has(make):
    """Rows that were not sent would show which were; those of padding are in nobody's involvement, and stay."""
    rows = {"a": {"t": torch.tensor([1])}, "b": {"t": torch.tensor([2])}}
    algorithm = make()
    algorithm.start({"t": torch.zeros(4, 2), "d": torch.zeros(3)}, ["a", "b"], involvement=rows)
    for round in range(2):
        sent = {"t": torch.ones(1, 2), "d": torch.zeros(3)}
        algorithm.aggregate(round, [ClientUpdate("a", round, sent, rows["a"], 1)])
    table = algorithm.parameters["t"]
    assert bool((table[[1, 2]] != 0).all()) and bool((table[[0, 3]] == 0).all())
    assert bool((algorithm.parameters["d"] != 0).all())


def test_without_involvement_noise_is_everywhere():
    algorithm = FedSubAvg(heat=GIVEN, robust=NOISY)
    algorithm.start({"t": torch.zeros(4, 2)}, ["a", "b"])
    algorithm.aggregate(0, [ClientUpdate("a", 0, {"t": torch.ones(1, 2)}, {"t": torch.tensor([1])}, 1)])
    assert bool((algorithm.parameters["t"] != 0).all())


def released(world, **options):
    """The average without its noise, where client 0 shares a row with each of the others, or has none of theirs."""
    clients = [f"c{index}" for index in range(30)]
    rows = {clients[0]: {"t": torch.arange(1, 30) if world else torch.tensor([0])}}
    rows |= {client: {"t": torch.tensor([index])} for index, client in enumerate(clients) if index}
    algorithm = FedSubAvg(**options)
    algorithm.start({"t": torch.zeros(30, 1)}, clients, involvement=rows)
    sent = [ClientUpdate(clients[0], 0, {"t": torch.ones(len(rows["c0"]["t"]), 1) * world}, rows["c0"], 1)]
    sent += [ClientUpdate(c, 0, {"t": torch.full((1, 1), 1 / 30)}, rows[c], 1) for c in clients[1:]]
    algorithm.aggregate(0, sent)
    return algorithm.parameters["t"]


def test_noise_needs_heat_that_does_not_depend_on_the_clients():
    """It is scaled to what one client can change: clip_norm / n. With heat that is counted this is exceeded."""
    clip, heat = Robust(clip_norm=1.0), {"t": torch.full((30,), 2.0)}
    assert float((released(1, robust=clip) - released(0, robust=clip)).norm()) > 1.5 / 30
    assert float((released(1, robust=clip, heat=heat) - released(0, robust=clip, heat=heat)).norm()) <= 1.0001 / 30
    for counted in ("exact", "streaming"):
        with pytest.raises(ValueError, match=f"noise_multiplier with heat='{counted}': .*depends on everybody's rows"):
            FedSubAvg(heat=counted, robust=NOISY)
    answers = estimate_heat(torch.tensor([4, 9]), 10, p_in=0.9, p_out=0.1, floor=2)
    assert FedSubAvg(heat={"t": answers}, robust=NOISY).robust is NOISY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "krum"}, "rule='krum'"),
        ({"trim": 0.5}, "trim=0.5"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"noise_multiplier": 1.0}, "needs clip_norm"),
        ({"noise_multiplier": 1.0, "clip_norm": 1.0, "rule": "median"}, "scaled to a mean"),
        ({"seed": 4}, "has no seed"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Robust(**options)


@pytest.mark.slow  # opacus imports half of torch
def test_the_accountant_is_between_the_closed_forms():
    """Rounds of Gaussian mechanisms are one of sigma / sqrt(rounds), whose exact delta is known (Balle and Wang 2018).
    A Rényi accountant is above it, and below the textbook's conversion."""
    pytest.importorskip("opacus")
    for sigma, rounds in ((4.0, 10), (1.0, 3)):
        epsilon, delta = epsilon_spent(sigma, [rounds, 1, 2], 1e-5), 1e-5
        mu = math.sqrt(rounds) / sigma
        exact = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        assert exact <= delta
        assert epsilon <= mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1e-2
        assert epsilon == epsilon_spent(sigma, rounds, delta)


def test_no_noise_is_no_privacy():
    assert epsilon_spent(0.0, 3, 1e-5) == math.inf and epsilon_spent(1.0, [], 1e-5) == 0.0
    with pytest.raises(ValueError, match="delta=1"):
        epsilon_spent(1.0, 3, 1)
