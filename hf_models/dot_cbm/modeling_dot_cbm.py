# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""DOT-CBM (arXiv 2505.07209): a concept bottleneck in which optimal transport says which patch speaks for which
concept.

    g, P = E(x)                                       global token and N patches of any vision transformer
    u_i = A_v(p_i) / |.|,   v_j = A_t(t_j) / |.|      adapted patches, and the M concepts' text embeddings
    Q = argmin <Q, D> - eps H(Q),   d_ij = 1 - u_i.v_j,   Q 1 = theta(S),   Q^T 1 = gamma
    z_j = s (1 - sum_i q_ij d_ij / sum_i q_ij) + b_j  concept logits; other read-outs in `readouts.py`
    y = W ((sigmoid(z) - mean) / std) + c             classes; column j of Q on the grid is concept j's heatmap

The paper prints sigmoid(1 - min_i q_ij d_ij) for the concepts, which is 0.731 whatever it sees (`readout="literal"`);
the read-out above is the nearest that trains. Scale s and bias b are not in the paper either.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast

from .activation_statistics import ActivationStatisticsMixin
from .adapters import DotCbmAdapter, DotCbmAdapterLinear, DotCbmConceptEmbeddings, mixed_embeddings
from .backbone import (
    PatchTokens,
    adapter_parameters,
    build_backbone,
    grid_of_patches,
    idle_parameters,
    patch_tokens,
)
from .concept_bank import ConceptBankMixin
from .configuration_dot_cbm import GLOBAL_READOUTS, STAGES, DotCbmConfig
from .explaining import ExplainingMixin
from .interventions import intervened
from .marginals import inside_of, mask_marginal, patch_marginal
from .objective import ObjectiveMixin
from .outputs import DotCbmModelOutput, DotCbmOutput
from .readouts import concept_scores, patch_shares
from .saliency import mask_coverage, patch_saliency
from .transport import transport_plan


class DotCbmPreTrainedModel(PreTrainedModel):
    """Initialisation, and the concepts that the model is about."""

    config: DotCbmConfig
    config_class = DotCbmConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Of the model below, of whose parameters the backbone's are to say what its dtype is: buffers only.
    _keep_in_fp32_modules_strict = ["gamma"]
    # Losses are means over images: the Trainer is to divide them by its accumulation steps, as it does where a model
    # takes no `num_items_in_batch`.
    accepts_loss_kwargs = False

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's, of patches."""
        return self.base_model.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.backbone.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DotCbmAdapterLinear):
            init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if isinstance(module, DotCbmModel):
            init.copy_(module.text_embeddings, placeholder_embeddings(*module.text_embeddings.shape))
            init.constant_(module.gamma, 1.0 / module.config.num_concepts)
            if module.config.uses_adapters and module.config.readout != "literal":
                init.constant_(module.logit_scale, math.log(module.config.initial_scale))
                init.zeros_(module.concept_bias)
        if isinstance(module, DotCbmForImageClassification):
            init.zeros_(module.activation_mean)
            init.ones_(module.activation_std)
            init.zeros_(module.activation_low)
            init.ones_(module.activation_high)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which makes every loaded parameter trainable; here the config's stage says which are."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.apply_stage()
        return loaded

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, config: DotCbmConfig | None = None, **fields):
        """A new model around a backbone that was loaded or trained elsewhere, whose weights it copies.

        `config` is changed to the backbone's; without it, `fields` are those of a new one.
        """
        if config is None:
            config = cls.config_class(backbone_config=backbone.config, **fields)
        else:
            config.backbone_config = backbone.config
        model = cls(config)
        inner = model.backbone if isinstance(model, DotCbmModel) else model.model.backbone
        weights = backbone.state_dict()
        if config.backbone_config.model_type == "vit":
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
        inner.load_state_dict(weights)
        return model


class DotCbmModel(ConceptBankMixin, DotCbmPreTrainedModel):
    """Images, or their cached tokens, to concept logits and the plan behind them."""

    def __init__(self, config: DotCbmConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        if config.uses_adapters:
            shape = {"num_layers": config.adapter_layers, "dropout": config.adapter_dropout}
            self.visual_adapter = DotCbmAdapter(config.hidden_size, config.projection_dim, **shape)
            self.text_adapter = DotCbmAdapter(config.text_embedding_dim, config.projection_dim, **shape)
            if config.readout != "literal":
                # exp makes it positive; FSDP2 shards no parameter without dimensions.
                self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.initial_scale)))
                self.concept_bias = nn.Parameter(torch.zeros(config.num_concepts))
        elif config.readout == "vanilla":
            self.concept_projection = nn.Linear(config.hidden_size, config.num_concepts)
        elif config.readout == "cem":
            self.concept_embeddings = DotCbmConceptEmbeddings(config.hidden_size, config.num_concepts, config.cem_dim)
        # Persistent: inference needs no text encoder, and a checkpoint knows its concepts.
        self.register_buffer("text_embeddings", torch.empty(config.num_concepts, config.text_embedding_dim))
        self.text_embeddings.copy_(placeholder_embeddings(config.num_concepts, config.text_embedding_dim))
        self.register_buffer("gamma", torch.full((config.num_concepts,), 1.0 / config.num_concepts))
        self.post_init()
        self.apply_stage()

    def apply_stage(self) -> None:
        """`freeze`, under the name that the classifier's stage has."""
        self.freeze()

    def freeze(self, *, concepts: bool = False) -> None:
        """`requires_grad_` by the config: the backbone's if it is not frozen, PEFT's adapters in it if it is, the
        rest; nothing if `concepts`."""
        self.requires_grad_(not concepts)
        if self.config.freeze_backbone:
            added = {id(parameter) for parameter in adapter_parameters(self.backbone)}
            idle = [parameter for parameter in self.backbone.parameters() if id(parameter) not in added]
        else:
            idle = idle_parameters(self.backbone, reads_global=self.config.readout in GLOBAL_READOUTS)
        for parameter in idle:
            parameter.requires_grad_(False)
        self.train(self.training)

    @property
    def trains_backbone(self) -> bool:
        """Whether anything in the backbone is trained: itself, or LoRA in a frozen one."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True):
        """As in torch; a backbone in which nothing is trained stays in eval mode."""
        super().train(mode)
        if self.config.freeze_backbone and not self.trains_backbone:
            self.backbone.eval()
        return self

    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `patch_features=` takes, for a cache: `(global (batch, D), patches (batch, N, D))`, and the CLS
        attention `(batch, N)` where the saliency is made of it. Without gradient."""
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            tokens, *_ = patch_tokens(self.backbone, self.config, pixel_values)
        self.backbone.train(was_training)
        return tuple(part for part in tokens if part is not None)

    def tokens_of(
        self,
        pixel_values: torch.Tensor | None,
        patch_features: tuple[torch.Tensor, ...] | None,
        grid: tuple[int, int] | None,
        **recorded: Any,
    ) -> tuple[PatchTokens, tuple[int, int], Mapping]:
        """Tokens and their grid, from the backbone, which reads `pixel_values (batch, channels, height, width)`, or,
        with the `grid` that was given for them, from the cache; and the backbone's output, empty where it did not
        run."""
        if (pixel_values is None) == (patch_features is None):
            raise ValueError("You must specify exactly one of pixel_values or patch_features")
        if patch_features is None:
            return patch_tokens(self.backbone, self.config, pixel_values, **recorded)
        tokens = PatchTokens(*(part.to(self.dtype) for part in patch_features))
        count = tokens.patches.shape[1]
        grid = grid_of_patches(self.config, count) if grid is None else tuple(grid)
        if grid[0] * grid[1] != count:
            raise ValueError(f"grid={grid} has not the {count} patches that were given.")
        return tokens, grid, {}

    @torch.no_grad()
    def marginal_of_patches(
        self,
        tokens: PatchTokens,
        grid: tuple[int, int],
        patch_mask: torch.Tensor | None,
        foreground_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Saliency and theta, both `(batch, N)`, by the config."""
        config, floor = self.config, self.config.marginal_floor
        if config.saliency == "mask" and foreground_mask is None:
            raise ValueError("saliency='mask' needs foreground_mask. Pass it, or choose a saliency that is computed.")
        if config.saliency != "mask" and foreground_mask is not None:
            raise ValueError(
                f"foreground_mask was given, but saliency={config.saliency!r} does not use it. Set "
                "config.saliency='mask', or leave it out."
            )
        if config.saliency == "mask":
            saliency = mask_coverage(foreground_mask.to(tokens.patches.device), grid)
            return saliency, mask_marginal(saliency, floor=floor, patch_mask=patch_mask)
        saliency = patch_saliency(
            config.saliency, tokens.patches, tokens.global_token, grid=grid, cls_attention=tokens.cls_attention
        )
        temperature = config.saliency_temperature
        return saliency, patch_marginal(saliency, temperature=temperature, floor=floor, patch_mask=patch_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_features: tuple[torch.Tensor, ...] | None = None,
        patch_mask: torch.Tensor | None = None,
        foreground_mask: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        output_transport_plan: bool = False,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> DotCbmModelOutput:
        """Concepts of `pixel_values (batch, channels, height, width)` or of cached `patch_features`, see
        [`extract_features`].

        Args:
            patch_mask: `(batch, N)`, 0 for patches that are to have no part, such as padding.
            foreground_mask: `(batch, height, width)` in pixels or `(batch, N)` in patches, for `saliency="mask"`.
            grid: rows and columns of cached patches, where they are neither a square nor the config's.
            output_transport_plan: return the plan and the maps, `(batch, N, M)` each.
            output_hidden_states, output_attentions: return the backbone's; `None`: as the config says.
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        asked = {name: getattr(self.config, name, None) if value is None else value for name, value in asked.items()}
        tokens, grid, inner = self.tokens_of(pixel_values, patch_features, grid, **asked)
        saliency, theta = self.marginal_of_patches(tokens, grid, patch_mask, foreground_mask)
        if self.config.uses_adapters:
            found = self._read_patches(tokens.patches, theta, patch_mask, output_transport_plan)
        else:
            found = self._read_global(tokens, output_transport_plan)
        return DotCbmModelOutput(
            **found,
            saliency=saliency,
            theta=theta,
            grid=grid,
            global_token=tokens.global_token,
            hidden_states=inner.get("hidden_states"),
            attentions=inner.get("attentions") if asked["output_attentions"] else None,
        )

    def _read_patches(
        self, patches: torch.Tensor, theta: torch.Tensor, patch_mask: torch.Tensor | None, with_maps: bool
    ) -> dict[str, torch.Tensor]:
        """Concept logits from adapted patches, with or without transport, and what else the output has of them."""
        config = self.config
        adapted, concepts = self.visual_adapter(patches), self.text_adapter(self.text_embeddings.to(self.dtype))
        inside = None if patch_mask is None else inside_of(theta, patch_mask)
        with maybe_autocast(device_type=adapted.device.type, enabled=False):
            dtype = torch.promote_types(adapted.dtype, torch.float32)
            if self.text_adapter.layers[0].weight.dtype == torch.float64:
                dtype = torch.float64
            u, v = F.normalize(adapted.to(dtype), dim=-1), F.normalize(concepts.to(dtype), dim=-1)
            cosine = u @ v.T  # (batch, N, M)
            plan = None
            if config.uses_transport:
                gamma = self.gamma.to(dtype)
                plan = transport_plan(
                    1.0 - cosine,
                    theta.to(dtype),
                    gamma / gamma.sum(),
                    eps=config.sinkhorn_eps,
                    num_iterations=config.sinkhorn_iterations,
                    rho=config.sinkhorn_rho,
                    gradient=config.sinkhorn_gradient,
                )
            logits = concept_scores(config.readout, cosine, plan, topk=config.readout_topk, patch_mask=inside)
            if config.readout != "literal":
                logits = self.logit_scale.to(dtype).exp() * logits + self.concept_bias.to(dtype)
        found = {"concept_logits": logits, "patch_directions": u, "concept_directions": v}
        if with_maps and plan is None:
            found["concept_maps"] = patch_shares(cosine.detach(), eps=config.sinkhorn_eps, patch_mask=inside)
        elif with_maps:
            found |= {"transport_plan": plan, "concept_maps": plan.detach()}
        return found

    def _read_global(self, tokens: PatchTokens, with_maps: bool) -> dict[str, torch.Tensor]:
        """Concept logits from the global token: the baselines. Their maps put each patch in its place, to first order
        in the logit, as class activation maps do."""
        token = tokens.global_token
        if self.config.readout == "vanilla":
            found = {"concept_logits": at_least_fp32(self.concept_projection(token))}
            slopes = self.concept_projection.weight.expand(len(token), -1, -1)  # (batch, M, D)
        elif self.config.readout == "cem":
            logits, pairs = self.concept_embeddings(token)
            found = {"concept_logits": at_least_fp32(logits), "concept_pairs": pairs}
            slopes = self.concept_embeddings.slopes(pairs) if with_maps else None
        else:
            return {}
        if with_maps:
            maps = torch.einsum("bnd,bmd->bnm", tokens.patches.to(slopes.dtype), slopes)
            found["concept_maps"] = maps.detach().float().clamp_min(0.0)
        return found


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32, the rest as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def placeholder_embeddings(count: int, width: int) -> torch.Tensor:
    """What concepts are until `set_concepts` brings their texts: random directions, the same in every model."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


class DotCbmForImageClassification(
    ActivationStatisticsMixin, ConceptBankMixin, ExplainingMixin, ObjectiveMixin, DotCbmPreTrainedModel
):
    """The bottleneck and a linear classifier on it, trained in two stages (`set_stage`) or jointly."""

    _keep_in_fp32_modules_strict = ["activation_mean", "activation_std", "activation_low", "activation_high"]

    def __init__(self, config: DotCbmConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DotCbmModel(config)
        self.classifier = nn.Linear(self.head_width, config.num_labels)
        for name, value in (("mean", 0.0), ("std", 1.0), ("low", 0.0), ("high", 1.0)):
            self.register_buffer(f"activation_{name}", torch.full((config.num_concepts,), value))
        self.post_init()
        self.apply_stage()

    @property
    def head_width(self) -> int:
        """What the classifier reads: M probabilities, M concept embeddings, or the global token."""
        if self.config.readout == "linear_probe":
            return self.config.hidden_size
        return self.config.num_concepts * (self.config.cem_dim if self.config.readout == "cem" else 1)

    def set_stage(self, stage: str) -> None:
        """What is trained: `"concept"` all but the classifier, `"class"` the classifier alone, `"joint"` both. Only
        `requires_grad` changes, so that DDP, wrapped after it, waits for no parameter that is never used."""
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is not known. Choose one of {STAGES}.")
        if stage == "concept" and self.config.readout == "linear_probe":
            raise ValueError("a linear probe has no concepts to train: its stages are 'class' and 'joint'.")
        self.config.training_stage = stage
        self.model.freeze(concepts=stage == "class")
        self.classifier.requires_grad_(stage != "concept")
        self.train(self.training)

    def apply_stage(self) -> None:
        """`set_stage` by the config."""
        self.set_stage(self.config.training_stage)

    def train(self, mode: bool = True):
        """As in torch; what the stage does not train stays in eval mode, without dropout."""
        super().train(mode)
        if self.config.training_stage == "class":
            self.model.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        concept_labels: torch.Tensor | None = None,
        interventions: torch.Tensor | None = None,
        patch_features: tuple[torch.Tensor, ...] | None = None,
        patch_mask: torch.Tensor | None = None,
        foreground_mask: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
        output_transport_plan: bool = False,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
    ) -> DotCbmOutput:
        """Classes of images, by their concepts. What is not named here is as in [`DotCbmModel`].

        Args:
            labels: `(batch,)`, -100 where there is none.
            concept_labels: `(batch, M)` of 0 and 1, NaN or negative where nothing is known. Training needs them in
                every stage but `"class"`; an evaluation with `labels` alone reports the class loss.
            interventions: `(batch, M)` or `(M,)`, probabilities that replace the predicted ones; NaN is untouched.
        """
        stage = self.config.training_stage
        if self.training and stage != "class" and labels is not None and concept_labels is None:
            raise ValueError(
                f"training in stage {stage!r} needs concept_labels. Pass them, or call set_stage('class'); with the "
                "Trainer, TrainingArguments(label_names=['labels', 'concept_labels'])."
            )
        found = self.model(
            pixel_values,
            patch_features=patch_features,
            patch_mask=patch_mask,
            foreground_mask=foreground_mask,
            grid=grid,
            output_transport_plan=output_transport_plan,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        probabilities, head_inputs = self.head_inputs_of(found, interventions, concept_labels)
        logits = self.classifier(head_inputs.to(self.classifier.weight.dtype))
        losses = self.losses_of(found, logits, labels, concept_labels)
        return DotCbmOutput(
            loss=self.objective(losses),
            losses={name: loss.detach() for name, loss in losses.items()} or None,
            logits=logits,
            concept_logits=found.concept_logits,
            concept_probs=probabilities,
            head_inputs=head_inputs,
            transport_plan=found.transport_plan,
            concept_maps=found.concept_maps,
            saliency=found.saliency,
            theta=found.theta,
            grid=found.grid,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def head_inputs_of(
        self,
        found: DotCbmModelOutput,
        interventions: torch.Tensor | None = None,
        concept_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Probabilities `(batch, M)` after interventions, and what the classifier reads, `(batch, head_width)`."""
        if self.config.readout == "linear_probe":
            if interventions is not None:
                raise ValueError("a linear probe has no concepts to intervene on.")
            return None, found.global_token
        ranged = self.config.intervention_range is not None
        low, high = (self.activation_low, self.activation_high) if ranged else (None, None)
        probabilities = intervened(found.concept_logits.sigmoid(), interventions, low=low, high=high)
        seen = probabilities
        if self.training and self.config.training_stage == "class" and self.config.class_inputs == "true":
            if concept_labels is None:
                raise ValueError("class_inputs='true' trains the classifier on concept_labels, which were not given.")
            known = concept_labels.to(seen)
            seen = torch.where(known >= 0, known, seen)
        if self.config.readout == "cem":
            return probabilities, mixed_embeddings(found.concept_pairs, seen).flatten(1)
        return probabilities, (seen - self.activation_mean.to(seen.dtype)) / self.activation_std.to(seen.dtype)


__all__ = [
    "DotCbmForImageClassification",
    "DotCbmModel",
    "DotCbmPreTrainedModel",
]
