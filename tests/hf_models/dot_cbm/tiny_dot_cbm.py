"""A small DOT-CBM on a small random backbone for the tests of this folder."""

import torch

from hf_models.dot_cbm import DotCbmConfig, DotCbmForImageClassification


BACKBONES = ("dinov2", "dinov2_with_registers", "vit", "clip_vision_model", "siglip_vision_model")
TRANSFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}
SHAPE = {
    "concept_names": ["red hat", "blue hat", "beard", "glasses", "smile"],
    "concept_groups": {"hat": [0, 1], "face": [2, 4]},
    "text_embedding_dim": 12,
    "projection_dim": 16,
    "num_labels": 3,
}
READOUTS = ("conditional", "topk", "peak", "literal", "dot", "mean", "vanilla", "cem", "linear_probe")
LABELS = torch.tensor([2, 0, 1])
CONCEPTS = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 1], [0, 0, 1, 1, 0]])


def backbone_config(kind: str = "dinov2", **fields) -> dict:
    inner = {} if kind.startswith("dinov2") else {"intermediate_size": 48}
    return {"model_type": kind, **TRANSFORMER, **inner, **fields}


def tiny_config(kind: str = "dinov2", **fields) -> DotCbmConfig:
    return DotCbmConfig(**({"backbone_config": backbone_config(kind)} | SHAPE | fields))


def tiny(kind: str = "dinov2", **fields) -> DotCbmForImageClassification:
    """In eval mode, its biases and scales not what they begin with, or leaving one out would not show."""
    torch.manual_seed(0)
    model = DotCbmForImageClassification(tiny_config(kind, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
        if hasattr(model.model, "logit_scale"):
            model.model.logit_scale.fill_(1.5)
        model.activation_mean.uniform_(0.2, 0.6)
        model.activation_std.uniform_(0.1, 0.4)
    return model


def images(batch: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def parameters_without_gradient(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
