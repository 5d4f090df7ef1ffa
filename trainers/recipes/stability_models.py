"""The models that collapse: the failing set-ups of the MSign paper (arXiv 2602.01734, appendix A), as far as
transformers has their blocks.

| shape | what it is |
|---|---|
| `nanogpt-5m` | GPT-2 blocks, 24 layers, 48 wide, without positions and biases, under the paper's muP rules |
| `proxy` | the same with a byte vocabulary: what two CPU cores train in a minute |
| `llama-1b` | Llama, 16 layers, 2048 wide |
| `llama-moe-3b` | Mixtral's blocks in the paper's shape: 16 experts, 4 active |

Sigma-40M is not offered: it alternates two kinds of attention, which no model of transformers does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)


@dataclass(frozen=True)
class Shape:
    """A model without its vocabulary. `layer_lr`, `embedding_lr`: multiples of the learning rate for the matrices of
    the layers and for both embeddings (muP)."""

    model_class: type[PreTrainedModel]
    fields: dict[str, Any]
    layer_lr: float = 1.0
    embedding_lr: float = 1.0


_NARROW = {
    "n_embd": 48,
    "n_layer": 24,
    "n_head": 6,
    "activation_function": "gelu",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_LLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
}
SHAPES = {
    "proxy": Shape(GPT2LMHeadModel, _NARROW, layer_lr=16, embedding_lr=4),
    "nanogpt-5m": Shape(GPT2LMHeadModel, _NARROW, layer_lr=16, embedding_lr=4),
    "llama-1b": Shape(LlamaForCausalLM, _LLAMA | {"intermediate_size": 5440}),
    "llama-moe-3b": Shape(
        MixtralForCausalLM,
        _LLAMA
        | {
            "intermediate_size": 1360,
            "num_local_experts": 16,
            "num_experts_per_tok": 4,
            "sliding_window": None,
            "output_router_logits": True,
        },
    ),
}
_CONFIGS = {GPT2LMHeadModel: GPT2Config, LlamaForCausalLM: LlamaConfig, MixtralForCausalLM: MixtralConfig}


def build_model(shape: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int) -> PreTrainedModel:
    """A freshly initialised model. The embeddings are not tied: the sizes in the paper's names need it so."""
    chosen = SHAPES[shape]
    vocabulary = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    narrow = {"n_positions": sequence_length} if chosen.model_class is GPT2LMHeadModel else {}
    set_seed(seed)
    model = chosen.model_class(_CONFIGS[chosen.model_class](**chosen.fields | vocabulary | narrow))
    if narrow:
        _initialise_narrow(model)
    return model


@torch.no_grad()
def _initialise_narrow(model: GPT2LMHeadModel) -> None:
    """Standard deviation 0.02 times 4 in the layers' matrices, the queries' zero, what writes to the residual stream
    divided by sqrt(2 layers) (appendix A); positions and biases are zero and stay so."""
    width, layers = model.config.n_embd, model.config.n_layer
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or ".wpe." in name:
            parameter.zero_()
            parameter.requires_grad_(False)
        elif name.endswith("c_proj.weight"):
            nn.init.normal_(parameter, std=0.08 / (2 * layers) ** 0.5)
        elif name.endswith(("c_attn.weight", "c_fc.weight")):
            nn.init.normal_(parameter, std=0.08)
        elif parameter.ndim == 2:  # the embedding and the head
            nn.init.normal_(parameter, std=0.02)
        if name.endswith("c_attn.weight"):  # (in, query | key | value)
            parameter[:, :width] = 0


def parameter_groups(model: PreTrainedModel, shape: str, *, learning_rate: float, weight_decay: float) -> list[dict]:
    """Groups for an optimizer, each with its learning rate: `layers` (the matrices of the layers), `embeddings`
    (of input and output) and `norms`, without decay and at the plain learning rate, which the paper does not state."""
    chosen = SHAPES[shape]
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    members: dict[str, list[nn.Parameter]] = {"layers": [], "embeddings": [], "norms": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "embeddings" if id(parameter) in outer else "layers" if parameter.ndim > 1 else "norms"
            members[kind].append(parameter)
    factors = {"layers": chosen.layer_lr, "embeddings": chosen.embedding_lr, "norms": 1.0}
    return [
        {
            "params": parameters,
            "name": kind,
            "lr": factors[kind] * learning_rate,
            "weight_decay": 0.0 if kind == "norms" else weight_decay,
        }
        for kind, parameters in members.items()
    ]
