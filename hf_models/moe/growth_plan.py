# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""What to grow: the plan of orthogonal growth (arXiv 2510.08008) and the order of layers that it gives.

interposition  l1 l1 ... l1  l2 l2 ... l2  ...  ln ln ... ln     each layer g times, the paper's method
stack          l1 l2 ... ln  l1 l2 ... ln  ...                   the whole block g times, its baseline
"""

import math
from dataclasses import dataclass


# The values of each field that has only some.
CHOICES = {
    "depth_method": ("interposition", "stack"),
    "depth_copy_init": ("copy", "zero_output"),
    "topk_policy": ("scale", "keep"),
    "expert_order": ("append", "interleave"),
    "router_init": ("copy", "random"),
    "router_scale_fix": ("auto", "none"),
}
NOISE_TARGETS = ("experts", "router")


@dataclass(frozen=True)
class GrowthPlan:
    """How a mixture-of-experts checkpoint is enlarged. The defaults are the paper's recipe, apart from the factors.

    Args:
        depth_factor (`int`, defaults to 1):
            How often each layer occurs afterwards. The paper uses 2, and 4 in an ablation.
        depth_method (`str`, defaults to `"interposition"`):
            `"interposition"` or `"stack"`: see the module's docstring.
        keep_first (`int`, defaults to 0), keep_last (`int`, defaults to 0):
            Layers at either end that are not repeated.
        depth_copy_init (`str`, defaults to `"copy"`):
            `"copy"`: repeated layers are exact copies, which changes the function. `"zero_output"`: what a copy adds
            to the residual stream (attention `o_proj`, every `down_proj`) is zero, which keeps it.
        width_factor (`int`, defaults to 1):
            How often each expert and its router row occur afterwards. The paper uses 2.
        topk_policy (`str`, defaults to `"scale"`):
            `"scale"`: experts per token grow by `width_factor` too. `"keep"`: they do not, which changes the function.
        noise_alpha (`float`, defaults to 0.01):
            Standard deviation of the noise on copies of experts and router rows, as a share of that of what is copied.
        noise_targets (`tuple[str, ...]`, defaults to `("experts", "router")`):
            What gets the noise.
        expert_order (`str`, defaults to `"append"`):
            `"append"`: copies follow all experts. `"interleave"`: each follows its original, and stays in its group
            where routing is limited to groups.
        router_init (`str`, defaults to `"copy"`):
            `"copy"`, or `"random"`: rows of copies from N(0, 0.02^2), the paper's baseline.
        seed (`int`, defaults to 0):
            Seed of all noise. Each matrix has a generator of its own, so no order of files or tensors matters.
        router_scale_fix (`str`, defaults to `"auto"`):
            Sigmoid weights that are not renormalised add up to `width_factor` times as much with as many more experts.
            `"auto"` divides `routed_scaling_factor` by it, or refuses where the config cannot express what keeps the
            function. `"none"` leaves the config alone.

    Raises:
        ValueError: a value that is not allowed; the message names the field, the value and the remedy.
    """

    depth_factor: int = 1
    depth_method: str = "interposition"
    keep_first: int = 0
    keep_last: int = 0
    depth_copy_init: str = "copy"
    width_factor: int = 1
    topk_policy: str = "scale"
    noise_alpha: float = 0.01
    noise_targets: tuple[str, ...] = NOISE_TARGETS
    expert_order: str = "append"
    router_init: str = "copy"
    seed: int = 0
    router_scale_fix: str = "auto"

    def __post_init__(self):
        for field, smallest in (("depth_factor", 1), ("width_factor", 1), ("keep_first", 0), ("keep_last", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{field}={value!r} is not an integer >= {smallest}. Give one.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} is not an integer. Give one.")
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known. Choose one of {known}.")
        alpha = self.noise_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (alpha >= 0 and math.isfinite(alpha)):
            raise ValueError(f"noise_alpha={alpha!r} must be a finite number >= 0; 0 turns the noise off.")
        if isinstance(self.noise_targets, str) or not set(self.noise_targets) <= set(NOISE_TARGETS):
            raise ValueError(f"noise_targets={self.noise_targets!r} must be a tuple of some of {NOISE_TARGETS}.")
        object.__setattr__(self, "noise_targets", tuple(self.noise_targets))

    @property
    def topk_factor(self) -> int:
        """What experts per token are multiplied by."""
        return self.width_factor if self.topk_policy == "scale" else 1


def layer_order(num_layers: int, plan: GrowthPlan) -> list[int]:
    """Source layer of each target layer, from 0; a source's first occurrence is the original, the others are copies.

    With g = `depth_factor`, a = `keep_first`, b = `keep_last`, n = `num_layers`: interposition gives n + (g-1)(n-a-b)
    layers; stack passes over [0, n-b) once and over [a, n) g-1 times, which gives (n-b) + (g-1)(n-a).

    Raises `ValueError` if the ends that are kept leave no layer to repeat.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} must be >= 1.")
    if plan.depth_factor == 1:
        return list(range(num_layers))
    first, end = plan.keep_first, num_layers - plan.keep_last
    if first >= end:
        raise ValueError(
            f"keep_first={plan.keep_first} and keep_last={plan.keep_last} leave none of {num_layers} layers to "
            "repeat. Keep fewer, or set depth_factor=1."
        )
    if plan.depth_method == "stack":
        return [*range(end), *list(range(first, num_layers)) * (plan.depth_factor - 1)]
    return [source for source in range(num_layers) for _ in range(plan.depth_factor if first <= source < end else 1)]


__all__ = ["CHOICES", "NOISE_TARGETS", "GrowthPlan", "layer_order"]
