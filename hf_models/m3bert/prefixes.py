# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Layers of which the first d entries are a layer of their own: one set of weights serves every width.

A map of `d` entries uses the first `d` columns of the weight (a square one the first `d` rows, too), a norm the mean
square of those `d` entries.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class M3BertPrefixLinear(nn.Linear):
    """`(..., d)` -> `(..., out_features)` for any `d <= in_features`; a `square` one gives `(..., d)`."""

    square = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dim = hidden_states.shape[-1]
        if dim == self.in_features:
            return super().forward(hidden_states)
        rows = dim if self.square else self.out_features
        # Contiguous, so that the product is that of the model cut to this width, bit for bit.
        weight = self.weight[:rows, :dim].contiguous()
        return F.linear(hidden_states, weight, None if self.bias is None else self.bias[:rows])


class M3BertPrefixSquareLinear(M3BertPrefixLinear):
    """`(..., d)` -> `(..., d)`."""

    square = True


class M3BertPrefixRMSNorm(nn.RMSNorm):
    """RMSNorm of `(..., d)`, `d` at most its width."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dim = hidden_states.shape[-1]
        return F.rms_norm(hidden_states, (dim,), self.weight[:dim], self.eps)


def prefix_slices(shape: Sequence[int], target: Sequence[int], width: int, smaller: int) -> tuple[slice, ...]:
    """What of a tensor of `shape` belongs to the model of width `smaller`, where it has the shape `target`: the first
    entries of each axis that is as long as the outputs were wide. Other axes stay whole, whatever `target` says."""
    cut = (size == width and wanted == smaller for size, wanted in zip(shape, target, strict=True))
    return tuple(slice(smaller) if shorter else slice(None) for shorter in cut)


__all__ = ["M3BertPrefixLinear", "M3BertPrefixRMSNorm", "M3BertPrefixSquareLinear", "prefix_slices"]
