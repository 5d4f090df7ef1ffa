"""The Trainer of every recipe: what `RecipeTrainingArguments` says beyond transformers' own arguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..callbacks import GracefulStopCallback, ThroughputCallback, install_callbacks
from ..optimizers import MSignFactory
from ..reliability import reliability, train_with_rollback
from ..reliability.checkpoints import stop_requiring_manifests


logger = logging.get_logger(__name__)


def build_trainer(
    model: PreTrainedModel,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    optimizer: tuple[type, dict[str, Any]] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer with `callbacks` ahead of the reporters. `optimizer`: its `optimizer_cls_and_kwargs`, by default what
    `args` say; `options`: its other arguments (datasets, collator)."""
    trainer = Trainer(
        model=model, args=args, optimizer_cls_and_kwargs=optimizer or _optimizer_of(args, model), **options
    )
    install_callbacks(trainer, *callbacks, ThroughputCallback())
    if args.disable_tqdm:  # Trainer would print every log line instead, from each of several runs at a time
        trainer.remove_callback(PrinterCallback)
    if (chosen := getattr(args, "reliability", "off")) != "off":
        reliability(trainer, policy="rollback" if chosen == "rollback" else "skip")
    elif trainer.is_world_process_zero():
        stop_requiring_manifests(args.output_dir)
    return trainer


def train(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train from `checkpoint` on, with rollbacks where they were asked for. `SystemExit` with code 0 where a stop was
    asked for: what comes after a finished training must not run, and the same command goes on."""
    resume = str(checkpoint) if checkpoint else None
    if getattr(trainer.args, "reliability", "off") == "rollback":
        train_with_rollback(trainer, resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, GracefulStopCallback) and callback.requested:
            logger.warning(f"Stopped at step {trainer.state.global_step}, as asked; the same command goes on.")
            raise SystemExit(0)


def _optimizer_of(args: TrainingArguments, model: PreTrainedModel) -> tuple[type, dict[str, Any]] | None:
    if getattr(args, "optimizer", "base") == "base":
        return None
    base, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if {"params", "model", "optimizer_dict"} & options.keys() or hasattr(base, "train"):
        raise ValueError(
            f"--optimizer msign around --optim {args.optim}: {base.__name__} wants groups, a model or a mode of its "
            "own. Use a plain optimizer (adamw_torch, adafactor, sgd, ...), or MSignCallback beside this one."
        )
    own = {"period": args.msign_period, "targets": args.msign_targets, "weight_decay": args.weight_decay}
    return MSignFactory, {"base": base, **options, **own}
