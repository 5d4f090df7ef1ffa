"""Intervention curves on heads whose answers are known."""

import numpy as np
import pytest

from trainers.evaluation.interventions import intervention_curve, logit_values


CODES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]])
LABELS = np.arange(8)
GROUPS = {"a": [0], "b": [1], "c": [2]}


def predict(probabilities, interventions):
    """The class is the three concepts, read as a number."""
    values = np.where(np.isnan(interventions), probabilities, interventions)
    return -4 * ((values[:, None] - CODES) ** 2).sum(axis=-1)


@pytest.mark.parametrize("policy", ["random", "uncertainty", "coop"])
def test_all_groups_set_to_truth_end_at_one(policy):
    wrong = np.where(CODES == 1, 0.4, 0.6)
    curve = intervention_curve(predict, wrong, CODES, LABELS, GROUPS, policy=policy)
    assert curve.num_groups == [0, 1, 2, 3] and curve.accuracy == [0.0, 0.0, 0.0, 1.0]
    assert (np.sort(curve.order, axis=1) == [0, 1, 2]).all()
    assert curve.area() == pytest.approx(0.5 / 3)


def test_uncertainty_asks_about_what_is_uncertain():
    probabilities = np.where(CODES == 1, 0.95, 0.05)
    probabilities[:, 1] = np.where(CODES[:, 1] == 1, 0.45, 0.55)  # wrong, and nearly undecided
    curve = intervention_curve(predict, probabilities, CODES, LABELS, GROUPS, policy="uncertainty")
    assert curve.accuracy == [0.0, 1.0, 1.0, 1.0] and (curve.order[:, 0] == 1).all()


def test_coop_asks_about_what_would_change_the_answer():
    """Two concepts are equally uncertain, one of them the head ignores."""

    def first_two(probabilities, interventions):
        values = np.where(np.isnan(interventions), probabilities, interventions)
        return -4 * ((values[:, None, :2] - CODES[None, ::2, :2]) ** 2).sum(axis=-1)

    probabilities = np.where(CODES == 1, 0.95, 0.05)
    probabilities[:, 1] = np.where(CODES[:, 1] == 1, 0.45, 0.55)
    probabilities[:, 2] = 0.5
    labels = LABELS // 2
    coop = intervention_curve(first_two, probabilities, CODES, labels, GROUPS, policy="coop", uncertainty_weight=0.1)
    assert (coop.order[:, 0] == 1).all() and coop.accuracy[1] == 1.0
    plain = intervention_curve(first_two, probabilities, CODES, labels, GROUPS, policy="uncertainty")
    assert (plain.order[:, 0] == 2).all() and plain.accuracy[1] == 0.0


def test_a_group_is_set_at_once_and_the_rest_left_alone():
    seen = []

    def watch(probabilities, interventions):
        seen.append(interventions.copy())
        return predict(probabilities, interventions)

    groups = {"both": [0, 2], "one": [1]}
    curve = intervention_curve(
        watch, np.full((8, 3), 0.5), CODES, LABELS, groups, seed=3, values=(-2.0, np.full(3, 5))
    )
    assert np.isnan(seen[0]).all() and not np.isnan(seen[2]).any()
    assert (seen[2] == np.where(CODES == 1, 5.0, -2.0)).all()
    both = curve.order[:, 0] == 0
    assert (np.isnan(seen[1]) == np.where(both[:, None], [[False, True, False]], [[True, False, True]])).all()
    again = intervention_curve(predict, np.full((8, 3), 0.5), CODES, LABELS, groups, seed=3)
    assert (again.order == curve.order).all()


def test_values_for_heads_that_see_logits():
    low, high = logit_values(np.stack([np.arange(101.0), np.zeros(101)], axis=1))
    assert low.tolist() == [5.0, 0.0] and high.tolist() == [95.0, 0.0]


def test_bad_arguments():
    with pytest.raises(ValueError, match="policy='best'"):
        intervention_curve(predict, CODES, CODES, LABELS, GROUPS, policy="best")
    with pytest.raises(ValueError, match="0 groups"):
        intervention_curve(predict, CODES, CODES, LABELS, {})
