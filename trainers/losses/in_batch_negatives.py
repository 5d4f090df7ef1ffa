r"""InfoNCE over in-batch negatives, `in_batch_negatives`, with memory that does not grow with queries times documents.

    L = -1/N sum_i log( exp(q_i . d_{t(i)} / tau) / sum_j exp(q_i . d_j / tau) )

is the cross-entropy of a linear head whose weight are the documents, so the similarities are never stored: see
`sigma_kernels.linear_cross_entropy`. The idea of computing the loss of a huge batch tile by tile is that of Inf-CL
(arXiv 2410.17243), which m3BERT's contrastive stage uses; there tiles also travel around the ranks, here every rank
holds the documents of all, `world x M x D` numbers, and computes its tiles by itself.
"""

import torch
import torch.distributed as dist

from sigma_kernels import linear_cross_entropy


IGNORED = -100


def in_batch_negatives(
    query: torch.Tensor,
    document: torch.Tensor,
    *,
    temperature: float = 0.05,
    symmetric: bool = False,
    targets: torch.Tensor | None = None,
    gather: bool = False,
) -> torch.Tensor:
    """InfoNCE of queries `(N, D)` against documents `(M, D)`, a scalar in fp32 (float64 of float64). Embeddings are
    used as they are: normalise them first for cosine similarity.

    Args:
        temperature: divides the similarities; 0.05 is the scale of 20 of the released m3BERT scripts.
        symmetric: the mean of this loss and of its mirror image, in which each query's document looks for it among the
            queries. The paper's scripts have the first direction only.
        targets: `(N,)`, the document of each query, -100 for a query that has none and does not count. By default
            query i belongs to document i; documents from N on are negatives of all (hard negatives).
        gather: negatives from all ranks of the default process group, which may have different N and M; gradients
            reach the rank where a document was encoded. The mean over ranks, of losses and of gradients as DDP takes
            it, is what one process would get for the union. Every rank has to take part, in the backward too.

    Raises:
        ValueError: a temperature that is not positive, shapes that do not fit, more queries than documents without
            `targets`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: it divides the similarities and must be positive.")
    if query.dim() != 2 or document.dim() != 2 or query.shape[1] != document.shape[1]:
        raise ValueError(
            f"Expected queries (N, D) and documents (M, D), got {tuple(query.shape)} and {tuple(document.shape)}."
        )
    if targets is None:
        if len(query) > len(document):
            raise ValueError(f"There are {len(query)} queries and {len(document)} documents: give `targets`.")
        targets = torch.arange(len(query), device=query.device)
    elif targets.shape != query.shape[:1]:
        raise ValueError(f"targets must be ({len(query)},), one document for each query, got {tuple(targets.shape)}.")
    counts = targets != IGNORED
    every_query, every_document, first_query, first_document = query, document, 0, 0
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        every_document, first_document = gathered(document)
        if symmetric:
            every_query, first_query = gathered(query)
    labels = torch.where(counts, targets + first_document, IGNORED)
    total = _summed(query, every_document, labels, temperature)
    if symmetric:
        own = document[targets.clamp(min=0)]  # (N, D)
        labels = torch.arange(first_query, first_query + len(query), device=query.device)
        total = (total + _summed(own, every_query, torch.where(counts, labels, IGNORED), temperature)) / 2
    return total / _mean_count(counts, gather)


def _summed(rows, columns, labels, temperature):
    return linear_cross_entropy(rows / temperature, columns, None, labels, ignore_index=IGNORED, reduction="sum")


def _mean_count(counts: torch.Tensor, gather: bool) -> torch.Tensor:
    """Queries that count, on average over ranks: with it, the mean of the ranks' losses is the mean over queries."""
    count = counts.sum().to(torch.float32)
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(count)
        count = count / dist.get_world_size()
        return count.clamp(min=1 / dist.get_world_size())
    return count.clamp(min=1)


def gathered(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all ranks one after the other, differentiable, and where those of this rank begin. Ranks may have
    different numbers of rows."""
    sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    sizes = [int(size) for size in sizes]
    return _Gather.apply(rows, sizes), sum(sizes[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """All-gather of rows. Its gradient is the sum over ranks, since each of their losses has seen the rows."""

    @staticmethod
    def forward(ctx, rows, sizes):
        ctx.sizes, ctx.dtype = sizes, rows.dtype
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded)
        return torch.cat([part[:size] for part, size in zip(every, sizes)])

    @staticmethod
    def backward(ctx, grad):
        # Not a reduce-scatter, whose names change with torch and which not every backend has.
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total)
        first = sum(ctx.sizes[: dist.get_rank()])
        return total[first : first + ctx.sizes[dist.get_rank()]].to(ctx.dtype), None
