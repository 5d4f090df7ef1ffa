"""From names to what DOT-CBM is fitted on: sets, a checked backbone, its tokens, and the concepts' texts."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments

from hf_models.dot_cbm import DotCbmConfig, DotCbmModel, image_processor_for

from .dot_cbm_backbone import (
    BackboneArguments,
    Locality,
    load_backbone,
    locality,
    part_under_patch,
    require_local,
    train_small_vit,
)
from .dot_cbm_data import (
    GENERATED,
    ConceptDataArguments,
    ConceptSplits,
    concept_embeddings,
    has_masks,
    parts_of,
    read_pretraining,
    read_splits,
)
from .dot_cbm_features import Features, cached_features, saliency_aucs, weights_key


PROBED = 400  # images of each set that locality is probed with


@dataclasses.dataclass
class Prepared:
    """What all bottlenecks of a seed share. `features` by name of the set, `train` and `validation` included; `aucs`
    of each form of saliency, on training images; `locality` None where no masks are known; `key` names all that."""

    splits: ConceptSplits
    backbone: PreTrainedModel
    features: dict[str, Features]
    aucs: dict[str, float]
    locality: Locality | None
    embeddings: tuple[torch.Tensor, str]
    image_size: int | None
    key: str


def prepare(
    data_args: ConceptDataArguments,
    args: BackboneArguments,
    training_args: TrainingArguments,
    root: Path,
    *,
    dtype: str = "float32",
    tokens: Path | None = None,
) -> Prepared:
    """Draw, train or load, check, extract; what is in `root` already is taken from there.

    Args:
        tokens: where tokens are kept. `None`: `root / "features"`.

    Raises:
        ValueError: the backbone's tokens are not local, see `require_local`; no backbone for data that bring none.
    """
    splits = read_splits(data_args, training_args)
    backbone = _backbone(data_args, args, training_args, root)
    has_cls = "siglip" not in backbone.config.model_type
    fields = {"saliency": "cls_attention"} if has_cls else {}
    config = DotCbmConfig(
        backbone_config=copy.deepcopy(backbone.config), image_size=args.backbone_image_size, **fields
    )
    model = DotCbmModel.from_backbone(backbone, config).to(training_args.device).eval()
    processor = image_processor_for(config)
    key = f"{weights_key(model.backbone)} {splits.fingerprint} {config.input_size}"
    sets = {"train": splits.train, "validation": splits.validation} | splits.tests
    features = {
        name: cached_features(
            model,
            data,
            processor,
            (tokens or root / "features") / name,
            key=f"{key} {data.dataset._fingerprint}",
            batch_size=training_args.per_device_eval_batch_size,
            dtype=dtype,
        )
        for name, data in sets.items()
    }
    found = _locality(splits, features)
    if found is not None:
        require_local(found, args)
    aucs = saliency_aucs(features["train"])
    if PartialState().is_main_process:
        print_check(found, aucs)
    seed = training_args.seed
    texts = concept_embeddings(data_args, splits.train.concept_names, seed)
    return Prepared(
        splits, backbone, features, aucs, found, texts, args.backbone_image_size, f"{key} {_sum(texts[0])}"
    )


def _backbone(
    data_args: ConceptDataArguments, args: BackboneArguments, training_args: TrainingArguments, root: Path
) -> PreTrainedModel:
    if args.backbone is not None:
        return load_backbone(args.backbone)
    if data_args.dataset_name not in GENERATED:
        raise ValueError(f"--dataset_name {data_args.dataset_name} needs a --backbone, such as facebook/dinov2-large.")
    data = read_pretraining(data_args, training_args, args.backbone_images)
    return train_small_vit(args, data, data_args.image_size, training_args, root / "backbone")


def _locality(splits: ConceptSplits, features: dict[str, Features]) -> Locality | None:
    """Probes fitted on training images and measured on validating ones."""
    if not has_masks(splits.train) or features["train"].foreground is None:
        return None
    grid = features["train"].grid
    parts = tuple(part_under_patch(parts_of(data, PROBED), grid) for data in (splits.train, splits.validation))
    return locality(features["train"], features["validation"], parts, limit=PROBED)


def print_check(found: Locality | None, aucs: dict[str, float]) -> None:
    """What was found of the tokens, before anything is built on them."""
    if found is not None:
        print(
            f"locality of the tokens: part under a patch {found.part_probe:.3f} (chance {found.chance:.3f}); concepts "
            f"from a background patch, AUC {found.remote_auc:.3f} (0.5 if strictly local)"
        )
    for form, auc in aucs.items():
        print(f"saliency {form}: foreground AUC {auc:.3f}")


def record(prepared: Prepared) -> dict[str, Any]:
    """The same for the record; what could not be measured is left out."""
    known = {} if prepared.locality is None else dataclasses.asdict(prepared.locality)
    return {
        "concept_encoder": prepared.embeddings[1],
        "saliency_foreground_auc": {form: round(auc, 4) for form, auc in prepared.aucs.items()},
        "locality": {name: value for name, value in known.items() if value == value},  # NaN is not equal to itself
    }


def _sum(texts: torch.Tensor) -> str:
    return f"{float(texts.double().sum()):.8g}"


__all__ = ["Prepared", "prepare", "record"]
