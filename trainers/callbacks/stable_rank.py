"""Stable rank of the weights by kind of projection: the early sign of a collapse (arXiv 2602.01734, figure 1)."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..optimizers import select_targets, stable_rank
from ..optimizers.targets import Selection
from ..reliability.events import EventLog
from .installation import add_to_log


# What a matrix is, by its name; parts of fused weights are numbered in the order of their rows.
_KINDS = (
    ("q", r"\bq_proj\b|(?:c_attn|qkv|Wqkv)\w*(?:\.weight)?\[0\]"),
    ("k", r"\bk_proj\b|(?:c_attn|qkv|Wqkv)\w*(?:\.weight)?\[1\]"),
    ("v", r"\bv_proj\b|(?:c_attn|qkv|Wqkv)\w*(?:\.weight)?\[2\]"),
    ("o", r"\b(?:o_proj|Wo|out_proj)\b|attn\.c_proj"),
    ("gate", r"\bgate_proj\b|gate_up_proj(?:\.weight)?\[0\]|\bWi(?:\.weight)?\[0\]"),
    ("up", r"\bup_proj\b|gate_up_proj(?:\.weight)?\[1\]|\bWi(?:\.weight)?\[1\]|\bc_fc\b"),
    ("down", r"\bdown_proj\b|mlp\.(?:c_proj|Wo)"),
)


class StableRankCallback(TrainerCallback):
    """Log `stable_rank/<kind>` (q, k, v, o, gate, up, down) with the loss, and write every matrix's as an event.

    The paper plots the geometric mean over "the first several layers" without saying how many, nor of which matrices;
    ours is over the first quarter of the layers, of each kind by itself. It is taken from the weights that the logged
    step starts from: right after an application of MSign it would always be full. Sharded weights are gathered, one at
    a time, on all ranks.

    Args:
        targets: which matrices, see [`select_targets`].
        iterations: of the power iteration; the values are 4 to 6 % too high on random matrices after 10, and exact
            where the stable rank is low.
    """

    def __init__(self, targets: Selection = "all_2d", *, iterations: int = 10):
        self.targets, self.iterations = targets, iterations
        self._means: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._selected = select_targets(model, self.targets)
        self._log = EventLog(args.output_dir, rank=args.process_index)
        self._means = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if (state.global_step + 1) % max(1, round(state.logging_steps or 1)):
            return
        ranks = dict(self._measure(dict(model.named_parameters())))
        self._means = first_quarter_means(ranks)
        if args.process_index == 0:
            self._log.record("stable_rank", step=state.global_step, evidence=ranks)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and self._means:
            add_to_log(state, logs, {f"stable_rank/{kind}": round(v, 4) for kind, v in self._means.items()})
            self._means = {}

    @torch.no_grad()
    def _measure(self, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, float]]:
        for target in self._selected:
            weight = weights.get(target.name, target.parameter)
            if isinstance(weight, DTensor):
                weight = weight.full_tensor()
            for name, matrix in target.matrices(weight):
                # Of experts `(E, m, n)`, the geometric mean: a single one that collapsed still moves it.
                values = stable_rank(matrix, iterations=self.iterations).clamp_min(1e-12).log().mean().exp()
                yield name, float(values)


def first_quarter_means(ranks: dict[str, float]) -> dict[str, float]:
    """Geometric means by kind over the first quarter of the layers, at least one; matrices of no known kind or without
    a layer number do not count."""
    by_kind: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, value in ranks.items():
        kind, layer = kind_of(name), re.search(r"\.(\d+)\.", name)
        if kind is not None and layer is not None:
            by_kind[kind][int(layer[1])].append(value)
    means = {}
    for kind, layers in by_kind.items():
        first = sorted(layers)[: max(1, math.ceil(len(layers) / 4))]
        values: list[Any] = [value for layer in first for value in layers[layer]]
        means[kind] = math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
    return means


def kind_of(name: str) -> str | None:
    """`"q"`, `"k"`, `"v"`, `"o"`, `"gate"`, `"up"`, `"down"` or `None`; `name` is one of [`MatrixTarget.matrices`]."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), None)


__all__ = ["StableRankCallback", "first_quarter_means", "kind_of"]
