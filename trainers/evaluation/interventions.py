"""Test-time interventions: what accuracy becomes when someone corrects concepts, group by group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


Policy = Literal["random", "uncertainty", "coop"]
# (probabilities (n, M), interventions (n, M), NaN where untouched) -> class scores (n, K)
Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class InterventionCurve:
    """Task accuracy after 0, 1, ... all groups were set to the truth; `order` `(n, groups)` is who was set when."""

    policy: str
    num_groups: list[int]
    accuracy: list[float]
    order: np.ndarray

    def area(self) -> float:
        """The mean accuracy over the curve, by trapezia: one number for a policy."""
        return float(np.trapezoid(self.accuracy, self.num_groups) / (self.num_groups[-1] - self.num_groups[0]))


def intervention_curve(
    predict: Predict,
    probabilities: np.ndarray,
    truth: np.ndarray,
    labels: np.ndarray,
    groups: Mapping[str, Sequence[int]],
    *,
    policy: Policy = "random",
    seed: int = 0,
    values: tuple[np.ndarray | float, np.ndarray | float] = (0.0, 1.0),
    uncertainty_weight: float = 1.0,
    importance_weight: float = 1.0,
) -> InterventionCurve:
    """
    The curve of a policy: which group of concepts to correct next, for each example on its own.

    "random": a random order. "uncertainty": groups by their most uncertain concept, |p - 0.5| smallest first. "coop":
    at each step the group with the largest mean over its concepts of
    `uncertainty_weight * entropy(p_j) + importance_weight * E_{v ~ p_j} |P(y | a_j = v) - P(y)|`, y being the class
    predicted at that step: what is uncertain and would change the prediction (after Chauhan et al., arXiv 2212.07430,
    with equal costs; their weights are tuned on held-out data, ours are arguments).

    Args:
        predict: class scores from probabilities and interventions, NaN where nothing is set; a softmax of the scores
            is taken as P(y), which "coop" alone looks at.
        probabilities: `(n, M)`, as predicted.
        truth: `(n, M)` of 0 and 1, by class or by instance; say which beside the curve.
        groups: concepts that are corrected together; see `ConceptData.concept_groups`.
        values: what a false and a true concept is set to, numbers or one for each concept: 0 and 1 for heads that see
            probabilities, [`logit_values`] for heads that see logits.

    Raises:
        ValueError: shapes that do not fit, or no group.
    """
    probabilities, truth, labels = (np.asarray(array) for array in (probabilities, truth, labels))
    if probabilities.shape != truth.shape or len(labels) != len(truth) or not groups:
        raise ValueError(
            f"probabilities {probabilities.shape}, truth {truth.shape}, labels {labels.shape}, {len(groups)} groups."
        )
    low, high = (np.broadcast_to(value, truth.shape) for value in values)
    corrected = np.where(truth == 1, high, low).astype(np.float64)
    members = np.array([np.isin(np.arange(truth.shape[1]), list(group)) for group in groups.values()])
    everyone = np.arange(len(labels))
    fixed_order = _fixed_order(policy, probabilities, members, seed)
    done = np.zeros((len(labels), len(groups)), dtype=bool)
    current = np.full(truth.shape, np.nan)
    accuracy, order = [_accuracy(predict(probabilities, current), labels)], []
    for step in range(len(groups)):
        if fixed_order is not None:
            chosen = fixed_order[:, step]
        else:
            worth = _coop_worth(predict, probabilities, current, (low, high), uncertainty_weight, importance_weight)
            score = (worth @ members.T) / members.sum(axis=1)
            chosen = np.where(done, -np.inf, score).argmax(axis=1)
        done[everyone, chosen] = True
        current = np.where(members[chosen], corrected, current)
        accuracy.append(_accuracy(predict(probabilities, current), labels))
        order.append(chosen)
    return InterventionCurve(policy, list(range(len(groups) + 1)), accuracy, np.stack(order, axis=1))


def logit_values(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What to set the logits of a false and of a true concept to: the 5th and 95th percentile of the training
    predictions `(n, M)`, as in Koh et al."""
    low, high = np.percentile(logits, [5, 95], axis=0)
    return low, high


def _fixed_order(policy: str, probabilities: np.ndarray, members: np.ndarray, seed: int) -> np.ndarray | None:
    if policy == "random":
        return np.random.default_rng(seed).permuted(np.tile(np.arange(len(members)), (len(probabilities), 1)), axis=1)
    if policy == "uncertainty":
        margin = np.abs(probabilities - 0.5)
        closest = np.stack([margin[:, group].min(axis=1) for group in members], axis=1)
        return closest.argsort(axis=1, kind="stable")
    if policy == "coop":
        return None  # depends on what was set before
    raise ValueError(f"policy={policy!r}: choose random, uncertainty or coop.")


def _coop_worth(
    predict: Predict,
    probabilities: np.ndarray,
    current: np.ndarray,
    values: tuple[np.ndarray, np.ndarray],
    uncertainty_weight: float,
    importance_weight: float,
) -> np.ndarray:
    """`(n, M)`: what asking about each concept is worth; concepts that are set already are worth nothing."""
    p = np.clip(probabilities, 1e-12, 1 - 1e-12)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    now = _softmax(predict(probabilities, current))
    predicted = now.argmax(axis=1)[:, None]
    before = np.take_along_axis(now, predicted, axis=1)[:, 0]
    change = np.zeros_like(entropy)
    for concept in range(entropy.shape[1]):
        for value, chance in ((values[0], 1 - p[:, concept]), (values[1], p[:, concept])):
            tried = current.copy()
            tried[:, concept] = value[:, concept]
            after = np.take_along_axis(_softmax(predict(probabilities, tried)), predicted, axis=1)[:, 0]
            change[:, concept] += chance * np.abs(after - before)
    return np.where(np.isnan(current), uncertainty_weight * entropy + importance_weight * change, 0.0)


def _softmax(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((np.asarray(scores).argmax(axis=1) == labels).mean())


__all__ = ["InterventionCurve", "intervention_curve", "logit_values"]
