"""What a plan is about: a model by preset, folder or Hub id, and how its recipe trains it."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from hf_models.m3bert import M3BertConfig
from hf_models.moe import (
    SIGMA_MOE_TINY_INITIAL_TOP_K,
    MMoeConfig,
    MoneConfig,
    SigmaMoeConfig,
)


class PlanError(ValueError):
    """A plan that cannot be: names the field, its value and the remedy."""


@dataclasses.dataclass(kw_only=True)
class Training:
    """What the recipe of a preset says of a step; the command line may say otherwise.

    Args:
        batch_size: sequences of a micro-batch, per device.
        stages: `(share of the tokens, active experts of each layer)`; empty: the config's from beginning to end.
        kept_fraction: share of the tokens that a masked language model predicts.
        notes: what a reader must know of the shape or the schedule.
    """

    batch_size: int = 1
    sequence_length: int = 4096
    gradient_accumulation: int = 1
    checkpointing: bool = False
    bf16: bool = True
    stages: Sequence[tuple[float, list[int]]] = ()
    kept_fraction: float = 0.15
    notes: Sequence[str] = ()


def _of_recipe(module: str, preset: str = "paper", **changes: Any) -> Training:
    preset = _recipe(module)[preset]
    return Training(
        **{
            "batch_size": preset.get("per_device_train_batch_size", 1),
            "sequence_length": preset["sequence_length"],
            "gradient_accumulation": preset.get("gradient_accumulation_steps", 1),
            "checkpointing": preset.get("gradient_checkpointing", False),
            "bf16": preset.get("bf16", False),
            **changes,
        }
    )


def _recipe(module: str) -> Mapping[str, Mapping[str, Any]]:
    # A recipe imports datasets and everything that it trains with, which is seconds that other presets need not wait.
    return import_module(f"..recipes.{module}", __package__).PRESETS


def _schedule(initial: list[int], switch_at: float) -> list[tuple[float, list[int]]]:
    return [(switch_at, list(initial)), (1 - switch_at, [1] * len(initial))]


def _sigma_moe_tiny() -> tuple[PreTrainedConfig, Training]:
    notes = (
        "Shape: head width 96 is inferred, the one value that gives the published parameter counts.",
        "Initial active experts per layer: from memory, not seen in print; the switch after 90 % is our proposal.",
    )
    stages = _schedule(SIGMA_MOE_TINY_INITIAL_TOP_K, 0.9)
    training = _of_recipe("pretrain_sigma_moe", stages=stages, notes=notes)
    return SigmaMoeConfig.from_preset("sigma-moe-tiny"), training


def _sigma_moe_demo() -> tuple[PreTrainedConfig, Training]:
    stages = _schedule(_recipe("pretrain_sigma_moe")["demo"]["initial_top_k"], 0.9)
    return SigmaMoeConfig.from_preset("demo"), _of_recipe("pretrain_sigma_moe", "demo", stages=stages)


def _sigma_v2() -> tuple[PreTrainedConfig, Training]:
    notes = ("Batch and checkpointing: those of our recipe for Sigma-MoE-Tiny; the 200B run's were not seen.",)
    return SigmaMoeConfig.from_preset("sigma-v2-200b"), _of_recipe("pretrain_sigma_moe", notes=notes)


def _mone() -> tuple[PreTrainedConfig, Training]:
    notes = ("Shape: Sigma-MoE-Tiny's with half of the neurons; the paper's sizes have no published architecture.",)
    fields = SigmaMoeConfig.from_preset("sigma-moe-tiny").own_fields()
    return MoneConfig(**fields | {"neuron_ratio": 0.5}), _of_recipe("pretrain_mone", notes=notes)


def _m_moe() -> tuple[PreTrainedConfig, Training]:
    config = MMoeConfig.from_preset("m-moe-20b")
    low, high = config.k_range
    # FLOPs are linear in k, so both ends have the mean of a uniform draw; memory must hold the largest of every layer.
    stages = [(0.5, [k] * config.num_hidden_layers) for k in (low, high)]
    notes = ("Shape: that it is Sigma-MoE-Tiny's is our inference. Draws are uniform; memory is that of the largest.",)
    return config, _of_recipe("pretrain_m_moe", stages=stages, notes=notes)


def _m3bert() -> tuple[PreTrainedConfig, Training]:
    recipe = _recipe("pretrain_m3bert")["paper"]
    notes = ("Batches of the text stages are ours; nothing is known of the paper's.",)
    config = M3BertConfig(exit_norm=recipe["exit_norm"])
    return config, _of_recipe("pretrain_m3bert", batch_size=recipe["stage_batch_sizes"][0], notes=notes)


PRESETS = {
    "sigma-moe-tiny": _sigma_moe_tiny,
    "sigma-moe-demo": _sigma_moe_demo,
    "sigma-v2-200b": _sigma_v2,
    "mone": _mone,
    "m-moe": _m_moe,
    "m3bert": _m3bert,
}


@dataclasses.dataclass
class PlannedModel:
    """A configuration with everything that its shapes say. Building costs neither memory nor a download of weights."""

    name: str
    config: PreTrainedConfig
    training: Training

    def build(self, top_k: list[int] | None = None, half: bool = False) -> PreTrainedModel:
        """The model on the current device (fake or meta), with these active experts per layer, in bf16 or fp32."""
        auto = AutoModelForMaskedLM if type(self.config) in AutoModelForMaskedLM._model_mapping else None
        auto = AutoModelForCausalLM if type(self.config) in AutoModelForCausalLM._model_mapping else auto
        if auto is None:
            raise PlanError(
                f"preset: {self.name} is a {self.config.model_type}, which has no language-modelling head to "
                "pre-train. Plan a causal or masked language model."
            )
        model = auto.from_config(self.config, dtype=torch.bfloat16 if half else torch.float32)
        if half:
            _all_in_bf16(model)
        if top_k is not None:
            model.set_experts_per_token(top_k)
        return model

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter; tied ones once."""
        with torch.device("meta"):
            return {name: parameter.shape for name, parameter in self.build().named_parameters()}

    @property
    def parameters(self) -> int:
        """Number of them all."""
        return sum(shape.numel() for shape in self.shapes.values())

    @cached_property
    def expert_shapes(self) -> dict[str, torch.Size]:
        """Those of the routed experts: `(experts, ...)`."""
        return {name: shape for name, shape in self.shapes.items() if ".experts." in name and len(shape) == 3}

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 in a dense model."""
        return next(iter(self.expert_shapes.values()))[0] if self.expert_shapes else 0

    def largest_stage(self) -> list[int] | None:
        """Active experts per layer where memory is largest."""
        return max((top_k for _, top_k in self.training.stages), key=sum, default=None)


def _all_in_bf16(model: PreTrainedModel) -> None:
    """FSDP2 gathers in bf16 what transformers keeps in fp32, too. Fake tensors refuse the swaps of `Module.to`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype == torch.float32:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().bfloat16())


def planned_model(name: str, *, trust_remote_code: bool = False) -> PlannedModel:
    """A preset, a model folder or a Hub id. [`PlanError`] for anything else, which lists the presets."""
    if name in PRESETS:
        config, training = PRESETS[name]()
        return PlannedModel(name, _with_fused_dropout(config), training)
    import hf_models  # noqa: F401  (registers the families)

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError, HfHubHTTPError) as error:
        where = (
            "a folder without a usable config.json" if Path(name).is_dir() else "no preset, folder or reachable Hub id"
        )
        raise PlanError(
            f"preset: {name!r} is {where} ({str(error).splitlines()[0]}). Presets: {', '.join(PRESETS)}."
        ) from error
    length = min(Training().sequence_length, getattr(config, "max_position_embeddings", None) or 4096)
    return PlannedModel(name, _with_fused_dropout(config), Training(sequence_length=length))


def _with_fused_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    # GPU kernels of attention draw dropout inside; on the CPU, where the step is traced, it would store the scores.
    if getattr(config, "attention_dropout", 0.0):
        config.attention_dropout = 0.0
    return config
