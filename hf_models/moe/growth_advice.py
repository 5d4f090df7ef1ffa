# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""When and how to grow: the profile of weight norms over depth, and rules of thumb, each with its source.

    norm(W) = ||W||_F / sqrt(numel W);   of an expert: mean over gate, up, down;   of a layer: mean over its experts

The metric and the rules are those of the authors of orthogonal growth (arXiv 2510.08008, and the first author's blog
post of July 2026) unless a line says otherwise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from .checkpoint_files import checkpoint_file, fetch_checkpoint, read_headers
from .growth_tensors import layer_tensor


# Ours: for norms that are independent over layers the ratio is about 1, for a steady rise over n layers it is n - 1.
_SEAM_RATIO_OF_A_RISE = 3.0
AUTHORS, G_STACK, OURS = "orthogonal growth (authors' rule of thumb)", "G_stack", "hf-sigma"


@dataclass(frozen=True)
class LayerNorm:
    """Norm of one layer's feed-forward weights: `kind` is `"experts"` or `"dense"`, `norm` the mean of the others."""

    layer: int
    kind: str
    gate: float
    up: float
    down: float

    @property
    def norm(self) -> float:
        return (self.gate + self.up + self.down) / 3


@dataclass(frozen=True)
class Recommendation:
    """A way to repeat layers. `seam_ratio`: the step of the norm from the last layer to the first, which stacking
    makes neighbours, over the mean step between neighbours."""

    depth_method: str
    seam_ratio: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """One rule: who says so, whether the plan follows it, and why."""

    source: str
    follows: bool
    text: str


def norm_profile(model_or_path: PreTrainedModel | str | Path, *, revision: str | None = None) -> list[LayerNorm]:
    """Norms of the routed experts, or of the MLP of dense layers, in order of layers; one tensor in memory at a time.

    Raises `ValueError` if there are no such weights, or for experts in an unknown layout.
    """
    sums: dict[tuple[int, str], dict[str, list[float]]] = {}
    for name, tensor in _tensors(model_or_path, revision):
        source = layer_tensor(name)
        if source is None or source.kind not in ("expert", "fused", "dense"):
            continue
        kind = "dense" if source.kind == "dense" else "experts"
        projections = sums.setdefault((source.layer, kind), {"gate": [], "up": [], "down": []})
        matrices = tensor if source.kind == "fused" else tensor[None]  # (experts, rows, columns)
        for projection, parts in zip(source.projections, matrices.chunk(len(source.projections), dim=1)):
            projections[projection] += [matrix.double().square().mean().sqrt().item() for matrix in parts]
    if not sums:
        raise ValueError("There is no feed-forward weight whose name growth knows. Pass a model of a known family.")
    return [
        LayerNorm(layer, kind, *(sum(values) / len(values) for values in projections.values()))
        for (layer, kind), projections in sorted(sums.items())
    ]


def _tensors(model_or_path: PreTrainedModel | str | Path, revision: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(model_or_path, PreTrainedModel):
        yield from model_or_path.state_dict().items()
        return
    folder = fetch_checkpoint(model_or_path, revision, ["*.json", "*.safetensors"])
    for file, names in read_headers(folder).items():
        with safe_open(checkpoint_file(folder, file), "pt") as shard:
            for name in names:
                yield name, shard.get_tensor(name)


def recommend(
    profile: list[LayerNorm], *, sunk_flops: float | None = None, active_parameters: float | None = None
) -> Recommendation:
    """`"interposition"`, or `"either"` where nothing speaks against stacking: from the norms of the layers with
    experts, and, if both numbers are given, from how long the source was trained."""
    norms = [row.norm for row in profile if row.kind == "experts"]
    if len(norms) < 2:
        raise ValueError(f"The profile has {len(norms)} layers with experts; a recommendation needs at least two.")
    step = sum(abs(b - a) for a, b in zip(norms, norms[1:])) / (len(norms) - 1)
    seam_ratio = abs(norms[0] - norms[-1]) / step if step else 0.0
    rising = seam_ratio >= _SEAM_RATIO_OF_A_RISE
    reasons = [
        f"{OURS}: the seam of a stack is a step of the norm {seam_ratio:.1f} times the usual one between layers, "
        + ("which interposition avoids" if rising else "so the norms do not tell the two apart")
    ]
    settled = None
    if sunk_flops is not None and active_parameters is not None:
        share = sunk_flops / chinchilla_flops(active_parameters)
        settled = share >= 1
        reasons.append(
            f"{AUTHORS}: trained for {share:.2g} of 6 N 20 N FLOPs; "
            + ("beyond 1, interposition wins" if settled else "below 1, both methods are alike")
        )
    method = "interposition" if settled or (settled is None and rising) else "either"
    return Recommendation(method, seam_ratio, tuple(reasons))


def chinchilla_flops(active_parameters: float) -> float:
    """F_c = 6 N (20 N): FLOPs of 20 tokens for each of the N *activated* parameters, as the authors count them."""
    if not active_parameters > 0:
        raise ValueError(f"active_parameters={active_parameters} must be positive.")
    return 6 * active_parameters * (20 * active_parameters)


def g_stack_tokens(parameters: float, flops: float) -> float:
    """Tokens to train before *stacking* a dense model: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.

    The formula of G_stack, for N parameters of the target and a compute budget of C FLOPs. It was fitted to dense
    models that are stacked, not to mixtures of experts, and is no rule of orthogonal growth.
    """
    if not (parameters > 0 and flops > 1):
        raise ValueError(f"parameters={parameters} and flops={flops} must be positive, flops above 1.")
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)


def advise(
    sunk_flops: float,
    extra_flops: float,
    active_parameters: float,
    *,
    annealed: bool = False,
    noise_alpha: float = 0.01,
) -> list[Advice]:
    """The rules of thumb for a source trained with `sunk_flops` that is to be trained on with `extra_flops`.

    `active_parameters` are the source's; `annealed` says that its learning rate was already brought down.
    """
    if sunk_flops < 0 or extra_flops <= 0:
        raise ValueError(f"sunk_flops={sunk_flops} must be >= 0 and extra_flops={extra_flops} positive.")
    settled = sunk_flops / chinchilla_flops(active_parameters)
    return [
        Advice(
            AUTHORS,
            extra_flops >= sunk_flops,
            f"spend at least about as much after growth as before: here {extra_flops / max(sunk_flops, 1):.2g} of it.",
        ),
        Advice(
            AUTHORS,
            settled >= 1,
            f"interposition shows its advantage beyond 1 F_c = 6 N 20 N: the source has {settled:.2g}; before, it and "
            "stacking are alike.",
        ),
        Advice(
            AUTHORS,
            not annealed,
            "grow from the phase of constant learning rate; after annealing, the new learning rate needs tuning.",
        ),
        Advice(
            AUTHORS,
            0.005 <= noise_alpha <= 0.02,
            f"noise of about 0.01 on the copies of experts: noise_alpha is {noise_alpha}. (0.005 to 0.02 counts as "
            "about, which is our reading.)",
        ),
        Advice(AUTHORS, True, "depth and width may come in either order."),
    ]


__all__ = [
    "Advice",
    "LayerNorm",
    "Recommendation",
    "advise",
    "chinchilla_flops",
    "g_stack_tokens",
    "norm_profile",
    "recommend",
]
