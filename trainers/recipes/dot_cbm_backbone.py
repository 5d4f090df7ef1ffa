"""The frozen backbone of DOT-CBM: one that is given, or a small ViT trained here on what images show; and whether its
patch tokens are local enough for a heatmap of them to mean anything."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, PreTrainedModel, TrainingArguments, ViTConfig, ViTModel, set_seed
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.modeling_vit import ViTPreTrainedModel
from transformers.utils import logging

from hf_models.dot_cbm import DotCbmConfig, image_processor_for

from ..data import ConceptData
from ..evaluation.concepts import sklearn_metrics
from .arguments import training_arguments_of
from .dot_cbm_data import labels_of, pixels_of
from .dot_cbm_features import Features
from .dot_cbm_runs import run_once


logger = logging.get_logger(__name__)


@dataclasses.dataclass
class BackboneArguments:
    """A vision transformer of the Hub, or the shape and the training of a small one."""

    backbone: str | None = dataclasses.field(
        default=None, metadata={"help": "Hub id or folder; without one, a small ViT is trained on the same domain."}
    )
    backbone_image_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Pixels a side that images are resized to; by default the backbone's own."}
    )
    backbone_hidden_size: int = 96
    backbone_layers: int = 2
    backbone_patch_size: int = 8
    backbone_images: int = 3200
    backbone_epochs: int = 9
    backbone_learning_rate: float = 2e-3
    backbone_batch_size: int = 64
    min_part_probe: float = dataclasses.field(
        default=0.4,
        metadata={
            "help": "Refuse a backbone if a linear probe tells the part under a patch from its token with a balanced "
            "accuracy below this; chance is 1 / (parts + 1)."
        },
    )


# --- a small ViT -----------------------------------------------------------------------------------------------------


class ViTForTags(ViTPreTrainedModel):
    """
    A ViT whose CLS token says which tags an image has and whose patches are made to be local: each keeps its own
    pixels and is, in training, what it would be if only a window of the image around it were shown.

    Tags are asked of the CLS token alone: a loss that pooled over patches would favour the read-out that pools so.
    """

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.global_tags = nn.Linear(config.hidden_size, config.num_labels)
        self.pixels = nn.Linear(config.hidden_size, config.num_channels * config.patch_size**2)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        """`labels (batch, tags)` of 0 and 1."""
        tokens = self.vit(pixel_values).last_hidden_state
        token, patches = tokens[:, 0], tokens[:, 1:]
        logits = self.global_tags(token)
        loss = None
        if labels is not None:
            truth = labels.to(logits.dtype)
            size = self.config.patch_size
            own = F.unfold(pixel_values, size, stride=size).mT  # (batch, N, channels * size^2)
            loss = F.binary_cross_entropy_with_logits(logits, truth) + F.mse_loss(self.pixels(patches), own)
            if self.training:
                loss = loss + self._context_loss(pixel_values, patches)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _context_loss(self, pixel_values: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """How far the patches of half of the batch are from what they are where all but a window is black."""
        size, half = self.config.patch_size, -(-len(pixel_values) // 2)
        rows, columns = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        window = torch.zeros(rows, columns, device=pixel_values.device)
        top, left = (int(torch.randint(side - side // 2 + 1, ())) for side in (rows, columns))
        window[top : top + rows // 2, left : left + columns // 2] = 1
        shown = window.repeat_interleave(size, 0).repeat_interleave(size, 1)
        alone = self.vit(pixel_values[:half] * shown).last_hidden_state[:, 1:]
        inside = window.flatten() > 0
        width = patches.shape[-1:]
        return F.mse_loss(F.layer_norm(alone[:, inside], width), F.layer_norm(patches[:half, inside], width))


class PixelRows(Dataset):
    """Pictures in memory and their tags."""

    def __init__(self, pixels: torch.Tensor, tags: torch.Tensor):
        self.pixels, self.tags = pixels, tags

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.tags[index]}


def small_vit_config(args: BackboneArguments, image_size: int) -> ViTConfig:
    """The shape of the small ViT."""
    return ViTConfig(
        hidden_size=args.backbone_hidden_size,
        num_hidden_layers=args.backbone_layers,
        num_attention_heads=4,
        intermediate_size=2 * args.backbone_hidden_size,
        image_size=image_size,
        patch_size=args.backbone_patch_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def train_small_vit(
    args: BackboneArguments, data: ConceptData, image_size: int, training_args: TrainingArguments, folder: Path
) -> PreTrainedModel:
    """The ViT of `folder`, trained there on the tags of `data` if it is not there yet."""
    config = small_vit_config(args, image_size)
    config.num_labels = len(data.concept_names)
    set_seed(training_args.seed)
    model = ViTForTags(config)
    tags = labels_of(data)[1]
    with torch.no_grad():
        model.global_tags.bias.copy_(torch.logit(tags.double().mean(0).clamp(1e-3, 1 - 1e-3)))
    processor = image_processor_for(DotCbmConfig(backbone_config=copy.deepcopy(config)))  # which it changes
    stage_args = training_arguments_of(
        training_args,
        output_dir=str(folder),
        num_train_epochs=args.backbone_epochs,
        max_steps=-1,
        learning_rate=args.backbone_learning_rate,
        per_device_train_batch_size=args.backbone_batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        label_names=["labels"],
        resume_from_checkpoint=None,
    )

    def rows() -> PixelRows:
        return PixelRows(pixels_of(data, processor), tags)

    run_once("backbone", model, rows, stage_args, key=f"{data.dataset._fingerprint}")
    return ViTModel.from_pretrained(folder, add_pooling_layer=False)


def load_backbone(name: str) -> PreTrainedModel:
    """A vision transformer by Hub id or folder; of a model of images and texts its vision part."""
    config = AutoConfig.from_pretrained(name)
    if getattr(config, "vision_config", None) is not None:
        config = config.vision_config
    return AutoModel.from_pretrained(name, config=config)


# --- locality --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Locality:
    """
    What single patch tokens know.

    `part_probe`: balanced accuracy of a linear probe for what lies under the patch, one of the parts or none; `chance`
    is one over their number. `remote_auc`: ROC-AUC, over the concepts, of a linear probe of a *background* patch for
    the concepts of the image; 0.5 if tokens were strictly local, near 1 if each token knows the whole image.
    """

    part_probe: float
    chance: float
    remote_auc: float


def locality(train: Features, test: Features, parts: tuple[np.ndarray, np.ndarray], *, limit: int = 400) -> Locality:
    """
    Probes fitted on `train` and measured on `test`, of the first `limit` images each.

    Args:
        parts: for both, the number of the part under each patch, 0 for none: `(images, N)`, see [`part_under_patch`].
    """
    tokens = [np.asarray(features.tokens[1][:limit], dtype=np.float64) for features in (train, test)]
    under = [numbers[:limit] for numbers in parts]
    flat = [values.reshape(-1, values.shape[-1]) for values in tokens]
    part = ridge(flat[0], one_hot(under[0].ravel()), balance=True)(flat[1])
    remote = [_background(values, features) for values, features in zip(tokens, (train, test), strict=True)]
    return Locality(
        part_probe=balanced_accuracy(part, under[1].ravel()),
        chance=1 / (1 + max(int(numbers.max()) for numbers in parts)),
        remote_auc=_probed_auc(*remote),
    )


def _background(tokens: np.ndarray, features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Every eighth patch of each image that has nothing of the foreground, and the concepts of the image."""
    chosen = [(image, patch) for image in range(len(tokens)) for patch in _empty(features.foreground[image])[::8]]
    images, patches = np.array(chosen, dtype=int).reshape(-1, 2).T
    return tokens[images, patches], features.concepts.numpy()[images]


def _empty(foreground: np.ndarray) -> np.ndarray:
    return np.flatnonzero(foreground == 0)


def _probed_auc(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean ROC-AUC, over the columns of the truth that vary, of a ridge; NaN where there is nothing to probe."""
    (inputs, targets), (new, truth) = train, test
    if not len(inputs) or not len(new):
        return float("nan")
    scores, metrics = ridge(inputs, targets)(new), sklearn_metrics()
    varied = np.flatnonzero(truth.min(0) != truth.max(0))
    aucs = [metrics.roc_auc_score(truth[:, j], scores[:, j]) for j in varied]
    return float(np.mean(aucs)) if aucs else float("nan")


def part_under_patch(parts: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`(images, N)`: the part that covers most of each patch, counted from 1, or 0 where none is on a third of it;
    `parts` is `(images, parts, height, width)` of bool."""
    images, count, height, width = parts.shape
    rows, columns = grid
    share = parts.reshape(images, count, rows, height // rows, columns, width // columns).mean(axis=(3, 5))
    share = share.reshape(images, count, -1)
    return np.where(share.max(axis=1) >= 1 / 3, share.argmax(axis=1) + 1, 0)


def one_hot(numbers: np.ndarray) -> np.ndarray:
    """`(n, largest + 1)`."""
    return np.eye(int(numbers.max()) + 1)[numbers]


def ridge(inputs: np.ndarray, targets: np.ndarray, *, strength: float = 1e-3, balance: bool = False):
    r"""A linear map fitted by \(\min_W \sum_i w_i |W x_i - t_i|^2 + \lambda |W|^2\) on standardised inputs with a
    constant, as a function of new inputs. `balance`: the rows of each column of one-hot `targets` weigh as much as
    those of another."""
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-9

    def prepared(values: np.ndarray) -> np.ndarray:
        return np.concatenate([(values - mean) / deviation, np.ones((len(values), 1))], axis=1)

    x = prepared(inputs)
    weight = (targets / np.maximum(targets.sum(axis=0), 1)).sum(axis=1) if balance else np.full(len(x), 1 / len(x))
    weight = weight / weight.sum()
    gram = (x * weight[:, None]).T @ x + strength * np.eye(x.shape[1])
    solution = np.linalg.solve(gram, (x * weight[:, None]).T @ targets)
    return lambda values: prepared(np.asarray(values, dtype=np.float64)) @ solution


def balanced_accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their rows with the largest score at their own."""
    predicted = scores.argmax(axis=1)
    return float(np.mean([(predicted[truth == kind] == kind).mean() for kind in np.unique(truth)]))


def require_local(found: Locality, args: BackboneArguments) -> None:
    """ValueError where tokens are not local enough; a warning where they know much of the rest of the image."""
    if math.isfinite(found.part_probe) and found.part_probe < args.min_part_probe:
        raise ValueError(
            f"The backbone's patch tokens are not local: a linear probe tells the part under a patch with a balanced "
            f"accuracy of {found.part_probe:.2f} (chance {found.chance:.2f}), below --min_part_probe "
            f"{args.min_part_probe:g}. Heatmaps of such tokens mean nothing. Train it longer, take another one, or "
            "lower the limit if you want to see that."
        )
    if found.remote_auc > 0.8:
        logger.warning(
            f"Background patches know the image's concepts (ROC-AUC {found.remote_auc:.2f}, 0.5 if tokens were "
            "strictly local): a heatmap may rest on patches that only heard of a part."
        )


__all__ = [
    "BackboneArguments",
    "Locality",
    "ViTForTags",
    "balanced_accuracy",
    "load_backbone",
    "locality",
    "one_hot",
    "part_under_patch",
    "require_local",
    "ridge",
    "small_vit_config",
    "train_small_vit",
]
