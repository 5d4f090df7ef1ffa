"""The kernels of the linear cross-entropy against the reference in float64, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from sigma_kernels import linear_cross_entropy, linear_cross_entropy_grid, linear_cross_entropy_launch, reference
from sigma_kernels.autotune import Tile, forced_tile
from tests.triton_kernels.heads import LIMITS, check_against_reference, error, head


pytestmark = pytest.mark.interpreter

LIMITS = {dtype: limit for dtype, limit in LIMITS.items() if dtype != torch.float64}
SHAPES = [
    pytest.param((1, 2, 1), id="smallest"),
    pytest.param((16, 64, 16), id="whole tiles"),
    pytest.param((21, 77, 19), id="odd numbers"),
    pytest.param((5, 140, 8), id="narrow"),
]


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """Several tiles, splits and parts of the vocabulary also at these sizes."""
    monkeypatch.setattr(linear_cross_entropy_launch, "WORKSPACE", 21 * 64)
    monkeypatch.setattr(linear_cross_entropy_launch, "PROGRAMS", 2)
    with forced_tile(Tile(16, 32, 16)):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape, dtype, bias):
    check_against_reference(*head(*shape, dtype=dtype, bias=bias), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_other_reductions(reduction):
    check_against_reference(*head(21, 77, 19), reduction=reduction)


@seed(0)
@settings(max_examples=8, deadline=None, database=None)
@given(
    st.tuples(st.integers(0, 20), st.integers(1, 80), st.integers(1, 24)),
    st.sampled_from(list(LIMITS)),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_shape(shape, dtype, bias, ignored):
    check_against_reference(*head(*shape, dtype=dtype, bias=bias, ignored=ignored))


@pytest.mark.parametrize("tile", [Tile(32, 16, 32), Tile(16, 64, 64), Tile(64, 16, 16)], ids=str)
def test_tiles_of_any_proportions(tile):
    with forced_tile(tile):
        check_against_reference(*head(21, 77, 19))


@pytest.mark.parametrize("masters", [False, True])
def test_prefixes_and_transposes_are_read_where_they_lie(masters):
    hidden, weight, bias, labels = head(12, 40, 8, full_width=13, dtype=torch.float16)
    if masters:
        weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    check_against_reference(hidden, weight, bias, labels)
    check_against_reference(hidden, weight.detach().T.contiguous().T.requires_grad_(), bias, labels.int())


def test_fp32_weights_are_rounded_under_autocast_and_their_gradient_is_fp32():
    hidden, weight, bias, labels = head(12, 40, 8)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    expected = reference.linear_cross_entropy(*leaves, labels)
    assert loss.dtype == torch.float32 and error(loss, expected) < LIMITS[torch.float16]
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves)):
        assert got.dtype == torch.float32 and error(got, want) < LIMITS[torch.float16]


@pytest.mark.parametrize("upstream", [1e-9, 1e-4, 1e5])
def test_gradients_beyond_the_range_of_fp16_survive_it(upstream):
    hidden, weight, bias, labels = head(12, 40, 8)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, bias, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(upstream))
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    expected = reference.linear_cross_entropy(*leaves, labels, reduction="sum")
    for got, want in zip(gradients, torch.autograd.grad(expected * upstream, leaves)):
        assert error(got, want) < LIMITS[torch.float16]


@pytest.mark.parametrize("tokens, ignored", [(0, 0.0), (9, 1.0)])
def test_no_tokens_are_a_loss_of_zero_with_a_graph(tokens, ignored):
    leaves = head(tokens, 30, 4, ignored=ignored)
    loss = linear_cross_entropy(*leaves)
    assert loss.requires_grad and not loss.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, leaves[:3]))


def test_huge_hidden_states_of_ignored_tokens_do_not_matter():
    hidden, weight, bias, labels = head(12, 40, 6)
    poisoned = hidden.detach().masked_fill((labels == -100)[:, None], 1e4).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, bias, labels)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, bias, labels))
    gradients = torch.autograd.grad(loss, (poisoned, weight))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][labels == -100].any()


def test_a_bias_of_minus_infinity_takes_classes_out():
    hidden, weight, bias, labels = head(12, 100, 6, ignored=0.0)
    labels = labels % 20
    with torch.no_grad():
        bias[20:] = -torch.inf
    check_against_reference(hidden, weight, bias, labels)


def test_a_label_that_is_no_class_is_nan_and_touches_no_other():
    hidden, weight, bias, labels = head(8, 40, 6, ignored=0.0)
    wrong = labels.clone()
    wrong[3], wrong[5] = 40, -7
    losses = linear_cross_entropy(hidden, weight, bias, wrong, reduction="none")
    right = linear_cross_entropy(hidden, weight, bias, labels, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3, 5]
    kept = [0, 1, 2, 4, 6, 7]
    assert torch.equal(losses[kept], right[kept])


def test_only_what_needs_a_gradient_is_computed():
    hidden, weight, bias, labels = head(12, 40, 6)
    every = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, labels), (hidden, weight, bias))
    for at, leaf in enumerate((hidden, weight, bias)):
        frozen = [t if t is leaf else t.detach() for t in (hidden, weight, bias)]
        assert torch.equal(torch.autograd.grad(linear_cross_entropy(*frozen, labels), leaf)[0], every[at])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_grid_is_its_prefixes_one_by_one(dtype):
    _, weight, bias, labels = head(12, 90, 24, dtype=dtype)
    hiddens = [torch.randn(12, width).to(dtype).requires_grad_() for width in (5, 24, 16)]
    losses = linear_cross_entropy_grid(hiddens, weight, bias, labels)
    wide = [t.detach().double().requires_grad_() for t in (*hiddens, weight, bias)]
    expected = torch.stack(
        [reference.linear_cross_entropy(h, wide[-2][:, : h.shape[1]], wide[-1], labels) for h in wide[:3]]
    )
    assert error(losses, expected) < LIMITS[dtype]
    upstream = torch.tensor([1.0, 0.01, 3.0])
    got = torch.autograd.grad(losses, [*hiddens, weight, bias], upstream)
    for one, other in zip(got, torch.autograd.grad(expected, wide, upstream.double())):
        assert error(one, other) < LIMITS[dtype]


def test_every_number_is_written(monkeypatch):
    leaves = head(21, 77, 19)
    real = torch.Tensor.new_empty

    def poisoned(self, *sizes, **options):
        out = real(self, *sizes, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check_against_reference(*leaves)
