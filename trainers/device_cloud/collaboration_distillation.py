"""Public-set distillation, our reading of FedMD: models that never meet agree on images which both may see."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer

from hf_models.dc_ccl import DcCclPreTrainedModel, control_loss

from ..federated.core import WireMeter, unpack
from .budget import DeviceBudget, device_cost
from .collaboration_entries import CollaborationClass
from .collaboration_task import DEVICE, CollaborationTask, Served, pixels_of, run_trainer, serve_through
from .dc_ccl_data import ImageRows, WithColumn, logits_of


UNLABELLED = -100


class ConsensusTrainer(Trainer):
    """Cross-entropy where a row has a label, KL to its `teacher_logits` where it has none: means of each, added.

    Args:
        branch (`str`): of the DC-CCL model, what learns.
    """

    def __init__(self, *args: Any, branch: str, **options: Any):
        super().__init__(*args, **options)
        self.branch = branch

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss of a mixed batch."""
        outputs = model(pixel_values=inputs["pixel_values"], branch=self.branch)
        logits, labels = outputs.logits.float(), inputs["labels"]
        public = labels == UNLABELLED
        loss = logits.sum() * 0.0
        if not public.all():
            loss = loss + F.cross_entropy(logits, labels, ignore_index=UNLABELLED)
        if public.any():
            loss = loss + control_loss(logits[public], inputs["teacher_logits"][public], "kl")
        return (loss, outputs) if return_outputs else loss


@dataclass(kw_only=True)
class PublicDistillation:
    """The small model learns from the device's labels, the large one has the cloud's; then, `exchanges` times, the
    mean of their logits on public images is the teacher of both.

    Args:
        exchanges (`int`): how often; all rounds' steps are shared among them.
        public (`str`): `"unlabelled"`, the task's images of all classes without their labels; or `"cloud"`, the few of
            the cloud that DC-CCL sends down too.
    """

    exchanges: int = 3
    public: str = "unlabelled"
    kind: CollaborationClass = "data"

    @property
    def name(self) -> str:
        """As it is called in a comparison."""
        return "public_distillation" + ("" if self.public == "unlabelled" else "_cloud_images")

    def train(self, task: CollaborationTask, meter: WireMeter, budget: DeviceBudget | None = None) -> Served:
        """See [`CollaborationMethod`]. `ValueError` where the task has no unlabelled images and they are asked for."""
        cloud, device = task.model(), task.model().device_package()
        del device.control_model  # the small model answers alone
        cost = budget.check(device, _alone(task)) if budget else device_cost(device, _alone(task))
        meter.send(device.state_dict(), direction="down", user=DEVICE, what="small model")
        images = pixels_of(self._public(task))
        payload = meter.send({"pixel_values": images}, direction="down", user=DEVICE, what="public images")
        public = ImageRows(images, torch.full((len(images),), UNLABELLED))
        theirs = ImageRows(unpack(payload)[0]["pixel_values"], public.labels)
        self._fit(task, device, "co", [_labelled(task.data.device, device)], turn=0)
        for turn in range(1, self.exchanges + 1):
            sent = {"logits": logits_of(device, theirs, "co")}
            arrived = unpack(meter.send(sent, direction="up", round=turn, user=DEVICE, what="public logits"))[0]
            mean = (arrived["logits"] + logits_of(cloud, public, "cloud")) / 2
            back = meter.send({"logits": mean}, direction="down", round=turn, user=DEVICE, what="public logits")
            taught = WithColumn(theirs, "teacher_logits", unpack(back)[0]["logits"])
            self._fit(task, device, "co", [_labelled(task.data.device, device), taught], turn=turn)
            taught = WithColumn(public, "teacher_logits", mean)
            self._fit(task, cloud, "teach", [_labelled(task.data.cloud, cloud), taught], turn=turn)
        cloud.eval()
        logits = serve_through(
            meter, pixels_of(task.data.test), lambda rows: cloud(rows, branch="cloud").logits, what="pixel_values"
        )
        alone = logits_of(device, task.data.test, "co")
        return Served(logits=logits, device_logits=alone, cost=cost, cloud_calls=len(logits))

    def _public(self, task: CollaborationTask) -> Dataset:
        found = {"unlabelled": task.unlabelled, "cloud": task.data.public}.get(self.public)
        if found is None:
            raise ValueError(f"the task has no {self.public!r} images that both may see. Use 'cloud'.")
        return found

    def _fit(
        self, task: CollaborationTask, model: DcCclPreTrainedModel, phase: str, sides: list[Dataset], *, turn: int
    ) -> None:
        """One share of the steps of one side; the first is the device's own, before any exchange."""
        model.set_phase(phase)
        fit = task.plan.co_device if phase == "co" else task.plan.co_cloud
        parts = self.exchanges + (phase == "co")
        args = task.all_rounds(fit, parts=parts).arguments(task.args, seed=task.plan.seed_of(f"public {phase}", turn))
        branch = "co" if phase == "co" else "cloud"
        run_trainer(ConsensusTrainer(model, args, train_dataset=ConcatDataset(sides), branch=branch))


def _alone(task: CollaborationTask) -> dict[str, Any]:
    return {**task.example, "branch": "co"}


def _labelled(dataset: Dataset, model: DcCclPreTrainedModel) -> Dataset:
    """Rows with labels, and a column that nothing reads for them."""
    return WithColumn(dataset, "teacher_logits", torch.zeros(len(dataset), model.num_labels))


__all__ = ["ConsensusTrainer", "PublicDistillation"]
