"""Heat: exact counts, randomised answers that are given once, and their estimator's mean and variance."""

import math

import pytest
import torch

from trainers.federated.core import (
    RandomisedResponse,
    StreamingHeat,
    epsilon_per_row,
    estimate_heat,
    exact_heat,
    heat_variance,
)


def test_exact_counts():
    involvement = {"a": {"t": torch.tensor([0, 2])}, "b": {"t": torch.tensor([2]), "s": torch.tensor([1])}}
    heat = exact_heat(involvement, {"t": 4, "s": 2})
    assert heat["t"].tolist() == [1, 0, 2, 0] and heat["s"].tolist() == [0, 1]
    weighed = exact_heat(involvement, {"t": 4, "s": 2}, weights={"a": 5, "b": 2})
    assert weighed["t"].tolist() == [5, 0, 7, 0]


def answers(clients, heat, p_in, p_out, seed):
    """How many of the clients say 1, of rows that the first n of them have."""
    ones = torch.zeros(len(heat))
    for index in range(clients):
        rows = torch.tensor([row for row, n in enumerate(heat) if index < n], dtype=torch.int64)
        client = RandomisedResponse(f"c{index}", p_in=p_in, p_out=p_out, simulation=True, seed=seed)
        ones += client.answer("t", rows, len(heat))
    return ones


@pytest.mark.parametrize(("p_in", "p_out"), [(15 / 16, 1 / 16), (0.8, 0.3)])
def test_the_estimate_is_unbiased_with_the_variance_that_is_stated(p_in, p_out):
    """Over 400 independent rows of each heat."""
    clients, heats, copies = 60, (0, 1, 20, 60), 400
    heat = [n for n in heats for _ in range(copies)]
    ones = answers(clients, heat, p_in, p_out, seed=1)
    raw = (ones.double() - clients * p_out) / (p_in - p_out)
    estimate = estimate_heat(ones, clients, p_in=p_in, p_out=p_out, floor=0)
    torch.testing.assert_close(estimate, raw.clamp(0, clients))
    for found, n in zip(raw.reshape(len(heats), copies), heats):
        variance = float(heat_variance(n, clients, p_in=p_in, p_out=p_out))
        assert abs(float(found.mean()) - n) < 4.5 * math.sqrt(variance / copies)
        # the sample variance of near-normal draws has a standard deviation of variance * sqrt(2 / copies)
        assert abs(float(found.var()) - variance) < 5 * variance * math.sqrt(2 / copies)


def test_a_thousand_clients_make_a_cold_row_useless():
    """About 8.7 rows of standard deviation, while half the rows of a shop belong to one client (digest 3)."""
    assert math.sqrt(float(heat_variance(1, 1000, p_in=15 / 16, p_out=1 / 16))) == pytest.approx(8.75, abs=0.02)


def test_floor_cap_and_those_who_did_not_answer():
    ones = torch.tensor([0, 30, 50])
    assert estimate_heat(ones, 50, p_in=1.0, p_out=0.0, floor=5, population=100).tolist() == [5, 60, 100]
    for wrong in ({"answers": 0}, {"answers": 60, "population": 50}, {"answers": 50, "floor": 51}):
        options = {"answers": 50, "floor": 0, "population": None} | wrong
        with pytest.raises(ValueError, match="do not fit"):
            estimate_heat(ones, options.pop("answers"), p_in=0.9, p_out=0.1, **options)


def test_one_answer_for_ever():
    client, rows = RandomisedResponse("a", p_in=0.6, p_out=0.4), torch.tensor([1, 5])
    first = client.answer("t", rows, 200)
    assert torch.equal(client.answer("t", rows, 200), first)
    assert torch.equal(client.answer("t", torch.tensor([7]), 200), first)  # whatever it has by now
    again = RandomisedResponse("a", p_in=0.6, p_out=0.4)
    again.load_state_dict(client.state_dict())
    assert torch.equal(again.answer("t", rows, 200), first)
    with pytest.raises(ValueError, match="answered with 200 rows, not 300"):
        client.answer("t", rows, 300)
    first.fill_(True)
    assert not bool(client.answer("t", rows, 200).all())


def test_a_client_that_begins_anew_says_the_same(tmp_path):
    file, rows = tmp_path / "client" / "answers.safetensors", torch.tensor([1, 5])
    first = RandomisedResponse("a", p_in=0.6, p_out=0.4, file=file)
    answer, other = first.answer("t", rows, 200), first.answer("other table", rows, 50)
    again = RandomisedResponse("a", p_in=0.6, p_out=0.4, file=file)
    assert torch.equal(again.answer("t", torch.tensor([7]), 200), answer)
    assert torch.equal(again.answer("other table", rows, 50), other)
    assert not torch.equal(RandomisedResponse("a", p_in=0.6, p_out=0.4).answer("t", rows, 200), answer)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_no_answer_is_given_that_is_not_on_the_disk(tmp_path, monkeypatch):
    file = tmp_path / "answers.safetensors"

    def full(*paths):
        raise OSError("the disk is full")

    client = RandomisedResponse("a", file=file)
    with monkeypatch.context() as context:
        context.setattr("os.replace", full)
        with pytest.raises(OSError, match="the disk is full"):
            client.answer("t", torch.tensor([1]), 200)
    assert not client.state_dict()["tensors"] and not file.exists()
    answer = client.answer("t", torch.tensor([1]), 200)
    assert torch.equal(RandomisedResponse("a", file=file).answer("t", torch.tensor([1]), 200), answer)


def test_answers_that_do_not_fit_are_refused(tmp_path):
    """Made with other probabilities, they would be counted, and paid for, as something that they are not."""
    file, rows = tmp_path / "answers.safetensors", torch.tensor([1])
    made = RandomisedResponse("a", p_in=0.75, p_out=0.25, file=file)
    made.answer("t", rows, 9)
    options = {"p_in": 0.75, "p_out": 0.25}
    for client, changes, reason in (
        ("a", {"p_in": 0.8}, "their p_in is 0.75, not 0.8"),
        ("a", {"p_out": 0.1}, "their p_out is 0.25, not 0.1"),
        ("b", {}, "their client is 'a', not 'b'"),
        ("a", {"simulation": True, "seed": 3}, "their simulation is False, not True"),
    ):
        with pytest.raises(ValueError, match=reason):
            RandomisedResponse(client, **(options | changes), file=file)
        other = RandomisedResponse(client, **(options | changes))
        with pytest.raises(ValueError, match=reason):
            other.load_state_dict(made.state_dict())
        assert not other.state_dict()["tensors"]
    assert torch.equal(RandomisedResponse("a", **options, file=file).answer("t", rows, 9), made.answer("t", rows, 9))


def test_answers_come_from_the_operating_system_unless_it_is_a_simulation():
    def draw(**options):
        return RandomisedResponse("a", p_in=0.6, p_out=0.4, **options).answer("t", torch.tensor([1]), 400)

    torch.manual_seed(0)
    one = draw()
    torch.manual_seed(0)
    assert not torch.equal(one, draw())
    assert torch.equal(draw(simulation=True, seed=3), draw(simulation=True, seed=3))
    for options in ({"seed": 3}, {"simulation": True}):
        with pytest.raises(ValueError, match="has no seed"):
            draw(**options)


def test_certain_answers_are_the_truth():
    rows = torch.tensor([0, 3])
    assert RandomisedResponse("a", p_in=1.0, p_out=0.0).answer("t", rows, 4).tolist() == [True, False, False, True]


def test_what_a_row_costs():
    assert epsilon_per_row(15 / 16, 1 / 16) == pytest.approx(math.log(15))
    assert epsilon_per_row(0.8, 0.3) == pytest.approx(max(math.log(0.8 / 0.3), math.log(0.7 / 0.2)))
    assert epsilon_per_row(1.0, 0.5) == math.inf == epsilon_per_row(0.5, 0.0)
    with pytest.raises(ValueError, match="say nothing"):
        epsilon_per_row(0.3, 0.3)


def test_streaming_counts_each_client_once():
    heat = StreamingHeat({"t": 3})
    heat = heat.with_clients({"a": {"t": torch.tensor([0])}, "b": {"t": torch.tensor([0, 1])}})
    later = heat.with_clients({"a": {"t": torch.tensor([0, 1, 2])}})
    for count in (heat, later):
        assert count.estimate(10)["t"].tolist() == [10, 5, 0]
    restored = StreamingHeat({})
    restored.load_state_dict(*later.state_dict())
    assert restored.with_clients({"c": {}}).estimate(9)["t"].tolist() == [6, 3, 0]
