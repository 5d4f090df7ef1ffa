"""Label correction in a Trainer: the labels of the training set are replaced, those of evaluation never are."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.utils import logging

from ..callbacks.installation import add_to_log, install_callbacks, require_steps
from .label_correction import (
    LABEL_METHODS,
    LabelCorrectionError,
    correct_labels,
    local_shares,
    model_prior,
    require_binary_labels,
)


logger = logging.get_logger(__name__)

FINGERPRINT = "label-corrected-"
# What to do with clients, whose rows are theirs before anything is installed.
FOR_CLIENTS = (
    "Let the clients' rows be collated by a LabelCorrectionCollator: train_dataset=ClientRows(data, 'user', collate="
    "LabelCorrectionCollator.of_dataset(data, p_ref, group_column='user')). Evaluation keeps data_collator=."
)
LABEL_NAMES = ("labels", "label")


class LabelCorrectionCallback(TrainerCallback):
    """Correct the labels of a Trainer's training set, once, before it trains.

    Example:
        >>> callback = LabelCorrectionCallback(p_ref=0.36, group_column="user")
        >>> callback.install(trainer)  # before trainer.train()

    For any model that is trained on float labels: CTR models, or a sequence classifier with one label and
    `problem_type="multi_label_classification"`, whose labels are lists of one. The new column is made with `map`, so
    its fingerprint follows from the old one and from these arguments. At `install`, not when training begins: Trainer
    has built its loader by then.

    Logged with the first loss: `label_correction/p_local`, `/p_ref` and `/mean_label`, means over the samples.

    Args:
        p_ref (`float` or `"model"`): the reference prior; `"model"` predicts the training set with the model as it is,
            and takes each group's mean.
        method (`str`): `"scale"` or `"shift"`.
        group_column (`str`, *optional*): users, where the set has several.
        label_column (`str`, *optional*): by default `labels` or `label`, whichever is there.
        smoothing (`float`): see [`correct_labels`].
    """

    def __init__(
        self,
        p_ref: float | Literal["model"],
        *,
        method: Literal["scale", "shift"] = "scale",
        group_column: str | None = None,
        label_column: str | None = None,
        smoothing: float = 0.0,
    ):
        if method not in LABEL_METHODS:
            raise ValueError(f"method {method!r} changes no labels; choose from {', '.join(LABEL_METHODS)}.")
        self.p_ref, self.method = p_ref, method
        self.group_column, self.label_column, self.smoothing = group_column, label_column, smoothing
        self.summary: dict[str, float] = {}
        self._logged = False

    def install(self, trainer: Trainer) -> None:
        """Replace `trainer.train_dataset`.

        Raises:
            LabelCorrectionError: the set was corrected before, its labels are integers, the model's head would cast
                them to integers, or the set is no `datasets.Dataset`.
            ValueError: a `FederatedTrainer`, whose clients have their rows already.
        """
        require_steps(trainer, "LabelCorrectionCallback", FOR_CLIENTS)
        data = trainer.train_dataset
        if not isinstance(data, Dataset):
            raise LabelCorrectionError(
                f"The training set is a {type(data).__name__}; a datasets.Dataset is needed to know its share of "
                "positives beforehand. Use `LabelCorrectionCollator` with known shares."
            )
        installed = [c for c in trainer.callback_handler.callbacks if isinstance(c, LabelCorrectionCallback)]
        if data._fingerprint.startswith(FINGERPRINT) or installed:
            raise LabelCorrectionError("The training set is corrected already; that must happen once.")
        require_head_of_floats(trainer.model)
        trainer.train_dataset = self._corrected(data, trainer)
        install_callbacks(trainer, self)

    def _corrected(self, data: Dataset, trainer: Trainer) -> Dataset:
        column = self.label_column or label_column_of(data.column_names)
        observed = np.asarray(data[column][:])
        require_binary_labels(observed, f"The labels in column {column!r}")
        flat = observed.reshape(len(observed), -1)
        if flat.shape[1] != 1:
            raise LabelCorrectionError(f"Column {column!r} has {flat.shape[1]} labels a row; one is expected.")
        groups = np.zeros(len(data), dtype=int) if self.group_column is None else data[self.group_column][:]
        reference = self._reference(data, trainer, groups)
        soft = correct_labels(
            flat[:, 0].astype(np.float64), reference, method=self.method, groups=groups, smoothing=self.smoothing
        )
        self.summary = {
            "label_correction/p_local": float(flat.mean()),
            "label_correction/p_ref": float(np.mean(reference)),
            "label_correction/mean_label": float(soft.mean()),
        }
        values = soft.reshape(observed.shape).astype(observed.dtype)
        known = [data._fingerprint, self.method, np.asarray(reference).tolist(), self.smoothing]
        features = data.features
        return data.map(
            lambda _, rows: {column: values[rows].tolist()},
            with_indices=True,
            batched=True,
            features=features,
            new_fingerprint=FINGERPRINT + Hasher.hash([*known, self.group_column, column]),
        )

    def _reference(self, data: Dataset, trainer: Trainer, groups: Sequence) -> Any:
        if self.p_ref != "model":
            return self.p_ref
        predictions = trainer.predict(data).predictions
        logits = torch.as_tensor(predictions[0] if isinstance(predictions, tuple) else predictions)
        if logits.numel() != len(data):
            raise LabelCorrectionError(f"Logits of shape {tuple(logits.shape)}: one for each sample is expected.")
        return model_prior(logits.reshape(-1), groups=groups).numpy()

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Refuse to train where the correction would have no effect."""
        if not self.summary:
            raise LabelCorrectionError(
                "LabelCorrectionCallback has corrected nothing: Trainer(callbacks=...) does not show it the training "
                "set. Call `callback.install(trainer)` instead."
            )
        self._logged = False
        logger.info(f"Label correction: {self.summary}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the summary to the first loss."""
        if "loss" in (logs or {}) and not self._logged:
            add_to_log(state, logs, {name: round(value, 6) for name, value in self.summary.items()})
            self._logged = True


class LabelCorrectionCollator:
    """Correct labels on the fly, in the training loader only.

    Example:
        >>> collator = LabelCorrectionCollator(p_ref=0.36, p_local=shares, group_column="user")
        >>> collator.install(trainer)

    Args:
        p_ref (`float` or by group): the reference prior.
        p_local (`float` or by group): the share of positives in the training set, as [`local_shares`] gives it.
        collator (`Callable`, *optional*): makes the batch; at `install`, by default the trainer's own.
        method, group_column, label_column: as in [`LabelCorrectionCallback`]. The group is taken out of each row.
    """

    def __init__(
        self,
        p_ref: float | Mapping[Hashable, float],
        p_local: float | Mapping[Hashable, float],
        *,
        collator: Callable[[list[dict]], dict] | None = None,
        method: Literal["scale", "shift"] = "scale",
        group_column: str | None = None,
        label_column: str | None = None,
    ):
        by_group = isinstance(p_ref, Mapping) or isinstance(p_local, Mapping)
        if by_group and group_column is None:
            raise ValueError("Priors by group need `group_column`, the column that names each row's group.")
        self.p_ref, self.p_local, self.method = p_ref, p_local, method
        self.collator = collator
        self.group_column, self.label_column = group_column, label_column

    @classmethod
    def of_dataset(cls, dataset: Dataset, p_ref: float, **options: Any) -> "LabelCorrectionCollator":
        """With the shares of `dataset`, by group where `group_column` is given."""
        column = options.get("label_column") or label_column_of(dataset.column_names)
        labels = np.asarray(dataset[column][:])
        group_column = options.get("group_column")
        groups = None if group_column is None else dataset[group_column][:]
        return cls(p_ref, local_shares(labels.reshape(-1), groups), **options)

    def install(self, trainer: Trainer) -> None:
        """Let the trainer's training loader use this collator; its evaluation loaders keep theirs.

        Raises:
            LabelCorrectionError: it has one already, or the head of the model would cast labels to integers.
            ValueError: the trainer would remove the column of the groups; a `FederatedTrainer`, whose clients have
                their rows already.
        """
        require_steps(trainer, "LabelCorrectionCollator.install", FOR_CLIENTS)
        require_head_of_floats(trainer.model)
        if isinstance(trainer.data_collator, LabelCorrectionCollator) or "get_train_dataloader" in vars(trainer):
            raise LabelCorrectionError("The trainer corrects labels already, or its training loader is replaced.")
        if self.group_column is not None and trainer.args.remove_unused_columns:
            raise ValueError(f"Trainer would remove column {self.group_column!r}: use remove_unused_columns=False.")
        self.collator = self.collator or trainer.data_collator
        build = trainer.get_train_dataloader

        def get_train_dataloader():
            own, trainer.data_collator = trainer.data_collator, self
            try:
                return build()
            finally:
                trainer.data_collator = own

        trainer.get_train_dataloader = get_train_dataloader

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of `rows`, which stay as they are. `LabelCorrectionError` for labels that are not floats 0 or 1,
        and for a batch in the place of rows."""
        if isinstance(rows, Mapping):
            raise LabelCorrectionError(
                "The data set gives whole batches, as CtrRows does, where rows are expected: correct its columns "
                "beforehand, CtrRows(rows.tensors | correction.targets(labels, rows.users)._asdict(), rows.users)."
            )
        return (self.collator or default_data_collator)([self._corrected(dict(row)) for row in rows])

    def _corrected(self, row: dict[str, Any]) -> dict[str, Any]:
        column = self.label_column or label_column_of(row)
        observed = row[column]
        value = observed if isinstance(observed, torch.Tensor) else np.asarray(observed)
        require_binary_labels(value.reshape(1), f"Labels ({column!r})")
        group = None if self.group_column is None else row.pop(self.group_column)
        reference, share = (p[group] if isinstance(p, Mapping) else p for p in (self.p_ref, self.p_local))
        soft = correct_labels(value.reshape(1), reference, share, self.method).reshape(value.shape)
        row[column] = soft if isinstance(observed, torch.Tensor | np.ndarray) else soft.tolist()
        return row


def label_column_of(columns: Sequence[str]) -> str:
    """The column that Trainer's collators take for labels. `LabelCorrectionError` if there is none."""
    for name in LABEL_NAMES:
        if name in columns:
            return name
    raise LabelCorrectionError(f"No column {' or '.join(LABEL_NAMES)} in {', '.join(columns)}: name `label_column`.")


def require_head_of_floats(model: torch.nn.Module) -> None:
    """`LabelCorrectionError` for a head that would cast soft labels to integers."""
    if getattr(getattr(model, "config", None), "problem_type", None) == "single_label_classification":
        raise LabelCorrectionError(
            f"{type(model).__name__} has problem_type='single_label_classification', which takes integers. Use one "
            "label and problem_type='multi_label_classification', with float labels as lists of one."
        )


__all__ = ["LabelCorrectionCallback", "LabelCorrectionCollator", "label_column_of", "require_head_of_floats"]
