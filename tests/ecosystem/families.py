"""What a model family gives to the ecosystem tests: one entry, and every test runs on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback

import hf_models  # noqa: F401  (registers the families)
from hf_models.dc_ccl import DcCclConfig, DcCclForCausalLM
from hf_models.m3bert import M3BertForMaskedLM
from hf_models.moe import MMoeConfig, MoneConfig, SigmaMoeConfig
from hf_models.personal_lm import PersonalLmConfig, PersonalLmForCausalLM
from tests.hf_models.ctr import tiny_ctr
from tests.hf_models.dc_ccl import tiny_dc_ccl
from tests.hf_models.dot_cbm.tiny_dot_cbm import images, tiny
from tests.hf_models.m3bert import tiny_m3bert
from tests.hf_models.personal_lm import tiny_personal_lm
from trainers.callbacks import MatryoshkaExpertsCallback, ProgressiveSparsificationCallback


@dataclass(frozen=True)
class Family:
    """A family with a compatibility table; its model type, as in `model_cards.matrix.MODELS`."""

    method: str


@dataclass(frozen=True)
class CausalLM(Family):
    """A causal language model with experts.

    Args:
        config: a tiny configuration, its fields overridden by keyword; every kind of layer that the family has.
        smaller: fields of a still smaller model with the same vocabulary, the assistant of assisted generation.
        schedule: a new callback that sets the active experts while the family trains, for a number of layers.
        logged: what it logs in each of six steps.
        sliding_window: fields that give it a window of a few tokens; None if the family has none.
        attention: names of the attention's linear layers, as LoRA's `target_modules`.
        experts: names of the 3-D expert parameters, as LoRA's `target_parameters`.
        router: part of the names of what stays in fp32.
    """

    config: Callable[..., PreTrainedConfig]
    smaller: dict[str, Any]
    schedule: Callable[[int], TrainerCallback]
    logged: dict[str, list[float]]
    sliding_window: dict[str, Any] | None = None
    attention: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    experts: list[str] = field(default_factory=lambda: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    router: str = ".mlp.gate."

    def model(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """The same weights for the same seed and fields, in evaluation mode."""
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config(**overrides)).eval()


@dataclass(frozen=True)
class ImageClassifier(Family):
    """An image classifier.

    Args:
        model: a tiny one in evaluation mode, its configuration's fields overridden by keyword.
        attention: names of linear layers in its backbone, as LoRA's `target_modules`.
    """

    model: Callable[..., PreTrainedModel]
    attention: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass(frozen=True)
class TextWriter(Family):
    """A causal language model around models of other families; `model(**fields)`: a tiny one in evaluation mode, its
    vocabulary and special tokens overridden by keyword."""

    model: Callable[..., PreTrainedModel]


@dataclass(frozen=True)
class Learner(Family):
    """What a plain Trainer trains: `model()`, a tiny one, on `rows()`, examples with labels."""

    model: Callable[[], PreTrainedModel]
    rows: Callable[[], list[dict[str, torch.Tensor]]]


def fields_of(**overrides: Any) -> dict[str, Any]:
    """Fields that the families on Sigma-MoE's trunk share."""
    return {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        # Both kinds of layer: several experts with normalised weights, and one expert with its raw score.
        "num_experts_per_tok_per_layer": [2, 1],
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # far from 0, so that what comes next depends visibly on what came before
        "router_aux_loss_coef": 0.05,
        "router_z_loss_coef": 0.01,
        "pad_token_id": 0,
    } | overrides


def sigma_moe_config(**overrides: Any) -> SigmaMoeConfig:
    return SigmaMoeConfig(**fields_of(**overrides))


def mone_config(**overrides: Any) -> MoneConfig:
    return MoneConfig(**fields_of(neuron_ratio=0.5, neuron_aux_loss_coef=0.05) | overrides)


def m_moe_config(**overrides: Any) -> MMoeConfig:
    return MMoeConfig(**fields_of(k_min=1, k_max=4) | overrides)


def two_stages(layers: int) -> ProgressiveSparsificationCallback:
    return ProgressiveSparsificationCallback([(0, [2] * layers), (3, 1)])


SMALLER = {"num_hidden_layers": 1, "num_experts_per_tok_per_layer": [1], "hidden_size": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
STAGES = {"moe/stage": [0, 0, 0, 1, 1, 1]}
CAUSAL_LMS = [
    CausalLM(
        method="sigma_moe",
        config=sigma_moe_config,
        smaller=SMALLER,
        schedule=two_stages,
        logged=STAGES,
        sliding_window=WINDOW,
    ),
    CausalLM(
        method="mone",
        config=mone_config,
        smaller=SMALLER,
        schedule=two_stages,
        logged=STAGES,
        sliding_window=WINDOW,
    ),
    CausalLM(
        method="m_moe",
        config=m_moe_config,
        smaller=SMALLER,
        schedule=lambda layers: MatryoshkaExpertsCallback(),
        logged={"moe/expected_k": [2.5] * 6},  # of 1 to 4
        sliding_window=WINDOW,
    ),
]
IMAGE_CLASSIFIERS = [ImageClassifier(method="dot_cbm", model=tiny)]


def dc_ccl_writer(**fields: Any) -> DcCclForCausalLM:
    torch.manual_seed(0)
    submodels = {name: config | fields for name, config in tiny_dc_ccl.LANGUAGE_MODELS.items()}
    return DcCclForCausalLM(DcCclConfig(**submodels)).eval()


def personal_writer(**fields: Any) -> PersonalLmForCausalLM:
    torch.manual_seed(0)
    base = tiny_personal_lm.base_config("llama") | {"initializer_range": 0.3} | fields
    return PersonalLmForCausalLM(PersonalLmConfig(task="causal_lm", num_user_tokens=2, base_config=base)).eval()


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def personal_rows() -> list[dict[str, torch.Tensor]]:
    batch = tiny_personal_lm.texts("right")
    return rows_of(batch | {"user_embeds": tiny_personal_lm.draws(2, 2), "labels": batch["input_ids"]})


TEXT_WRITERS = [
    TextWriter(method="dc_ccl", model=dc_ccl_writer),
    TextWriter(method="personal_lm", model=personal_writer),
]
LEARNERS = [
    Learner(
        method="m3bert",
        model=lambda: tiny_m3bert.tiny(M3BertForMaskedLM),
        rows=lambda: rows_of(
            {"input_ids": tiny_m3bert.IDS, "attention_mask": tiny_m3bert.MASK, "labels": tiny_m3bert.IDS}
        ),
    ),
    Learner(
        method="dot_cbm",
        model=lambda: tiny(training_stage="class"),
        rows=lambda: rows_of({"pixel_values": images(), "labels": torch.arange(3)}),
    ),
    Learner(method="ctr", model=tiny_ctr.tiny, rows=lambda: rows_of(tiny_ctr.batch())),
    Learner(
        method="dc_ccl",
        model=tiny_dc_ccl.tiny,
        rows=lambda: rows_of({"pixel_values": tiny_dc_ccl.images(), "labels": tiny_dc_ccl.LABELS}),
    ),
    Learner(method="personal_lm", model=tiny_personal_lm.language_model, rows=personal_rows),
]
