"""Matryoshka distillation against its formula in float64, written down with all similarities."""

import pytest
import torch
from torch.nn import functional as F

from sigma_kernels.benchmarks.allocations import allocations
from trainers.losses import MatryoshkaDistillationLoss, matryoshka_distillation, similarity_kl
from trainers.losses.matryoshka_distillation import normalized_prefix


FP64 = torch.float64
DIMS = [2, 3, 8]


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(matryoshka_distillation, "ROWS", 4)


def embeddings(queries=7, documents=7, dtype=FP64):
    return [torch.randn(rows, 8, dtype=dtype, requires_grad=True) for rows in (queries, documents)]


def naive(query, document, dims, weights, teachers, targets):
    """`sum_d w_d (CE_d + mean over teachers t > d of KL(softmax(z_t).detach() || softmax(z_d)))`, `z` x 20."""
    logits = {dim: 20 * F.normalize(query[:, :dim], dim=-1) @ F.normalize(document[:, :dim], dim=-1).T for dim in dims}
    total = 0
    for dim, weight in zip(dims, weights):
        total = total + weight * F.cross_entropy(logits[dim], targets)
        larger = [t for t in teachers if t > dim]
        for t in larger:
            kl = F.kl_div(logits[dim].log_softmax(-1), logits[t].softmax(-1).detach(), reduction="batchmean")
            total = total + weight * kl / len(larger)
    return total


@pytest.mark.parametrize("documents", [7, 11])
@pytest.mark.parametrize("teachers", [None, [8], [3, 8], [3], []])
@pytest.mark.parametrize("dims, weights", [(DIMS, None), ([8, 2, 3], [1.0, 0.5, 2.0])])
def test_it_is_the_formula(dims, weights, teachers, documents):
    query, document = embeddings(documents=documents)
    loss = MatryoshkaDistillationLoss(dims, weights=weights, teacher_dims=teachers)(query, document)
    all_weights, all_teachers = weights or [1.0] * 3, dims if teachers is None else teachers
    expected = naive(query, document, dims, all_weights, all_teachers, torch.arange(7))
    torch.testing.assert_close(loss, expected)
    for got, want in zip(*(torch.autograd.grad(value, (query, document)) for value in (loss, expected))):
        torch.testing.assert_close(got, want)


def test_targets_are_passed_on():
    query, document = embeddings(documents=9)
    targets = torch.tensor([8, 7, 6, 5, 4, 3, 2])
    loss = MatryoshkaDistillationLoss(DIMS)(query, document, targets=targets)
    torch.testing.assert_close(loss, naive(query, document, DIMS, [1.0] * 3, DIMS, targets))


def test_the_teacher_has_no_gradient_and_agreement_costs_nothing():
    (query, document), teacher = embeddings(), embeddings()
    loss = similarity_kl((query, document), teacher)
    loss.backward()
    assert loss > 0 and query.grad.any() and all(tensor.grad is None for tensor in teacher)
    assert similarity_kl((query, document), (query, document)).abs() < 1e-12
    assert similarity_kl(embeddings(queries=0), embeddings(queries=0)) == 0


def test_memory_does_not_grow_with_queries_times_documents(monkeypatch):
    monkeypatch.setattr(matryoshka_distillation, "ROWS", 32)
    (query, document), teacher = (embeddings(1024, 1024, torch.float32) for _ in range(2))
    step = lambda: similarity_kl((query, document), teacher).backward()  # noqa: E731
    assert allocations(step, torch.device("cpu")).peak < 4 * 1024 * 1024 / 2


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([],), {}, r"dims=\[\]"),
        (([2, 2],), {}, r"dims=\[2, 2\]"),
        (([0, 2],), {}, r"dims=\[0, 2\]"),
        (([2, 4],), {"weights": [1.0]}, "1 weights for 2 dims"),
        (([2, 4],), {"teacher_dims": [8]}, r"teacher_dims \[8\] are not among the dims \[2, 4\]"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaDistillationLoss(*arguments, **options)


def test_a_dim_wider_than_the_embeddings_is_refused():
    with pytest.raises(ValueError, match="dim=16 is more than the 8"):
        MatryoshkaDistillationLoss([16])(*embeddings())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_zeros_stay_zero_in_every_precision(dtype):
    rows = torch.zeros(2, 8, dtype=dtype)
    rows[0] = 1
    cut = normalized_prefix(rows, 4)
    assert cut.dtype == dtype and not cut[1].any()
    torch.testing.assert_close(cut[0].float(), torch.full((4,), 0.5), rtol=1e-2, atol=0)
