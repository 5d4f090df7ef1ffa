"""Attacks on anonymous embeddings against closed forms, and bounds against the attacks."""

import math

import numpy
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_models.personal_lm import SimulatedNoise, UserDistribution, UserDistributionConfig
from trainers.evaluation.mixture_recovery import mixture_recovery
from trainers.evaluation.privacy import (
    attribution_accuracy,
    dp_epsilon,
    gaussian_attribution_bound,
    linkage_auc,
    membership_auc,
    mixture_attribution_bound,
    privacy_report,
    two_user_attribution,
    user_entropy_report,
)


def gaussians(users: int, radius_over_std: float, *, width: int = 16, std: float = 0.2, seed: int = 0, **fields):
    """Means in random directions at one distance from the centre."""
    table = UserDistribution(UserDistributionConfig(width, std=std, **fields), users)
    directions = torch.randn(users, 1, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        table.mean.add_(radius_over_std * std * directions / directions.norm(dim=2, keepdim=True))
    return table


def mixture(weights: torch.Tensor, *, std: float = 0.01, seed: int = 0):
    count = weights.shape[1]
    config = UserDistributionConfig(8, design="mixture", num_components=count, std=std)
    components = torch.randn(count, 1, 8, generator=torch.Generator().manual_seed(seed))
    table = UserDistribution(config, len(weights), components=components)
    table.set_weights(weights)
    return table


# --- attribution


@pytest.mark.parametrize("separation", [0.25, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("links", [1, 4])
def test_two_users_are_told_apart_as_often_as_phi_says(separation, links):
    table = UserDistribution(UserDistributionConfig(24, 2, std=0.5), 2)
    with torch.no_grad():
        table.mean[1] += separation * 0.5 / math.sqrt(48)
    count = 3000
    found = attribution_accuracy(table, links=links, draws=count, noise=SimulatedNoise(0))
    expected = two_user_attribution(separation * math.sqrt(links))
    assert abs(found - expected) < 3 * math.sqrt(expected * (1 - expected) / (2 * count)) + 1e-4


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 0.030), (1, 0.08), (2, 0.32), (4, 0.90), (8, 1.0)])
def test_a_hundred_users_as_in_the_digest_s_table(ratio, expected):
    found = attribution_accuracy(gaussians(100, ratio, width=64), draws=60, noise=SimulatedNoise(1))
    assert found == pytest.approx(expected, rel=0.3, abs=0.01)


def test_closeness_is_a_matter_of_the_l2_norm():
    """A gap of .01 in each of 768 entries is 1.39 standard deviations of .2."""
    assert two_user_attribution(0.01 * math.sqrt(768) / 0.2) == pytest.approx(0.76, abs=0.005)


def test_equal_users_are_guessed_among():
    assert attribution_accuracy(gaussians(10, 0.0), draws=50) == pytest.approx(0.1)
    weights = torch.eye(2).repeat(5, 1)
    assert attribution_accuracy(mixture(weights), draws=100) == pytest.approx(2 / 10)


@settings(max_examples=15, deadline=None)
@given(users=st.integers(2, 12), count=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_no_mixture_is_attributed_better_than_its_bound_and_that_is_at_most_k_of_n(users, count, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(users, count, generator=generator) ** 4 + 1e-6
    weights /= weights.sum(1, keepdim=True)
    bound = mixture_attribution_bound(weights)
    assert bound <= count / users + 1e-9
    draws = 300
    found = attribution_accuracy(mixture(weights, seed=seed), draws=draws, noise=SimulatedNoise(seed))
    assert found <= bound + 4 * math.sqrt(0.25 / (draws * users))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("links", [1, 4])
def test_no_gaussian_is_attributed_better_than_its_bound(ratio, links):
    found = attribution_accuracy(gaussians(20, ratio), links=links, draws=400, noise=SimulatedNoise(0))
    assert found <= gaussian_attribution_bound(ratio, 20, links=links) + 0.02


def test_the_gaussian_bound_is_the_total_variation_of_scipy():
    def gap(x):
        return abs(scipy.stats.norm.pdf(x, 1.3) - scipy.stats.norm.pdf(x)) / 2

    variation = scipy.integrate.quad(gap, -9, 10, limit=200)[0]
    assert gaussian_attribution_bound(1.3, 10) == pytest.approx(0.1 + variation, abs=1e-6)


# --- linkage and membership


def test_linkage_by_both_attackers():
    near, far = gaussians(20, 0.0), gaussians(20, 8.0)
    for attacker in ("informed", "blind"):
        assert linkage_auc(far, attacker=attacker, noise=SimulatedNoise(0)) > 0.99
        assert linkage_auc(near, attacker=attacker, noise=SimulatedNoise(0)) == pytest.approx(0.5, abs=0.03)
    middle = gaussians(20, 2.0)
    informed, blind = (
        linkage_auc(middle, attacker=name, pairs=4000, noise=SimulatedNoise(0)) for name in ("informed", "blind")
    )
    assert 0.55 < blind < informed + 0.02 and informed < 0.95
    with pytest.raises(ValueError, match="two users"):
        linkage_auc(gaussians(1, 1.0))
    with pytest.raises(ValueError, match="informed"):
        linkage_auc(far, attacker="lucky")


def test_membership_of_a_shift_is_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    members = torch.randn(20_000, generator=generator) - 1
    others = torch.randn(20_000, generator=generator)
    assert membership_auc(members, others) == pytest.approx(scipy.stats.norm.cdf(1 / math.sqrt(2)), abs=0.01)
    assert membership_auc([0.1, 0.2], [0.3, 0.4]) == 1.0


# --- differential privacy


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_epsilon_is_where_the_exact_privacy_profile_meets_delta(ratio, delta):
    """By numerical integration of the privacy loss, an independent road to delta(epsilon)."""
    epsilon, gap = dp_epsilon(ratio, delta=delta), 2 * ratio

    def excess(x):
        return max(0.0, scipy.stats.norm.pdf(x, gap) - math.exp(epsilon) * scipy.stats.norm.pdf(x))

    start = (epsilon + gap**2 / 2) / gap if epsilon > 0 else gap / 2  # where the densities' ratio is e^epsilon
    reached = scipy.integrate.quad(excess, start, start + 12, limit=200)[0]
    if epsilon > 1e-6:
        assert reached == pytest.approx(delta, rel=1e-3)
    else:
        assert reached <= delta + 1e-9


def test_the_classical_bound_is_above_the_exact_one_and_uploads_compose():
    delta = 1e-5
    for ratio in (0.01, 0.05, 0.1):
        classical = 2 * ratio * math.sqrt(2 * math.log(1.25 / delta))
        assert classical <= 1 and dp_epsilon(ratio, delta=delta) <= classical
    assert dp_epsilon(0.5, uploads=4) == pytest.approx(dp_epsilon(1.0))
    assert dp_epsilon(0.0) == 0.0 and dp_epsilon(40.0) > 1000
    found = [dp_epsilon(r) for r in (0.1, 0.2, 1.0, 4.0)]
    assert found == sorted(found)
    for fields in ({"delta": 0.0}, {"uploads": 0}):
        with pytest.raises(ValueError):
            dp_epsilon(1.0, **fields)


def test_only_what_is_proved_is_reported():
    bounded = privacy_report(gaussians(8, 1.0, max_radius=0.2), draws=20)
    assert bounded.epsilon == pytest.approx(dp_epsilon(1.0), rel=1e-4) and bounded.attribution <= bounded.bound + 0.15
    assert bounded.radius_over_std_max == pytest.approx(1.0, abs=1e-4) and bounded.chance == 1 / 8
    free = privacy_report(gaussians(8, 1.0), draws=20)
    assert free.epsilon is None and free.bound is None
    beta = privacy_report(UserDistribution(UserDistributionConfig(4, design="beta"), 4), draws=20)
    assert beta.epsilon is None and beta.bound is None and beta.attribution == pytest.approx(0.25)
    shared = privacy_report(mixture(torch.eye(3).repeat(3, 1)), draws=20)
    assert (
        shared.epsilon is None and shared.bound == pytest.approx(3 / 9) and set(shared.attribution_linked) == {4, 16}
    )


def test_no_bound_is_claimed_of_means_beyond_the_radius():
    table = gaussians(8, 3.0, max_radius=0.2)
    with pytest.raises(ValueError, match=r"of user \d lies 0\.6 from the centre, beyond max_radius=0\.2"):
        privacy_report(table, draws=20)
    with torch.no_grad():
        table.mean[3] = float("nan")
    with pytest.raises(ValueError, match="user 3"):
        privacy_report(table, draws=20)
    table = gaussians(8, 3.0, max_radius=0.2)
    table.project_()
    assert privacy_report(table, draws=20).epsilon == pytest.approx(dp_epsilon(1.0), rel=1e-4)


# --- recovery


def test_far_gaussians_are_recovered_from_their_pool():
    found = mixture_recovery(gaussians(6, 8.0), uploads_per_user=60, noise=SimulatedNoise(0))
    assert found.error < 0.4 * found.error_of_one_mean
    assert found.attribution_known > 0.99 and found.attribution > 0.9


def test_near_gaussians_are_not():
    found = mixture_recovery(gaussians(6, 0.5), uploads_per_user=60, noise=SimulatedNoise(0))
    assert found.attribution < found.attribution_known + 0.05 < 0.5


def test_far_betas_are_recovered_and_near_ones_are_attributed_by_who_knows_them_only():
    config = UserDistributionConfig(32, design="beta")
    table = UserDistribution(config, 6)
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(parameter.shape, generator=generator) for name, parameter in table.named_parameters()}
    results = {}
    for spread in (1.5, 0.2):
        with torch.no_grad():
            for (name, parameter), value in zip(table.named_parameters(), (config.initial_alpha, config.initial_beta)):
                parameter.copy_(value * (spread * start[name] / 2).exp())
        results[spread] = mixture_recovery(table, uploads_per_user=80, noise=SimulatedNoise(0))
    assert results[1.5].attribution > 0.9 and results[1.5].error < 0.5 * results[1.5].error_of_one_mean
    near = results[0.2]
    assert near.attribution_known > near.attribution + 0.1


def test_a_shared_mixture_has_nobody_s_component():
    with pytest.raises(ValueError, match="no component of each user"):
        mixture_recovery(mixture(torch.eye(2)))


# --- the paper's analysis plot


def test_entropy_bins_by_hand():
    predictions = torch.tensor([[0, 0, 0], [0, 1, 2], [0, 0, 1], [2, 2, 2]])
    correct = {"ours": torch.tensor([1, 1, 0, 0]).bool(), "central": torch.tensor([1, 0, 0, 1]).bool()}
    bins = user_entropy_report(predictions, correct, 3)
    assert len(bins) == 6 and [b.count for b in bins] == [2, 0, 0, 1, 0, 1]
    assert bins[0].accuracy == {"ours": 0.5, "central": 1.0} and bins[1].accuracy["ours"] is None
    assert bins[-1].accuracy == {"ours": 1.0, "central": 0.0} and bins[-1].high == pytest.approx(math.log(3))
    assert numpy.isclose(bins[3].low, math.log(3) / 2)
