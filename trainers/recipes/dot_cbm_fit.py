"""Both stages of DOT-CBM on frozen tokens: concepts first, then the classes on what was predicted of them."""

import dataclasses
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments, set_seed

from hf_models.dot_cbm import DotCbmConfig, DotCbmForImageClassification

from ..data import ConceptData
from .arguments import training_arguments_of
from .dot_cbm_data import labels_of
from .dot_cbm_features import FeatureCollator, Features
from .dot_cbm_runs import Run, run_once


@dataclasses.dataclass
class BottleneckArguments:
    """The bottleneck and how long its stages are. `learning_rate`, `weight_decay` and the batch of the training
    arguments are those of the concepts' stage; fields of the model without a word here keep the config's defaults."""

    readout: str = dataclasses.field(default="conditional", metadata={"help": "See DotCbmConfig."})
    projection_dim: int = 768
    adapter_layers: int = 3
    adapter_dropout: float = 0.4
    sinkhorn_eps: float = 0.1
    sinkhorn_iterations: int = 30
    saliency: str = dataclasses.field(
        default="best",
        metadata={"help": "See DotCbmConfig; best: the form with the highest foreground AUC on training images."},
    )
    saliency_temperature: float = 1.0
    concept_prior: str = "cooccurrence"
    orth_loss: str = "signed"
    lambda_vop: float = 0.15
    lambda_top: float = 0.2
    lambda_concept: float = 0.8
    concept_epochs: float = 200
    class_epochs: float = 30
    class_learning_rate: float = dataclasses.field(
        default=1e-2, metadata={"help": "Of the classifier; its stage is not in the paper."}
    )
    halve_every: float = dataclasses.field(default=10, metadata={"help": "Epochs after which a rate is halved."})


FIELDS_OF_THE_MODEL = (
    *("readout", "projection_dim", "adapter_layers", "adapter_dropout", "sinkhorn_eps", "sinkhorn_iterations"),
    *("saliency", "saliency_temperature", "concept_prior", "orth_loss"),
    *("lambda_vop", "lambda_top", "lambda_concept"),
)


def bottleneck_config(
    args: BottleneckArguments, backbone_config: Any, data: ConceptData, text_width: int, **fields: Any
) -> DotCbmConfig:
    """The model's configuration; `fields` go over those of `args`."""
    names = dict(enumerate(data.class_names))
    return DotCbmConfig(
        backbone_config=backbone_config,
        concept_names=list(data.concept_names),
        concept_groups={name: list(members) for name, members in data.concept_groups.items()},
        text_embedding_dim=text_width,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        **{name: getattr(args, name) for name in FIELDS_OF_THE_MODEL} | fields,
    )


def build_bottleneck(
    args: BottleneckArguments,
    backbone: PreTrainedModel,
    data: ConceptData,
    embeddings: tuple[torch.Tensor, str],
    seed: int,
    **fields: Any,
) -> DotCbmForImageClassification:
    """A model around a copy of `backbone`, everything else initialised from `seed`, that knows the concepts of
    `data`; `embeddings` and their encoder's name are those of `concept_embeddings`."""
    texts, encoder = embeddings
    set_seed(seed)
    config = bottleneck_config(args, backbone.config, data, texts.shape[1], **fields)
    model = DotCbmForImageClassification.from_backbone(backbone, config)
    model.set_concepts(
        data.concept_names,
        texts,
        torch.from_numpy(data.class_concept_matrix),
        groups=data.concept_groups,
        frequencies=labels_of(data)[1].double().mean(0),
        encoder=encoder,
    )
    return model


def best_saliency(aucs: Mapping[str, float]) -> str:
    """The form with the highest foreground AUC; `cls_cosine` where none was measured, `uniform` where none is better
    than chance."""
    if not aucs:
        return "cls_cosine"
    best = max(aucs, key=aucs.get)
    return best if aucs[best] > 0.5 else "uniform"


def fit_bottleneck(
    name: str,
    model: DotCbmForImageClassification,
    train: Features,
    args: BottleneckArguments,
    training_args: TrainingArguments,
    folder: Path,
    *,
    key: str,
) -> dict[str, Run]:
    """Train `model` in both stages, each in a folder of its own below `folder`; a linear probe has only the second,
    and a model in stage `joint` that one alone."""
    concept = fit_concepts(name, model, train, args, training_args, folder, key=key)
    if model.config.training_stage == "joint":
        return {"joint": concept}
    model.set_stage("class")
    options = _options(model, train, args, key)
    runs = {
        "concept": concept,
        "class": run_once(name, model, args=_stage(training_args, folder, "class", args), **options),
    }
    model.eval()
    return {stage: run for stage, run in runs.items() if run is not None}


def fit_concepts(
    name: str,
    model: DotCbmForImageClassification,
    train: Features,
    args: BottleneckArguments,
    training_args: TrainingArguments,
    folder: Path,
    *,
    key: str,
) -> Run | None:
    """The first stage, `joint` for a model that is in it and else `concept`, and the statistics of what it predicts;
    None for a linear probe, which has no concepts."""
    if model.config.readout == "linear_probe":
        return None
    stage = "joint" if model.config.training_stage == "joint" else "concept"
    model.set_stage(stage)
    options = _options(model, train, args, key)
    run = run_once(name, model, args=_stage(training_args, folder, stage, args), **options)
    state = PartialState()
    batches = train.batches(256, with_mask=model.config.saliency == "mask")
    mine = islice(batches, state.process_index, None, state.num_processes)
    model.fit_activation_statistics(_on_device(mine, model.device))
    model.eval()
    return run


def _options(
    model: DotCbmForImageClassification, train: Features, args: BottleneckArguments, key: str
) -> dict[str, Any]:
    return {
        "rows": lambda: train,
        "collator": FeatureCollator(train, model.config.saliency == "mask"),
        "key": f"{key} {len(train)}",
        "halve_every": args.halve_every,
    }


def _stage(base: TrainingArguments, folder: Path, stage: str, args: BottleneckArguments) -> TrainingArguments:
    changes: dict[str, Any] = {"num_train_epochs": args.concept_epochs}
    if stage == "class":
        changes = {"num_train_epochs": args.class_epochs, "learning_rate": args.class_learning_rate}
    return training_arguments_of(
        base,
        output_dir=str(folder / stage),
        max_steps=-1,
        label_names=["labels", "concept_labels"],
        ddp_find_unused_parameters=False,
        resume_from_checkpoint=None,  # each stage goes on from its own checkpoints
        **changes,
    )


def _on_device(batches, device: torch.device):
    for batch in batches:
        yield {name: moved(value, device) for name, value in batch.items()}


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those in tuples, on `device`; the rest as it is."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, tuple) and value and torch.is_tensor(value[0]):
        return tuple(part.to(device) for part in value)
    return value


__all__ = [
    "BottleneckArguments",
    "best_saliency",
    "bottleneck_config",
    "build_bottleneck",
    "fit_bottleneck",
    "fit_concepts",
    "moved",
]
