"""One interface for methods of all classes: the same task in, the same kind of answer out."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_models.dc_ccl import DcCclForImageClassification

from ..federated.core import WireMeter, unpack
from .budget import DeviceBudget, DeviceCost
from .collaboration_entries import CollaborationClass
from .dc_ccl_data import DcCclData, columns, labels_of
from .dc_ccl_plan import DcCclPlan, Fit


DEVICE = "device"
SERVING = "serving"  # the purpose, on the wire, of what a request and its answer are


@dataclass(frozen=True, kw_only=True)
class CollaborationTask:
    """What a cloud and a device have to learn together, for whichever method.

    Args:
        data (`DcCclData`): both sides' images and the test set.
        model: a copy of the cloud's model before the device takes part: the same for every method, which may change
            it. Its `"cloud"` branch classifies alone; its co-submodel is the small model.
        plan (`DcCclPlan`): rounds, and steps and rates of either side in one: every method has as many steps. Tuning a
            head after each round is DC-CCL's and its relatives' alone.
        args (`TrainingArguments`): device, precision and folder of all Trainer runs.
        unlabelled (`Dataset`, *optional*): images that both sides may see, of all classes; labels are never read.
    """

    data: DcCclData
    model: Callable[[], DcCclForImageClassification]
    plan: DcCclPlan
    args: TrainingArguments
    unlabelled: Dataset | None = None

    @property
    def folder(self) -> Path:
        """Where a method keeps its rounds."""
        return Path(self.args.output_dir)

    @property
    def example(self) -> dict[str, torch.Tensor]:
        """One image as a device has it, for budgets and cuts."""
        return {"pixel_values": self.data.device[0]["pixel_values"][None]}

    @cached_property
    def fingerprint(self) -> str:
        """Of all images and labels, and of the cloud's model as every method gets it."""
        parts = {field.name: getattr(self.data, field.name) for field in fields(self.data)}
        parts["unlabelled"] = self.unlabelled
        tensors = {f"model/{name}": tensor for name, tensor in self.model().state_dict().items()}
        for role, part in parts.items():
            found = {} if part is None else columns(part)
            tensors |= {f"{role}/{name}": tensor for name, tensor in found.items()}
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return f"sha256:{digest.hexdigest()[:16]}"

    def all_rounds(self, fit: Fit, *, parts: int = 1) -> Fit:
        """The steps of one side in all rounds, in `parts` runs."""
        steps = max(1, round(fit.max_steps * self.plan.rounds / parts)) if fit.max_steps > 0 else -1
        return Fit(**{**vars(fit), "max_steps": steps, "epochs": fit.epochs * self.plan.rounds / parts})


@dataclass(frozen=True, kw_only=True)
class Served:
    """What users get after a method has run.

    Args:
        logits: of the test images, `(rows, classes)`, as they are served.
        device_logits: of the same, without the cloud; `None` where the device cannot answer alone.
        cost: of what lies on the device, one image at a time; `None` where it holds no model.
        cloud_calls: requests of the cloud's model for the test images.
    """

    logits: torch.Tensor
    device_logits: torch.Tensor | None = None
    cost: DeviceCost | None = None
    cloud_calls: int = 0

    def accuracy(self, labels: torch.Tensor, *, device: bool = False) -> float | None:
        """Share of the rows that get their label, as served or without the cloud; `None` where there is no answer."""
        logits = self.device_logits if device else self.logits
        return None if logits is None else float((logits.argmax(-1) == labels).float().mean())


@runtime_checkable
class CollaborationMethod(Protocol):
    """A method as it is compared: `name`, its class `kind`, which baselines may lack, and `train`.

    `train` learns what there is to learn, then serves every test image. All that crosses the wire goes through
    `meter`, requests and answers with the purpose `SERVING`; `budget` is checked on what goes onto the device, before
    anything is sent, and `DeviceBudgetError` raised if it does not fit.
    """

    name: str
    kind: CollaborationClass | None

    def train(self, task: CollaborationTask, meter: WireMeter, budget: DeviceBudget | None) -> Served:
        """Learn and serve."""
        ...


def serve_through(
    meter: WireMeter,
    requests: torch.Tensor,
    answer: Callable[[torch.Tensor], torch.Tensor],
    *,
    what: str,
    batch_size: int = 256,
) -> torch.Tensor:
    """Send each row of `requests` up by itself, `answer` batches of what arrived, send each row of logits down.

    Returns:
        The logits that arrive, `(rows, classes)`.
    """
    served = []
    for rows in requests.split(batch_size):
        sent = [meter.send({what: row}, direction="up", user=DEVICE, what=SERVING) for row in rows]
        arrived = torch.stack([unpack(payload)[0][what] for payload in sent])
        with torch.no_grad():
            logits = answer(arrived)
        back = [meter.send({"logits": row}, direction="down", user=DEVICE, what=SERVING) for row in logits]
        served += [unpack(payload)[0]["logits"] for payload in back]
    return torch.stack(served)


def pixels_of(dataset: Dataset) -> torch.Tensor:
    """All images `(rows, channels, height, width)`."""
    return columns(dataset)["pixel_values"]


def wire_of(meter: WireMeter, requests: int) -> dict[str, float]:
    """Bytes of learning, up and down, and of one request with its answer."""
    by_purpose = meter.by_purpose()
    serving = by_purpose.get(SERVING, {"up": 0, "down": 0})
    totals = meter.totals()
    return {
        "bytes_up": totals["up"] - serving["up"],
        "bytes_down": totals["down"] - serving["down"],
        "request_bytes_up": serving["up"] / requests,
        "request_bytes_down": serving["down"] / requests,
    }


def add_to_meter(meter: WireMeter, other: WireMeter) -> None:
    """Count in `meter` what `other` has counted."""
    counts: dict[tuple, int] = {}
    for *key, size in meter.state_dict()["bytes"] + other.state_dict()["bytes"]:
        counts[tuple(key)] = counts.get(tuple(key), 0) + size
    meter.load_state_dict({"bytes": [[*key, size] for key, size in counts.items()]})


def run_trainer(trainer: Trainer) -> None:
    """Train without a line for each of many runs."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def labels_of_test(task: CollaborationTask) -> torch.Tensor:
    """The labels of the test images."""
    return labels_of(task.data.test)


def as_json(served: Served, meter: WireMeter, task: CollaborationTask) -> dict[str, Any]:
    """Everything that is compared, by name; what a method does not have is `None`."""
    labels = labels_of_test(task)
    known = torch.isin(labels, labels_of(task.data.cloud).unique())
    cost: Mapping[str, Any] = vars(served.cost) if served.cost else {}
    right = served.logits.argmax(-1) == labels
    return {
        "served_accuracy": served.accuracy(labels),
        "served_accuracy_cloud_classes": float(right[known].float().mean()) if known.any() else None,
        "served_accuracy_device_classes": float(right[~known].float().mean()) if (~known).any() else None,
        "device_accuracy": served.accuracy(labels, device=True),
        **wire_of(meter, len(labels)),
        "cloud_calls_per_request": served.cloud_calls / len(labels),
        **{f"device_{name}": cost.get(name) for name in ("parameters", "bytes", "peak_bytes", "flops")},
    }


__all__ = [
    "DEVICE",
    "SERVING",
    "CollaborationMethod",
    "CollaborationTask",
    "Served",
    "add_to_meter",
    "as_json",
    "pixels_of",
    "run_trainer",
    "serve_through",
    "wire_of",
]
