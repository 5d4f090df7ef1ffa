"""DOT-CBM: concept bottlenecks that show where they look."""

from ..registration import register_family
from .concept_texts import embed_concepts
from .configuration_dot_cbm import DotCbmConfig
from .explanation import ConceptRecord
from .figure import plot_explanation
from .grad_cam import grad_cam
from .image_processor import image_processor_for
from .modeling_dot_cbm import (
    DotCbmForImageClassification,
    DotCbmModel,
    DotCbmPreTrainedModel,
)
from .outputs import DotCbmModelOutput, DotCbmOutput
from .pipeline import DotCbmPipeline


def register() -> None:
    """Register the family with transformers' Auto classes."""
    register_family(
        DotCbmConfig, {"AutoModel": DotCbmModel, "AutoModelForImageClassification": DotCbmForImageClassification}
    )


__all__ = [
    "ConceptRecord",
    "DotCbmConfig",
    "DotCbmForImageClassification",
    "DotCbmModel",
    "DotCbmModelOutput",
    "DotCbmOutput",
    "DotCbmPipeline",
    "DotCbmPreTrainedModel",
    "embed_concepts",
    "grad_cam",
    "image_processor_for",
    "plot_explanation",
    "register",
]
