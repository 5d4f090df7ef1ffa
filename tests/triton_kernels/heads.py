"""Heads over a vocabulary for the tests of the CPU path, of the interpreted kernels and of a GPU."""

import torch

from sigma_kernels import linear_cross_entropy, reference


# Relative root-mean-square errors of losses and gradients; in the interpreter bf16 is truncated where it is stored.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def head(tokens, classes, width, *, dtype=torch.float32, bias=True, full_width=None, ignored=0.2, device="cpu"):
    """Hidden states, weight, bias or None, and labels; with `full_width` the first two are prefixes of wider ones."""
    full_width = full_width or width
    hidden = torch.randn(tokens, full_width, device=device).to(dtype)[:, :width].requires_grad_()
    weight = torch.randn(classes, full_width, device=device).mul_(width**-0.5).to(dtype)[:, :width].requires_grad_()
    offset = torch.randn(classes, device=device).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(classes, (tokens,), device=device)
    return hidden, weight, offset, labels.masked_fill(torch.rand(tokens, device=device) < ignored, -100)


def error(got, expected):
    """Relative root-mean-square error; 0 of zeros that are zeros."""
    difference, size = (got.double() - expected).norm().item(), expected.norm().item()
    return difference / size if size else difference


def exact(hidden, weight, bias, labels, **options):
    """The reference in float64, with its leaves."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    return reference.linear_cross_entropy(*leaves, labels, **options), [t for t in leaves if t is not None]


def check_against_reference(hidden, weight, bias, labels, **options):
    """The loss and all gradients for a random upstream gradient."""
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    limit = max(LIMITS[t.dtype] for t in leaves)
    loss = linear_cross_entropy(hidden, weight, bias, labels, **options)
    expected, wide = exact(hidden, weight, bias, labels, **options)
    assert loss.shape == expected.shape and loss.dtype == (torch.float64 if limit == 1e-12 else torch.float32)
    assert error(loss, expected) < limit
    upstream = torch.rand_like(loss) + 0.5
    gradients = torch.autograd.grad(loss, leaves, upstream)
    for leaf, got, want in zip(leaves, gradients, torch.autograd.grad(expected, wide, upstream.double())):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        assert error(got, want) < limit
