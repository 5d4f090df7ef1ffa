"""A model of the click-through rate, trained as a cloud trains it: on all users' rows, mixed."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import EarlyStoppingCallback, EvalPrediction, set_seed
from transformers.utils import logging

from hf_models.ctr import CtrForCtrPrediction

from ..data import CtrCollator, CtrData, CtrRows
from ..evaluation import ranking_metrics
from .arguments import RecipeTrainingArguments
from .training import build_trainer, train


logger = logging.get_logger(__name__)


@dataclasses.dataclass
class CtrTrainingArguments(RecipeTrainingArguments):
    """`TrainingArguments` with defaults for tens of thousands of rows, and what the model is made of."""

    architecture: Literal["lr", "wide_deep", "pnn", "deepfm", "din"] = "deepfm"
    embedding_dim: int = 16
    hidden_sizes: list[int] = dataclasses.field(default_factory=lambda: [64, 32])
    dropout: float = 0.0
    patience: int = dataclasses.field(
        default=3, metadata={"help": "Epochs without a better validation GAUC before training ends."}
    )
    num_train_epochs: float = 20
    per_device_train_batch_size: int = 1024
    per_device_eval_batch_size: int = 8192
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    lr_scheduler_type: str = "constant"
    logging_strategy: str = "epoch"
    save_total_limit: int | None = 1


def train_ctr(args: CtrTrainingArguments, data: CtrData) -> tuple[CtrForCtrPrediction, dict[str, Any]]:
    """
    Train on `data.splits["train"]`, keep the epoch with the best GAUC on `"validation"`, and measure it on every other
    split.

    Args:
        args: one checkpoint an epoch goes into `args.output_dir`; `seed` decides weights and order.
        data: see `encode_ctr`.

    Returns:
        The model of the best epoch, in eval mode, and `{"validation": {..}, "test": {..}, "best_epoch", "epochs",
        "seconds", "rows_per_second", "parameters"}`, the metrics being those of `ranking_metrics`.

    Raises:
        ValueError: there is no validation split, or no user in it has both classes.
    """
    if "validation" not in data.splits:
        raise ValueError(f"The best epoch is chosen on a split 'validation'; there are {sorted(data.splits)}.")
    rows = {split: data.rows(split) for split in data.splits}
    set_seed(args.seed)
    shape = {name: getattr(args, name) for name in ("embedding_dim", "hidden_sizes", "dropout")}
    model = CtrForCtrPrediction(data.config(args.architecture, **shape))
    trainer = build_trainer(
        model,
        _every_epoch(args),
        [EarlyStoppingCallback(early_stopping_patience=args.patience)],
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=CtrCollator(),
        compute_metrics=_measure(rows["validation"].users.numpy()),
    )
    begin = time.perf_counter()
    train(trainer, Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None)
    seconds = time.perf_counter() - begin
    history = [log for log in trainer.state.log_history if "eval_gauc" in log]
    if not np.isfinite([log["eval_gauc"] for log in history]).all():
        raise ValueError("No user of the validation split has both a click and none: GAUC chooses nothing.")
    best = max(history, key=lambda log: log["eval_gauc"])
    model.eval()
    measured = {
        split: ranking_metrics(predict_ctr(model, part), part.tensors["labels"].numpy(), part.users.numpy())
        for split, part in rows.items()
        if split != "train"
    }
    epochs = len(history)
    return model, {
        **measured,
        "best_epoch": best["epoch"],
        "epochs": epochs,
        "seconds": seconds,
        "rows_per_second": epochs * len(rows["train"]) / seconds,
        "parameters": model.num_parameters(),
    }


@torch.no_grad()
def predict_ctr(model: CtrForCtrPrediction, rows: CtrRows, *, batch_size: int = 8192) -> np.ndarray:
    """Logits `(rows,)` in float32, in eval mode."""
    was_training = model.training
    model.eval()
    inputs = {name: tensor for name, tensor in rows.tensors.items() if name.endswith("_features")}
    parts = [
        model(**{name: tensor[begin : begin + batch_size].to(model.device) for name, tensor in inputs.items()}).logits
        for begin in range(0, len(rows), batch_size)
    ]
    model.train(was_training)
    return torch.cat(parts).float().cpu().numpy()


def _every_epoch(args: CtrTrainingArguments) -> CtrTrainingArguments:
    return dataclasses.replace(
        args,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="gauc",
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _measure(users: np.ndarray):
    def measure(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return ranking_metrics(logits, prediction.label_ids, users[: len(logits)])

    return measure


__all__ = ["CtrTrainingArguments", "predict_ctr", "train_ctr"]
