# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Draws of active experts: their frequencies, their reproducibility, the budget, what is refused."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hf_models.moe.configuration_m_moe import MMoeConfig
from hf_models.moe.configuration_sigma_moe import SigmaMoeConfig
from hf_models.moe.expert_sampling import ExpertSampling, phds_stages
from tests.forked import run_python


LAWS = {
    "uniform": {},
    "tau=2": {"k_distribution": "capacity", "k_tau": 2.0},
    "tau=1": {"k_distribution": "capacity", "k_tau": 1.0},
}
MODES = ("global_batch", "micro_batch", "layer")


@pytest.mark.parametrize(("law", "expected"), [("uniform", 3.5), ("tau=2", 3.96), ("tau=1", 4.33)])
def test_expected_k_is_the_closed_form(law, expected):
    assert ExpertSampling(1, 6, **LAWS[law]).expected_k == pytest.approx(expected, abs=5e-3)


def test_probabilities_of_the_capacity_law():
    ps = ExpertSampling(1, 6, k_distribution="capacity").probabilities()
    assert [round(p, 3) for p in ps.values()] == [0.092, 0.131, 0.160, 0.185, 0.206, 0.226]
    assert sum(ps.values()) == pytest.approx(1)
    flat = ExpertSampling(2, 5, k_distribution="capacity", k_tau=1e9).probabilities()
    assert flat == pytest.approx({k: 0.25 for k in range(2, 6)})


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("mode", MODES)
def test_frequencies_are_those_of_the_law(law, mode):
    sampling = ExpertSampling(1, 6, k_sampling=mode, k_seed=3, **LAWS[law])
    number, layers = 3000, 3
    draws = [sampling.draw(step, micro, layers) for step in range(number) for micro in range(2)]
    independent = {
        "layer": [k for ks in draws for k in ks],
        "micro_batch": [ks[0] for ks in draws],
        "global_batch": [ks[0] for ks in draws[::2]],
    }[mode]
    counts = Counter(independent)
    expected = {k: p * len(independent) for k, p in sampling.probabilities().items()}
    assert counts.keys() == expected.keys()
    assert chisquare([counts[k] for k in expected], list(expected.values())).pvalue > 1e-3


def test_draws_of_neighbouring_layers_micro_batches_and_steps_are_independent():
    sampling = ExpertSampling(1, 4, k_seed=1)
    for a, b in (((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (0, 1, 0)), ((0, 0, 0), (1, 0, 0))):
        pairs = Counter()
        for step in range(0, 8000, 2):
            pairs[tuple(sampling.draw(step + s, m, 2)[layer] for s, m, layer in (a, b))] += 1
        assert chisquare([pairs[i, j] for i in range(1, 5) for j in range(1, 5)]).pvalue > 1e-3


def test_what_is_shared_within_each_mode():
    steps, micros, layers = range(40), range(3), 5
    for mode in MODES:
        draws = {(s, m): ExpertSampling(1, 6, k_sampling=mode).draw(s, m, layers) for s in steps for m in micros}
        one_k = all(len(set(ks)) == 1 for ks in draws.values())
        held = all(draws[s, 0] == draws[s, m] for s in steps for m in micros)
        assert (one_k, held) == {"global_batch": (True, True), "micro_batch": (True, False), "layer": (False, False)}[
            mode
        ]


def test_a_draw_is_the_same_in_another_process_and_another_for_another_seed():
    sampling = ExpertSampling(1, 6, k_seed=7, k_budget=1.1)
    here = [sampling.draw(step, 1, 8) for step in range(20)]
    code = (
        "from hf_models.moe.expert_sampling import ExpertSampling\n"
        "s = ExpertSampling(1, 6, k_seed=7, k_budget=1.1)\n"
        "print([s.draw(step, 1, 8) for step in range(20)])"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(here)
    assert here != [ExpertSampling(1, 6, k_seed=8, k_budget=1.1).draw(step, 1, 8) for step in range(20)]


def test_draws_do_not_change_between_versions_of_this_file():
    """A run resumed with a later version must go on with the draws of the earlier one."""
    assert ExpertSampling(1, 6).draw(0, 0, 6) == [3, 4, 1, 2, 6, 6]
    assert ExpertSampling(1, 6, k_distribution="capacity", k_budget=1.0, k_seed=5).draw(123, 4, 6) == [
        3,
        5,
        6,
        3,
        2,
        5,
    ]


@settings(deadline=None, max_examples=60)
@given(
    low=st.integers(1, 3),
    width=st.integers(0, 5),
    beta=st.floats(1.0, 2.0),
    layers=st.integers(1, 12),
    step=st.integers(0, 10**6),
)
def test_the_budget_holds_and_takes_no_more_than_it_must(low, width, beta, layers, step):
    free = ExpertSampling(low, low + width)
    tight = ExpertSampling(low, low + width, k_budget=beta)
    budget = math.ceil(round(beta * layers * free.expected_k, 9))
    before, after = free.draw(step, 0, layers), tight.draw(step, 0, layers)
    assert tight.budget_of(layers) == budget
    assert sum(after) == min(sum(before), budget)
    assert all(low <= b <= a for a, b in zip(before, after))


def test_the_budget_takes_from_random_layers():
    taken = Counter()
    for step in range(2000):
        before = ExpertSampling(1, 6).draw(step, 0, 4)
        after = ExpertSampling(1, 6, k_budget=1.0).draw(step, 0, 4)
        taken.update({layer: a - b for layer, (a, b) in enumerate(zip(before, after))})
    assert min(taken.values()) > 0.85 * max(taken.values())


def test_fields_of_a_config_there_and_back():
    sampling = ExpertSampling(2, 5, k_distribution="capacity", k_tau=1.5, k_budget=1.2, k_seed=9)
    config = SigmaMoeConfig(num_experts=8)
    assert ExpertSampling.from_config(config) is None
    sampling.write_to(config)
    config.validate()
    assert ExpertSampling.from_config(config) == sampling
    assert ExpertSampling.from_config(MMoeConfig()) == ExpertSampling(1, 6)
    by_default = SigmaMoeConfig(k_sampling="global_batch", num_experts_per_tok=3)
    assert ExpertSampling.from_config(by_default) == ExpertSampling(1, 3, k_sampling="global_batch")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_min": 0}, "k_min=0 and k_max=6 must satisfy"),
        ({"k_min": 7}, "k_min=7 and k_max=6 must satisfy"),
        ({"k_sampling": "none"}, "k_sampling='none' draws nothing"),
        ({"k_distribution": "normal"}, "k_distribution='normal' draws nothing"),
        ({"k_tau": 0.0}, "k_tau=0.0 must be positive"),
        ({"k_budget": 1.1, "k_sampling": "micro_batch"}, "takes experts from single layers"),
        ({"k_budget": 0.2}, "k_budget=0.2 allows 0.70 experts a layer, fewer than k_min=1"),
    ],
)
def test_impossible_laws_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertSampling(**{"k_min": 1, "k_max": 6, **fields})


def test_the_phds_stages_mix_and_then_stay_sparse():
    (start, mixed), (later, sparse) = phds_stages(2, 8, anchor_share=0.25, k_seed=4)
    assert (start, later) == (0.0, 0.75) and (mixed.k_min, mixed.k_max) == (2, 8)
    assert (sparse.k_min, sparse.k_max, sparse.k_seed, sparse.k_sampling) == (2, 2, 4, "micro_batch")
    assert phds_stages(2, 8, anchor_k=3)[1][1].k_max == 3
    with pytest.raises(ValueError, match="anchor_share=0"):
        phds_stages(1, 2, anchor_share=0)
