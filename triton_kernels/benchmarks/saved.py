"""Bytes that a layer keeps for its backward, beyond its inputs and weights.

They follow from shapes and types alone: a small shape on the CPU, ours in Triton's interpreter (`TRITON_INTERPRET=1`),
says what a GPU would keep.
"""

import argparse
import json

import torch
from torch import nn

from .allocations import kept_bytes
from .layers import layers
from .routings import route


SHAPES = ((64, 1, 8, 64, 32), (64, 2, 8, 64, 32), (64, 4, 8, 32, 64))  # tokens, slots, experts, hidden, inner


def saved_bytes(layer, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, known: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward, each storage once, without those of `known`."""
    return kept_bytes(lambda: layer(x, index, weights), [x, index, weights, *known])


def measure(dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """Numbers that each layer keeps per (token, slot) pair, at the small shapes."""
    rows = []
    for tokens, slots, experts, hidden, inner in SHAPES:
        generator = torch.Generator().manual_seed(0)
        shapes = ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner))
        x, w1, w2 = (nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes)
        index = route("uniform", tokens, slots, experts)
        weights = torch.rand(tokens, slots, generator=generator).requires_grad_()
        pairs = tokens * slots
        kept = {
            name: saved_bytes(layer, x, index, weights, [w1, w2]) / pairs / x.element_size()
            for name, layer in layers(w1, w2, pairs=pairs, compute_dtype=dtype, training=True).items()
        }
        rows.append({"slots": slots, "hidden": hidden, "inner": inner, "numbers_per_pair": kept})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This one has no options."""


def run(options: argparse.Namespace) -> int:
    """Print the figures as JSON."""
    print(json.dumps(measure()))
    return 0
