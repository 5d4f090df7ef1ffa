"""One application: what it does to norms, ranks and singular values, by float64, and the mechanism that it breaks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.optimizers import align, msign_, stable_rank
from trainers.optimizers.restoration import BATCH_ELEMENTS, RestorationOptions, restore, restore_views


FP64 = torch.float64


def orthogonal(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=FP64)).Q


def of_rank(rank, size=32):
    return torch.randn(size, rank, dtype=FP64) @ torch.randn(rank, size, dtype=FP64)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_the_paper_s_restoration_by_its_properties(rows, columns, seed):
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=FP64)
    new = msign_(matrix.clone())
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    expected = s.norm() / math.sqrt(len(s)) * u @ vt  # equation 14, as it stands
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(new.norm(), matrix.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        stable_rank(new, exact=True), torch.tensor(float(len(s)), dtype=FP64), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(msign_(new.clone()), new, rtol=1e-9, atol=1e-10)
    q, r = orthogonal(rows), orthogonal(columns)
    torch.testing.assert_close(msign_(q @ matrix @ r), q @ new @ r, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48), (128, 128)])
def test_fp32_is_as_good_as_the_digest_says(shape):
    matrix = torch.randn(shape)
    new = msign_(matrix.clone())
    assert abs(new.norm() / matrix.norm() - 1) < 3e-7
    assert (msign_(new.clone()) - new).norm() / new.norm() < 2e-6
    assert stable_rank(new, exact=True).item() == pytest.approx(min(shape), rel=1e-5)
    exact = msign_(matrix.double())
    torch.testing.assert_close(new, exact.float(), rtol=0, atol=2e-5)


def test_a_matrix_of_low_rank_keeps_its_rank():
    matrix = of_rank(4, 64).float()
    new = msign_(matrix.clone())
    assert stable_rank(new, exact=True).item() == pytest.approx(4, rel=1e-4)
    assert torch.linalg.svdvals(new.double())[4] < 1e-4 * new.norm()
    torch.testing.assert_close(new.norm(), matrix.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("rescale", "level"),
    [("spectral", lambda s: s[0]), ("nuclear", lambda s: s.mean()), ("none", lambda s: torch.tensor(1.0, dtype=FP64))],
)
def test_other_rescales(rescale, level):
    matrix = torch.randn(12, 20, dtype=FP64)
    result = restore(matrix, RestorationOptions(rescale=rescale))
    expected = level(torch.linalg.svdvals(matrix))
    values = torch.linalg.svdvals(result.weight)
    torch.testing.assert_close(values, expected.expand_as(values), rtol=1e-9, atol=0)
    assert result.scale.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_nuclear_rescale_moves_the_weight_least():
    matrix = torch.randn(12, 20, dtype=FP64)
    best = (restore(matrix, RestorationOptions(rescale="nuclear")).weight - matrix).norm()
    for rescale in ("frobenius", "spectral", "none"):
        assert best < (restore(matrix, RestorationOptions(rescale=rescale)).weight - matrix).norm()


def test_a_stack_of_experts_is_restored_expert_by_expert():
    stack = torch.randn(3, 8, 12)
    stack[1] *= 100
    together = msign_(stack.clone())
    for i in range(3):
        torch.testing.assert_close(together[i], msign_(stack[i].clone()))
    flat = msign_(stack.reshape(24, 12).clone()).reshape(3, 8, 12)
    assert (flat - together).norm() / together.norm() > 0.1


def test_what_is_not_finite_comes_back_and_the_rest_is_done():
    stack = torch.randn(4, 6, 6)
    stack[1, 2, 3], stack[2] = torch.nan, 0.0
    result = restore(stack)
    assert torch.equal(result.weight[1].nan_to_num(7.0), stack[1].nan_to_num(7.0))
    assert result.restored.tolist() == [True, False, True, True]
    assert result.before.isnan().tolist() == [False, True, False, False]
    assert not result.weight[2].any() and result.before[2] == result.after[2] == 0
    torch.testing.assert_close(result.weight[3], msign_(stack[3].clone()))


def test_the_report_says_what_was_and_what_is():
    matrix = torch.randn(16, 24, dtype=FP64)
    result = restore(matrix)
    exact = torch.linalg.svdvals(matrix)
    assert result.before.item() == pytest.approx((exact.square().sum() / exact[0] ** 2).item(), rel=1e-6)
    assert result.after.item() == pytest.approx(16, rel=1e-6)
    assert result.scale.item() == pytest.approx((matrix.norm() / 4).item(), rel=1e-6)


def test_only_matrices_that_fell_are_restored_below_a_threshold():
    healthy, fallen = torch.randn(32, 32), of_rank(2).float() + 0.01 * torch.randn(32, 32)
    stack = torch.stack([healthy, fallen])
    assert stable_rank(healthy) > 0.15 * 32 > stable_rank(fallen)
    result = restore(stack, RestorationOptions(below=0.15))
    assert result.restored.tolist() == [False, True]
    assert torch.equal(result.weight[0], healthy)
    assert result.after[0] == result.before[0] and result.scale[0] == 1
    assert result.after[1].item() == pytest.approx(32, rel=1e-3)
    nothing = restore(healthy, RestorationOptions(below=0.15))
    assert torch.equal(nothing.weight, healthy) and not nothing.restored


def test_bf16_is_restored_in_fp32_and_rounded():
    matrix = torch.randn(32, 32).bfloat16()
    new = msign_(matrix.clone())
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, msign_(matrix.float()).bfloat16())


def test_views_of_one_shape_go_together_and_large_ones_apart(monkeypatch):
    whole = torch.randn(12, 4)
    views = [whole[:4], torch.randn(3, 4), torch.randn(2, 4, 4), whole[4:8], whole[8:]]
    expected, calls = [msign_(view.clone()) for view in views], []

    def counted(matrices, options):
        calls.append(tuple(matrices.shape))
        return restore(matrices, options)

    monkeypatch.setattr("trainers.optimizers.restoration.restore", counted)
    sums = restore_views(views, RestorationOptions())
    assert sorted(calls) == [(1, 3, 4), (5, 4, 4)]
    for view, right in zip(views, expected, strict=True):
        torch.testing.assert_close(view, right)
    torch.testing.assert_close(whole, torch.cat([expected[0], expected[3], expected[4]]))
    assert sums[:, 0].tolist() == sums[:, 1].tolist() == [1, 1, 2, 1, 1]
    torch.testing.assert_close(sums[:, 3], torch.tensor([4.0, 3, 8, 4, 4]), rtol=1e-4, atol=0)
    calls.clear()
    monkeypatch.setattr("trainers.optimizers.restoration.BATCH_ELEMENTS", 32)
    restore_views(views, RestorationOptions())
    assert sum(shape[0] for shape in calls) == 6 and all(math.prod(shape) <= 32 for shape in calls)
    assert BATCH_ELEMENTS > 32


def test_stable_rank_is_its_definition_and_an_estimate_is_not_below_it():
    matrices = torch.randn(5, 20, 30, dtype=FP64)
    s = torch.linalg.svdvals(matrices)
    exact = stable_rank(matrices, exact=True)
    torch.testing.assert_close(exact, s.square().sum(-1) / s[:, 0].square())
    assert (stable_rank(matrices) >= exact - 1e-12).all()
    torch.testing.assert_close(stable_rank(matrices, iterations=500), exact, rtol=1e-6, atol=0)
    # Not the participation ratio tr(W'W)^2 / tr((W'W)^2), which goes by the same name elsewhere.
    ratio = s.square().sum(-1).square() / s.pow(4).sum(-1)
    assert ((ratio - exact).abs() > 1).all()
    assert stable_rank(torch.zeros(2, 3)).item() == 0
    for scale in (1e-25, 1e25):
        torch.testing.assert_close(stable_rank(matrices.float() * scale, exact=True), exact.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("options", "message"), [({"rescale": "trace"}, "rescale='trace'"), ({"below": 0.0}, "srank_threshold=0.0")]
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RestorationOptions(**options)


# --- the mechanism, on a linear chain h <- W_l h


def singular_values(rank_wanted, size):
    """One large value and `size - 1` equal ones with this stable rank and the norm sqrt(size)."""
    first = math.sqrt(size / rank_wanted)
    return torch.tensor([first] + [math.sqrt((size - first**2) / (size - 1))] * (size - 1), dtype=FP64)


def chain(rank_wanted, layers=24, size=32):
    """`W_l = U_l diag(s) U_{l-1}^T`: every layer's top direction is the next one's."""
    s, bases = singular_values(rank_wanted, size), [orthogonal(size) for _ in range(layers + 1)]
    return [(later * s) @ earlier.mT for earlier, later in zip(bases, bases[1:], strict=False)]


def jacobian_norm(weights):
    return torch.linalg.matrix_norm(torch.linalg.multi_dot(weights[::-1]), 2).item()


@pytest.mark.parametrize(("wanted", "above"), [(10, 1e6), (3.3, 5e11), (1.7, 1e15)])
def test_aligned_layers_of_low_stable_rank_explode_and_restored_ones_do_not(wanted, above):
    weights = chain(wanted)
    for earlier, later in zip(weights, weights[1:], strict=False):
        assert align(later, earlier).item() == pytest.approx(1, abs=1e-9)
    for weight in weights:
        assert stable_rank(weight, exact=True).item() == pytest.approx(wanted, rel=1e-9)
        # Theorem 4.4
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(math.sqrt(32 / wanted), rel=1e-9)
    # Theorem 4.2 with alignment 1, the one case in which it holds as it stands
    assert jacobian_norm(weights) == pytest.approx(math.sqrt(32 / wanted) ** 24, rel=1e-9)
    assert jacobian_norm(weights) > above
    restored = [msign_(weight.clone()) for weight in weights]
    assert jacobian_norm(restored) == pytest.approx(1, rel=1e-9)


def gradient_norm(weights):
    """Of all weights, for the loss |h_L|^2 / 2 at a unit vector along the first layer's top direction."""
    weights = [weight.clone().requires_grad_() for weight in weights]
    hidden = start = torch.linalg.svd(weights[0].detach()).Vh[0]
    for weight in weights:
        hidden = weight @ hidden
    slope = torch.linalg.svd(torch.linalg.multi_dot([w.detach() for w in weights[::-1]])).U[:, 0]
    (hidden @ slope).backward()
    assert start.norm().item() == pytest.approx(1)
    return torch.stack([weight.grad.norm() for weight in weights]).norm().item()


def test_gradients_explode_and_are_as_for_orthogonal_layers_after_one_application():
    weights = chain(3.3)
    assert gradient_norm(weights) > 1e11
    restored = [msign_(weight.clone()) for weight in weights]
    assert gradient_norm(restored) == pytest.approx(math.sqrt(24), rel=1e-6)  # one for each of 24 layers


def test_pairwise_alignment_bounds_nothing():
    """Theorem 4.2 with alignment 0.8 claims more than there is, so no test here leans on it."""
    size, layers, tilt = 32, 24, math.acos(0.8)
    s, u = singular_values(10, size), orthogonal(size)
    turn = torch.eye(size, dtype=FP64)
    turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = math.cos(tilt), -math.sin(tilt), math.sin(tilt), math.cos(tilt)
    weight = u @ turn @ torch.diag(s) @ u.mT  # the same rotation at every layer, always away from the top direction
    assert align(weight, weight).item() == pytest.approx(0.8, rel=1e-9)
    claimed = (0.8 * s[0].item()) ** layers / 0.8
    assert jacobian_norm([weight] * layers) < claimed / 2


@pytest.mark.parametrize(
    ("options", "message"), [({"backend": "bogus"}, "backend='bogus'.*polar_express"), ({"rtol": 5.0}, "rtol=5.0")]
)
def test_a_bad_option_is_refused_before_the_first_application(options, message):
    with pytest.raises(ValueError, match=message):
        RestorationOptions(**options)
