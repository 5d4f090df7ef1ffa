"""Every row in one split, every user in training, and nobody trained on what came after the test."""

import datetime

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data import user_split


def dataset(users, times=None):
    columns = {"user": users, "row": list(range(len(users)))}
    return Dataset.from_dict(columns | ({"time": times} if times is not None else {}))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=40), st.booleans())
def test_every_row_is_in_one_split_and_time_runs_forward(rows, three):
    fractions = (0.6, 0.2, 0.2) if three else (0.7, 0.3)
    data = dataset([user for user, _ in rows], [time for _, time in rows])
    splits = user_split(data, "user", time_column="time", fractions=fractions)
    assert list(splits) == (["train", "validation", "test"] if three else ["train", "test"])
    found = [row for split in splits.values() for row in split["row"]]
    assert sorted(found) == list(range(len(rows)))
    for split in splits.values():
        assert list(split["row"]) == sorted(split["row"])
    for user in {user for user, _ in rows}:
        per_split = [[(r["time"], r["row"]) for r in split if r["user"] == user] for split in splits.values()]
        total = sum(map(len, per_split))
        ordered = [pair for part in per_split for pair in sorted(part)]
        assert ordered == sorted(ordered)
        bounds = [int(np.floor(total * share + 0.5 + 1e-9)) for share in np.cumsum(fractions)]
        assert [len(part) for part in per_split] == np.diff([0, *bounds[:-1], total]).tolist()
        assert per_split[0]


def test_without_time_the_seed_decides():
    data = dataset(["a"] * 50 + ["b"] * 50)
    one, same, other = (user_split(data, "user", seed=seed) for seed in (1, 1, 2))
    assert one["train"]["row"][:] == same["train"]["row"][:] != other["train"]["row"][:]
    assert one["train"]["user"][:].count("a") == 30 and len(one["validation"]) == len(one["test"]) == 20
    assert one["train"]["row"][:] != list(range(30)) + list(range(50, 80))


def test_users_may_be_numbers_and_times_dates():
    days = np.array(["2026-01-03", "2026-01-01", "2026-01-02"], dtype="datetime64[D]").tolist()
    splits = user_split(dataset([5, 5, 5], days), "user", time_column="time", fractions=(0.5, 0.5))
    assert splits["train"]["row"][:] == [1, 2] and splits["test"]["row"][:] == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (1.0,)}, "fractions"),
        ({"fractions": (0.5, 0.6)}, "sum 1"),
        ({"fractions": (1.2, -0.2)}, "positive"),
        ({"time_column": "when"}, "no column 'when'"),
    ],
)
def test_what_cannot_be_split_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        user_split(dataset(["a", "b"]), "user", **options)


def test_a_user_must_be_there():
    with pytest.raises(ValueError, match="Column 'user' has 1 missing values"):
        user_split(dataset(["a", None]), "user")


@pytest.mark.parametrize("times", [[1.0, float("nan")], [1, None], ["x", None]])
def test_a_time_must_be_there(times):
    with pytest.raises(ValueError, match="missing values"):
        user_split(dataset(["a", "a"], times), "user", time_column="time")


def test_dates_are_times():

    days = [datetime.datetime(2026, 1, day) for day in (3, 1, 2)]
    splits = user_split(dataset(["a"] * 3, days), "user", time_column="time", fractions=(0.67, 0.33))
    assert splits["train"]["row"][:] == [1, 2] and splits["test"]["row"][:] == [0]
