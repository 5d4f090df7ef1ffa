# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of M-MoE (Matryoshka mixture of experts, arXiv 2509.26520)."""

from huggingface_hub.dataclasses import strict

from .configuration_sigma_moe import PRESETS, SigmaMoeConfig


# Draws from 1 to 6, as reported. "m-moe-20b": the paper names 20B parameters, 56 layers, 96 experts and a base trained
# with one expert; that these are Sigma-MoE-Tiny's, from which everything else is taken, is our inference. "demo": what
# two CPU cores train in minutes.
_PRESETS = {
    "m-moe-20b": PRESETS["sigma-moe-tiny"] | {"num_experts_per_tok": 4, "k_min": 1, "k_max": 6},
    "demo": PRESETS["demo"] | {"num_experts_per_tok": 4, "k_min": 1, "k_max": 6},
}


@strict
class MMoeConfig(SigmaMoeConfig):
    r"""
    Configuration of a [`MMoeModel`]: Sigma-MoE trained with a number of active experts that is drawn anew for each
    layer and micro-batch, so that it can be chosen at inference.

    Args:
        num_experts_per_tok (`int`, defaults to 4):
            Active experts per token at inference and evaluation, until `set_active_experts` changes them. Draws do not
            touch it. Which of the trained numbers to serve is a choice; this default is ours.
        scoring_func (`str`, defaults to `"softmax"`):
            As the paper's router, renormalised over the kept experts.
        norm_top1_prob (`bool`, defaults to `True`):
            Also over one kept expert, so that its weight is 1, as the shares of several add up to 1. `False` weighs
            it by its probability, which gives the router a gradient at k = 1; in our comparison that was worse on
            average at every k, and not resolved over three seeds. What the paper does is not known.
        k_sampling (`str`, defaults to `"layer"`):
            One draw for each layer of a micro-batch, the paper's best. `MatryoshkaExpertsCallback` draws; without it,
            training uses `num_experts_per_tok` like evaluation.
        k_min (`int`, defaults to 1), k_max (`int`, *optional*):
            Range of the draw; `None`: 6, the paper's, or `num_experts` if there are fewer.

    Every other field means what it means in [`SigmaMoeConfig`].
    """

    model_type = "m_moe"

    num_experts_per_tok: int = 4
    scoring_func: str = "softmax"
    norm_top1_prob: bool = True
    k_sampling: str = "layer"
    k_min: int | None = 1

    def __post_init__(self, **kwargs):
        if self.k_max is None:
            self.k_max = min(6, self.num_experts)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MMoeConfig":
        """A named shape (`"m-moe-20b"`, `"demo"`), any field overridden. `ValueError` if unknown."""
        if name not in _PRESETS:
            raise ValueError(f"preset {name!r} is not known. Choose one of {sorted(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **overrides})


__all__ = ["MMoeConfig"]
