"""Who is there when: windows over midnight, traces, and answers that do not depend on the order of questions."""

import json

import pytest

from trainers.federated.core import Alternating, Bernoulli, SleepWindow, Trace, availability_from_dict


def test_groups_take_turns():
    there = Alternating([["a", "b"], ["c"]], [2, 3])
    assert [there.available(r) for r in range(6)] == [["a", "b"]] * 2 + [["c"]] * 3 + [["a", "b"]]
    assert Alternating([["a"], ["b"]], 50).lengths == (50, 50)
    for lengths in ([1], [0, 1]):
        with pytest.raises(ValueError, match="lengths"):
            Alternating([["a"], ["b"]], lengths)


@pytest.mark.parametrize("per_day", [24, 120, 240])
def test_a_window_over_midnight_is_eight_hours_like_any_other(per_day):
    """The release's test, `hour >= start or hour <= end`, holds always when end < start."""
    there = SleepWindow({"owl": 2.0, "lark": 22.0, "noon": 16.0}, per_day)
    for client in there.starts:
        for day in (0, 3):
            hours = [24 * r / per_day for r in range(per_day) if client in there.available(day * per_day + r)]
            assert len(hours) == per_day // 3
    hours = [24 * r / per_day for r in range(per_day) if "lark" in there.available(r)]
    assert (
        min(hours) == 0 and 6 not in hours and 12 not in hours and 22 in hours and max(h for h in hours if h < 12) < 6
    )
    assert "noon" in there.available(per_day - 1) and "noon" not in there.available(0)


def test_sleep_is_where_nothing_happens():
    busy = {"day": [h + 0.5 for h in range(7, 23)], "night": [h + 0.9 for h in [*range(20, 24), *range(12)]]}
    window = SleepWindow.from_activity(busy | {"long": [12.0], "never": []}, rounds_per_day=24)
    assert dict(window.starts) == {"day": 23, "night": 12, "long": 20, "never": 0}
    assert window.hours == 8


@pytest.mark.parametrize(
    ("starts", "per_day", "hours"), [({"a": 24.0}, 24, 8), ({"a": -1.0}, 24, 8), ({}, 0, 8), ({}, 24, 25), ({}, 24, 0)]
)
def test_impossible_days_are_refused(starts, per_day, hours):
    with pytest.raises(ValueError):
        SleepWindow(starts, per_day, hours)


def test_a_trace_is_read_from_json_and_begins_again(tmp_path):
    (tmp_path / "trace.json").write_text(json.dumps([["a"], [], ["a", "b"]]))
    there = Trace.from_file(tmp_path / "trace.json")
    assert [there.available(r) for r in range(4)] == [["a"], [], ["a", "b"], ["a"]]
    with pytest.raises(ValueError, match="at least one"):
        Trace([])


def test_bernoulli_is_as_often_as_it_says_and_the_same_when_asked_again():
    there = Bernoulli({"always": 1.0, "never": 0.0, "half": 0.5}, seed=4)
    rounds = [there.available(r) for r in range(400)]
    assert all("always" in r and "never" not in r for r in rounds)
    assert abs(sum("half" in r for r in rounds) - 200) < 5 * 10
    assert [there.available(r) for r in reversed(range(400))] == rounds[::-1]
    other = Bernoulli(there.probability, seed=5)
    assert any(other.available(r) != rounds[r] for r in range(400))
    with pytest.raises(ValueError, match="'a' is 1.5"):
        Bernoulli({"a": 1.5})


@pytest.mark.parametrize(
    "there",
    [
        Alternating([["a"], ["b"]], [1, 2]),
        SleepWindow({"a": 23.0, "b": 4.5}, 24, 6.0),
        Trace([["a"], ["b"]]),
        Bernoulli({"a": 0.3, "b": 0.9}, seed=2),
    ],
    ids=lambda there: type(there).__name__,
)
def test_json_and_back(there):
    again = availability_from_dict(json.loads(json.dumps(there.to_dict())))
    assert again == there and all(again.available(r) == there.available(r) for r in range(50))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind='lunar'"):
        availability_from_dict({"kind": "lunar"})
