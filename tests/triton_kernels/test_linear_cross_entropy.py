"""Cross-entropy by blocks in torch: what it computes, what it allocates, and what it refuses."""

import importlib

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from sigma_kernels import linear_cross_entropy, linear_cross_entropy_grid, reference
from sigma_kernels.benchmarks.allocations import allocations, kept_bytes
from tests.triton_kernels.fresh_process import python
from tests.triton_kernels.heads import LIMITS, check_against_reference, error, exact, head


MODULE = importlib.import_module("sigma_kernels.linear_cross_entropy")
SHAPES = [
    pytest.param((1, 2, 1), id="smallest"),
    pytest.param((13, 37, 8), id="odd numbers"),
    pytest.param((64, 64, 16), id="whole blocks"),
    pytest.param((70, 129, 33), id="one more"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of tokens and of classes also at these sizes."""
    monkeypatch.setattr(MODULE, "BLOCK", 512)
    monkeypatch.setattr(MODULE, "MAX_ROWS", 16)


@pytest.mark.parametrize("reduction", MODULE.REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape, dtype, bias, reduction):
    check_against_reference(*head(*shape, dtype=dtype, bias=bias), reduction=reduction)


def test_it_is_the_cross_entropy_of_torch():
    hidden, weight, bias, labels = head(20, 50, 12)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, labels), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(bias):
    hidden, weight, offset, labels = head(7, 40, 3, dtype=torch.float64, bias=bias)
    leaves = [t for t in (hidden, weight, offset) if t is not None]
    for reduction in MODULE.REDUCTIONS:
        torch.autograd.gradcheck(
            lambda *t, r=reduction: linear_cross_entropy(t[0], t[1], t[2] if bias else None, labels, reduction=r),
            leaves,
        )


@seed(0)
@settings(max_examples=40, deadline=None, database=None)
@given(
    st.tuples(st.integers(0, 40), st.integers(1, 90), st.integers(1, 40)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(MODULE.REDUCTIONS),
)
def test_every_shape(shape, dtype, bias, ignored, reduction):
    check_against_reference(*head(*shape, dtype=dtype, bias=bias, ignored=ignored), reduction=reduction)


@pytest.mark.parametrize("reduction", MODULE.REDUCTIONS)
@pytest.mark.parametrize("tokens, ignored", [(0, 0.0), (9, 1.0)])
def test_no_tokens_are_a_loss_of_zero_with_a_graph(tokens, ignored, reduction):
    hidden, weight, bias, labels = head(tokens, 30, 4, ignored=ignored)
    loss = linear_cross_entropy(hidden, weight, bias, labels, reduction=reduction)
    assert loss.requires_grad and not loss.any()
    for leaf, gradient in zip((hidden, weight, bias), torch.autograd.grad(loss.sum(), (hidden, weight, bias))):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_ignored_tokens_are_not_even_read():
    hidden, weight, bias, labels = head(12, 40, 6)
    assert 0 < (labels == -100).sum() < 12
    expected = linear_cross_entropy(hidden, weight, bias, labels)
    poisoned = hidden.detach().masked_fill((labels == -100)[:, None], torch.nan).requires_grad_()
    loss = linear_cross_entropy(poisoned, weight, bias, labels)
    assert torch.equal(loss, expected)
    gradients = torch.autograd.grad(loss, (poisoned, weight))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][labels == -100].any()


def test_any_number_may_mean_ignored():
    hidden, weight, bias, labels = head(12, 40, 6)
    other = labels.masked_fill(labels == -100, 7)
    got = linear_cross_entropy(hidden, weight, bias, other, ignore_index=7)
    expected, _ = exact(hidden, weight, bias, other.masked_fill(other == 7, -100))
    assert error(got, expected) < 1e-6


def test_a_bias_of_minus_infinity_takes_classes_out():
    hidden, weight, bias, labels = head(12, 60, 6, ignored=0.0)
    labels = labels % 20
    with torch.no_grad():
        bias[20:] = -torch.inf  # some blocks have nothing else
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    expected = linear_cross_entropy(hidden, weight[:20], bias[:20], labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert not gradients[1][20:].any()
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected, hidden)[0])


def test_large_logits_do_not_overflow():
    hidden, weight, bias, labels = head(9, 50, 4)
    check_against_reference(*((t * 300).detach().requires_grad_() for t in (hidden, weight, bias)), labels)


def test_only_what_needs_a_gradient_is_computed():
    hidden, weight, bias, labels = head(12, 40, 6)
    every = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, labels), (hidden, weight, bias))
    for at, (name, leaf) in enumerate({"hidden": hidden, "weight": weight, "bias": bias}.items()):
        frozen = [t if t is leaf else t.detach() for t in (hidden, weight, bias)]
        (gradient,) = torch.autograd.grad(linear_cross_entropy(*frozen, labels), leaf)
        assert torch.equal(gradient, every[at]), name
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), bias.detach(), labels).requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, bias, labels).requires_grad


def test_dtypes_may_differ_and_autocast_rounds_operands():
    hidden, weight, bias, labels = head(12, 40, 6)
    half = hidden.detach().bfloat16().requires_grad_()
    check_against_reference(half, weight, bias, labels)
    rounded = [t.detach().bfloat16() for t in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    expected, _ = exact(*rounded, bias, labels)
    assert loss.dtype == torch.float32 and error(loss, expected) < 1e-6
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_the_gradient_of_a_bf16_weight_is_summed_in_fp32():
    hidden, weight, bias, labels = head(3000, 8, 4, dtype=torch.bfloat16, bias=False)
    gradient = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, labels, reduction="sum"), weight)[0]
    expected, leaves = exact(hidden, weight, bias, labels, reduction="sum")
    assert error(gradient, torch.autograd.grad(expected, leaves[1])[0]) < 2.5e-3  # one rounding


@pytest.mark.parametrize("full_width", [9, 64])
def test_prefixes_and_transposes_are_read_where_they_lie(full_width):
    hidden, weight, bias, labels = head(12, 40, 8, full_width=full_width)
    assert not weight.is_contiguous()
    check_against_reference(hidden, weight, bias, labels)
    upright = weight.detach().T.contiguous().T.requires_grad_()
    check_against_reference(hidden, upright, bias, labels.int())


# --- memory


def test_nothing_as_large_as_the_logits_is_ever_allocated(monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 2**14)
    tokens, classes = 200, 3000
    hidden, weight, bias, labels = head(tokens, classes, 8)
    logits = 4 * tokens * classes

    found = allocations(lambda: linear_cross_entropy(hidden, weight, bias, labels).backward(), torch.device("cpu"))

    assert 4 * weight.numel() <= found.largest < logits / 10
    assert found.peak < logits / 4
    hidden.grad = weight.grad = bias.grad = None
    plain = allocations(
        lambda: torch.nn.functional.cross_entropy(hidden @ weight.T + bias, labels).backward(), torch.device("cpu")
    )
    assert plain.largest >= logits and plain.peak >= 2 * logits


def test_one_number_a_token_is_kept_for_the_backward():
    leaves = head(100, 300, 8, ignored=0.0)
    kept = kept_bytes(lambda: linear_cross_entropy(*leaves[:3], leaves[3]), list(leaves))
    assert kept <= 4 * 100 + 16  # and how many tokens count


def test_a_frozen_weight_has_no_gradient_in_memory(monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 2**10)
    hidden, weight, _, labels = head(20, 5000, 8)
    step = lambda: linear_cross_entropy(hidden, weight.detach(), None, labels).backward()  # noqa: E731
    assert allocations(step, torch.device("cpu")).largest < 4 * weight.numel() / 4


# --- the grid


def grid(dtype=torch.float32, widths=(2, 5, 8, 8)):
    hidden, weight, bias, labels = head(12, 40, 8, dtype=dtype)
    hiddens = [torch.randn(12, width).to(dtype).requires_grad_() for width in widths]
    return hiddens, weight, bias, labels


@pytest.mark.parametrize("reduction", MODULE.REDUCTIONS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_grid_is_its_prefixes_one_by_one(dtype, reduction):
    hiddens, weight, bias, labels = grid(dtype)
    losses = linear_cross_entropy_grid(hiddens, weight, bias, labels, reduction=reduction)
    wide = [[h.detach().double().requires_grad_() for h in hiddens]]
    wide += [t.detach().double().requires_grad_() for t in (weight, bias)]
    expected = torch.stack(
        [reference.linear_cross_entropy(h, wide[1][:, : h.shape[1]], wide[2], labels, reduction=reduction)
         for h in wide[0]]
    )  # fmt: skip
    assert losses.shape == expected.shape and error(losses, expected) < LIMITS[dtype]
    upstream = torch.rand_like(losses) + 0.5
    got = torch.autograd.grad(losses, [*hiddens, weight, bias], upstream)
    for one, other in zip(got, torch.autograd.grad(expected, [*wide[0], *wide[1:]], upstream.double())):
        assert error(one, other) < LIMITS[dtype]


def test_hidden_states_without_a_gradient_are_left_alone_in_the_grid():
    hiddens, weight, bias, labels = grid()
    every = torch.autograd.grad(linear_cross_entropy_grid(hiddens, weight, bias, labels).sum(), hiddens)
    mixed = [h.detach() if at % 2 else h for at, h in enumerate(hiddens)]
    some = torch.autograd.grad(linear_cross_entropy_grid(mixed, weight, bias, labels).sum(), mixed[::2])
    assert all(torch.equal(a, b) for a, b in zip(every[::2], some))


# --- graphs


def test_it_is_one_node_of_a_compiled_graph():
    hidden, weight, bias, labels = head(12, 40, 6)

    def loss(hidden, weight, bias):
        return 2 * linear_cross_entropy(hidden * 1.0, weight[:, :6], bias, labels)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(hidden, weight, bias), loss(hidden, weight, bias))
    for got, expected in zip(*(torch.autograd.grad(f(hidden, weight, bias), (hidden, weight, bias))
                               for f in (compiled, loss))):  # fmt: skip
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_is_what_its_registration_says(bias):
    hidden, weight, offset, labels = head(12, 40, 6, bias=bias)
    arguments = ([hidden, hidden], weight, offset, labels, -100, torch.float32)
    torch.library.opcheck(torch.ops.sigma_kernels.linear_cross_entropy.default, arguments)
    losses, lse = torch.ops.sigma_kernels.linear_cross_entropy(*arguments)
    detached = ([hidden.detach()] * 2, weight.detach(), None if offset is None else offset.detach(), labels)
    wanted = [True, False, True, bias]
    backward = (torch.ones_like(losses), *detached, lse.detach(), -100, torch.float32, wanted)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sigma_kernels.linear_cross_entropy_backward.default, backward, test_utils=checks)


def test_a_second_derivative_is_refused():
    hidden, weight, bias, labels = head(4, 10, 3)
    (first,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from sigma_kernels import linear_cross_entropy
weight = torch.zeros(10, 4, requires_grad=True)
loss = linear_cross_entropy(torch.ones(3, 4), weight, None, torch.tensor([1, 2, 3]))
loss.backward()
print(round(loss.item(), 4), tuple(weight.grad.shape))
"""


def test_it_needs_no_triton():
    done = python("-c", WITHOUT_TRITON, interpret=False)
    assert done.stdout.split("\n")[0] == "2.3026 (10, 4)", done.stderr


# --- what is refused


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"hidden": torch.zeros(4, 7)}, "hidden is 7 wide and weight 6: slice the wider one"),
        ({"hidden": torch.zeros(4, 1, 6)}, r"got hidden \(4, 1, 6\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels \(5,\)"),
        ({"labels": torch.zeros(4)}, "labels must be int64 or int32, got torch.float32"),
        ({"bias": torch.zeros(9)}, r"bias \(9,\)"),
        ({"weight": torch.zeros(0, 6), "bias": None}, r"weight \(0, 6\)"),
        ({"weight": torch.zeros(10, 6, dtype=torch.int64)}, "must be floating point"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, "All must be on one device"),
        ({"labels": torch.tensor([0, 3, 10, 1])}, "A label is 10: labels are 0 to 9, or ignore_index=-100"),
        ({"labels": torch.tensor([0, -1, 9, 1])}, "A label is -1"),
        ({"reduction": "max"}, "reduction='max' is not known"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, message):
    right = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(10, 6), "bias": torch.zeros(10)}
    right["labels"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**right | wrong)


def test_a_grid_of_nothing_or_of_heads_that_are_too_wide_is_refused():
    _, weight, bias, labels = grid()
    for hiddens in ([], [torch.zeros(12, 9)], [torch.zeros(12, 8), torch.zeros(11, 8)]):
        with pytest.raises(ValueError, match="Expected hidden"):
            linear_cross_entropy_grid(hiddens, weight, bias, labels)
    with pytest.raises(ValueError, match="floating point"):
        linear_cross_entropy_grid([torch.zeros(12, 8), torch.zeros(12, 8).double()], weight, bias, labels)
