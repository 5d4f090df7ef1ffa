"""Quality user by user: a ranking that is right for the average may be wrong for many.

AUC is computed for all users at once by ranks: scikit-learn's, whose numbers these are, would take longer than a
training epoch when it is called for each of a thousand users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np


Weight = Literal["impressions", "clicks", "users"]
RowMetric = Callable[[np.ndarray, np.ndarray], float]  # scores and labels of one user


@dataclass(frozen=True)
class UserValues:
    """A value for each user, NaN where it is not defined.

    `users` ascend; `counts` are their rows, `clicks` the sums of their labels.
    """

    users: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    clicks: np.ndarray

    def mean(self, weight: Weight = "users") -> float:
        """Over users with a value: each counting the same, or as many times as it has rows or clicks. NaN if there
        is none."""
        weights = {"users": np.ones(len(self.values)), "impressions": self.counts, "clicks": self.clicks}
        if weight not in weights:
            raise ValueError(f"weight={weight!r} is not known. Choose one of {sorted(weights)}.")
        known = ~np.isnan(self.values)
        chosen = weights[weight][known]
        return float(np.average(self.values[known], weights=chosen)) if chosen.sum() else float("nan")


@dataclass(frozen=True)
class UserCalibration:
    """How far predicted and true levels are apart.

    `bias`: mean prediction minus mean label of each user. `mean_absolute`: of these, over users by their rows.
    `ratio`: predicted clicks over clicks, of all rows together; NaN without clicks.
    """

    bias: UserValues
    mean_absolute: float
    ratio: float


def per_user(metric: RowMetric, scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> UserValues:
    """`metric(scores, labels)` on the rows of each user; what it raises `ValueError` for is NaN."""
    scores, labels, groups = _by_user(scores, labels, users)
    values = np.full(len(groups.users), np.nan)
    for index, (begin, end) in enumerate(zip(groups.starts, groups.starts + groups.counts)):
        try:
            values[index] = metric(scores[begin:end], labels[begin:end])
        except ValueError:
            continue
    return groups.valued(values, labels)


def auc_by_user(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> UserValues:
    """The AUC of each user, NaN for users with one class only; equal scores count one half."""
    scores, labels, groups = _by_user(scores, labels, users)
    _require_binary(labels)
    owner = np.repeat(np.arange(len(groups.users)), groups.counts)
    order = np.lexsort((scores, owner))
    sorted_scores = scores[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (owner[1:] != owner[:-1]) | (sorted_scores[1:] != sorted_scores[:-1])
    tie = np.cumsum(first) - 1
    sizes = np.bincount(tie, minlength=1)
    places = np.arange(1, len(order) + 1) - np.repeat(groups.starts, groups.counts)  # from 1 within each user
    ranks = (np.bincount(tie, weights=places) / sizes)[tie]  # equal scores share their mean rank
    clicked = labels[order] == 1
    positives = np.bincount(owner, weights=clicked, minlength=len(groups.users))
    negatives = groups.counts - positives
    rank_sums = np.bincount(owner, weights=ranks * clicked, minlength=len(groups.users))
    pairs = positives * negatives
    wins = rank_sums - positives * (positives + 1) / 2
    values = np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return groups.valued(values, labels)


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray, *, weight: Weight = "impressions") -> float:
    """
    Mean AUC over users that have both classes (Zhou et al. 2018, section 6.2): what a ranking is worth to each. No
    change of a user's level shows in it.

    Args:
        weight: "impressions", by rows, as there; "clicks"; "users", all the same.

    Returns:
        NaN if no user has both classes.
    """
    return auc_by_user(scores, labels, users).mean(weight)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Over all rows together, which compares users with one another; NaN for one class only."""
    return float(auc_by_user(scores, labels, np.zeros(len(scores), dtype=int)).values[0])


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean binary cross-entropy of logits, which saturate no probability; soft labels allowed."""
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    return float((np.logaddexp(0, logits) - labels * logits).mean())


def worst_decile(values: np.ndarray, *, fraction: float = 0.1, higher_is_better: bool = True) -> float:
    """Mean over the worst `fraction` of the users that have a value, at least one; NaN if none has."""
    known = np.asarray(values, dtype=np.float64)
    known = np.sort(known[~np.isnan(known)])
    if not len(known):
        return float("nan")
    count = max(1, int(np.floor(fraction * len(known) + 1e-9)))  # .29 of 100 are 28.999999999999996
    return float((known[:count] if higher_is_better else known[-count:]).mean())


def harm_rate(
    values: np.ndarray, baseline: np.ndarray, *, tolerance: float = 0.0, higher_is_better: bool = True
) -> float:
    """Share of users that are worse off by more than `tolerance` than with the baseline, such as the cloud's model;
    of those that have a value in both, in the same order. NaN if there is none."""
    values, baseline = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if values.shape != baseline.shape:
        raise ValueError(f"{values.shape} values and {baseline.shape} of the baseline: give the same users.")
    known = ~(np.isnan(values) | np.isnan(baseline))
    losses = (baseline - values if higher_is_better else values - baseline)[known]
    return float((losses > tolerance).mean()) if len(losses) else float("nan")


def user_calibration(probabilities: np.ndarray, labels: np.ndarray, users: np.ndarray) -> UserCalibration:
    """Predicted against true click-through rates; a correction to a global rate shows here, not in the GAUC."""
    probabilities, labels, groups = _by_user(probabilities, labels, users)
    bias = np.add.reduceat(probabilities - labels, groups.starts) / groups.counts
    clicks = labels.sum()
    return UserCalibration(
        bias=groups.valued(bias, labels),
        mean_absolute=float(np.average(np.abs(bias), weights=groups.counts)),
        ratio=float(probabilities.sum() / clicks) if clicks else float("nan"),
    )


def cold_users(users: np.ndarray, known_users: np.ndarray, *, max_rows: int = 0) -> np.ndarray:
    """Which rows are of users with at most `max_rows` rows among `known_users`, the users of the training rows."""
    users = np.asarray(users)
    known, counts = np.unique(np.asarray(known_users), return_counts=True)
    return ~np.isin(users, known[counts > max_rows])


def ranking_metrics(logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """`gauc` by impressions, `user_auc` over users alike, `worst_decile` of these, `auc`, `log_loss`, `calibration`
    (the mean absolute one over users) of 0/1 labels."""
    by_user = auc_by_user(logits, labels, users)
    probabilities = np.exp(-np.logaddexp(0, -np.asarray(logits, dtype=np.float64)))
    return {
        "gauc": by_user.mean("impressions"),
        "user_auc": by_user.mean("users"),
        "worst_decile": worst_decile(by_user.values),
        "auc": auc(logits, labels),
        "log_loss": log_loss(logits, labels),
        "calibration": user_calibration(probabilities, labels, users).mean_absolute,
    }


@dataclass(frozen=True)
class _Groups:
    users: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def valued(self, values: np.ndarray, labels: np.ndarray) -> UserValues:
        return UserValues(self.users, values, self.counts, np.add.reduceat(labels, self.starts))


def _by_user(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, _Groups]:
    """Scores and labels, the rows of each user together, and where each begins."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    users = np.asarray(users)
    if not scores.shape == labels.shape == users.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores {scores.shape}, labels {labels.shape} and users {users.shape}: all must be (rows,).")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite.")
    order = np.argsort(users, kind="stable")
    found, starts, counts = np.unique(users[order], return_index=True, return_counts=True)
    return scores[order], labels[order], _Groups(found, starts, counts)


def _require_binary(labels: np.ndarray) -> None:
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("AUC needs labels of 0 and 1; evaluate on labels that no correction has changed.")


__all__ = [
    "UserCalibration",
    "UserValues",
    "auc",
    "auc_by_user",
    "cold_users",
    "gauc",
    "harm_rate",
    "log_loss",
    "per_user",
    "ranking_metrics",
    "user_calibration",
    "worst_decile",
]
