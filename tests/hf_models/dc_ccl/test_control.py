"""The bound that the control model rests on, and the losses that it is distilled by."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_models.dc_ccl import control_gap, control_loss


finite = st.floats(min_value=-50, max_value=50, width=32)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12).flatmap(lambda n: st.tuples(*[st.lists(finite, min_size=n, max_size=n)] * 3)))
def test_softmax_is_half_lipschitz(rows):
    """|p - q| <= |F_c - G| / 2 with p = softmax(F_c + F_s) and q = softmax(G + F_s)."""
    cloud, control, co = (torch.tensor(row, dtype=torch.float64) for row in rows)
    off = ((cloud + co).softmax(-1) - (control + co).softmax(-1)).norm()
    assert off <= 0.5 * (cloud - control).norm() + 1e-12


def test_the_bound_is_that_of_the_gradient():
    torch.manual_seed(0)
    cloud, control = torch.randn(2, 7, 5, dtype=torch.float64)
    label = torch.randint(0, 5, (7,))
    gradients = []
    for fixed in (cloud, control):
        co = torch.zeros(7, 5, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(fixed + co, label, reduction="sum").backward()
        gradients.append(co.grad)
    off = (gradients[0] - gradients[1]).norm(dim=-1)
    assert (off <= 0.5 * (cloud - control).norm(dim=-1)).all()
    assert off.mean() <= 0.5 * control_gap(control, cloud)


def test_losses_by_hand():
    control, cloud = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 2.0, 5.0]])
    assert control_loss(control, cloud).item() == pytest.approx(5 / 3)
    assert control_loss(control, cloud, "centered_mse").item() == pytest.approx((0 + 1 + 1) / 3)
    p, q = cloud.softmax(-1), control.softmax(-1)
    assert control_loss(control, cloud, "kl").item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert control_gap(control, cloud).item() == pytest.approx(5**0.5)
    with pytest.raises(ValueError, match="control_loss='l2' is not known"):
        control_loss(control, cloud, "l2")


@pytest.mark.parametrize("kind", ["centered_mse", "kl"])
def test_a_constant_on_all_logits_changes_nothing_where_it_should_not(kind):
    torch.manual_seed(0)
    control, cloud = torch.randn(2, 4, 6)
    shifted = control_loss(control + 3.0, cloud, kind)
    torch.testing.assert_close(shifted, control_loss(control, cloud, kind), rtol=1e-4, atol=1e-5)
    assert control_loss(control + 3.0, cloud, "mse") > control_loss(control, cloud, "mse")


def test_the_target_gets_no_gradient():
    cloud = torch.randn(2, 3, requires_grad=True)
    control = torch.randn(2, 3, requires_grad=True)
    control_loss(control, cloud).backward()
    assert cloud.grad is None and control.grad is not None
