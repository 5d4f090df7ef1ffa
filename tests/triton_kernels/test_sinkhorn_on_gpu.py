"""Entropic transport where only a GPU can answer: rounding, barriers, graphs, synchronisation, memory."""

import pytest
import torch

from sigma_kernels import reference, sinkhorn
from sigma_kernels.benchmarks.allocations import allocations
from tests.triton_kernels.heads import error
from tests.triton_kernels.transports import check_against_reference, gradients, problem


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [
    pytest.param((128, 324, 312), id="CUB"),
    pytest.param((16, 324, 112), id="fewer concepts"),
    pytest.param((3, 77, 45), id="odd numbers"),
    pytest.param((2, 1000, 1500), id="many columns"),
    pytest.param((2, 40, 5000), id="more columns than the kernel holds"),
    pytest.param((1, 1, 1), id="smallest"),
]


@pytest.mark.parametrize("rho", [None, 0.2])
@pytest.mark.parametrize("eps, limit", [(0.1, 1e-5), (0.01, 1e-4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape, eps, limit, rho):
    cost, theta, gamma = problem(*shape, device="cuda")
    plan = check_against_reference(cost, theta, gamma, eps=eps, rho=rho, limit=limit)
    if rho is None:
        torch.testing.assert_close(plan.sum(1), gamma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_and_strided_costs(dtype):
    cost, theta, gamma = problem(8, 324, 112, device="cuda")
    cost = cost.to(dtype)
    plan = check_against_reference(cost, theta, gamma, limit=1e-5)
    torch.testing.assert_close(sinkhorn(cost.mT.contiguous().mT, theta, gamma), plan, rtol=1e-5, atol=0)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(sinkhorn(cost, theta, gamma), plan)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("rho", [None, 0.3])
def test_gradients(gradient, rho):
    cost, theta, gamma = problem(4, 81, 45, device="cuda")
    upstream = torch.randn_like(cost)
    options = {"eps": 0.2, "num_iterations": 100, "rho": rho}
    expected = gradients(reference.sinkhorn, cost, theta, gamma, upstream.double(), **options)
    got = gradients(sinkhorn, cost, theta, gamma, upstream, gradient=gradient, **options)
    assert all(error(one, other) < 1e-4 for one, other in zip(got, expected))


def test_equal_inputs_give_equal_bits_and_zeros_are_zeros():
    cost, theta, gamma = problem(64, 324, 312, device="cuda")
    theta[:, 100:200], gamma[:, 7], theta[3] = 0.0, 0.0, 0.0
    plan = sinkhorn(cost, theta, gamma)
    assert plan.isfinite().all() and not plan[:, 100:200].any() and not plan[:, :, 7].any() and not plan[3].any()
    assert all(torch.equal(sinkhorn(cost, theta, gamma), plan) for _ in range(5))


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
def test_nothing_waits_for_the_gpu_and_a_graph_holds_it(gradient):
    cost, theta, gamma = problem(4, 81, 45, device="cuda")
    cost.requires_grad_()

    def step():
        plan = sinkhorn(cost, theta, gamma, gradient=gradient, num_iterations=5)
        return torch.autograd.grad(plan, cost, plan.detach())[0]

    expected = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = torch.compile(lambda *t: 2 * sinkhorn(*t, gradient=gradient, num_iterations=5), fullgraph=True)
    plan = compiled(cost, theta, gamma)
    torch.testing.assert_close(torch.autograd.grad(plan, cost, plan.detach())[0], 4 * expected)


def test_the_plan_is_all_that_a_constant_one_needs():
    cost, theta, gamma = problem(128, 324, 312, device="cuda")
    sinkhorn(cost, theta, gamma)
    found = allocations(lambda: sinkhorn(cost, theta, gamma), torch.device("cuda"))
    assert found.peak < 1.02 * 4 * cost.numel()
