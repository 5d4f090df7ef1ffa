"""The disentangling losses against their definition, a double loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_models.dot_cbm.orthogonality import orthogonality_loss, saliency_weights


def double_loop(unit, weights, form):
    count, total = len(unit), 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                cosine = float(unit[i] @ unit[j])
                total += float(weights[i] * weights[j]) * (cosine if form == "signed" else cosine**2)
    return total / (count * (count - 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["signed", "squared"]), st.integers(2, 9), st.integers(1, 12))
def test_it_is_the_double_loop(seed, form, count, dim):
    generator = torch.Generator().manual_seed(seed)
    unit = F.normalize(torch.randn(3, count, dim, generator=generator, dtype=torch.float64), dim=-1)
    weights = torch.rand(3, count, generator=generator, dtype=torch.float64)
    expected = sum(double_loop(u, w, form) for u, w in zip(unit, weights, strict=True)) / 3
    assert float(orthogonality_loss(unit, weights, form=form)) == pytest.approx(expected, abs=1e-12)
    unweighted = double_loop(unit[0], torch.ones(count), form)
    assert float(orthogonality_loss(unit[0], form=form)) == pytest.approx(unweighted, abs=1e-12)


def test_the_signed_form_prefers_antipodes_to_orthogonal_vectors():
    orthonormal = torch.eye(4, dtype=torch.float64)
    antipodes = torch.eye(4, dtype=torch.float64)[0] * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert float(orthogonality_loss(orthonormal)) == float(orthogonality_loss(orthonormal, form="squared")) == 0
    assert float(orthogonality_loss(antipodes)) == pytest.approx(-1 / 3)
    assert float(orthogonality_loss(antipodes, form="squared")) == pytest.approx(1.0)


def test_one_vector_has_no_pair():
    unit = F.normalize(torch.randn(2, 1, 4), dim=-1).requires_grad_()
    loss = orthogonality_loss(unit)
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("form", ["signed", "squared"])
def test_the_gradient_reaches_the_vectors_and_never_the_weights(form):
    unit = F.normalize(torch.randn(2, 5, 3, dtype=torch.float64), dim=-1).requires_grad_()
    saliency = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    orthogonality_loss(unit, saliency.softmax(-1), form=form).backward()
    assert saliency.grad is None and unit.grad.abs().sum() > 0
    weights = torch.rand(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda u: orthogonality_loss(u, weights, form=form), unit)


def test_weights_are_not_negative_and_at_most_1():
    weights = saliency_weights(torch.tensor([[0.1, 0.4, 0.5], [1 / 3, 1 / 3, 1 / 3]]))
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.8, 1.0], [1.0, 1.0, 1.0]]))
