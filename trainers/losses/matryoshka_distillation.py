r"""Matryoshka distillation: every prefix of an embedding learns the task and from the larger prefixes.

As the released m3BERT code has it, with dims walked from large to small, prefixes L2-normalised, and
`p_d = softmax(q_d D_d^T / tau)` over the documents of the batch:

    L = sum_d w_d ( CE_d + 1/|T_d| sum_{t in T_d} KL(stop_gradient(p_t) || p_d) ),   T_d = {teachers t > d}

KL is summed over documents and averaged over queries; its only temperature is that of the similarities. The largest
dim has no teacher.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .in_batch_negatives import in_batch_negatives


ROWS = 1024  # queries whose similarities to all documents exist at a time


class MatryoshkaDistillationLoss:
    """Cross-entropy and distillation over prefixes.

    Example:
        >>> loss = MatryoshkaDistillationLoss([32, 64, 128, 768])
        >>> loss(query, document).backward()  # (N, 768), (M, 768), not normalised

    Args:
        dims: widths of the prefixes, in any order.
        weights: `w_d`, one for each of `dims` in their order; by default 1.
        teacher_dims: the dims that may teach smaller ones; by default all. (The released code gives their indices.)
        temperature: of the similarities, in both terms; the released 1 / 20.

    Raises `ValueError` for dims that are empty, repeated or not positive, weights of another number, and teachers that
    are not among the dims.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        teacher_dims: Sequence[int] | None = None,
        temperature: float = 0.05,
    ):
        weights = [1.0] * len(dims) if weights is None else list(weights)
        check_increasing("dims", sorted(dims))
        if len(weights) != len(dims):
            raise ValueError(f"There are {len(weights)} weights for {len(dims)} dims.")
        strangers = sorted(set(teacher_dims or ()) - set(dims))
        if strangers:
            raise ValueError(f"teacher_dims {strangers} are not among the dims {sorted(dims)}.")
        self.weights = dict(sorted(zip(dims, weights), reverse=True))
        self.teacher_dims = sorted(dims if teacher_dims is None else teacher_dims, reverse=True)
        self.temperature = temperature

    def __call__(
        self, query: torch.Tensor, document: torch.Tensor, *, targets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of queries `(N, H)` and documents `(M, H)`; `targets` as in [`in_batch_negatives`]."""
        total, prefixes = query.new_zeros((), dtype=torch.float32), {}
        for dim, weight in self.weights.items():
            pair = prefixes[dim] = normalized_prefix(query, dim), normalized_prefix(document, dim)
            term = in_batch_negatives(*pair, temperature=self.temperature, targets=targets)
            teachers = [prefixes[other] for other in self.teacher_dims if other > dim]
            for teacher in teachers:
                term = term + similarity_kl(pair, teacher, temperature=self.temperature) / len(teachers)
            total = total + weight * term
        return total


def check_increasing(name: str, values: Sequence[int]) -> None:
    """`ValueError` unless `values` are positive, increasing, and at least one."""
    values = list(values)
    if not values or values[0] < 1 or any(a >= b for a, b in zip(values, values[1:])):
        raise ValueError(f"{name}={values} must be positive numbers, each once.")


def normalized_prefix(embedding: torch.Tensor, dim: int) -> torch.Tensor:
    """The first `dim` numbers of each row, L2-normalised after the cut; rows of zeros stay zero."""
    if dim > embedding.shape[-1]:
        raise ValueError(f"dim={dim} is more than the {embedding.shape[-1]} of the embeddings.")
    cut = embedding[..., :dim]
    # In fp16 the smallest norm that is divided by would be 0.
    return F.normalize(cut.to(torch.promote_types(cut.dtype, torch.float32)), dim=-1).to(cut.dtype)


def similarity_kl(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    *,
    temperature: float = 0.05,
) -> torch.Tensor:
    """`mean_i KL(p_teacher[i] || p_student[i])`, `p[i] = softmax_j(q_i . d_j / temperature)`, of pairs (queries,
    documents); the teacher gets no gradient. Similarities are made for [`ROWS`] queries at a time, and again in the
    backward, so memory does not grow with queries times documents."""
    (query, document), (wise_query, wise_document) = student, [tensor.detach() for tensor in teacher]
    total = query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
    for rows in (slice(at, at + ROWS) for at in range(0, len(query), ROWS)):
        block = (query[rows], document, wise_query[rows], wise_document, temperature)
        total = total + checkpoint(_summed_kl, *block, use_reentrant=False, preserve_rng_state=False)
    return total / max(len(query), 1)


def _summed_kl(query, document, wise_query, wise_document, temperature):
    ours = (query / temperature @ document.T).log_softmax(-1, dtype=_wide(query))
    theirs = (wise_query / temperature @ wise_document.T).log_softmax(-1, dtype=_wide(query))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
