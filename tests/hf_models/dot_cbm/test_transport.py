"""The transport plan against its conditions of optimality and a plain matrix scaling in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_models.dot_cbm.transport import sinkhorn_loop, transport_plan


def problem(batch=2, rows=7, columns=5, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(batch, rows, columns, generator=generator, dtype=torch.float64)
    theta = torch.rand(batch, rows, generator=generator, dtype=torch.float64) + 0.1
    gamma = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    return cost.to(dtype), (theta / theta.sum(-1, keepdim=True)).to(dtype), (gamma / gamma.sum()).to(dtype)


def scaled(cost, theta, gamma, eps, iterations):
    """Sinkhorn and Knopp's scaling of exp(-cost / eps), in the space of the plan."""
    plans = []
    for c, t in zip(cost, theta, strict=True):
        kernel, v = (-c / eps).exp(), gamma
        for _ in range(iterations):
            u = t / (kernel @ v)
            v = gamma / (kernel.T @ u)
        plans.append(u[:, None] * kernel * v)
    return torch.stack(plans)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.05])
def test_it_is_matrix_scaling(eps):
    cost, theta, gamma = problem()
    expected = scaled(cost, theta, gamma, eps, 30)
    torch.testing.assert_close(sinkhorn_loop(cost, theta, gamma, eps=eps, num_iterations=30), expected)
    single = transport_plan(cost.float(), theta.float(), gamma.float(), eps=eps)
    torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-6)


def test_no_plan_with_these_marginals_is_cheaper():
    """The objective <Q, D> - eps H(Q) against plans that are moved along the marginals' null space."""
    cost, theta, gamma = problem(batch=1)
    eps = 0.1
    plan = sinkhorn_loop(cost, theta, gamma, eps=eps, num_iterations=500)[0]

    def objective(q):
        return (q * cost[0]).sum() + eps * (q * q.log()).sum()

    for seed in range(20):
        step = torch.randn(plan.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = step - step.mean(0) - step.mean(1, keepdim=True) + step.mean()
        step = step * plan.min() / step.abs().max() * 0.5
        torch.testing.assert_close((plan + step).sum(0), gamma)
        assert objective(plan + step) > objective(plan)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.1, 0.05]))
def test_columns_are_exact_and_patches_and_concepts_have_no_order(seed, eps):
    cost, theta, gamma = problem(seed=seed)
    plan = transport_plan(cost, theta, gamma, eps=eps, num_iterations=50)
    torch.testing.assert_close(plan.sum(1), gamma.expand(2, -1))
    assert (plan >= 0).all() and (eps < 1 or (plan.sum(2) - theta).abs().max() < 1e-9)
    # How fast the rows follow depends on eps and the costs; that their L1 error never grows does not.
    errors = [
        (transport_plan(cost, theta, gamma, eps=eps, num_iterations=count).sum(2) - theta).abs().sum(1)
        for count in (1, 5, 50)
    ]
    assert all((after <= before + 1e-12).all() for before, after in zip(errors, errors[1:]))
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(7, generator=generator), torch.randperm(5, generator=generator)
    moved = transport_plan(cost[:, rows][:, :, columns], theta[:, rows], gamma[columns], eps=eps, num_iterations=50)
    torch.testing.assert_close(moved, plan[:, rows][:, :, columns])


def test_zero_marginals_have_zero_mass_and_no_nan():
    cost, theta, gamma = problem()
    theta[0, 2] = 0
    gamma[3] = 0
    theta, gamma = theta / theta.sum(-1, keepdim=True), gamma / gamma.sum()
    for dtype in (torch.float64, torch.float32):
        leaf = cost.to(dtype, copy=True).requires_grad_()
        plan = transport_plan(leaf, theta.to(dtype), gamma.to(dtype), gradient="unrolled")
        assert plan.isfinite().all() and (plan[0, 2] == 0).all() and (plan[:, :, 3] == 0).all()
        torch.testing.assert_close(plan.sum(1), gamma.to(dtype).expand(2, -1), rtol=1e-5, atol=1e-6)
        plan.pow(2).sum().backward()
        assert leaf.grad.isfinite().all()


def test_autocast_changes_nothing():
    cost, theta, gamma = problem(dtype=torch.float32)
    expected = transport_plan(cost, theta, gamma)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = transport_plan(cost, theta, gamma)
        half = transport_plan(cost.bfloat16(), theta, gamma)
    assert got.dtype == half.dtype == torch.float32 and torch.equal(got, expected)


def test_a_detached_plan_is_a_constant_and_an_unrolled_one_is_not():
    cost, theta, gamma = problem(rows=3, columns=2)
    cost.requires_grad_()
    assert not transport_plan(cost, theta, gamma).requires_grad
    options = {"eps": 0.5, "num_iterations": 5}
    assert torch.autograd.gradcheck(lambda c: sinkhorn_loop(c, theta, gamma, **options), cost)


@pytest.mark.parametrize("rho", [None, 0.3, 10.0])
def test_the_loop_and_the_kernels_have_one_definition(rho):
    """The loop is what a Hub repository runs without our package; with it, the same model gives the same plan."""
    sigma_kernels = pytest.importorskip("sigma_kernels")
    cost, theta, gamma = problem()
    options = {"eps": 0.1, "num_iterations": 30, "rho": rho}
    loop = sinkhorn_loop(cost, theta, gamma, **options)
    torch.testing.assert_close(sigma_kernels.sinkhorn(cost, theta, gamma, **options), loop)
    single = transport_plan(cost.float(), theta.float(), gamma.float(), **options)
    torch.testing.assert_close(single, loop.float(), rtol=1e-4, atol=1e-6)


def test_unbalanced_transport_becomes_balanced_as_its_marginals_become_strict():
    cost, theta, gamma = problem()
    balanced = transport_plan(cost, theta, gamma)
    torch.testing.assert_close(transport_plan(cost, theta, gamma, rho=1e9), balanced)
    loose = transport_plan(cost, theta, gamma, rho=0.05)
    assert loose.sum() < 0.9 * balanced.sum()
