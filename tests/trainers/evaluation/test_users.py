"""User-level measures against scikit-learn and against loops over users."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from trainers.evaluation.users import (
    auc,
    auc_by_user,
    cold_users,
    gauc,
    harm_rate,
    log_loss,
    per_user,
    ranking_metrics,
    user_calibration,
    worst_decile,
)


ROWS = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1), st.integers(0, 4)), min_size=1, max_size=60)


def columns(rows):
    scores, labels, users = map(np.array, zip(*rows))
    return scores / 2, labels, users


def pairs_in_order(scores, labels):
    """By hand: the share of pairs of a click and none that are in order, equal scores counting one half."""
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    return np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]) if pairs else math.nan


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_auc_of_every_user_is_the_share_of_pairs_and_scikit_learns(rows):
    scores, labels, users = columns(rows)
    found = auc_by_user(scores, labels, users)
    assert found.users.tolist() == sorted(set(users.tolist()))
    total = total_clicks = weighted = clicked = 0.0
    for user, value, count, clicks in zip(found.users, found.values, found.counts, found.clicks):
        own = users == user
        expected = pairs_in_order(scores[own], labels[own])
        assert value == pytest.approx(expected, nan_ok=True)
        assert (count, clicks) == (own.sum(), labels[own].sum())
        if not math.isnan(expected):
            assert value == pytest.approx(metrics.roc_auc_score(labels[own], scores[own]))
            total, weighted = total + count, weighted + count * value
            total_clicks, clicked = total_clicks + clicks, clicked + clicks * value
    if total:
        assert gauc(scores, labels, users) == pytest.approx(weighted / total)
        assert gauc(scores, labels, users, weight="clicks") == pytest.approx(clicked / total_clicks)
        assert gauc(scores, labels, users, weight="users") == pytest.approx(np.nanmean(found.values))
    else:
        assert math.isnan(gauc(scores, labels, users))
    assert auc(scores, labels) == pytest.approx(pairs_in_order(scores, labels), nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.lists(st.integers(-5, 5), min_size=5, max_size=5))
def test_no_change_of_a_user_s_level_shows_in_the_gauc(rows, levels):
    scores, labels, users = columns(rows)
    moved = scores + np.array(levels)[users]
    assert gauc(moved, labels, users) == pytest.approx(gauc(scores, labels, users), nan_ok=True)


def test_one_user_s_gauc_is_scikit_learns_auc():
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal(500).round(1), rng.integers(0, 2, 500)
    expected = metrics.roc_auc_score(labels, scores)
    assert gauc(scores, labels, np.zeros(500)) == pytest.approx(expected, abs=1e-12)
    assert auc(scores, labels) == pytest.approx(expected, abs=1e-12)
    assert gauc(scores, labels, np.array(["ann"] * 500)) == pytest.approx(expected)


def test_log_loss_is_scikit_learns_and_saturates_nowhere():
    logits, labels = np.array([-2.0, 0.5, 3.0]), np.array([0, 1, 1])
    assert log_loss(logits, labels) == pytest.approx(metrics.log_loss(labels, 1 / (1 + np.exp(-logits))))
    assert log_loss(np.array([-1000.0]), np.array([1])) == 1000.0
    assert log_loss(np.array([0.0]), np.array([0.3])) == pytest.approx(math.log(2))


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_any_metric_of_every_user(rows):
    scores, labels, users = columns(rows)
    found = per_user(lambda s, y: float((s * y).sum()), scores, labels, users)
    for user, value in zip(found.users, found.values):
        assert value == pytest.approx((scores * labels)[users == user].sum())


def test_a_metric_that_is_not_defined_for_a_user_is_nan():
    def defined_for_two(scores, labels):
        if len(scores) < 2:
            raise ValueError("one row")
        return scores.mean()

    found = per_user(defined_for_two, np.array([1.0, 3.0, 5.0]), np.array([0, 1, 1]), np.array([7, 7, 9]))
    assert found.values[0] == 2.0 and math.isnan(found.values[1])
    assert found.mean() == 2.0 and found.mean("clicks") == 2.0
    with pytest.raises(ValueError, match="weight='rows' is not known"):
        found.mean("rows")


def test_the_worst_users_and_those_who_are_worse_off():
    values = np.array([0.9, math.nan, 0.1, *[0.5] * 17, 0.3])
    assert worst_decile(values) == pytest.approx((0.1 + 0.3) / 2)
    assert worst_decile(np.arange(100.0), fraction=0.29) == np.arange(29).mean(), "and not of 28, by rounding"
    assert worst_decile(values, higher_is_better=False) == pytest.approx((0.9 + 0.5) / 2)
    assert worst_decile(np.array([0.7, 0.6])) == 0.6 and math.isnan(worst_decile(np.array([math.nan])))
    before, after = np.array([0.5, 0.5, 0.5, math.nan]), np.array([0.4, 0.5, 0.6, 0.1])
    assert harm_rate(after, before) == pytest.approx(1 / 3)
    assert harm_rate(after, before, tolerance=0.2) == 0.0
    assert harm_rate(after, before, higher_is_better=False) == pytest.approx(1 / 3)
    assert math.isnan(harm_rate(before[3:], after[3:]))
    with pytest.raises(ValueError, match="give the same users"):
        harm_rate(after, before[:2])


def test_calibration_sees_the_level_of_every_user():
    labels, users = np.array([1, 0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 1, 1])
    right = user_calibration(np.full(6, 0.5), labels, users)
    assert right.mean_absolute == 0.0 and right.ratio == 1.0
    off = user_calibration(np.array([0.7, 0.7, *[0.4] * 4]), labels, users)
    assert off.bias.values == pytest.approx([0.2, -0.1])
    assert off.mean_absolute == pytest.approx((2 * 0.2 + 4 * 0.1) / 6) and off.ratio == pytest.approx(1.0)
    assert math.isnan(user_calibration(np.ones(2), np.zeros(2), np.zeros(2)).ratio)


def test_users_without_a_past():
    users, known = np.array(["a", "b", "c", "b"]), np.array(["b", "b", "a"])
    assert cold_users(users, known).tolist() == [False, False, True, False]
    assert cold_users(users, known, max_rows=1).tolist() == [True, False, True, False]


def test_all_of_it_together():
    rng = np.random.default_rng(1)
    users, labels = np.repeat(np.arange(20), 30), rng.integers(0, 2, 600)
    logits = labels + rng.standard_normal(600)
    found = ranking_metrics(logits, labels, users)
    assert found["gauc"] == gauc(logits, labels, users) == pytest.approx(found["user_auc"]), "all have 30 rows"
    assert found["worst_decile"] < found["gauc"] and found["auc"] == auc(logits, labels)
    probabilities = 1 / (1 + np.exp(-logits))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(labels, probabilities))
    assert found["calibration"] == pytest.approx(user_calibration(probabilities, labels, users).mean_absolute)


@pytest.mark.parametrize(
    ("scores", "labels", "users", "message"),
    [
        ([1.0, 2.0], [1], [0, 0], "all must be"),
        ([], [], [], "all must be"),
        ([1.0, math.nan], [1, 0], [0, 0], "1 scores are not finite"),
        ([1.0, 2.0], [1, 0.5], [0, 0], "labels that no correction has changed"),
    ],
)
def test_what_cannot_be_measured(scores, labels, users, message):
    with pytest.raises(ValueError, match=message):
        gauc(np.array(scores), np.array(labels), np.array(users))
