"""The polar factor: against an SVD in float64, by both backends, and what becomes of directions near zero."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigma_kernels import polar_factor, polar_with_rank, reference, spectral_norm
from sigma_kernels.polar import COEFFICIENTS


FP32, FP64 = torch.float32, torch.float64
BOTH = pytest.mark.parametrize("backend", ["svd", "polar_express"])
SHAPES = pytest.mark.parametrize(("rows", "columns"), [(48, 48), (48, 192), (192, 48), (1, 7), (7, 1), (1, 1)])


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=FP64)).Q


def matrix_of(values, rows, columns):
    """A matrix with these singular values and its sign, in float64."""
    values = torch.as_tensor(values, dtype=FP64)
    u, v = orthonormal(rows, len(values)), orthonormal(columns, len(values))
    keep = values > 0
    return (u * values) @ v.mT, u[:, keep] @ v[:, keep].mT


def conditioned(condition, size=96):
    return matrix_of(torch.logspace(0, -math.log10(condition), size, dtype=FP64), size, size)


def error(factor, sign):
    return ((factor.double() - sign).norm() / sign.norm()).item()


@BOTH
@SHAPES
def test_it_is_the_reference_in_float64(backend, rows, columns):
    matrix = torch.randn(rows, columns, dtype=FP64)
    expected = reference.polar_factor(matrix)
    assert error(polar_factor(matrix, backend=backend), expected) < 1e-10
    factor = polar_factor(matrix.to(FP32), backend=backend)
    assert factor.dtype == FP32 and error(factor, expected) < 1e-4


@BOTH
@pytest.mark.parametrize(("condition", "tolerance"), [(1e1, 5e-6), (1e2, 5e-6), (1e3, 2e-5), (1e4, 2e-4), (1e5, 2e-3)])
def test_the_error_grows_with_the_condition_number_alone(backend, condition, tolerance):
    matrix, sign = conditioned(condition)
    result = polar_with_rank(matrix.to(FP32), backend=backend, rtol=1e-6)
    assert error(result.factor, sign) < tolerance
    assert result.rank == 96


def test_the_iteration_itself_reaches_condition_ten_thousand(monkeypatch):
    """Otherwise the SVD would stand in, and nobody would see that the fast path is none."""
    used = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda work, **options: used.append(len(work)) or svd(work, **options))
    easy = torch.stack([conditioned(condition)[0] for condition in (1e1, 1e3, 1e4)]).to(FP32)
    polar_factor(easy, backend="polar_express")
    assert used == []
    hard = torch.stack([easy[0], conditioned(1e6)[0].to(FP32), torch.zeros(96, 96), easy[1]])
    polar_factor(hard, backend="polar_express")
    assert used == [2]  # and only those that need it go there


def test_the_coefficients_take_what_they_promise_to_one():
    x = torch.logspace(-4, 0, 20_001, dtype=FP64)
    for a, b, c in COEFFICIENTS[:9]:
        x = a * x + b * x**3 + c * x**5
        assert x.max() < 2
    assert (x - 1).abs().max() < 1e-9
    assert math.prod(a for a, _, _ in COEFFICIENTS) == pytest.approx(8.7e4, rel=0.01)  # of what is near zero


# --- null directions


@BOTH
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_null_directions_are_not_promoted(backend, dtype):
    for rank in (1, 4, 63):
        matrix, sign = matrix_of(torch.linspace(1, 0.5, rank), 64, 64)
        result = polar_with_rank(matrix.to(dtype), backend=backend)
        assert result.rank == rank
        assert error(result.factor, sign) < 1e-4
        assert torch.linalg.matrix_norm(result.factor).item() ** 2 == pytest.approx(rank, rel=1e-4)


@BOTH
def test_what_is_below_the_cut_is_left_out_even_where_the_iteration_would_reach_it(backend):
    values = torch.cat([torch.linspace(1, 0.1, 40), torch.full((8,), 0.005)])
    matrix, _ = matrix_of(values, 48, 64)
    matrix = matrix.to(FP32)
    cut = polar_with_rank(matrix, backend=backend, rtol=0.01)
    assert cut.rank == 40
    assert error(cut.factor, reference.polar_factor(matrix.double(), rtol=0.01)) < 1e-4
    whole = polar_with_rank(matrix, backend=backend, rtol=0.001)
    assert whole.rank == 48
    assert error(whole.factor, reference.polar_factor(matrix.double(), rtol=0.001)) < 1e-4


@BOTH
@pytest.mark.parametrize("small", [3e-3, 3e-4, 3e-5, 3e-6, 3e-7, 3e-8, 0.0])
def test_one_small_direction_is_kept_whole_or_dropped_whole(backend, small):
    values = torch.ones(64)
    values[-1] = small
    matrix, _ = matrix_of(values, 64, 64)
    singular = torch.linalg.svdvals(polar_factor(matrix.to(FP32), backend=backend).double())
    torch.testing.assert_close(singular[:-1], torch.ones(63, dtype=FP64), rtol=0, atol=1e-4)
    assert singular[-1] < 1e-4 or singular[-1] > 1 - 1e-4
    assert (singular[-1] > 0.5) == (small > 64 * torch.finfo(FP32).eps)


@BOTH
def test_zero_stays_zero_and_nan_stays_where_it_is(backend):
    matrices = torch.randn(5, 6, 9)
    alone = [polar_factor(matrices[i], backend=backend) for i in (0, 4)]
    matrices[1], matrices[2, 0, 0], matrices[3, 1, 1] = 0.0, torch.nan, torch.inf
    result = polar_with_rank(matrices, backend=backend)
    assert result.rank.tolist() == [6, 0, 0, 0, 6]
    assert not result.factor[1].any() and result.spectral_norm[1] == 0
    assert result.factor[2:4].isnan().all() and result.spectral_norm[2:4].isnan().all()
    torch.testing.assert_close(result.factor[[0, 4]], torch.stack(alone))


# --- properties


@BOTH
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 10_000))
def test_it_is_a_partial_isometry_that_is_its_own_sign_and_moves_with_rotations(backend, rows, columns, seed):
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=FP64)
    factor = polar_factor(matrix, backend=backend)
    torch.testing.assert_close(factor @ factor.mT @ factor, factor, rtol=0, atol=1e-9)
    torch.testing.assert_close(polar_factor(factor, backend=backend), factor, rtol=0, atol=1e-9)
    q, r = orthonormal(rows, rows), orthonormal(columns, columns)
    torch.testing.assert_close(polar_factor(q @ matrix @ r, backend=backend), q @ factor @ r, rtol=0, atol=1e-7)
    torch.testing.assert_close(polar_factor(matrix.mT, backend=backend), factor.mT, rtol=0, atol=1e-9)
    positive = factor.mT @ matrix  # W = sign(W) H with H positive semidefinite
    torch.testing.assert_close(factor @ positive, matrix, rtol=0, atol=1e-8)
    assert torch.linalg.eigvalsh((positive + positive.mT) / 2).min() > -1e-9


@BOTH
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_scale_does_not_matter(backend, scale):
    matrix = torch.randn(20, 30)
    torch.testing.assert_close(
        polar_factor(matrix * scale, backend=backend), polar_factor(matrix, backend=backend), rtol=0, atol=1e-5
    )


@BOTH
def test_leading_dimensions_are_a_batch(backend):
    matrices = torch.randn(2, 3, 8, 12)
    result = polar_with_rank(matrices, backend=backend)
    assert result.factor.shape == matrices.shape and result.rank.shape == result.spectral_norm.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(
                result.factor[i, j], polar_factor(matrices[i, j], backend=backend), atol=1e-5, rtol=0
            )
    for empty in (matrices[:0], matrices[..., :0], matrices[..., :0, :]):
        assert polar_factor(empty, backend=backend).shape == empty.shape
        assert polar_with_rank(empty, backend=backend).rank.shape == empty.shape[:-2]


@BOTH
def test_bf16_is_computed_in_fp32_and_its_noise_needs_a_larger_cut(backend):
    full = torch.randn(32, 32).bfloat16()
    factor = polar_factor(full, backend=backend)
    assert factor.dtype == torch.bfloat16
    torch.testing.assert_close(factor, polar_factor(full.float(), backend="svd").bfloat16(), atol=1e-2, rtol=0)
    rounded = matrix_of(torch.linspace(1, 0.5, 4), 64, 64)[0].bfloat16()
    assert polar_with_rank(rounded, backend=backend).rank > 50
    assert polar_with_rank(rounded, backend=backend, rtol=1e-2).rank == 4


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_neither_autocast_nor_a_fast_matmul_setting_lowers_the_precision(precision):
    before = torch.get_float32_matmul_precision()
    matrix, sign = conditioned(1e2)
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(polar_factor(matrix.to(FP32), backend="polar_express"), sign) < 5e-6
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_input_is_not_written_to_and_no_graph_is_kept():
    matrix = torch.randn(8, 8, requires_grad=True)
    before = matrix.detach().clone()
    for backend in ("auto", "svd", "polar_express"):
        assert not polar_factor(matrix, backend=backend).requires_grad
        assert torch.equal(matrix, before)


def test_auto_is_the_svd_on_a_cpu():
    matrix = torch.randn(3, 16, 16)
    assert torch.equal(polar_factor(matrix), polar_factor(matrix, backend="svd"))


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (3, 5, 8, 8), (1, 1)])
def test_power_iteration_finds_the_spectral_norm_from_below(shape):
    matrix = torch.randn(shape, dtype=FP64)
    exact = torch.linalg.svdvals(matrix)[..., 0]
    estimate = spectral_norm(matrix)
    assert (estimate <= exact * (1 + 1e-12)).all() and (estimate > 0.9 * exact).all()
    torch.testing.assert_close(spectral_norm(matrix, iterations=1000), exact, rtol=1e-3, atol=0)
    for scale in (1e-25, 1e25):
        torch.testing.assert_close(
            spectral_norm(matrix.float() * scale), (estimate * scale).float(), rtol=1e-4, atol=0
        )
    assert not spectral_norm(torch.zeros(4, 5)).any()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (torch.ones(2, 2), {"backend": "eigh"}, "backend='eigh'"),
        (torch.ones(4), {}, r"\(4,\)"),
        (torch.ones(2, 2, dtype=torch.int64), {}, "int64"),
        (torch.ones(2, 2), {"rtol": 1.0}, "rtol=1.0"),
        (torch.ones(2, 2), {"rtol": -0.1}, "rtol=-0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        polar_factor(arguments, **options)


@pytest.mark.gpu
def test_on_a_gpu_auto_iterates_to_the_factor_of_the_cpu():
    matrices = torch.stack([conditioned(condition)[0] for condition in (1e1, 1e3)]).to(FP32)
    torch.testing.assert_close(polar_factor(matrices.cuda()).cpu(), polar_factor(matrices), rtol=0, atol=1e-4)


def test_signs_need_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from sigma_kernels import polar_factor
assert torch.equal(polar_factor(torch.eye(3)), torch.eye(3))
try:
    from sigma_kernels import moe_mlp
except ImportError:
    print("as it should")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "as it should\n", done.stderr
