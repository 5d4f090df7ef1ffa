"""Small DC-CCL models for the tests of this folder."""

import torch
from transformers import AutoConfig, PreTrainedConfig

from hf_models.dc_ccl import DcCclConfig, DcCclForCausalLM, DcCclForImageClassification, split_vertically


BASES = {
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.2,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"},
    "as wide as its stem": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "basic"},
    "bottleneck": {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "bottleneck"},
}
PAIRS = ("vit", "resnet", "bottleneck", "whole")
LABELS = torch.tensor([2, 0, 4])
SENTENCE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LANGUAGE_MODELS = {
    "cloud_config": {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "initializer_range": 0.5,
        **SENTENCE,
    },
    **{
        name: {"model_type": "gpt2", "vocab_size": 40, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 64}
        | {"initializer_range": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **SENTENCE}
        for name in ("co_config", "control_config")
    },
}


def base_config(kind: str, **fields) -> PreTrainedConfig:
    model_type = "vit" if kind == "vit" else "resnet"
    return AutoConfig.for_model(model_type, **(BASES[kind] | {"num_labels": 5} | fields))


def tiny_config(kind: str = "vit", **fields) -> DcCclConfig:
    """`"whole"`: two models of different families without a shared encoder; else a vertical split."""
    if kind != "whole":
        return split_vertically(base_config(kind), 0.25, **fields)
    small = {"model_type": "resnet", "num_labels": 5, **BASES["resnet"]}
    return DcCclConfig(
        cloud_config=base_config("vit"), co_config=small, control_config=small, **({"num_labels": 5} | fields)
    )


def tiny(kind: str = "vit", **fields) -> DcCclForImageClassification:
    """In eval mode, its biases and batch norms not what they begin with."""
    torch.manual_seed(0)
    return unsettled(DcCclForImageClassification(tiny_config(kind, **fields)).eval())


def unsettled(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(std=0.3)
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    return model


def tiny_lm() -> DcCclForCausalLM:
    torch.manual_seed(0)
    return DcCclForCausalLM(DcCclConfig(**LANGUAGE_MODELS)).eval()


def windowed(window: int | None, layers: int = 2) -> dict:
    """A Mistral whose layers attend to `window` tokens; `None`: to all."""
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": layers, "vocab_size": 40, "initializer_range": 0.5, "sliding_window": window}
    return {"model_type": "mistral", **sizes, **SENTENCE}


def windowed_lm(cloud: int | None, small: int | None) -> DcCclForCausalLM:
    torch.manual_seed(0)
    configs = {name: windowed(small) for name in ("co_config", "control_config")}
    return DcCclForCausalLM(DcCclConfig(cloud_config=windowed(cloud, 3), **configs)).eval()


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def tokens(batch: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))
