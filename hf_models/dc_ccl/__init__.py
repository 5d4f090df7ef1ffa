"""DC-CCL: a large cloud model that learns from devices which hold only a small part of it."""

from ..registration import register_family
from .configuration_dc_ccl import DcCclConfig, DcCclDeviceConfig
from .control import control_gap, control_loss
from .modeling_dc_ccl import (
    DcCclDeviceForCausalLM,
    DcCclDeviceModel,
    DcCclForCausalLM,
    DcCclForImageClassification,
    DcCclPreTrainedModel,
)
from .vertical_split import split_vertically


def register() -> None:
    """Register whole models and device packages with transformers' Auto classes."""
    register_family(
        DcCclConfig,
        {"AutoModelForImageClassification": DcCclForImageClassification, "AutoModelForCausalLM": DcCclForCausalLM},
    )
    register_family(
        DcCclDeviceConfig,
        {"AutoModelForImageClassification": DcCclDeviceModel, "AutoModelForCausalLM": DcCclDeviceForCausalLM},
    )


__all__ = [
    "DcCclConfig",
    "DcCclDeviceConfig",
    "DcCclDeviceForCausalLM",
    "DcCclDeviceModel",
    "DcCclForCausalLM",
    "DcCclForImageClassification",
    "DcCclPreTrainedModel",
    "control_gap",
    "control_loss",
    "register",
    "split_vertically",
]
