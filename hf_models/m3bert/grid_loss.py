# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""Masked-language-model loss over the grid of exits:

    L = sum_{l in layers} sum_{d in dims} w_ld CE( head_d( H_l[:, :d] ), labels )

with H_l the states of the masked tokens after layer l and head_d the one head on its first d entries. Logits are never
stored: `sigma_kernels.linear_cross_entropy_grid` computes all terms together, and where it is missing, chunks of
tokens do, one term after the other.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging


logger = logging.get_logger(__name__)

IGNORED = -100
LOGITS_AT_ONCE = 1 << 25  # of a chunk: 128 MiB in fp32


def grid_losses(
    features_of: Callable[[torch.Tensor], torch.Tensor],
    decoder: torch.nn.Linear,
    states: Sequence[torch.Tensor],
    labels: torch.Tensor,
    dims: Sequence[int],
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of every cell, `(layers, dims)`, in fp32 (float64 of float64).

    Args:
        features_of: what is projected onto the vocabulary, `(N, d)`, for states `(N, d)`.
        decoder: that projection; its first d columns serve a width of d.
        states: of each exit, `(batch, tokens, H)`.
        labels: `(batch, tokens)`, -100 where nothing is to be predicted.
        dims: widths of the cells.
        num_items_in_batch: what the sums are divided by, the labels of the whole optimizer step. `None`: the labels
            here, so that each cell is a mean. Without any label every cell is 0, with a graph.
    """
    labels = labels.reshape(-1).to(states[0].device)
    kept = (labels != IGNORED).nonzero(as_tuple=True)[0]  # (N,)
    gathered = [state.reshape(-1, state.shape[-1])[kept] for state in states]  # each (N, H)
    features = [features_of(state[:, :dim]) for state in gathered for dim in dims]  # each (N, d)
    count = kept.shape[0] if num_items_in_batch is None else num_items_in_batch
    count = count.clamp(min=1) if torch.is_tensor(count) else max(count, 1)
    sums = summed_cross_entropies(features, decoder.weight, decoder.bias, labels[kept])
    return (sums / (count.to(sums.device) if torch.is_tensor(count) else count)).view(len(states), len(dims))


def summed_cross_entropies(
    features: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """`(cells,)`: the sum over tokens of the cross-entropy of each `features (N, d)` through the first d columns of
    `weight (V, H)` with `labels (N,)`."""
    try:
        from sigma_kernels import linear_cross_entropy_grid
    except ImportError:
        logger.warning_once("hf-sigma's kernels are not installed; chunks in torch compute the loss.")
        return torch.stack([chunked_cross_entropy(each, weight, bias, labels) for each in features])
    return linear_cross_entropy_grid(features, weight, bias, labels, ignore_index=IGNORED, reduction="sum")


def chunked_cross_entropy(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """One of them, a scalar of `features (N, d)`, at most `LOGITS_AT_ONCE` logits at a time, which the backward pass
    computes again."""
    weight = weight[:, : features.shape[1]]

    def of_chunk(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(rows.to(weight.dtype), weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, reduction="sum")

    size = max(1, LOGITS_AT_ONCE // weight.shape[0])
    chunks = zip(features.split(size), labels.split(size), strict=True)
    return torch.stack([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()


__all__ = ["chunked_cross_entropy", "grid_losses", "summed_cross_entropies"]
