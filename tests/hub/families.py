"""The sisters of Sigma-MoE as run folders of the Hub tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

from hf_models.moe import (
    MMoeConfig,
    MMoeForCausalLM,
    MMoeForSequenceClassification,
    MMoeForTokenClassification,
    MMoeModel,
    MoneConfig,
    MoneForCausalLM,
    MoneForSequenceClassification,
    MoneForTokenClassification,
    MoneModel,
)
from tests.model_cards.tiny_run import write_tiny_run


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TRUNK = SHAPE | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8}
TRUNK_FILES = {"configuration_sigma_moe.py", "modeling_sigma_moe.py", "balance.py", "routing_losses.py", "elastic.py"}
TRUNK_FILES |= {"neurons.py"}


@dataclass(frozen=True)
class HubFamily:
    """What a repository of a family holds.

    Args:
        build: the model, its weights given by torch's seed.
        heads: the class that each Auto class is to find.
        top_k: active experts of each layer.
        code: names of all the Python files.
    """

    build: Callable[[], PreTrainedModel]
    heads: dict[str, type[PreTrainedModel]]
    top_k: list[int]
    code: set[str]

    def write_run(self, folder: Path, *, seed: int = 0) -> None:
        """A run folder that holds this model."""
        write_tiny_run(folder)
        for name in ("*.safetensors", "model*.json", "config.json", "configuration_*.py", "modeling_*.py"):
            for path in folder.glob(name):
                path.unlink()
        for name in TRUNK_FILES:
            (folder / name).unlink(missing_ok=True)
        torch.manual_seed(seed)
        self.build().save_pretrained(folder, max_shard_size="40KB")


def mone() -> PreTrainedModel:
    fields = {"num_experts_per_tok_per_layer": [3, 1, 2], "neuron_ratio": [0.5, 0.25, 1.0]}
    return MoneForCausalLM(MoneConfig(**TRUNK, **fields, neuron_aux_loss_coef=0.1, router_aux_loss_coef=0.01))


def mone_in_olmoe() -> PreTrainedModel:
    fields = {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}
    host = AutoModelForCausalLM.from_config(OlmoeConfig(**SHAPE, **fields))
    return MoneForCausalLM.from_moe(host, neuron_ratio=0.5, config_overrides={"neuron_aux_loss_coef": 0.1})


def m_moe() -> PreTrainedModel:
    return MMoeForCausalLM(MMoeConfig(**TRUNK, num_experts_per_tok_per_layer=[4, 2, 1], router_aux_loss_coef=0.01))


MONE_FILES = TRUNK_FILES | {"configuration_mone.py", "modeling_mone.py"}
HUB_FAMILIES = {
    "mone": HubFamily(
        build=mone,
        heads={
            "AutoModelForSequenceClassification": MoneForSequenceClassification,
            "AutoModelForTokenClassification": MoneForTokenClassification,
            "AutoModelForCausalLM": MoneForCausalLM,
            "AutoModel": MoneModel,
        },
        top_k=[3, 1, 2],
        code=MONE_FILES,
    ),
    "mone in olmoe": HubFamily(
        build=mone_in_olmoe,
        heads={"AutoModelForCausalLM": MoneForCausalLM},  # the body is OLMoE's own
        top_k=[2, 2, 2],
        code=MONE_FILES,
    ),
    "m_moe": HubFamily(
        build=m_moe,
        heads={
            "AutoModelForSequenceClassification": MMoeForSequenceClassification,
            "AutoModelForTokenClassification": MMoeForTokenClassification,
            "AutoModelForCausalLM": MMoeForCausalLM,
            "AutoModel": MMoeModel,
        },
        top_k=[4, 2, 1],
        code=TRUNK_FILES | {"configuration_m_moe.py", "modeling_m_moe.py"},
    ),
}
