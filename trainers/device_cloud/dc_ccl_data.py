"""Rows of images, or of text, for DC-CCL, and what is computed of them once."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from transformers import default_data_collator

from hf_models.dc_ccl import DcCclPreTrainedModel, control_gap


class ImageRows(Dataset):
    """Images `(N, channels, height, width)` and labels `(N,)` in memory."""

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor):
        if len(pixel_values) != len(labels):
            raise ValueError(f"{len(pixel_values)} images, but {len(labels)} labels.")
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    @property
    def fingerprint(self) -> str:
        """Hash of pixels and labels."""
        return _digest(self.pixel_values, self.labels)


class TokenRows(Dataset):
    """Text `(N, length)` in memory, for language models; labels are the tokens where none are given, -100 where
    nothing is to be predicted."""

    def __init__(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None):
        self.input_ids = input_ids
        self.labels = input_ids if labels is None else labels
        if self.labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(self.labels.shape)} of tokens {tuple(input_ids.shape)}.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    @property
    def fingerprint(self) -> str:
        """Hash of tokens and labels."""
        return _digest(self.input_ids, self.labels)


class WithColumn(Dataset):
    """A map-style data set whose rows have one more column, of which `values` holds one entry a row."""

    def __init__(self, dataset: Dataset, name: str, values: torch.Tensor):
        if len(dataset) != len(values):
            raise ValueError(f"{len(values)} values of {name} for {len(dataset)} rows.")
        self.dataset, self.name, self.values = dataset, name, values

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], self.name: self.values[index]}


@dataclass(frozen=True, kw_only=True)
class DcCclData:
    """What each side has. Rows are mappings of `pixel_values` and `labels`; for language models of `input_ids`,
    `labels` and whatever else these take, all of one length.

    Args:
        cloud, device: the two training sets; none of `device` is ever sent up by DC-CCL.
        public: the few cloud images that are sent down, on which, with `tune_device`, the device tunes the head.
        tune_device: rows of `device` that the head is tuned on; `None` is all of them.
        test: what accuracies are measured on.
        held_out: cloud images that nothing was trained on, for the control gap; `None` leaves that out.
        validation: what rates are chosen on, of all classes; `None` leaves that out.
        device_test: test rows of the kind that only the device has, for the quality of its user; `None` leaves that
            out.
    """

    cloud: Dataset
    device: Dataset
    public: Dataset
    test: Dataset
    tune_device: Dataset | None = None
    held_out: Dataset | None = None
    validation: Dataset | None = None
    device_test: Dataset | None = None

    @property
    def tuning(self) -> Dataset:
        """The mixed set on the device that the head is tuned on."""
        return ConcatDataset([self.public, self.device if self.tune_device is None else self.tune_device])

    def fingerprints(self) -> dict[str, str | None]:
        """What a repeated run is compared by, see [`fingerprint_of`]."""
        return {field.name: fingerprint_of(getattr(self, field.name)) for field in fields(self)}


def fingerprint_of(dataset: Dataset | None) -> str | None:
    """The `fingerprint` of a data set, such as [`ImageRows`] has; of one without, the number of its rows and a hash of
    their labels, which stay the same when images are augmented."""
    if dataset is None:
        return None
    own = getattr(dataset, "fingerprint", None)
    return str(own) if own is not None else f"{len(dataset)} rows, labels {_digest(labels_of(dataset))}"


def _digest(*tensors: torch.Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]


def columns(dataset: Dataset, batch_size: int = 256) -> dict[str, torch.Tensor]:
    """All rows as one tensor a column."""
    batches = list(DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def labels_of(dataset: Dataset) -> torch.Tensor:
    """The labels of all rows `(N,)`, of text `(N, length)`."""
    if isinstance(dataset, (ImageRows, TokenRows)):
        return dataset.labels
    return torch.stack([torch.as_tensor(dataset[index]["labels"]) for index in range(len(dataset))])


@torch.no_grad()
def logits_of(model: DcCclPreTrainedModel, dataset: Dataset, branch: str, batch_size: int = 256) -> torch.Tensor:
    """Logits `(N, num_labels)` of every row, in eval mode; the model is left in the mode that it was in."""
    mode, found = model.training, []
    model.eval()
    for batch in _batches(model, dataset, batch_size):
        batch.pop("labels", None)
        found.append(model(**batch, branch=branch).logits.cpu())
    model.train(mode)
    return torch.cat(found)


@torch.no_grad()
def features_of(model: DcCclPreTrainedModel, dataset: Dataset, batch_size: int = 256) -> torch.Tensor:
    """What the shared encoder makes of every row, in eval mode."""
    mode = model.training
    model.eval()
    found = [model.encode(batch["pixel_values"]).cpu() for batch in _batches(model, dataset, batch_size)]
    model.train(mode)
    return torch.cat(found)


def _batches(model: DcCclPreTrainedModel, dataset: Dataset, batch_size: int):
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=default_data_collator):
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def _answers(
    model: DcCclPreTrainedModel, dataset: Dataset, branches: tuple[str, ...], batch_size: int
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Batches of labels that count, and of the logits of each branch that are to predict them."""
    mode = model.training
    model.eval()
    for batch in _batches(model, dataset, batch_size):
        labels = batch.pop("labels")
        logits = [model(**batch, branch=branch).logits for branch in branches]
        if labels.dim() == 2:  # of tokens, each of which the one before predicts
            labels, logits = labels[:, 1:], [one[:, :-1] for one in logits]
        kept = labels != -100
        yield labels[kept], [one[kept] for one in logits]
    model.train(mode)


def accuracy(model: DcCclPreTrainedModel, dataset: Dataset, branch: str, batch_size: int = 256) -> float:
    """Share of the labels that a branch gives, between 0 and 1: of the rows, or of the next tokens of text."""
    right = count = 0
    for labels, (logits,) in _answers(model, dataset, (branch,), batch_size):
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return right / max(1, count)


def measured_gap(model: DcCclPreTrainedModel, dataset: Dataset, batch_size: int = 256) -> float:
    """Mean distance of the control model's logits from the cloud submodel's, see [`control_gap`]."""
    total, count = 0.0, 0
    for labels, (control, cloud) in _answers(model, dataset, ("control", "cloud"), batch_size):
        total += float(control_gap(control, cloud)) * len(labels) if len(labels) else 0.0
        count += len(labels)
    return total / max(1, count)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state as it is sent: tied weights are there once."""
    once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: tensor for name, tensor in module.state_dict().items() if name in once}


def average_states(
    states: list[Mapping[str, torch.Tensor]], weights: tuple[float, ...] | list[float]
) -> dict[str, torch.Tensor]:
    """The weighted mean of states, key by key, running statistics of batch norms included; integer entries, which only
    count, are those of the first.

    Raises:
        ValueError: weights that do not add up to 1, or states of different keys.
    """
    if len(states) != len(weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights {tuple(weights)} of {len(states)} states must be as many, and add up to 1.")
    first, *others = states
    if any(other.keys() != first.keys() for other in others):
        raise ValueError("states of different keys cannot be averaged.")
    return {
        key: sum(weight * state[key] for weight, state in zip(weights, states))
        if tensor.is_floating_point()
        else tensor.clone()
        for key, tensor in first.items()
    }


__all__ = [
    "DcCclData",
    "ImageRows",
    "TokenRows",
    "WithColumn",
    "accuracy",
    "average_states",
    "columns",
    "features_of",
    "fingerprint_of",
    "labels_of",
    "logits_of",
    "measured_gap",
    "state_of",
]
