"""The properties that the abstract states, gradients by hand, and Bayes' rule on simulated drift."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from trainers.device_cloud.label_correction import (
    METHODS,
    PRIORS,
    Correction,
    LabelCorrectionError,
    clipped_share,
    correct_labels,
    ctr_statistics,
    local_shares,
    model_prior,
    prior_offset,
    prior_offset_loss,
    prior_weights,
)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
several_users = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=5)
priors = st.floats(0.01, 0.99)


def flat(users, dtype=torch.float64):
    labels = torch.tensor([label for user in users for label in user], dtype=dtype)
    groups = torch.tensor([10 * index for index, user in enumerate(users) for _ in user])
    return labels, groups


@settings(max_examples=80, deadline=None)
@given(several_users, priors, st.sampled_from(["scale", "shift"]), st.booleans(), st.sampled_from(DTYPES))
def test_the_mean_of_each_user_is_the_reference(users, p, method, in_numpy, dtype):
    labels, groups = flat(users, dtype)
    given_labels = labels.numpy() if in_numpy and dtype != torch.bfloat16 else labels
    soft = correct_labels(given_labels, p, method=method, groups=groups)
    assert type(soft) is type(given_labels)
    soft = torch.as_tensor(soft)
    assert soft.dtype == torch.promote_types(dtype, torch.float32)
    soft, labels = soft.double(), labels.double()
    for user in groups.unique():
        own, before = soft[groups == user], labels[groups == user]
        assert own.mean().item() == pytest.approx(p, abs=1e-6)
        order = before.argsort(stable=True)
        assert (own[order].diff() >= 0).all()
        if before.mean() == p:
            assert torch.equal(own, before)
    if method == "scale":
        assert soft.min() >= 0 and soft.max() <= 1


def test_a_user_who_agrees_with_everybody_is_left_alone():
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0])
    for method in ("scale", "shift"):
        assert torch.equal(correct_labels(labels, 0.5, method=method), labels)


@pytest.mark.parametrize("method", ["scale", "shift"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_users_of_one_class(method, value):
    soft = correct_labels(torch.full((7,), value), 0.3, method=method)
    torch.testing.assert_close(soft, torch.full((7,), 0.3))


def test_scale_moves_one_side_and_shift_keeps_the_contrast():
    high, low = torch.tensor([1.0, 1, 1, 0]), torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(correct_labels(high, 0.6), torch.tensor([0.8, 0.8, 0.8, 0]))
    torch.testing.assert_close(correct_labels(low, 0.4), torch.tensor([1, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(correct_labels(high, 0.6, method="shift"), high - 0.15)


def test_a_share_that_is_given_counts():
    labels = np.array([1.0, 0.0], dtype=np.float32)
    soft = correct_labels(labels, 0.25, np.array([0.5, 0.5]))
    assert soft.dtype == np.float32 and soft.tolist() == [0.5, 0.0]
    assert correct_labels(labels, 0.25, 0.25).tolist() == [1.0, 0.0]


def test_a_share_that_is_given_is_not_smoothed():
    with pytest.raises(ValueError, match="smoothing draws the share of the labels"):
        correct_labels(torch.ones(2), 0.25, 0.5, smoothing=3.0)


@pytest.mark.parametrize("method", ["scale", "shift"])
def test_smoothing_goes_half_of_the_way(method):
    labels = torch.ones(10, dtype=torch.float64)
    full, half = (correct_labels(labels, 0.5, method=method, smoothing=strength).mean() for strength in (0.0, 10.0))
    assert full == pytest.approx(0.5) and 0.5 < half < 1
    expected = 0.5 / 0.75 if method == "scale" else 1 - 0.25
    assert half.item() == pytest.approx(expected)


def test_references_by_user():
    labels, groups = torch.tensor([1.0, 0, 1, 0]).double(), ["a", "b", "a", "b"]
    reference = torch.tensor([0.2, 0.7, 0.2, 0.7]).double()
    soft = correct_labels(labels, reference, groups=groups)
    torch.testing.assert_close(soft, reference)


def test_the_common_part_of_the_gradient_vanishes():
    p, labels = 0.35, torch.tensor([1.0, 1, 1, 0, 1]).double()
    for method in (None, "scale", "shift"):
        logits = torch.full((5,), float(np.log(p / (1 - p))), dtype=torch.float64, requires_grad=True)
        target = labels if method is None else correct_labels(labels, p, method=method)
        F.binary_cross_entropy_with_logits(logits, target, reduction="sum").backward()
        expected = 5 * (p - 0.8) if method is None else 0.0
        assert logits.grad.sum().item() == pytest.approx(expected, abs=1e-9)


def test_weights_bring_the_reference_back():
    labels, groups = flat([[1, 1, 1, 0], [0, 0, 1, 0]])
    weights = prior_weights(labels, 0.4, groups=groups)
    for user in groups.unique():
        own, y = weights[groups == user], labels[groups == user]
        assert (own * y).sum() / own.sum() == pytest.approx(0.4) and own.mean() == pytest.approx(1.0)
    one_class = prior_weights(torch.ones(4), 0.4)
    torch.testing.assert_close(one_class, torch.full((4,), 0.4 / clipped_share(1.0, 4)))


def test_an_offset_of_nothing_is_plain_cross_entropy():
    logits, labels = torch.randn(6).double(), torch.tensor([1.0, 0, 0, 1, 0, 0]).double()
    plain = F.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(prior_offset_loss(logits, labels, 1 / 3, 1 / 3), plain)
    torch.testing.assert_close(prior_offset(labels, 1 / 3), torch.zeros(6).double(), atol=1e-12, rtol=0)
    column = prior_offset_loss(logits[:, None], labels, 1 / 3, 1 / 3, num_items_in_batch=torch.tensor(12))
    torch.testing.assert_close(column, plain / 2)


def test_the_offset_is_bayes_rule():
    """Drawn from P(x | y) with a local prior: at the logit under the reference prior, the offset loss is at rest."""
    rng = np.random.default_rng(0)
    n, p_local, p_ref = 400_000, 0.8, 0.3
    y = (rng.random(n) < p_local).astype(float)
    x = rng.normal(np.where(y == 1, 0.7, -0.7), 1.0)  # log P(x | 1) / P(x | 0) = 1.4 x
    logit_ref = 1.4 * x + np.log(p_ref / (1 - p_ref))
    bayes = torch.tensor(np.stack([np.ones(n), x]))  # gradients along a level and a slope
    for offset, at_rest in ((True, True), (False, False)):
        logits = torch.tensor(logit_ref, requires_grad=True)
        share = p_local if offset else p_ref
        prior_offset_loss(logits, torch.tensor(y), share, p_ref).backward()
        pull = (bayes * logits.grad).sum(dim=1).abs().max().item()
        assert (pull < 3e-3) is at_rest


def test_offsets_of_users_of_one_class_are_finite():
    labels, groups = flat([[1] * 5, [0] * 5])
    offset = prior_offset(labels, 0.4, groups=groups)
    assert offset.isfinite().all()
    expected = np.log(0.9 / 0.1) - np.log(0.4 / 0.6)
    torch.testing.assert_close(offset[:5], torch.full((5,), expected).double())


def test_statistics_of_drift():
    labels = np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0], dtype=np.float32)
    found = ctr_statistics(labels, ["u", "u", "u", "u", "v", "v", "v", "v", "w", "w"])
    assert found.global_ctr == 0.5 and found.users.tolist() == ["u", "v", "w"]
    assert found.local_ctr.tolist() == [1, 0.25, 0] and found.counts.tolist() == [4, 4, 2]
    assert found.drift_sd == pytest.approx(np.std([1, 0.25, 0])) and found.deviating == {0.1: 1.0, 0.2: 1.0}
    assert local_shares(labels, np.array([0] * 4 + [1] * 6)) == {0: 1.0, 1: pytest.approx(1 / 6)}
    assert local_shares(torch.from_numpy(labels)) == 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prior", PRIORS)
def test_a_correction_puts_the_pieces_together(method, prior):
    labels, groups = flat([[1, 1, 1, 0], [0, 0, 1, 0, 0]])
    logits = torch.randn(9).double()
    correction = Correction(method=method, prior=prior, global_ctr=0.4, strength=5.0)
    targets = correction.targets(labels, groups, logits)
    reference = model_prior(logits, groups=groups) if prior == "model" else 0.4
    smoothing = 5.0 if prior == "smoothed" else 0.0
    expected = [labels, torch.ones(9).double(), torch.zeros(9).double()]
    if method in ("scale", "shift"):
        expected[0] = correct_labels(labels, reference, method=method, groups=groups, smoothing=smoothing)
    if method == "reweight":
        expected[1] = prior_weights(labels, reference, groups=groups, smoothing=smoothing)
    if method == "offset":
        expected[2] = prior_offset(labels, reference, groups=groups, smoothing=smoothing)
    for got, value in zip((targets.labels, targets.sample_weight, targets.logit_offset), expected):
        assert torch.equal(got, value)
    assert correction.free_intercept is (method == "bias")
    assert correction.name == {"none": "plain", "bias": "bias"}.get(method, f"{method}_{prior}")


def test_the_prior_of_the_model_is_each_users_mean_prediction():
    logits = torch.tensor([0.0, 2.0, -50.0, -60.0])
    prior = model_prior(logits, groups=torch.tensor([3, 3, 1, 1]))
    assert prior[:2].tolist() == [pytest.approx(torch.tensor([0.0, 2.0]).sigmoid().mean().item())] * 2
    assert prior[2:].tolist() == [1e-6, 1e-6]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), "int64"),
        (np.array([0, 1]), "int64"),
        (torch.tensor([True, False]), "bool"),
        (torch.tensor([0.0, 1.5]), "between 0 and 1"),
        (torch.tensor([0.0, float("nan")]), "NaN"),
    ],
)
@pytest.mark.parametrize("function", [correct_labels, prior_weights, prior_offset])
def test_labels_that_cannot_be_corrected(function, labels, message):
    with pytest.raises(LabelCorrectionError, match=message):
        function(labels, 0.5)


@pytest.mark.parametrize("p", [0.0, 1.0, -1.0, float("nan")])
def test_a_reference_lies_between_0_and_1(p):
    with pytest.raises(LabelCorrectionError, match="between 0 and 1"):
        correct_labels(torch.ones(2), p)


def test_what_is_not_known_is_said():
    with pytest.raises(ValueError, match="'offset' changes no labels"):
        correct_labels(torch.ones(2), 0.5, method="offset")
    with pytest.raises(ValueError, match="1 groups for 2 labels"):
        correct_labels(torch.ones(2), 0.5, groups=[1])
    with pytest.raises(ValueError, match="method 'guess'"):
        Correction(method="guess")
    with pytest.raises(ValueError, match="global_ctr"):
        Correction().targets(torch.ones(2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="logits"):
        Correction(prior="model").targets(torch.ones(2), torch.zeros(2).long())
    with pytest.raises(LabelCorrectionError, match="no samples"):
        ctr_statistics(np.zeros(0), [])
