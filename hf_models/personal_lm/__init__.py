"""Personal language models: shared weights, and an embedding that each request's user has drawn."""

from ..registration import register_family
from .configuration_personal_lm import PersonalLmConfig
from .modeling_personal_lm import (
    PersonalLmForCausalLM,
    PersonalLmForSequenceClassification,
    PersonalLmPreTrainedModel,
)
from .private_noise import MemoisedNoise, PrivateNoise, SimulatedNoise, kept_secret, noise_source
from .user_distribution import UserDistribution, UserDistributionConfig


def register() -> None:
    """Register the family with transformers' Auto classes."""
    register_family(
        PersonalLmConfig,
        {
            "AutoModelForCausalLM": PersonalLmForCausalLM,
            "AutoModelForSequenceClassification": PersonalLmForSequenceClassification,
        },
    )


__all__ = [
    "MemoisedNoise",
    "PersonalLmConfig",
    "PersonalLmForCausalLM",
    "PersonalLmForSequenceClassification",
    "PersonalLmPreTrainedModel",
    "PrivateNoise",
    "SimulatedNoise",
    "UserDistribution",
    "UserDistributionConfig",
    "kept_secret",
    "noise_source",
    "register",
]
