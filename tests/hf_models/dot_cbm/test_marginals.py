"""Masses of patches and concepts: they are distributions, whatever they are made of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_models.dot_cbm.marginals import concept_marginal, cooccurrence, mask_marginal, patch_marginal


seeds = st.integers(0, 10_000)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- theta


def test_theta_of_a_known_saliency():
    saliency = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    z = math.sqrt(1.5)  # mean 2, variance 2/3
    for temperature in (1.0, 0.5):
        e = math.exp(z / temperature)
        expected = torch.tensor([1 / e, 1, e], dtype=torch.float64) / (1 / e + 1 + e)
        torch.testing.assert_close(patch_marginal(saliency, temperature=temperature, floor=0.0)[0], expected)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(0.1, 5.0))
def test_theta_is_a_distribution_that_sees_neither_shift_nor_scale(seed, shift, scale, temperature):
    saliency = random(2, 11, seed=seed)
    theta = patch_marginal(saliency, temperature=temperature)
    torch.testing.assert_close(theta.sum(-1), torch.ones(2, dtype=torch.float64))
    assert (theta > 0).all()
    torch.testing.assert_close(patch_marginal(saliency * scale + shift, temperature=temperature), theta)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(patch_marginal(saliency[:, order], temperature=temperature), theta[:, order])


def test_theta_becomes_uniform_with_the_temperature_and_for_a_constant_saliency():
    uniform = torch.full((2, 9), 1 / 9)
    torch.testing.assert_close(patch_marginal(random(2, 9, seed=0).float(), temperature=1e6), uniform)
    for value in (0.0, 0.1, 1e4, -1e-30):
        torch.testing.assert_close(patch_marginal(torch.full((2, 9), value)), uniform)


def test_the_raw_dot_product_would_be_one_patch_and_the_standardised_is_not():
    """Unit-variance features of 768 entries and 324 patches, as the digest of the paper measured."""
    generator = torch.Generator().manual_seed(0)
    saliency = torch.randn(1, 324, 768, generator=generator) @ torch.randn(768, generator=generator)
    effective = [1 / theta.pow(2).sum() for theta in (saliency.softmax(-1), patch_marginal(saliency))]
    assert effective[0] < 3 and effective[1] > 60


def test_patches_outside_the_mask_have_no_mass_and_no_say():
    saliency = random(2, 6, seed=3)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0]])
    theta = patch_marginal(saliency, patch_mask=mask)
    assert (theta[mask == 0] == 0).all()
    for row in range(2):
        kept = mask[row].bool()
        torch.testing.assert_close(theta[row, kept], patch_marginal(saliency[row : row + 1, kept])[0])
    nothing = patch_marginal(saliency, patch_mask=torch.zeros(2, 6))
    torch.testing.assert_close(nothing, patch_marginal(saliency))


def test_the_floor_is_the_least_mass():
    theta = patch_marginal(torch.tensor([[0.0, 0.0, 0.0, 100.0]]), temperature=0.01, floor=1e-3)
    torch.testing.assert_close(theta[0], torch.tensor([1e-3, 1e-3, 1e-3, 1.0]) / 1.003)


def test_a_mask_is_a_marginal_proportional_to_what_it_covers():
    coverage = torch.tensor([[0.0, 0.5, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    theta = mask_marginal(coverage, floor=0.0)
    torch.testing.assert_close(theta, torch.tensor([[0.0, 0.25, 0.5, 0.25], [0.25, 0.25, 0.25, 0.25]]))
    theta = mask_marginal(coverage, floor=0.0, patch_mask=torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]))
    torch.testing.assert_close(theta, torch.tensor([[0.0, 0.5, 0.0, 0.5], [0.5, 0.0, 0.0, 0.5]]))


# --- gamma


# Three classes; concept 0 in all of them, concept 1 in two, concept 2 in one that has all.
KNOWN = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])


def test_cooccurrence_of_a_known_matrix():
    # r_0 = 3/3 + 2/3 + 1/3, r_1 = 2/2 + 2/2 + 1/2, r_2 = 1 + 1 + 1
    torch.testing.assert_close(cooccurrence(KNOWN), torch.tensor([2.0, 2.5, 3.0], dtype=torch.float64))


def test_gamma_of_a_known_matrix():
    e = torch.tensor([2.0, 2.5, 3.0], dtype=torch.float64).exp()
    paper = (1 - e / e.sum()) / 2
    torch.testing.assert_close(concept_marginal(KNOWN, 3, prior="paper", floor=0.0), paper.float())
    for temperature in (1.0, 0.1):
        s = ((1 - torch.tensor([2.0, 2.5, 3.0], dtype=torch.float64) / 3) / temperature).exp()
        gamma = concept_marginal(KNOWN, 3, prior="cooccurrence", temperature=temperature, floor=0.0)
        torch.testing.assert_close(gamma, (s / s.sum()).float())


def test_equation_18_as_printed_is_no_distribution():
    e = cooccurrence(KNOWN).exp()
    torch.testing.assert_close((1 - e / e.sum()).sum(), torch.tensor(2.0, dtype=torch.float64))  # M - 1


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(["uniform", "paper", "cooccurrence"]), st.integers(1, 12), st.floats(0.0, 1.0))
def test_gamma_is_a_distribution_with_dead_and_ever_present_concepts(seed, prior, count, share):
    generator = torch.Generator().manual_seed(seed)
    matrix = (torch.rand(7, count, generator=generator) < share).long()
    matrix[:, seed % count] = seed % 2  # in no class, or in all
    gamma = concept_marginal(matrix, count, prior=prior)
    assert gamma.dtype == torch.float32 and gamma.isfinite().all() and (gamma > 0).all()
    torch.testing.assert_close(gamma.sum(), torch.tensor(1.0))
    order = torch.randperm(count, generator=generator)
    torch.testing.assert_close(concept_marginal(matrix[:, order], count, prior=prior), gamma[order])


@pytest.mark.parametrize("prior", ["paper", "cooccurrence"])
def test_all_concepts_alike_and_no_matrix_are_uniform(prior):
    for matrix in (torch.ones(4, 5), torch.zeros(4, 5), None, torch.eye(5)):
        torch.testing.assert_close(concept_marginal(matrix, 5, prior=prior), torch.full((5,), 0.2))


def test_a_concept_of_no_class_has_the_floor_and_no_more():
    matrix = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    gamma = concept_marginal(matrix, 4, prior="cooccurrence", floor=1e-6)
    torch.testing.assert_close(gamma[1], torch.tensor(1e-6), rtol=1e-4, atol=0)
    assert (gamma[[0, 2, 3]] > 0.2).all()


def test_a_matrix_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"\(classes, 4\)"):
        concept_marginal(torch.ones(3, 5), 4)
