# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Configuration of DOT-CBM (arXiv 2505.07209): a concept bottleneck whose concepts say where they look."""

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


TRANSPORT_READOUTS = ("conditional", "topk", "peak", "literal")
COSINE_READOUTS = ("dot", "mean")
GLOBAL_READOUTS = ("vanilla", "cem", "linear_probe")
READOUTS = (*TRANSPORT_READOUTS, *COSINE_READOUTS, *GLOBAL_READOUTS)
SALIENCIES = ("cls_cosine", "cls_dot", "cls_attention", "contrast", "pca", "uniform", "mask")
CONCEPT_PRIORS = ("uniform", "paper", "cooccurrence")
SINKHORN_GRADIENTS = ("detached", "unrolled", "implicit")
ORTHOGONALITIES = ("signed", "squared")
STAGES = ("concept", "class", "joint")
CLASS_INPUTS = ("predicted", "true")
WITHOUT_CLS = ("siglip_vision_model", "siglip2_vision_model")


@strict
class DotCbmConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DotCbmModel`]. Where the paper gives a value, it is the default; what it leaves open, and the
    repairs that its equations need, are named at each field.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Any vision transformer of `AutoModel`: `dinov2`, `dinov2_with_registers`, `vit`, `clip_vision_model`,
            `siglip_vision_model`. `None`: DINOv2 ViT-L/14, the paper's.
        freeze_backbone (`bool`, defaults to `True`):
            The backbone gets no gradient and stays in eval mode.
        image_size (`int` or `list[int]`, *optional*, defaults to 252 with the default backbone):
            Height and width that images are resized to. `None`: the backbone's own.
        concept_names (`list[str]`, *optional*), num_concepts (`int`, *optional*):
            The M concepts. One gives the other; without both there are 2.
        concept_groups (`dict[str, list[int]]`, *optional*):
            Concepts that are intervened on together, by name.
        text_embedding_dim (`int`, defaults to 768), concept_encoder (`str`, *optional*):
            Width of the concepts' text embeddings, and the name of the encoder that they came from.
        projection_dim (`int`, defaults to 768), adapter_layers (`int`, defaults to 3),
        adapter_dropout (`float`, defaults to 0.4):
            Of both adapters, MLPs with ReLU. The paper does not give the widths; all are `projection_dim` here.
        readout (`str`, defaults to `"conditional"`):
            How a concept's logit comes about. From the transport plan: `"conditional"`, the mean cosine of the patches
            under the concept's column; `"topk"`, the same over its `readout_topk` heaviest patches; `"peak"`;
            `"literal"`, the paper's Eq. 11-12, which gives 0.731 for whatever it sees and is kept for comparison.
            Without transport, from cosines: `"dot"` (the largest), `"mean"`. From the global token, the baselines:
            `"vanilla"` (linear), `"cem"` (concept embeddings of width `cem_dim`), `"linear_probe"` (classes without
            concepts).
        initial_scale (`float`, defaults to 10.0):
            What cosines are multiplied by before the sigmoid, at the start; learned.
        sinkhorn_eps (`float`, defaults to 0.1), sinkhorn_iterations (`int`, defaults to 30):
            Not in the paper.
        sinkhorn_gradient (`str`, defaults to `"detached"`):
            `"detached"`: the plan is a constant; `"unrolled"` or `"implicit"`: it is not.
        sinkhorn_rho (`float`, *optional*):
            Strength of the marginals in unbalanced transport. `None`: balanced.
        saliency (`str`, defaults to `"cls_cosine"`), saliency_temperature (`float`, defaults to 1.0):
            Where the patch marginal, softmax(z(S) / temperature), comes from; z standardises in each image. `"mask"`:
            from the caller's `foreground_mask`.
        concept_prior (`str`, defaults to `"cooccurrence"`), concept_prior_temperature (`float`, defaults to 1.0):
            Where the concept marginal comes from. `"paper"`: Eq. 17-18, divided by M - 1 to make it a distribution;
            `"cooccurrence"`: softmax((1 - r/M) / temperature), without concepts that no class has.
        marginal_floor (`float`, defaults to 1e-6):
            Least mass of a patch and of a concept, before both are normalised again.
        orth_loss (`str`, defaults to `"signed"`):
            `"signed"`, the mean cosine as printed, whose minimum are antipodes; `"squared"`, whose minimum is
            orthogonality.
        lambda_vop, lambda_top, lambda_concept, lambda_class (`float`, default to 0.15, 0.2, 0.8 and 1.0):
            Weights of the losses; the first three are the paper's for CUB.
        training_stage (`str`, defaults to `"concept"`):
            `"concept"` trains all but the classifier, `"class"` the classifier alone, `"joint"` both. A linear probe
            has no concepts: `"concept"` becomes `"class"`.
        class_inputs (`str`, defaults to `"predicted"`):
            What the classifier sees in its own stage: the predicted concepts, or (`"true"`) their labels.
        intervention_range (`list[float]`, *optional*):
            Quantiles of the training set's predictions, such as `[0.05, 0.95]`, that interventions by 0 and 1 are
            mapped to. `None`: interventions are probabilities as they are.
        heatmap_threshold (`float`, defaults to 0.6):
            Share of a heatmap's maximum that its box encloses.

    Raises:
        StrictDataclassFieldValidationError: a value of the wrong type.
        StrictDataclassClassValidationError: values that do not fit together; the message names the remedy.
    """

    model_type = "dot_cbm"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [
        *("losses", "transport_plan", "concept_maps", "saliency", "theta", "grid", "head_inputs"),
        *("hidden_states", "attentions"),
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    freeze_backbone: bool = True
    image_size: int | list[int] | tuple[int, ...] | None = None
    concept_names: list[str] | None = None
    num_concepts: int | None = None
    concept_groups: dict[str, list[int]] | None = None
    text_embedding_dim: int = 768
    concept_encoder: str | None = None
    projection_dim: int = 768
    adapter_layers: int = 3
    adapter_dropout: float | int = 0.4
    readout: str = "conditional"
    readout_topk: int = 8
    cem_dim: int = 16
    initial_scale: float | int = 10.0
    sinkhorn_eps: float | int = 0.1
    sinkhorn_iterations: int = 30
    sinkhorn_gradient: str = "detached"
    sinkhorn_rho: float | int | None = None
    saliency: str = "cls_cosine"
    saliency_temperature: float | int = 1.0
    concept_prior: str = "cooccurrence"
    concept_prior_temperature: float | int = 1.0
    marginal_floor: float = 1e-6
    orth_loss: str = "signed"
    lambda_vop: float | int = 0.15
    lambda_top: float | int = 0.2
    lambda_concept: float | int = 0.8
    lambda_class: float | int = 1.0
    training_stage: str = "concept"
    class_inputs: str = "predicted"
    intervention_range: list[float | int] | None = None
    heatmap_threshold: float | int = 0.6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
            self.backbone_config = CONFIG_MAPPING["dinov2"](patch_size=14, **large)
            self.image_size = self.image_size or 252
        elif isinstance(self.backbone_config, dict):
            if "model_type" not in self.backbone_config:
                raise ValueError("backbone_config names no model_type, such as 'dinov2'. Add it.")
            fields = dict(self.backbone_config)
            self.backbone_config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
        if self.concept_names is None:
            count = 2 if self.num_concepts is None else self.num_concepts
            self.concept_names = [f"concept {index}" for index in range(count)]
        if self.num_concepts is None:
            self.num_concepts = len(self.concept_names)
        if self.readout == "linear_probe" and self.training_stage == "concept":
            self.training_stage = "class"
        if auto_map := getattr(type(self), "_family_auto_map", None):
            kwargs["auto_map"] = dict(auto_map)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's tokens."""
        return self.backbone_config.hidden_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that images are resized to."""
        size = self.backbone_config.image_size if self.image_size is None else self.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        size = self.backbone_config.patch_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def uses_transport(self) -> bool:
        """Whether concept logits come from a transport plan."""
        return self.readout in TRANSPORT_READOUTS

    @property
    def uses_adapters(self) -> bool:
        """Whether patches and concepts are brought to one space."""
        return self.readout not in GLOBAL_READOUTS

    def validate_concepts(self):
        """As many names as concepts, no name twice, groups of indices that exist."""
        if self.num_concepts < 1 or len(self.concept_names) != self.num_concepts:
            raise ValueError(
                f"num_concepts={self.num_concepts}, but there are {len(self.concept_names)} concept_names. Give one "
                "name for each concept, and at least one."
            )
        if len(set(self.concept_names)) != self.num_concepts:
            twice = sorted({name for name in self.concept_names if self.concept_names.count(name) > 1})
            raise ValueError(f"concept_names repeats {twice}: a concept is addressed by its name. Make them unique.")
        for name, members in (self.concept_groups or {}).items():
            if not members or not all(0 <= index < self.num_concepts for index in members):
                raise ValueError(
                    f"concept_groups[{name!r}]={members} must hold one or more indices in 0..{self.num_concepts - 1}."
                )

    def validate_backbone(self):
        """A vision transformer, which has these three."""
        missing = [f for f in ("hidden_size", "image_size", "patch_size") if not hasattr(self.backbone_config, f)]
        if missing:
            kind = self.backbone_config.model_type
            raise ValueError(
                f"backbone_config of type {kind!r} has no {missing}: it is no vision transformer. Give that of its "
                "vision part, such as 'clip_vision_model' of 'clip'."
            )

    def validate_choices(self):
        """Known words in every field that is a choice."""
        for field, known in (
            ("readout", READOUTS),
            ("saliency", SALIENCIES),
            ("concept_prior", CONCEPT_PRIORS),
            ("sinkhorn_gradient", SINKHORN_GRADIENTS),
            ("orth_loss", ORTHOGONALITIES),
            ("training_stage", STAGES),
            ("class_inputs", CLASS_INPUTS),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known. Choose one of {known}.")
        if self.saliency == "cls_attention" and self.backbone_config.model_type in WITHOUT_CLS:
            raise ValueError(
                f"saliency='cls_attention' needs a CLS token, which {self.backbone_config.model_type} does not have. "
                "Choose 'contrast' or 'pca'."
            )

    def validate_numbers(self):
        """Positive sizes and temperatures, shares between 0 and 1."""
        for field in (
            *("text_embedding_dim", "projection_dim", "adapter_layers", "readout_topk", "cem_dim", "initial_scale"),
            *("sinkhorn_eps", "sinkhorn_iterations", "saliency_temperature", "concept_prior_temperature"),
        ):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive.")
        if self.sinkhorn_rho is not None and not self.sinkhorn_rho > 0:
            raise ValueError(f"sinkhorn_rho={self.sinkhorn_rho} must be positive, or None for balanced transport.")
        if not 0 < self.heatmap_threshold <= 1 or not 0 <= self.adapter_dropout < 1:
            raise ValueError(
                f"heatmap_threshold={self.heatmap_threshold} must lie in (0, 1], "
                f"adapter_dropout={self.adapter_dropout} in [0, 1)."
            )
        if not 0 <= self.marginal_floor < 1e-2:
            raise ValueError(f"marginal_floor={self.marginal_floor} must lie in [0, 0.01).")
        if self.intervention_range is not None:
            low_high = list(self.intervention_range)
            if len(low_high) != 2 or not 0 <= low_high[0] < low_high[1] <= 1:
                raise ValueError(
                    f"intervention_range={low_high} must be two ascending quantiles, such as [0.05, 0.95], or None."
                )


__all__ = ["DotCbmConfig"]
