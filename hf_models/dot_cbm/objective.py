"""What is minimised: the losses of concepts and classes, and which of them a stage is about."""

import torch
from torch.nn import functional as F

from .orthogonality import orthogonality_loss, saliency_weights
from .outputs import DotCbmModelOutput


class ObjectiveMixin:
    """`losses_of` and `objective`, by the config."""

    def losses_of(
        self,
        found: DotCbmModelOutput,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        concept_labels: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The terms of the objective that the given labels allow, each a scalar, a mean over images.

        `logits (batch, classes)`, `labels (batch,)`, `concept_labels (batch, concepts)` of 0 and 1."""
        losses = {}
        if concept_labels is not None and found.concept_logits is not None:
            losses["concept"] = concept_loss(found.concept_logits, concept_labels)
            if found.patch_directions is not None:
                weights, form = saliency_weights(found.theta), self.config.orth_loss
                losses["vop"] = orthogonality_loss(found.patch_directions, weights, form=form)
                losses["top"] = orthogonality_loss(found.concept_directions, form=form)
        if labels is not None:
            losses["class"] = class_loss(logits, labels, self.config.problem_type)
        return losses

    def objective(self, losses: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The weighted terms of the stage; where labels allow none of these, of those that they allow."""
        weights = {name: getattr(self.config, f"lambda_{name}") for name in losses}
        stage = self.config.training_stage
        terms = [name for name in losses if stage == "joint" or (name == "class") == (stage == "class")]
        terms = terms or list(losses)
        return sum(weights[name] * losses[name] for name in terms) if terms else None


def concept_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of `logits (batch, M)`, mean over the labels that are not NaN or negative; 0 of none."""
    target = labels.to(device=logits.device, dtype=logits.dtype)
    if target.shape != logits.shape:
        raise ValueError(f"concept_labels have shape {tuple(target.shape)}; they must be {tuple(logits.shape)}.")
    known = target >= 0  # False for NaN
    loss = F.binary_cross_entropy_with_logits(logits, target.nan_to_num().clamp(0.0, 1.0), reduction="none")
    return (loss * known).sum() / known.sum().clamp_min(1)


def class_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """Loss of `logits (batch, classes)`, fp32, by the `problem_type` of transformers' configs: cross-entropy of
    `labels (batch,)`, mean over those that are not -100; binary cross-entropy (`"multi_label_classification"`) or
    squared error (`"regression"`) of labels of the logits' shape."""
    logits, labels = logits.float(), labels.to(logits.device)
    if problem_type in (None, "single_label_classification"):
        return F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum().clamp_min(1)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.to(logits.dtype).view_as(logits))


__all__ = ["ObjectiveMixin", "class_loss", "concept_loss"]
