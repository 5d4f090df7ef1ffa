r"""The Matryoshka grid: one loss for every (layer, dim) of an encoder, all from one forward.

    L = sum_l sum_d w[l, d] base( normalize(q_l[:, :d]), normalize(D_l[:, :d]) )

over exits l and prefixes d, a plain weighted sum as in m3BERT's pre-training over layers x dims (arXiv 2605.19568;
that its contrastive stage sums over all cells is our reading). Sampling cells and distilling across layers are ours.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from .in_batch_negatives import in_batch_negatives
from .matryoshka_distillation import check_increasing, normalized_prefix, similarity_kl


BaseLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class MatryoshkaGridLoss:
    """A loss of pairs of embeddings, applied at every exit and width.

    Example:
        >>> loss = MatryoshkaGridLoss(layers=[4, 8, 12], dims=[32, 64, 128, 768])
        >>> loss({4: q4, 8: q8, 12: q12}, {4: d4, 8: d8, 12: d12}).backward()  # (N, 768), not normalised

    Args:
        base_loss: of queries `(N, d)` and documents `(M, d)`, both L2-normalised; a scalar. Options go in through
            `functools.partial(in_batch_negatives, gather=True)`.
        layers: exits, increasing.
        dims: prefixes, increasing.
        weights: of the cells, `len(layers) x len(dims)`, nested or flat, layer by layer; by default 1.
        cells_per_step: so many cells, drawn afresh at each call without replacement and uniformly, stand for the grid:
            their sum is scaled by cells / cells_per_step, so that it is the whole sum on average. -1: all cells.
        distill: `"kl"`: every cell also gets `KL(p_teacher || p_cell)` of its similarities, where the teacher is the
            last layer at the largest dim, without gradient; see [`similarity_kl`].
        distill_temperature: of the similarities in that term.
        generator: a generator on the CPU for the draws; needed with `cells_per_step`. Seed it alike on all ranks: with
            `gather` each cell is a collective operation.

    Raises `ValueError` for layers or dims that are empty or do not increase, weights of another number, cells_per_step
    out of range or without a generator, and an unknown `distill`.
    """

    def __init__(
        self,
        base_loss: BaseLoss = in_batch_negatives,
        *,
        layers: Sequence[int],
        dims: Sequence[int],
        weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
        cells_per_step: int = -1,
        distill: str | None = None,
        distill_temperature: float = 0.05,
        generator: torch.Generator | None = None,
    ):
        check_increasing("layers", layers)
        check_increasing("dims", dims)
        self.cells = [(layer, dim) for layer in layers for dim in dims]
        weights = torch.ones(len(self.cells)) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if weights.numel() != len(self.cells):
            raise ValueError(f"There are {weights.numel()} weights for {len(layers)} x {len(dims)} cells.")
        if cells_per_step != -1 and not 1 <= cells_per_step <= len(self.cells):
            raise ValueError(f"cells_per_step={cells_per_step} must be -1, or from 1 to {len(self.cells)}.")
        if cells_per_step != -1 and generator is None:
            raise ValueError("cells_per_step draws cells: give a `generator`, seeded alike on all ranks.")
        if distill not in (None, "kl"):
            raise ValueError(f"distill={distill!r} is not known. Choose None or 'kl'.")
        self.base_loss, self.generator, self.distill = base_loss, generator, distill
        self.weights = dict(zip(self.cells, weights.flatten().tolist()))
        self.cells_per_step = len(self.cells) if cells_per_step == -1 else cells_per_step
        self.distill_temperature = distill_temperature

    def __call__(
        self, query_exits: Mapping[int, torch.Tensor], document_exits: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """The loss of pooled embeddings, `{layer: (N, H)}` and `{layer: (M, H)}`, at full width and not normalised.

        Raises:
            ValueError: a layer is missing, or a dim is wider than the embeddings.
        """
        missing = sorted({layer for layer, _ in self.cells} - (set(query_exits) & set(document_exits)))
        if missing:
            raise ValueError(f"There are no embeddings of layers {missing}; given are {sorted(query_exits)}.")

        def pair(layer: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
            return normalized_prefix(query_exits[layer], dim), normalized_prefix(document_exits[layer], dim)

        teacher = self.cells[-1]
        with torch.no_grad():
            lesson = pair(*teacher) if self.distill else None
        total = 0.0
        for cell in self._drawn():
            term = self.base_loss(*(embeddings := pair(*cell)))
            if self.distill and cell != teacher:
                term = term + similarity_kl(embeddings, lesson, temperature=self.distill_temperature)
            total = total + self.weights[cell] * term
        return total * (len(self.cells) / self.cells_per_step)

    def _drawn(self) -> list[tuple[int, int]]:
        if self.cells_per_step == len(self.cells):
            return self.cells
        drawn = torch.randperm(len(self.cells), generator=self.generator)[: self.cells_per_step]
        return [self.cells[at] for at in drawn.sort().values.tolist()]
