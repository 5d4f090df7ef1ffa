"""From a plan to concept scores, against loops, and what the paper's own read-out does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_models.dot_cbm.readouts import concept_scores, patch_shares
from hf_models.dot_cbm.transport import transport_plan


READOUTS = ("conditional", "topk", "peak", "literal", "dot", "mean")


def score_of(readout, c, q, topk):
    """One concept's score, of lists of cosines and of masses."""
    if readout == "peak":
        return max(mass / max(q) * cosine for mass, cosine in zip(q, c, strict=True))
    if readout == "literal":
        return 1 - min(mass * (1 - cosine) for mass, cosine in zip(q, c, strict=True))
    if readout in ("dot", "mean"):
        return max(c) if readout == "dot" else sum(c) / len(c)
    heavy = sorted(range(len(q)), key=lambda i: -q[i])[: topk if readout == "topk" else len(q)]
    return 1 - sum(q[i] * (1 - c[i]) for i in heavy) / sum(q[i] for i in heavy)


def by_loops(readout, cosine, plan, topk):
    batch, _, concepts = cosine.shape
    return torch.tensor(
        [
            [score_of(readout, cosine[b, :, j].tolist(), plan[b, :, j].tolist(), topk) for j in range(concepts)]
            for b in range(batch)
        ],
        dtype=torch.float64,
    )


def planned(seed=0, batch=2, patches=6, concepts=4):
    generator = torch.Generator().manual_seed(seed)
    u = F.normalize(torch.randn(batch, patches, 5, generator=generator, dtype=torch.float64), dim=-1)
    v = F.normalize(torch.randn(concepts, 5, generator=generator, dtype=torch.float64), dim=-1)
    cosine = u @ v.T
    theta = torch.full((batch, patches), 1 / patches, dtype=torch.float64)
    gamma = torch.full((concepts,), 1 / concepts, dtype=torch.float64)
    return cosine, transport_plan(1 - cosine, theta, gamma)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(READOUTS), st.integers(1, 9))
def test_scores_are_those_of_the_loops_and_patches_have_no_order(seed, readout, topk):
    cosine, plan = planned(seed)
    scores = concept_scores(readout, cosine, plan, topk=topk)
    torch.testing.assert_close(scores, by_loops(readout, cosine, plan, topk))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(concept_scores(readout, cosine[:, order], plan[:, order], topk=topk), scores)


@pytest.mark.parametrize("readout", ["conditional", "topk", "peak", "dot", "mean"])
def test_a_concept_rises_when_a_patch_is_moved_towards_it(readout):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 16, 8, generator=generator, dtype=torch.float64)
    concepts = F.normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64), dim=-1)
    theta, gamma = torch.full((1, 16), 1 / 16, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64)

    def score(patches):
        cosine = F.normalize(patches, dim=-1) @ concepts.T
        return concept_scores(readout, cosine, transport_plan(1 - cosine, theta, gamma), topk=4)[0, 2]

    moved = patches.clone()
    moved[0, 7] = 10 * concepts[2]
    assert score(moved) > score(patches) + 0.01


@pytest.mark.parametrize("eps", [0.01, 0.05, 0.1, 1.0])
def test_the_printed_readout_is_0_731_for_every_concept_of_every_image(eps):
    """Every concept has one patch that fits it, of 324; Eq. 11-12 do not notice, and choose another patch."""
    generator = torch.Generator().manual_seed(0)
    concepts = F.normalize(torch.randn(312, 64, generator=generator), dim=-1)
    patches = F.normalize(torch.randn(1, 324, 64, generator=generator), dim=-1)
    patches[0, :312] = F.normalize(concepts + 0.1 * torch.randn(312, 64, generator=generator), dim=-1)
    cosine = patches @ concepts.T
    plan = transport_plan(1 - cosine, torch.full((1, 324), 1 / 324), torch.full((312,), 1 / 312), eps=eps)
    activations = concept_scores("literal", cosine, plan).sigmoid()
    assert (activations - 1 / (1 + math.exp(-1))).abs().max() < 1e-4
    if eps <= 0.1:
        chosen = (plan * (1 - cosine)).argmin(1)[0]
        assert (chosen != torch.arange(312)).all()
    sane = concept_scores("conditional", cosine, plan)
    if eps <= 0.05:
        assert sane.min() > 0.5


def test_patches_outside_the_mask_do_not_count():
    cosine, _ = planned()
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()
    theta = mask / mask.sum(1, keepdim=True).double()
    plan = transport_plan(1 - cosine, theta, torch.full((4,), 0.25, dtype=torch.float64))
    for readout in READOUTS:
        scores = concept_scores(readout, cosine, plan, topk=3, patch_mask=mask)
        for row in range(2):
            kept = mask[row]
            alone = concept_scores(readout, cosine[row : row + 1, kept], plan[row : row + 1, kept], topk=3)
            torch.testing.assert_close(scores[row : row + 1], alone)


def test_maps_without_transport_are_columns_of_a_plan_with_free_rows():
    cosine, _ = planned()
    gamma = torch.full((4,), 0.25, dtype=torch.float64)
    column = (cosine / 0.1).exp()
    free = gamma * column / column.sum(1, keepdim=True)  # the plan of least cost whose columns alone are given
    torch.testing.assert_close(patch_shares(cosine, eps=0.1) * gamma, free)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()
    shares = patch_shares(cosine, patch_mask=mask)
    assert (shares[~mask] == 0).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, dtype=torch.float64))


def test_a_concept_without_mass_has_a_score_without_nan():
    cosine, plan = planned()
    plan[:, :, 1] = 0
    for readout in READOUTS:
        assert concept_scores(readout, cosine, plan).isfinite().all()


def test_an_unknown_readout_is_refused():
    with pytest.raises(ValueError, match="'vanilla'"):
        concept_scores("vanilla", *planned())
