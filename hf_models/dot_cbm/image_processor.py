"""What prepares images for the backbone inside: a processor of PIL images, which needs no torchvision."""

from transformers import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .configuration_dot_cbm import DotCbmConfig


# How the released weights of each kind were trained.
_NORMALISATION = {
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


def image_processor_for(config: DotCbmConfig) -> BaseImageProcessor:
    """A processor that resizes to `config.input_size`, without a crop, so that every pixel of the image has its place
    in the heatmap, and normalises as the backbone's released weights expect."""
    height, width = config.input_size
    standard = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    mean, std = _NORMALISATION.get(config.backbone_config.model_type, standard)
    return ViTImageProcessorPil(
        size={"height": height, "width": width},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )


__all__ = ["image_processor_for"]
