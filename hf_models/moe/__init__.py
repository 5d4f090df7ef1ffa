"""The mixture-of-experts family: Sigma-MoE, MoNE and M-MoE, and the dial of active experts for any other model."""

from ..registration import register_family
from . import experts
from .configuration_m_moe import MMoeConfig
from .configuration_mone import MoneConfig
from .configuration_sigma_moe import SIGMA_MOE_TINY_INITIAL_TOP_K, SigmaMoeConfig
from .elastic import active_experts, routers_of, set_active_experts
from .elastic_hosts import wrap_moe
from .modeling_m_moe import MMoeForCausalLM, MMoeForSequenceClassification, MMoeForTokenClassification, MMoeModel
from .modeling_mone import MoneForCausalLM, MoneForSequenceClassification, MoneForTokenClassification, MoneModel
from .modeling_sigma_moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
    SigmaMoePreTrainedModel,
)


def register() -> None:
    """Register the family with transformers' Auto classes, and the experts backends."""
    experts.register()
    register_family(
        MMoeConfig,
        {
            "AutoModel": MMoeModel,
            "AutoModelForCausalLM": MMoeForCausalLM,
            "AutoModelForSequenceClassification": MMoeForSequenceClassification,
            "AutoModelForTokenClassification": MMoeForTokenClassification,
        },
    )
    register_family(
        MoneConfig,
        {
            "AutoModel": MoneModel,
            "AutoModelForCausalLM": MoneForCausalLM,
            "AutoModelForSequenceClassification": MoneForSequenceClassification,
            "AutoModelForTokenClassification": MoneForTokenClassification,
        },
    )
    register_family(
        SigmaMoeConfig,
        {
            "AutoModel": SigmaMoeModel,
            "AutoModelForCausalLM": SigmaMoeForCausalLM,
            "AutoModelForSequenceClassification": SigmaMoeForSequenceClassification,
            "AutoModelForTokenClassification": SigmaMoeForTokenClassification,
        },
    )


__all__ = [
    "MMoeConfig",
    "MMoeForCausalLM",
    "MMoeForSequenceClassification",
    "MMoeForTokenClassification",
    "MMoeModel",
    "MoneConfig",
    "MoneForCausalLM",
    "MoneForSequenceClassification",
    "MoneForTokenClassification",
    "MoneModel",
    "SIGMA_MOE_TINY_INITIAL_TOP_K",
    "SigmaMoeConfig",
    "SigmaMoeForCausalLM",
    "SigmaMoeForSequenceClassification",
    "SigmaMoeForTokenClassification",
    "SigmaMoeModel",
    "SigmaMoePreTrainedModel",
    "active_experts",
    "register",
    "routers_of",
    "set_active_experts",
    "wrap_moe",
]
