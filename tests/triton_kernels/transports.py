"""Transport problems for the tests of the torch path, of the interpreted kernel and of a GPU."""

import torch

from sigma_kernels import reference, sinkhorn
from tests.triton_kernels.heads import error


# Relative root-mean-square errors of plans.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6}


def problem(images, rows, columns, *, dtype=torch.float32, device="cpu", each=True):
    """Costs from 0 to 2 and positive marginals; gamma is one for all images unless `each`."""
    like = {"dtype": dtype, "device": device}
    gamma = torch.randn(*((images,) if each else ()), columns, **like)
    return (
        2 * torch.rand(images, rows, columns, **like),
        torch.randn(images, rows, **like).softmax(-1),
        gamma.softmax(-1),
    )


def check_against_reference(cost, theta, gamma, *, limit=None, **options):
    """The plan is that of the reference in float64; returns it."""
    plan = sinkhorn(cost, theta, gamma, **options)
    expected = reference.sinkhorn(cost.double(), theta.double(), gamma.double(), **options)
    assert plan.shape == cost.shape and not plan.requires_grad
    assert error(plan, expected) < (limit or LIMITS[plan.dtype])
    return plan


def gradients(function, cost, theta, gamma, upstream, **options):
    """Of cost, theta and gamma."""
    leaves = [t.detach().to(upstream.dtype).requires_grad_() for t in (cost, theta, gamma)]
    return torch.autograd.grad(function(*leaves, **options), leaves, upstream)
