"""Entropic transport in torch: the plan, its marginals, what zeros do, its gradients and its memory."""

import importlib

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from sigma_kernels import reference, sinkhorn
from sigma_kernels.benchmarks.allocations import allocations
from tests.triton_kernels.heads import error
from tests.triton_kernels.transports import LIMITS, check_against_reference, gradients, problem


module = importlib.import_module("sigma_kernels.sinkhorn")
CPU = torch.device("cpu")
ROUTES = {"products": 80.0, "exponentials": -1.0}  # the largest cost / eps for products
DIFFERENTIABLE = ("unrolled", "implicit")


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """Both ways to sum, each where it would also not be chosen, and some parts of a batch."""
    monkeypatch.setattr(module, "LARGEST", ROUTES[request.param])
    monkeypatch.setattr(module, "BLOCK", 100)
    return request.param


# --- the plan


@pytest.mark.parametrize("rho", [None, 1.0, 0.05])
@pytest.mark.parametrize("eps", [1.0, 0.1])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_it_is_the_reference(route, dtype, eps, rho):
    for shape in ((3, 9, 7), (1, 1, 1), (2, 1, 5), (5, 6, 1)):
        check_against_reference(*problem(*shape, dtype=dtype), eps=eps, rho=rho)
    check_against_reference(*problem(3, 9, 7, dtype=dtype, each=False), eps=eps, rho=rho, num_iterations=1)


@pytest.mark.parametrize("eps, limit", [(0.02, 1e-5), (0.001, 1e-3)])
def test_a_small_eps_is_not_for_products(eps, limit, monkeypatch):
    chosen = []
    real = module._by_exponentials
    monkeypatch.setattr(module, "_by_exponentials", lambda *arguments: chosen.append(1) or real(*arguments))
    check_against_reference(*problem(2, 20, 11), eps=eps, limit=limit)
    assert chosen


def test_cosine_distances_at_the_default_eps_need_no_exponentials(monkeypatch):
    monkeypatch.delattr(module, "_by_exponentials")
    check_against_reference(*problem(2, 20, 11))


@pytest.mark.parametrize("rho", [None, 0.5])
@pytest.mark.parametrize("common", [-30.0, 7.0])
def test_a_cost_that_all_have_in_common_does_not_matter_without_penalties(route, common, rho):
    cost, theta, gamma = problem(3, 9, 7)
    options = {"rho": rho, "gradient": "unrolled", "num_iterations": 5, "return_potentials": True}
    plan, f, g = sinkhorn(cost + common, theta, gamma, **options)
    torch.testing.assert_close(plan, ((f[:, :, None] + g[:, None] - cost - common) / 0.1).exp(), rtol=1e-3, atol=0)
    if rho is None:
        torch.testing.assert_close(plan, sinkhorn(cost, theta, gamma, num_iterations=5), rtol=1e-3, atol=0)
    expected = reference.sinkhorn(*(t.double() for t in (cost + common, theta, gamma)), rho=rho, num_iterations=5)
    assert error(plan, expected) < 1e-4


def test_masses_that_let_the_scalings_run_away_are_summed_by_exponentials():
    cost, theta, gamma = problem(2, 20, 11)
    plan = sinkhorn(cost, 1e4 * theta, gamma, num_iterations=50)
    torch.testing.assert_close(plan, sinkhorn(cost, theta, gamma, num_iterations=50))
    check_against_reference(cost, 1e4 * theta, gamma, num_iterations=50, limit=1e-4)


@pytest.mark.parametrize("function", [sinkhorn, reference.sinkhorn])
def test_it_is_that_of_pot(function):
    ot = pytest.importorskip("ot")
    cost, theta, gamma = problem(1, 5, 7, dtype=torch.float64)
    one = [t[0].numpy() for t in (theta, gamma, cost)]
    expected = ot.sinkhorn(*one, 0.1, method="sinkhorn_log", numItermax=1000, stopThr=1e-12)
    plan = function(cost, theta, gamma, num_iterations=500)[0]
    torch.testing.assert_close(plan, torch.from_numpy(expected), rtol=0, atol=1e-5)
    # POT's only way to penalise with products of the marginals as the reference.
    expected = ot.unbalanced.sinkhorn_unbalanced(*one, 0.1, 0.3, reg_type="kl", numItermax=5000, stopThr=1e-13)
    plan = function(cost, theta, gamma, rho=0.3, num_iterations=500)[0]
    torch.testing.assert_close(plan, torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_sums_of_columns_are_exact_and_those_of_rows_close(route):
    _, theta, gamma = problem(4, 81, 45)
    patches, concepts = (torch.nn.functional.normalize(torch.randn(n, 16), dim=-1) for n in (4 * 81, 45))
    plan = sinkhorn(1 - (patches @ concepts.T).view(4, 81, 45), theta, gamma, eps=0.1)
    torch.testing.assert_close(plan.sum(1), gamma, rtol=2e-6, atol=0)
    assert (plan.sum(2) - theta).abs().sum(1).max() < 1e-4


@seed(0)
@settings(max_examples=25, deadline=None, database=None)
@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_rows_and_columns_have_no_order(images, rows, columns, random):
    cost, theta, gamma = problem(images, rows, columns)
    i, j = (torch.tensor(random.sample(range(n), n)) for n in (rows, columns))
    plan = sinkhorn(cost, theta, gamma)
    permuted = sinkhorn(cost[:, i][:, :, j], theta[:, i], gamma[:, j])
    torch.testing.assert_close(permuted, plan[:, i][:, :, j], rtol=2e-5, atol=1e-12)


def test_an_image_does_not_depend_on_the_others(monkeypatch):
    cost, theta, gamma = problem(6, 9, 7)
    together = sinkhorn(cost, theta, gamma)
    monkeypatch.setattr(module, "BLOCK", 1)
    torch.testing.assert_close(sinkhorn(cost, theta, gamma), together, rtol=1e-5, atol=0)


def test_strides_do_not_matter():
    cost, theta, gamma = problem(3, 9, 7)
    plan = sinkhorn(cost, theta, gamma)
    images_last = cost.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for same in (cost.mT.contiguous().mT, torch.stack([cost, cost], -1)[..., 1], images_last):
        assert not same.is_contiguous()
        torch.testing.assert_close(sinkhorn(same, theta, gamma), plan, rtol=1e-6, atol=0)
    one = sinkhorn(cost[:1].expand(3, -1, -1), theta, gamma[0])
    torch.testing.assert_close(one, sinkhorn(cost[[0, 0, 0]], theta, gamma[[0, 0, 0]]))
    torch.testing.assert_close(sinkhorn(cost, theta[0], gamma), sinkhorn(cost, theta[[0, 0, 0]], gamma))


def test_it_is_computed_in_fp32_whatever_autocast_and_the_precision_of_products_say():
    cost, theta, gamma = problem(3, 33, 17)
    plan = sinkhorn(cost, theta, gamma)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            same = sinkhorn(cost, theta, gamma)
            of_bf16 = sinkhorn(cost.bfloat16(), theta, gamma)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(same, plan)
    assert of_bf16.dtype == torch.float32
    torch.testing.assert_close(of_bf16, sinkhorn(cost.bfloat16().float(), theta, gamma), rtol=1e-6, atol=0)


def test_potentials_make_the_plan(route):
    cost, theta, gamma = problem(3, 9, 7)
    theta[1, 4] = 0.0
    plan, f, g = sinkhorn(cost, theta, gamma, eps=0.2, gradient="unrolled", return_potentials=True)
    torch.testing.assert_close(plan, ((f[:, :, None] + g[:, None] - cost) / 0.2).exp(), rtol=1e-5, atol=0)
    assert f.isinf().nonzero().tolist() == [[1, 4]]


# --- zeros


def test_what_has_no_mass_is_as_if_it_were_not_there(route):
    cost, theta, gamma = problem(2, 9, 7, dtype=torch.float64)
    theta[:, 5:], gamma[:, 0] = 0.0, 0.0
    for rho in (None, 0.2):
        plan = sinkhorn(cost, theta, gamma, rho=rho)
        torch.testing.assert_close(plan[:, :5, 1:], sinkhorn(cost[:, :5, 1:], theta[:, :5], gamma[:, 1:], rho=rho))
        assert not plan[:, 5:].any() and not plan[:, :, 0].any()


@pytest.mark.parametrize("gradient", DIFFERENTIABLE)
@pytest.mark.parametrize("rho", [None, 0.2])
def test_what_has_no_mass_has_no_gradient(route, gradient, rho):
    cost, theta, gamma = problem(2, 9, 7, dtype=torch.float64)
    theta[:, 5:], gamma[:, 0] = 0.0, 0.0
    upstream = torch.randn_like(cost)
    options = {"rho": rho, "gradient": gradient}
    every = gradients(sinkhorn, cost, theta, gamma, upstream, **options)
    some = gradients(sinkhorn, cost[:, :5, 1:], theta[:, :5], gamma[:, 1:], upstream[:, :5, 1:], **options)
    for got, expected, kept in zip(every, some, ((slice(5), slice(1, 7)), (slice(5),), (slice(1, 7),))):
        rest = got.clone()
        torch.testing.assert_close(got[:, *kept], expected)
        rest[:, *kept] = 0.0
        assert not rest.any()


@pytest.mark.parametrize("gradient", DIFFERENTIABLE)
@pytest.mark.parametrize("mass", [0.0, 1e-42, 1e-30, 1e-8])
@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_almost_nothing_is_never_nan(route, eps, mass, gradient):
    cost, theta, gamma = problem(3, 9, 7)
    theta[0, 2:4], gamma[0, 1] = mass, mass
    upstream = torch.randn_like(cost)
    theta[1], gamma[2] = mass, mass  # all of an image
    plan = sinkhorn(cost, theta, gamma, eps=eps)
    assert plan.isfinite().all() and plan[0, 2].sum() <= 10 * mass
    if mass == 0:
        assert not plan[1:].any()
    else:  # a gradient of the order of 1 / mass, which may be beyond fp32
        cost, theta, gamma, upstream = (t[:1] for t in (cost, theta, gamma, upstream))
    assert all(
        g.isfinite().all() for g in gradients(sinkhorn, cost, theta, gamma, upstream, eps=eps, gradient=gradient)
    )


def test_infinite_costs_forbid_pairs():
    cost, theta, gamma = problem(2, 9, 7)
    forbidden = torch.rand(2, 9, 7) < 0.2
    plan = sinkhorn(cost.masked_fill(forbidden, torch.inf), theta, gamma)
    assert not plan[forbidden].any()
    torch.testing.assert_close(plan.sum(1), gamma)
    far = sinkhorn(cost.masked_fill(forbidden, 50.0), theta, gamma)
    torch.testing.assert_close(plan, far)


def test_one_image_of_nan_is_its_own_affair():
    cost, theta, gamma = problem(3, 9, 7)
    plan = sinkhorn(cost, theta, gamma)
    cost[1, 2, 3] = torch.nan
    broken = sinkhorn(cost, theta, gamma)
    assert broken[1].isnan().any()
    torch.testing.assert_close(broken[[0, 2]], plan[[0, 2]], rtol=1e-5, atol=0)


# --- gradients


@pytest.mark.parametrize("rho", [None, 1.0, 0.05])
@pytest.mark.parametrize("iterations", [1, 2, 30])
def test_unrolled_is_autograd_through_the_reference(route, iterations, rho):
    arguments = (*problem(3, 9, 7, dtype=torch.float64), torch.randn(3, 9, 7, dtype=torch.float64))
    options = {"num_iterations": iterations, "rho": rho}
    for got, expected in zip(
        gradients(sinkhorn, *arguments, gradient="unrolled", **options),
        gradients(reference.sinkhorn, *arguments, **options),
    ):
        assert error(got, expected) < 1e-10


@pytest.mark.parametrize("rho", [None, 1.0, 0.05])
@pytest.mark.parametrize("eps", [0.5, 0.1])
def test_implicit_is_unrolled_when_it_has_converged(route, eps, rho):
    arguments = (*problem(3, 9, 7, dtype=torch.float64), torch.randn(3, 9, 7, dtype=torch.float64))
    options = {"num_iterations": 1000, "eps": eps, "rho": rho}
    for got, expected in zip(
        gradients(sinkhorn, *arguments, gradient="implicit", **options),
        gradients(reference.sinkhorn, *arguments, **options),
    ):
        assert error(got, expected) < 1e-8


@pytest.mark.parametrize("gradient", DIFFERENTIABLE)
@pytest.mark.parametrize("rho", [None, 0.3])
def test_gradients_are_those_of_finite_differences(gradient, rho):
    leaves = [t.requires_grad_() for t in problem(2, 4, 3, dtype=torch.float64, each=False)]
    torch.autograd.gradcheck(
        lambda *t: sinkhorn(*t, eps=0.4, num_iterations=100, rho=rho, gradient=gradient), leaves, atol=1e-6
    )


@pytest.mark.parametrize("gradient", DIFFERENTIABLE)
def test_gradients_in_fp32_are_those_of_float64(gradient):
    cost, theta, gamma = problem(3, 33, 17)
    upstream = torch.randn(3, 33, 17)
    expected = gradients(reference.sinkhorn, cost, theta, gamma, upstream.double(), num_iterations=200)
    got = gradients(sinkhorn, cost, theta, gamma, upstream, num_iterations=200, gradient=gradient)
    for one, other in zip(got, expected):
        assert one.dtype == torch.float32 and error(one, other) < 2e-5


def test_masses_of_rows_need_not_be_those_of_columns():
    cost, theta, gamma = problem(3, 9, 7, dtype=torch.float64)
    upstream = torch.randn_like(cost)
    options = {"eps": 0.5, "num_iterations": 100}
    expected = gradients(reference.sinkhorn, cost, 3 * theta, gamma, upstream, **options)
    got = gradients(sinkhorn, cost, 3 * theta, gamma, upstream, gradient="implicit", **options)
    assert all(error(one, other) < 1e-8 for one, other in zip(got, expected))


def test_one_more_step_of_the_solver_does_not_matter_after_as_many_as_iterations():
    arguments = (*problem(3, 33, 17, dtype=torch.float64), torch.randn(3, 33, 17, dtype=torch.float64))
    few = gradients(sinkhorn, *arguments, eps=0.2, num_iterations=40, gradient="implicit")
    many = gradients(sinkhorn, *arguments, eps=0.2, num_iterations=400, gradient="implicit")
    assert all(error(one, other) < 1e-6 for one, other in zip(few, many))


def test_gradients_have_the_dtype_of_what_they_belong_to_and_expanded_ones_are_sums():
    cost, theta, gamma = problem(3, 9, 7, each=False)
    leaves = cost.bfloat16().requires_grad_(), theta.requires_grad_(), gamma.requires_grad_()
    sinkhorn(*leaves, gradient="implicit").square().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    wide = [t.detach().clone().requires_grad_() for t in (leaves[0].float(), theta, gamma.expand(3, -1))]
    sinkhorn(*wide, gradient="implicit").square().sum().backward()
    torch.testing.assert_close(gamma.grad, wide[2].grad.sum(0))
    torch.testing.assert_close(leaves[0].grad, wide[0].grad.bfloat16())


def test_only_marginals_may_need_a_gradient():
    cost, theta, gamma = problem(3, 9, 7)
    upstream = torch.randn_like(cost)
    every = gradients(sinkhorn, cost, theta, gamma, upstream, gradient="implicit")
    theta.requires_grad_()
    (alone,) = torch.autograd.grad(sinkhorn(cost, theta, gamma, gradient="implicit"), theta, upstream)
    torch.testing.assert_close(alone, every[1])


def test_a_detached_plan_is_a_constant():
    leaves = [t.requires_grad_() for t in problem(2, 9, 7)]
    plan = sinkhorn(*leaves)
    assert not plan.requires_grad
    (gradient,) = torch.autograd.grad((plan * leaves[0]).sum(), leaves[:1])
    torch.testing.assert_close(gradient, plan)


# --- penalties


def test_an_infinite_penalty_is_the_balanced_plan_and_none_is_cheap_mass():
    cost, theta, gamma = problem(3, 9, 7, dtype=torch.float64)
    balanced = sinkhorn(cost, theta, gamma, num_iterations=200)
    assert torch.equal(sinkhorn(cost, theta, gamma, num_iterations=200, rho=float("inf")), balanced)
    close = [sinkhorn(cost, theta, gamma, num_iterations=200, rho=rho) for rho in (1e2, 1e4, 1e6)]
    apart = [error(plan, balanced) for plan in close]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-5
    assert (sinkhorn(cost, theta, gamma, rho=0.01).sum((1, 2)) < 0.6).all()


# --- memory, graphs, refusals


@pytest.mark.parametrize("largest", ROUTES.values(), ids=ROUTES)
def test_beyond_the_plan_a_part_of_a_batch_is_the_largest_block(largest, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", largest)
    monkeypatch.setattr(module, "BLOCK", 2 * 100 * 40)
    cost, theta, gamma = problem(24, 100, 40)
    cost = cost.mT.contiguous().mT
    found = allocations(lambda: sinkhorn(cost, theta, gamma, num_iterations=3), CPU)
    size, part = 4 * cost.numel(), 4 * module.BLOCK
    assert found.largest == size and found.peak < size + 2 * part
    cost.requires_grad_()
    for gradient, parts in (("implicit", 2), ("unrolled", 2)):
        plan = sinkhorn(cost, theta, gamma, num_iterations=3, gradient=gradient)
        found = allocations(lambda plan=plan: torch.autograd.grad(plan, cost, plan), CPU)
        assert found.largest == size and found.peak < size + (1 + parts) * part


def test_a_compiled_graph_holds_it_whole():
    leaves = [t.requires_grad_() for t in problem(2, 9, 7)]
    for gradient in ("detached", *DIFFERENTIABLE):
        function = torch.compile(
            lambda *t, g=gradient: 2 * sinkhorn(*t, gradient=g), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(function(*leaves), 2 * sinkhorn(*leaves, gradient=gradient))
        if gradient != "detached":
            upstream = torch.randn(2, 9, 7)
            got = torch.autograd.grad(function(*leaves), leaves, upstream)
            expected = torch.autograd.grad(2 * sinkhorn(*leaves, gradient=gradient), leaves, upstream)
            torch.testing.assert_close(got, expected)


def test_the_operators_keep_their_contract():
    cost, theta, gamma = (t.requires_grad_() for t in problem(2, 5, 4))
    for keep in (False, True):
        torch.library.opcheck(torch.ops.sigma_kernels.sinkhorn.default, (cost, theta, gamma, 0.1, 3, 1.0, keep))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gradient": "exact"}, "gradient='exact' is not known"),
        ({"eps": 0.0}, "must be positive"),
        ({"num_iterations": 0}, "must be positive"),
        ({"rho": -1.0}, "must be positive"),
        ({"rho": float("nan")}, "must be positive"),
        ({"theta": torch.ones(2, 8)}, "Expected cost"),
        ({"gamma": torch.ones(3, 7)}, "Expected cost"),
        ({"cost": torch.ones(9, 7)}, "Expected cost"),
        ({"cost": torch.ones(2, 9, 0), "gamma": torch.ones(0)}, "N and M from 1"),
        ({"cost": torch.ones(2, 9, 7, dtype=torch.int64)}, "floating point"),
        ({"gamma": torch.ones(7, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = dict(zip(("cost", "theta", "gamma"), problem(2, 9, 7)))
    with pytest.raises(ValueError, match=message):
        sinkhorn(**names | change)
