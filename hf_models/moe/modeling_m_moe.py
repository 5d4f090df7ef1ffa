# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""M-MoE (Matryoshka mixture of experts, arXiv 2509.26520) on Sigma-MoE's trunk.

    y = sum_{i in Top_k(p)} p_i / (sum_{j in Top_k(p)} p_j) E_i(x),     k ~ P(k_min..k_max) per layer in training

The model is Sigma-MoE; what is new is that k moves. A router's ranking is then useful at every prefix: the first
expert is coarse, later ones refine. `expert_sampling.py` has the draws, `elastic.py` sets k at inference, and
`trainers.callbacks.MatryoshkaExpertsCallback` does the drawing.
"""

from transformers import GenerationMixin

from .configuration_m_moe import MMoeConfig
from .modeling_sigma_moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
    register_expert_layouts,
)


class MMoeModel(SigmaMoeModel):
    """The decoder without a head."""

    config: MMoeConfig
    config_class = MMoeConfig


# GenerationMixin by name: transformers would put another class in front of one that a Hub repository brings.
class MMoeForCausalLM(SigmaMoeForCausalLM, GenerationMixin):
    """Language model that runs at any number of active experts: `set_active_experts`, `with active_experts(2):`,
    `generate(..., num_active_experts=2)`."""

    config: MMoeConfig
    config_class = MMoeConfig
    body_class = MMoeModel


class MMoeForSequenceClassification(SigmaMoeForSequenceClassification):
    """The decoder with a classifier on the last real token."""

    config: MMoeConfig
    config_class = MMoeConfig
    body_class = MMoeModel


class MMoeForTokenClassification(SigmaMoeForTokenClassification):
    """The decoder with a classifier on every token."""

    config: MMoeConfig
    config_class = MMoeConfig
    body_class = MMoeModel


register_expert_layouts("m_moe")

__all__ = ["MMoeForCausalLM", "MMoeForSequenceClassification", "MMoeForTokenClassification", "MMoeModel"]
