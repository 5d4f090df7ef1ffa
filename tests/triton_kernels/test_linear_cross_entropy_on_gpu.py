"""The linear cross-entropy where only a GPU can answer: rounding, races, graphs, synchronisation, memory."""

import pytest
import torch
from torch.nn import functional as F

from sigma_kernels import linear_cross_entropy, linear_cross_entropy_grid
from sigma_kernels.benchmarks.allocations import allocations
from tests.triton_kernels.heads import error, head


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative root-mean-square errors of kernels that round as they should.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [
    pytest.param((512, 32001, 768), id="odd vocabulary"),
    pytest.param((333, 5000, 8), id="narrow"),
    pytest.param((64, 70001, 100), id="few tokens"),
    pytest.param((2048, 2048, 384), id="in-batch negatives"),
]


@pytest.fixture(autouse=True)
def exact_references():
    """No TF32 in what we compare with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_cross_entropy_of_float64(shape, dtype, bias):
    hidden, weight, offset, labels = head(*shape, dtype=dtype, bias=bias, full_width=shape[2] + 24, device="cuda")
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    loss = linear_cross_entropy(hidden, weight, offset, labels)
    expected = F.cross_entropy(F.linear(*wide), labels)
    assert error(loss, expected) < LIMITS[dtype] / 10
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, wide)):
        assert error(got, want) < LIMITS[dtype]


def test_the_grid_is_its_prefixes():
    _, weight, bias, labels = head(300, 20001, 768, dtype=torch.bfloat16, device="cuda")
    hiddens = [torch.randn(300, d, device="cuda").bfloat16().requires_grad_() for d in (32, 64, 128, 768)]
    losses = linear_cross_entropy_grid(hiddens, weight, bias, labels)
    wide = [t.detach().double().requires_grad_() for t in (*hiddens, weight, bias)]
    expected = torch.stack([F.cross_entropy(F.linear(h, wide[4][:, : h.shape[1]], wide[5]), labels) for h in wide[:4]])
    assert error(losses, expected) < 1e-3
    gradients = torch.autograd.grad(losses.sum(), [*hiddens, weight, bias])
    for got, want in zip(gradients, torch.autograd.grad(expected.sum(), wide)):
        assert error(got, want) < LIMITS[torch.bfloat16]


def test_equal_inputs_give_equal_bits():
    leaves = head(700, 40001, 384, dtype=torch.bfloat16, device="cuda")

    def step():
        loss = linear_cross_entropy(*leaves)
        return loss, *torch.autograd.grad(loss, leaves[:3])

    first = step()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, step()))


def test_nothing_waits_for_the_gpu():
    leaves = head(300, 9000, 64, dtype=torch.bfloat16, device="cuda")
    linear_cross_entropy(*leaves).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_label_that_is_no_class_is_nan():
    hidden, weight, bias, labels = head(64, 500, 64, ignored=0.0, device="cuda")
    labels[3] = 500
    losses = linear_cross_entropy(hidden, weight, bias, labels, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]


def test_the_logits_are_never_there():
    tokens, classes = 8192, 50001
    leaves = head(tokens, classes, 64, dtype=torch.bfloat16, device="cuda")
    found = allocations(lambda: linear_cross_entropy(*leaves).backward(), torch.device("cuda"))
    assert found.peak < 2 * tokens * classes / 4


def test_a_compiled_graph_holds_it_whole():
    leaves = head(300, 9000, 64, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda *t: 2 * linear_cross_entropy(*t), fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), 2 * linear_cross_entropy(*leaves))
    compiled(*leaves).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves[:3])
