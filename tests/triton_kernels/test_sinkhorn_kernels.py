"""The transport kernel against the reference in float64, in Triton's interpreter."""

import importlib

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from sigma_kernels import reference, sinkhorn
from sigma_kernels.autotune import Tile, forced_tile
from tests.triton_kernels.heads import error
from tests.triton_kernels.transports import check_against_reference, gradients, problem


pytestmark = pytest.mark.interpreter

module = importlib.import_module("sigma_kernels.sinkhorn")
SHAPES = [
    pytest.param((1, 1, 1), id="smallest"),
    pytest.param((2, 8, 16), id="whole tiles"),
    pytest.param((3, 9, 21), id="odd numbers"),
    pytest.param((2, 3, 5), id="less than a tile"),
    pytest.param((2, 21, 1), id="one column"),
]


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Also of these rows, and nothing but the kernel makes a plan."""
    monkeypatch.delattr(module, "_by_exponentials")
    monkeypatch.delattr(module, "_by_products")
    with forced_tile(Tile(4, 16, 1)):
        yield


@pytest.mark.parametrize("rho", [None, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape, rho):
    check_against_reference(*problem(*shape), rho=rho, num_iterations=5)


@seed(0)
@settings(max_examples=8, deadline=None, database=None)
@given(st.integers(0, 2), st.integers(1, 13), st.integers(1, 20), st.integers(1, 4))
def test_every_shape(images, rows, columns, iterations):
    check_against_reference(*problem(images, rows, columns), num_iterations=iterations)


def test_a_batch_of_nothing_is_one():
    assert sinkhorn(*problem(0, 9, 7)).shape == (0, 9, 7)


@pytest.mark.parametrize("eps, limit", [(0.02, 1e-5), (0.001, 1e-3)])
def test_a_small_eps(eps, limit):
    check_against_reference(*problem(2, 9, 7), eps=eps, limit=limit)


def test_sums_of_columns_are_exact():
    cost, theta, gamma = problem(2, 9, 21)
    for eps in (0.1, 0.005):
        plan = sinkhorn(cost, theta, gamma, eps=eps, num_iterations=5)
        torch.testing.assert_close(plan.sum(1), gamma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_costs_are_read_where_they_lie(dtype):
    cost, theta, gamma = problem(2, 9, 7)
    cost = cost.to(dtype)
    check_against_reference(cost, theta, gamma, num_iterations=4)
    check_against_reference(cost.mT.contiguous().mT, theta, gamma, num_iterations=4)


def test_strides_and_marginals_of_all_images():
    cost, theta, gamma = problem(2, 9, 7)
    check_against_reference(torch.stack([cost, cost], -1)[..., 1], theta, gamma, num_iterations=4)
    plan = sinkhorn(cost[:1].expand(2, -1, -1), theta[0], gamma[0], num_iterations=4)
    torch.testing.assert_close(plan, sinkhorn(cost[[0, 0]], theta[[0, 0]], gamma[[0, 0]], num_iterations=4))


@pytest.mark.parametrize("rho", [None, 0.2])
@pytest.mark.parametrize("mass", [0.0, 1e-42, 1e-30])
def test_almost_nothing_is_never_nan(mass, rho):
    cost, theta, gamma = problem(3, 9, 7)
    theta[0, 2:4], gamma[0, 1] = mass, mass
    theta[1], gamma[2] = mass, mass
    plan = sinkhorn(cost, theta, gamma, num_iterations=4, rho=rho)
    assert plan.isfinite().all() and plan[0, 2].sum() <= 10 * mass
    if mass == 0:
        assert not plan[1:].any() and not plan[0, 2:4].any() and not plan[0, :, 1].any()
        rows, columns = [0, 1, 4, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6]
        rest = sinkhorn(cost[:1, rows][:, :, columns], theta[:1, rows], gamma[:1, columns], num_iterations=4, rho=rho)
        torch.testing.assert_close(plan[:1, rows][:, :, columns], rest)


def test_infinite_costs_forbid_pairs():
    cost, theta, gamma = problem(2, 9, 7)
    forbidden = torch.rand(2, 9, 7) < 0.2
    forbidden[0, 3] = True  # a row that may go nowhere
    plan = sinkhorn(cost.masked_fill(forbidden, torch.inf), theta, gamma, num_iterations=4)
    assert plan.isfinite().all() and not plan[forbidden].any()
    torch.testing.assert_close(plan.sum(1), gamma)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("rho", [None, 0.2])
def test_gradients_go_through_the_potentials_that_it_writes(gradient, rho):
    cost, theta, gamma = problem(2, 9, 7)
    upstream = torch.randn_like(cost)
    options = {"eps": 0.5, "num_iterations": 25, "rho": rho}
    expected = gradients(reference.sinkhorn, cost, theta, gamma, upstream.double(), **options)
    got = gradients(sinkhorn, cost, theta, gamma, upstream, gradient=gradient, **options)
    assert all(error(one, other) < 2e-5 for one, other in zip(got, expected))


def test_the_potentials_make_the_plan():
    cost, theta, gamma = problem(2, 9, 7)
    for gradient in ("detached", "unrolled"):
        plan, f, g = sinkhorn(cost, theta, gamma, num_iterations=3, gradient=gradient, return_potentials=True)
        torch.testing.assert_close(plan, ((f[:, :, None] + g[:, None] - cost) / 0.1).exp(), rtol=1e-5, atol=0)


def test_every_number_is_written(monkeypatch):
    leaves = problem(3, 9, 21)
    real = torch.Tensor.new_empty

    def poisoned(self, *sizes, **options):
        return real(self, *sizes, **options).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check_against_reference(*leaves, num_iterations=2)
    found = gradients(sinkhorn, *leaves, torch.randn(3, 9, 21), num_iterations=2, gradient="unrolled")
    assert all(one.isfinite().all() for one in found)
