"""DC-CCL (arXiv 2303.10361) as Trainer runs: train the cloud submodel, distil the control model, train the
co-submodel under control."""

from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_models.dc_ccl import DcCclPreTrainedModel, control_gap, control_loss

from .dc_ccl_data import WithColumn, labels_of, logits_of


Phase1Loss = Literal["seen_classes", "all"]


class DcCclTrainer(Trainer):
    """A Trainer of one phase of a [`DcCclForImageClassification`], a [`DcCclForCausalLM`], or a device package.

    | phase | trains | loss |
    |---|---|---|
    | `"cloud"` | shared encoder, cloud submodel | cross-entropy of F_c |
    | `"control"` | control model | the config's `control_loss` between G and F_c |
    | `"co"` | co-submodel | cross-entropy of stopgrad(G) + F_s, or of another `branch` |
    | `"head"` | the co-submodel's last linear layer | the same |

    What a phase does not train has no gradient, stays in eval mode, and is called under `no_grad`.

    Example:
        >>> for phase in ("cloud", "control"):
        ...     DcCclTrainer(model, args, phase=phase, train_dataset=cloud_images).train()

    Args:
        phase (`str`): see above; also the phases of baselines that [`DcCclPreTrainedModel.set_phase`] knows.
        branch (`str`): what is trained in `"co"` and `"head"`: `"device"`, under control; `"serve"`, with the true
            cloud submodel; `"co"`, alone.
        phase1_loss (`str`, *optional*): `"all"` is cross-entropy over all classes, as in the first author's code.
            `"seen_classes"` runs its softmax over the classes that the training set has: otherwise the logits of the
            device's own classes are driven far down, and the co-submodel must first undo that. Evaluation is over
            all classes. `None`: `"seen_classes"` where the set lacks classes.
        cache (`bool`): call frozen submodels once for each row instead of in each step. For rows that are the same
            each time: without augmentation the results are equal.
    """

    def __init__(
        self,
        model: DcCclPreTrainedModel,
        args: TrainingArguments,
        *,
        phase: str,
        branch: str = "device",
        phase1_loss: Phase1Loss | None = None,
        cache: bool = False,
        train_dataset: Dataset | None = None,
        **options: Any,
    ):
        if phase1_loss not in (None, "seen_classes", "all"):
            raise ValueError(f"phase1_loss={phase1_loss!r} is not known. Choose 'seen_classes' or 'all'.")
        model.set_phase(phase)
        self.phase = phase
        self.branch = {"cloud": "cloud", "control": "control", "teach": "cloud", "alone": "co"}.get(phase, branch)
        labelled = phase in ("cloud", "teach")  # phases whose labels are of the cloud's classes alone
        self.unseen = _unseen_classes(model, train_dataset, phase1_loss) if labelled else None
        self._gaps: list[torch.Tensor] = []
        frozen = frozen_submodel(model, phase, self.branch)
        if cache and frozen is not None and train_dataset is not None:
            column, submodel = frozen
            train_dataset = WithColumn(train_dataset, column, logits_of(model, train_dataset, submodel))
        super().__init__(model, args, train_dataset=train_dataset, **options)
        if phase in ("control", "teach"):  # means of a batch, also of language models
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of the phase."""
        if self.phase in ("control", "teach"):
            loss, outputs = self._distilled(model, dict(inputs))
        else:
            counted = {"num_items_in_batch": num_items_in_batch} if self.model_accepts_loss_kwargs else {}
            outputs = model(**inputs, **counted, branch=self.branch)
            loss = outputs.loss
            if self.unseen is not None and model.training:
                loss = self._of_seen_classes(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _distilled(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """G from F_c; or, in the baseline's `"teach"`, F_c from labels and from F_s."""
        teacher = "cloud" if self.phase == "control" else "co"
        labels, target = inputs.pop("labels", None), inputs.pop("teacher_logits", None)
        if target is None:
            with torch.no_grad():
                target = self.accelerator.unwrap_model(model)(**inputs, branch=teacher).logits
        outputs = model(**inputs, branch=self.branch)
        learned = outputs.logits
        if labels is not None and labels.dim() == 2:  # of tokens: the logits that predict a label which counts
            kept = labels[:, 1:] != -100
            learned, target, labels = learned[:, :-1][kept], target[:, :-1][kept], labels[:, 1:][kept]
            if not kept.any():
                return outputs.logits.sum() * 0.0, outputs
        if self.phase == "control":
            self._gaps.append(control_gap(learned.detach(), target))
            return control_loss(learned, target, self.accelerator.unwrap_model(model).config.control_loss), outputs
        return self._of_seen_classes(learned, labels) + control_loss(learned, target, "kl"), outputs

    def _of_seen_classes(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the rows that have a label, its softmax without the unseen classes."""
        logits = logits.float()
        if self.unseen is not None:
            logits = logits.masked_fill(self.unseen.to(logits.device), float("-inf"))
        return F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum().clamp_min(1)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers; in the control phase with `control_gap`, the mean over the steps since the last log."""
        if self._gaps and "loss" in logs:
            logs["control_gap"] = float(torch.stack(self._gaps).mean())
            self._gaps.clear()
        super().log(logs, *args, **kwargs)


def _unseen_classes(
    model: DcCclPreTrainedModel, dataset: Dataset | None, phase1_loss: Phase1Loss | None
) -> torch.Tensor | None:
    """A mask `(num_labels,)` of the classes without a row; `None` where the loss runs over all."""
    if phase1_loss == "all" or dataset is None or model.config.of_text:
        return None
    unseen = torch.ones(model.num_labels, dtype=torch.bool)
    labels = labels_of(dataset)
    unseen[labels[labels != -100].unique()] = False
    return unseen if unseen.any() else None


def frozen_submodel(model: DcCclPreTrainedModel, phase: str, branch: str) -> tuple[str, str] | None:
    """The column for the logits of what is frozen, and the branch that gives them; `None` where nothing is kept."""
    if model.config.of_text:
        return None
    if phase in ("control", "teach"):
        return "teacher_logits", "cloud" if phase == "control" else "co"
    if phase in ("co", "head") and branch in ("device", "serve"):
        return "control_logits", "control" if branch == "device" else "cloud"
    return None


__all__ = ["DcCclTrainer", "Phase1Loss", "frozen_submodel"]
