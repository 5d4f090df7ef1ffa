"""The mixture-of-experts family: Sigma-MoE."""

from ..registration import register_family
from . import experts
from .configuration_sigma_moe import SIGMA_MOE_TINY_INITIAL_TOP_K, SigmaMoeConfig
from .modeling_sigma_moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
    SigmaMoePreTrainedModel,
)


def register() -> None:
    """Register the family with transformers' Auto classes, and the experts backend `sigma_triton`."""
    experts.register()
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
    "SIGMA_MOE_TINY_INITIAL_TOP_K",
    "SigmaMoeConfig",
    "SigmaMoeForCausalLM",
    "SigmaMoeForSequenceClassification",
    "SigmaMoeForTokenClassification",
    "SigmaMoeModel",
    "SigmaMoePreTrainedModel",
    "register",
]
